#include "run/scratch_plan.h"

#include <algorithm>
#include <string>
#include <vector>

#include "model/forward.h"
#include "ops/attention_kernels.h"
#include "ops/batch.h"
#include "ops/decoded_weights.h"
#include "ops/dense_matmul.h"
#include "ops/gradient_ranges.h"
#include "ops/head_chunk.h"
#include "ops/moe.h"

namespace orbit {
namespace {

constexpr int64_t kF32 = 4;

int64_t round_up(int64_t value, int64_t to) {
    return (value + to - 1) / to * to;
}

int64_t ceil_div(int64_t value, int64_t by) {
    return (value + by - 1) / by;
}

// Counts as Scratch does, either in one endless block or in blocks of 32 MiB and more.
class Meter {
  public:
    explicit Meter(bool one_block) : one_block_(one_block) {}

    void take(int64_t bytes) {
        constexpr int64_t kAlignment = 256;
        constexpr int64_t kBlock = int64_t{32} << 20;
        const int64_t size = std::max(kAlignment, round_up(bytes, kAlignment));
        while (!one_block_ && block_ < blocks_.size() && offset_ + size > blocks_[block_]) {
            ++block_;
            offset_ = 0;
        }
        if (!one_block_ && block_ == blocks_.size()) {
            blocks_.push_back(std::max(kBlock, size));
        }
        offset_ += size;
        peak_ = std::max(peak_, offset_);
    }

    int64_t peak() const { return peak_; }

    int64_t allocated() const {
        int64_t total = 0;
        for (const int64_t block : blocks_) {
            total += block;
        }
        return total;
    }

  private:
    friend class Scope;
    bool one_block_;
    std::vector<int64_t> blocks_;
    size_t block_ = 0;
    int64_t offset_ = 0;
    int64_t peak_ = 0;
};

class Scope {
  public:
    explicit Scope(Meter& meter) : meter_(meter), block_(meter.block_), offset_(meter.offset_) {}

    ~Scope() {
        meter_.block_ = block_;
        meter_.offset_ = offset_;
    }

    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

  private:
    Meter& meter_;
    size_t block_;
    int64_t offset_;
};

// One linear layer with its adapter.
struct Site {
    int64_t in = 0;
    int64_t out = 0;
    AdapterKind kind = AdapterKind::kNone;
    int64_t rank = 0;
    int64_t block = 0;
    bool keeps_u = false;  // LoRA's, for backward: not the op's to take
};

// dense_cpu.cpp.
class CpuLinear {
  public:
    CpuLinear(const ScratchModel& model, Meter& meter, int64_t rows)
        : m_(model), meter_(meter), rows_(rows), element_(dtype_bytes(model.compute)) {}

    void forward(const Site& s) {
        const Scope scope(meter_);
        if (s.kind == AdapterKind::kOft) {
            meter_.take(rows_ * s.in * element_);
            rotate(s);
        }
        product(s.in, s.in);
        if (s.kind == AdapterKind::kLora) {
            low_rank_input(s);
            product(s.rank, s.rank);
        }
        run(s.in, s.out, 1, s.kind == AdapterKind::kLora ? s.rank : 0);
    }

    void backward(const Site& s) {
        const Scope scope(meter_);
        if (s.kind == AdapterKind::kNone) {
            multiply(s.out, s.in);
        } else if (s.kind == AdapterKind::kOft) {
            meter_.take(rows_ * s.in * element_);
            multiply(s.out, s.in);
            rotate(s);
        } else {
            if (!s.keeps_u) {
                const Scope inner(meter_);
                low_rank_input(s);
            }
            meter_.take(rows_ * s.rank * element_);
            multiply(s.out, s.rank);
            product(s.out, s.out);
            product(s.rank, s.rank);
            run(s.out, s.in, 1, s.rank);
        }
    }

    // A product of depth `depth` with `width` outputs, alone.
    void multiply(int64_t depth, int64_t width) {
        const Scope scope(meter_);
        product(depth, depth);
        run(depth, width, 1, 0);
    }

  private:
    bool pairs(int64_t depth) const {
        return m_.compute == DType::kBF16 && m_.isa >= CpuIsa::kAvx512 && depth % 2 == 0;
    }

    // The input's float copy, where the kernels need one.
    void product(int64_t depth, int64_t columns) {
        if (m_.compute == DType::kBF16 && !pairs(depth)) {
            meter_.take(rows_ * columns * kF32);
        }
    }

    void low_rank_input(const Site& s) {
        if (!s.keeps_u) {
            meter_.take(rows_ * s.rank * element_);
        }
        multiply(s.in, s.rank);
    }

    void rotate(const Site& s) {
        const Scope scope(meter_);
        product(s.block, s.in);
        run(s.block, s.block, s.in / s.block, 0);
    }

    // plan_matmul's workspaces.
    void run(int64_t depth, int64_t width, int64_t blocks, int64_t low_rank) {
        const bool amx = m_.isa == CpuIsa::kAmx;
        const int64_t row_bytes_x = depth * (pairs(depth) ? 2 : 4);
        int64_t block = std::clamp<int64_t>((256 << 10) / row_bytes_x, 48, 384);
        const int64_t columns = ceil_div(width, kPanelWidth) * blocks;
        if (columns < 8 && columns % m_.threads != 0) {
            block =
                std::min(block, std::max<int64_t>(48, round_up(rows_, m_.threads) / m_.threads));
        }
        const int64_t row_blocks = std::max<int64_t>(1, ceil_div(rows_, block));
        const int64_t row_block =
            round_up(ceil_div(rows_, row_blocks), amx ? isa_amx::kTileRowsMax : 12);
        const int64_t chunk =
            std::min<int64_t>(round_up(depth, 64), rows_ <= 12 && !amx ? 64 : 1024);
        const int64_t cells = (row_block + kSumsPadding + chunk + low_rank) * kPanelWidth;
        const int64_t bytes = cells * kF32 + 32 * std::max(chunk, low_rank);
        const Scope scope(meter_);
        meter_.take(round_up(bytes, 256) * m_.threads);
    }

    const ScratchModel& m_;
    Meter& meter_;
    int64_t rows_;
    int64_t element_;
};

// Packed weights of `elements` in all, in matmul_decoded_cuda.cu.
void decode_first(
    const ScratchModel& m, Meter& meter, int64_t rows, bool packed, int64_t elements
) {
    if (m.decodes_first && packed && rows >= kDecodeFirstRows) {
        const Scope scope(meter);
        meter.take(decoded_bytes(elements));
    }
}

// dense_cuda.cu, or grouped_cuda.cu, which sums gradients without partial sums.
class GpuLinear {
  public:
    GpuLinear(const ScratchModel& model, Meter& meter, int64_t rows, bool grouped)
        : m_(model), meter_(meter), rows_(rows), grouped_(grouped) {}

    void forward(std::initializer_list<Site> sites) {
        const Scope scope(meter_);
        int64_t elements = 0;
        for (const Site& s : sites) {
            if (!s.keeps_u) {
                take_input(s);
            }
            elements += s.in * s.out;
        }
        decode_first(m_, meter_, rows_, m_.packed.linears && !grouped_, elements);
    }

    // Layers with one input.
    void backward(std::initializer_list<Site> sites) {
        const Scope scope(meter_);
        for (const Site& s : sites) {
            if (s.kind == AdapterKind::kOft) {
                oft_backward(s);
            } else if (s.kind == AdapterKind::kLora) {
                take_input(s);  // du
                if (!s.keeps_u) {
                    take_input(s);
                }
            }
        }
        output_gradients(sites);
        for (const Site& s : sites) {
            decode_first(m_, meter_, rows_, m_.packed.linears && !grouped_, s.in * s.out);
        }
        const Scope partial_sums(meter_);
        for (const Site& s : sites) {
            if (s.kind == AdapterKind::kLora) {
                partials(ranges(), s.in * s.rank);
            }
        }
    }

  private:
    void oft_backward(const Site& s) {
        const Scope scope(meter_);
        take_input(s);  // the gradient of the rotated input
        decode_first(m_, meter_, rows_, m_.packed.linears && !grouped_, s.in * s.out);
        if (s.block % 16 == 0 && s.block <= 128) {
            partials(ranges(), s.in * s.block);
        }
    }

    // LoRA's, of adapter_grad_cuda.cu.
    void output_gradients(std::initializer_list<Site> sites) {
        int64_t columns = 0;
        for (const Site& s : sites) {
            columns += s.kind == AdapterKind::kLora ? s.out : 0;
        }
        const Scope scope(meter_);
        for (const Site& s : sites) {
            if (s.kind == AdapterKind::kLora) {
                partials(ceil_div(s.out, gradient_columns(columns)), rows_ * round_up(s.rank, 16));
                partials(ranges(), s.out * s.rank);
            }
        }
    }

    void take_input(const Site& s) {
        if (s.kind == AdapterKind::kLora) {
            meter_.take(rows_ * round_up(s.rank, 16) * 2);
        } else if (s.kind == AdapterKind::kOft) {
            meter_.take(rows_ * s.in * 2);
        }
    }

    int64_t ranges() const { return ceil_div(rows_, kGradientTokens); }

    void partials(int64_t num, int64_t count) {
        if (!grouped_) {
            meter_.take(num * count * kF32);
        }
    }

    const ScratchModel& m_;
    Meter& meter_;
    int64_t rows_;
    bool grouped_;
};

struct BatchShape {
    int64_t tokens = 0;
    int64_t sequences = 1;
    int64_t longest = 0;  // positions of one sequence
};

// One layer of forward.cpp and the families: activations, then gradients in backward's order.
class Layer {
  public:
    Layer(
        const ScratchModel& model,
        Meter& meter,
        const BatchShape& batch,
        int64_t index,
        bool taped = false
    )
        : m_(model),
          c_(model.config),
          meter_(meter),
          batch_(batch),
          prefix_("model.layers." + std::to_string(index) + "."),
          moe_(c_.layer_has_experts(index)),
          taped_(taped) {}

    // Attention's output, and for backward its log-sum-exp.
    void attention_output(bool with_lse) {
        activation(tokens(), q_width());
        if (with_lse) {
            meter_.take(tokens() * c_.num_heads * kF32);
        }
    }

    void forward(bool kept_attention) {
        const Site q = attention_site("q_proj", c_.width, q_width());
        const Site k = attention_site("k_proj", c_.width, kv_width());
        const Site v = attention_site("v_proj", c_.width, kv_width());
        const Site o = attention_site("o_proj", q_width(), c_.width);
        activation(tokens(), c_.width);
        linears(tokens(), {q, k, v}, false);
        activation(tokens(), q_width());  // after rope
        activation(tokens(), kv_width());
        if (!kept_attention) {
            attention_output(taped_);
        }
        if (!kept_attention || !taped_) {
            attention(false);
        }
        activation(tokens(), c_.width);
        linear(tokens(), o, false, false);
        activation(tokens(), c_.width);  // after the second norm
        moe_ ? forward_experts() : forward_mlp();
    }

    void backward() {
        moe_ ? backward_experts() : backward_mlp();
        const Site o = attention_site("o_proj", q_width(), c_.width);
        activation(tokens(), q_width());
        linear(tokens(), o, true, false);
        activation(tokens(), q_width());
        activation(tokens(), kv_width());
        activation(tokens(), kv_width());
        attention(true);
        activation(tokens(), kv_width());  // before rope
        activation(tokens(), q_width());
        activation(tokens(), c_.width);  // of the first norm's output
        linears_backward(
            {attention_site("q_proj", c_.width, q_width()),
             attention_site("k_proj", c_.width, kv_width()),
             attention_site("v_proj", c_.width, kv_width())}
        );
    }

  private:
    int64_t tokens() const { return batch_.tokens; }

    int64_t routed() const { return batch_.tokens * c_.experts_per_token; }

    int64_t q_width() const { return c_.num_heads * c_.head_dim; }

    int64_t kv_width() const { return c_.num_kv_heads * c_.head_dim; }

    void activation(int64_t rows, int64_t cols) {
        meter_.take(rows * cols * dtype_bytes(m_.compute));
    }

    Site site(const std::string& module, int64_t in, int64_t out) const {
        Site s{in, out};
        if (is_targeted(m_.adapter, module)) {
            s.kind = m_.adapter.kind == "lora" ? AdapterKind::kLora : AdapterKind::kOft;
            s.rank = m_.adapter.rank;
            s.block = m_.adapter.block_size;
        }
        return s;
    }

    Site attention_site(const char* leaf, int64_t in, int64_t out) const {
        return kept(site(prefix_ + "self_attn." + leaf, in, out));
    }

    // With a tape the products that are computed leave LoRA's u for backward.
    Site kept(Site s) const {
        s.keeps_u = taped_ && s.kind == AdapterKind::kLora;
        return s;
    }

    Site mlp_site(const char* leaf, int64_t in, int64_t out) const {
        return site(prefix_ + (moe_ ? "mlp.experts.0." : "mlp.") + leaf, in, out);
    }

    void take_u(const Site& s, int64_t rows) {
        if (s.keeps_u) {
            activation(rows, m_.on_cpu ? s.rank : round_up(s.rank, 16));
        }
    }

    // Experts run one after the other on a CPU, in one launch on a GPU.
    void linear(int64_t rows, const Site& s, bool is_backward, bool grouped) {
        if (!is_backward) {
            take_u(s, rows);
        }
        linear_workspace(rows, s, is_backward, grouped);
    }

    void linear_workspace(int64_t rows, const Site& s, bool is_backward, bool grouped) {
        if (!m_.on_cpu) {
            GpuLinear op(m_, meter_, rows, grouped);
            is_backward ? op.backward({s}) : op.forward({s});
            return;
        }
        // The busiest expert of a skewed router: twice its share.
        const int64_t most = grouped ? std::min(rows, 2 * ceil_div(rows, c_.num_experts)) : rows;
        CpuLinear op(m_, meter_, most);
        is_backward ? op.backward(s) : op.forward(s);
    }

    // Pass::linears and Pass::grouped_linears.
    void linears(int64_t rows, std::initializer_list<Site> sites, bool grouped) {
        for (const Site& s : sites) {
            take_u(s, rows);
            activation(rows, s.out);
        }
        const bool rotates = std::any_of(sites.begin(), sites.end(), [](const Site& s) {
            return s.kind == AdapterKind::kOft;
        });
        if (!m_.on_cpu && !(grouped && rotates)) {
            GpuLinear(m_, meter_, rows, grouped).forward(sites);
            return;
        }
        for (const Site& s : sites) {
            linear_workspace(rows, s, false, grouped);
        }
    }

    // linear_group_backward.
    void linears_backward(std::initializer_list<Site> sites) {
        if (!m_.on_cpu) {
            GpuLinear(m_, meter_, tokens(), false).backward(sites);
            return;
        }
        for (const Site& s : sites) {
            linear_workspace(tokens(), s, true, false);
        }
    }

    void attention(bool is_backward) {
        const Scope scope(meter_);
        if (!m_.on_cpu) {
            if (is_backward) {
                meter_.take(tokens() * c_.num_heads * kF32);
            }
            return;
        }
        constexpr int64_t kUnitBytes = 24;
        const int64_t floats = is_backward
                                   ? attention_backward_workspace(batch_.longest, c_.head_dim)
                                   : attention_workspace(batch_.longest, c_.head_dim);
        meter_.take(floats * m_.threads * kF32);
        const int64_t pieces = is_backward ? 0 : tokens() / 64;
        meter_.take((pieces + batch_.sequences) * c_.num_kv_heads * kUnitBytes);
    }

    // With a tape the output is not computed.
    void forward_mlp() {
        linears(
            tokens(),
            {kept(mlp_site("gate_proj", c_.width, c_.mlp_width)),
             kept(mlp_site("up_proj", c_.width, c_.mlp_width))},
            false
        );
        activation(tokens(), c_.mlp_width);
        if (!taped_) {
            linear(tokens(), mlp_site("down_proj", c_.mlp_width, c_.width), false, false);
        }
    }

    void backward_mlp() {
        activation(tokens(), c_.mlp_width);
        linear(tokens(), mlp_site("down_proj", c_.mlp_width, c_.width), true, false);
        activation(tokens(), c_.mlp_width);
        activation(tokens(), c_.mlp_width);
        activation(tokens(), c_.width);
        linears_backward(
            {kept(mlp_site("gate_proj", c_.width, c_.mlp_width)),
             kept(mlp_site("up_proj", c_.width, c_.mlp_width))}
        );
    }

    void forward_experts() {
        meter_.take(tokens() * c_.num_experts * kF32);
        for (int i = 0; i < 4; ++i) {
            meter_.take(routed() * kF32);
        }
        meter_.take((c_.num_experts + 1) * kF32);
        if (m_.on_cpu) {
            CpuLinear(m_, meter_, tokens()).multiply(c_.width, c_.num_experts);
        }
        activation(routed(), c_.width);
        linears(
            routed(),
            {mlp_site("gate_proj", c_.width, c_.expert_width),
             mlp_site("up_proj", c_.width, c_.expert_width)},
            true
        );
        activation(routed(), c_.expert_width);
        linears(routed(), {mlp_site("down_proj", c_.expert_width, c_.width)}, true);
    }

    void backward_experts() {
        activation(routed(), c_.width);
        meter_.take(routed() * kF32);
        activation(routed(), c_.expert_width);
        linear(routed(), mlp_site("down_proj", c_.expert_width, c_.width), true, true);
        activation(routed(), c_.expert_width);
        activation(routed(), c_.expert_width);
        activation(routed(), c_.width);
        for (const char* leaf : {"up_proj", "gate_proj"}) {
            linear(routed(), mlp_site(leaf, c_.width, c_.expert_width), true, true);
        }
        activation(tokens(), c_.width);
        const Scope scope(meter_);
        meter_.take(tokens() * c_.num_experts * kF32);
        activation(tokens(), c_.width);
        if (m_.compute == DType::kBF16) {
            meter_.take(tokens() * c_.num_experts * 2);
        }
        if (m_.on_cpu) {
            CpuLinear(m_, meter_, tokens()).multiply(c_.num_experts, c_.width);
        }
    }

    const ScratchModel& m_;
    const ModelConfig& c_;
    Meter& meter_;
    BatchShape batch_;
    std::string prefix_;
    bool moe_;
    bool taped_;
};

// One chunk of logits of logprob_cpu.cpp or logprob_cuda.cu, and what is around it.
void head(
    const ScratchModel& m, Meter& meter, int64_t rows, const SamplingFilter& filter, bool backward
) {
    const Scope scope(meter);
    const int64_t vocabulary = m.config.vocab_size;
    if (!m.on_cpu) {
        constexpr int64_t kRowBytes = 24 + 8;  // RowCut, RowSummary
        constexpr int64_t kTileBytes = 20;     // TileStats, of 1024 ids
        const int64_t chunk = head_chunk_rows(rows, vocabulary);
        meter.take(chunk * vocabulary * kF32);
        meter.take(chunk * (kRowBytes + ceil_div(vocabulary, 1024) * kTileBytes));
        decode_first(m, meter, chunk, m.packed.head, vocabulary * m.config.width);
        if (backward) {
            meter.take(chunk * vocabulary * 2);
            constexpr int64_t kSegment = 4096;  // head_backward of dense_cuda.cu: parts added up
            const int64_t part = round_up(ceil_div(vocabulary, 8), kSegment);
            const int64_t parts = ceil_div(vocabulary, part);
            if (parts > 1) {
                meter.take(parts * chunk * m.config.width * kF32);
            }
            decode_first(m, meter, chunk, m.packed.head, vocabulary * m.config.width);
        }
        return;
    }
    const int64_t row = vocabulary * kF32;
    const int64_t fit = std::max<int64_t>(
        1, std::min((int64_t{32} << 20) / row, std::max<int64_t>(128, (int64_t{2} << 20) / row))
    );
    const int64_t chunk = std::min(fit, rows);
    meter.take(chunk * row);
    const bool filtered = filter.temperature > 0.0f && !filter.plain();
    meter.take(filtered ? m.threads * vocabulary * 8 : 0);
    meter.take(filtered ? m.threads * row : 0);
    CpuLinear(m, meter, chunk).multiply(m.config.width, vocabulary);
    if (backward) {
        if (m.compute == DType::kBF16) {
            meter.take(chunk * vocabulary * 2);
        }
        CpuLinear(m, meter, chunk).multiply(vocabulary, m.config.width);
    }
}

// The index arrays of TokenBatch::upload.
void upload(Meter& meter, const BatchShape& batch) {
    const int64_t table = batch.sequences * pages_for(batch.longest);
    const int64_t ints = 3 * round_up(batch.tokens, 16) + round_up(batch.sequences + 1, 16) +
                         round_up(batch.sequences, 16) + round_up(table, 16);
    meter.take(ints * int64_t{sizeof(int32_t)});
}

// The buffers of experts that are decoded first, and of those that come from host memory.
void expert_buffers(const ScratchModel& m, Meter& meter, int64_t tokens) {
    for (const int64_t bytes : {dequant_bytes(m.config, m.dequant, tokens), m.staged}) {
        if (bytes > 0) {
            meter.take(bytes);
        }
    }
}

void hidden(
    const ScratchModel& m,
    Meter& meter,
    const BatchShape& batch,
    bool keep_inputs,
    bool keep_attention
) {
    const int64_t bytes = batch.tokens * m.config.width * dtype_bytes(m.compute);
    for (int64_t i = 0; i < (keep_inputs ? m.config.num_layers + 1 : 2); ++i) {
        meter.take(bytes);
    }
    for (int64_t layer = 0; keep_attention && layer < m.config.num_layers; ++layer) {
        Layer(m, meter, batch, layer).attention_output(true);
    }
    const Scope decoded(meter);
    expert_buffers(m, meter, batch.tokens);
    for (int64_t layer = 0; layer < m.config.num_layers; ++layer) {
        const Scope scope(meter);
        Layer(m, meter, batch, layer).forward(keep_attention);
    }
}

}  // namespace

ScratchModel scratch_model(
    const Device& device, const ModelConfig& config, const AdapterOptions& adapter
) {
    ScratchModel m;
    m.config = config;
    m.adapter = adapter;
    m.on_cpu = device.is_cpu();
    m.isa = device.isa;
    m.threads = device.threads->num_threads();
    m.decodes_first = cuda::decodes_first(device);
    return m;
}

int64_t training_pages(const TrainShape& shape) {
    return shape.tokens / kPageTokens + shape.sequences;
}

int64_t routing_page_bytes(const ScratchModel& m) {
    const ModelConfig& c = m.config;
    const int64_t id_bytes = c.num_experts > 256 ? 2 : 1;
    return kPageTokens * c.num_expert_layers() * c.experts_per_token * id_bytes;
}

int64_t training_scratch(const ScratchModel& m, const TrainShape& shape) {
    Meter meter(true);
    const BatchShape batch{shape.tokens, shape.sequences, shape.longest};
    const int64_t row_bytes = m.config.width * dtype_bytes(m.compute);
    const auto columns = [&] { meter.take(shape.rows * kF32); };
    upload(meter, batch);
    if (shape.replay_routing) {
        meter.take(training_pages(shape) * routing_page_bytes(m));
    }
    hidden(m, meter, batch, !shape.offload, shape.keep_attention);
    columns();  // rows
    columns();  // targets
    meter.take(shape.rows * row_bytes);
    meter.take(shape.rows * row_bytes);
    columns();  // log-probs
    columns();  // entropies
    head(m, meter, shape.rows, shape.filter, false);
    columns();  // coefficients
    meter.take(shape.rows * row_bytes);
    head(m, meter, shape.rows, shape.filter, true);
    meter.take(shape.rows * row_bytes);
    meter.take(shape.tokens * row_bytes);
    expert_buffers(m, meter, shape.tokens);
    for (int64_t index = m.config.num_layers - 1; index >= 0; --index) {
        const Scope scope(meter);
        Layer layer(m, meter, batch, index, true);
        layer.forward(shape.keep_attention);
        layer.backward();
    }
    return meter.peak();
}

int64_t prefill_scratch(const ScratchModel& m, const PrefillShape& shape) {
    Meter meter(true);
    const BatchShape batch{shape.tokens, shape.sequences, shape.longest};
    const int64_t row_bytes = m.config.width * dtype_bytes(m.compute);
    upload(meter, batch);
    hidden(m, meter, batch, false, false);
    meter.take(shape.draws * kF32);
    meter.take(shape.draws * row_bytes);
    meter.take(shape.draws * row_bytes);
    meter.take(shape.draws * int64_t{sizeof(SampleRow)});
    meter.take(shape.draws * kF32);
    meter.take(shape.draws * kF32);
    head(m, meter, shape.draws, shape.filter, false);
    return meter.peak();
}

int64_t decode_scratch(
    const ScratchModel& m, int64_t batch, int64_t longest, const SamplingFilter& filter
) {
    Meter meter(false);
    hidden(m, meter, {batch, batch, longest}, false, false);
    const int64_t row_bytes = m.config.width * dtype_bytes(m.compute);
    meter.take(batch * row_bytes);
    meter.take(batch * row_bytes);
    head(m, meter, batch, filter, false);
    return meter.allocated();
}

}  // namespace orbit
