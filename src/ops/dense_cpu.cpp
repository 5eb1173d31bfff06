#include <algorithm>

#include "ops/cuda_ops.h"
#include "ops/dense.h"
#include "ops/dense_matmul.h"

namespace orbit {
namespace {

// Bytes of activations that one row block may keep in the second-level cache beside a panel.
constexpr int64_t kRowBlockBytes = 256 << 10;
constexpr int64_t kRowBlockMax = 384;
constexpr int64_t kRowBlockMin = 48;
constexpr int64_t kFewRows = 12;
constexpr int64_t kChunkFewRows = 64;  // small enough that decoding overlaps with multiplying
constexpr int64_t kChunk = 1024;

bool is_f32(const Tensor& t) {
    return t.dtype == DType::kF32;
}

// An adapter matrix [rows, cols], in the compute type, as a weight.
QuantizedMatrix as_weight(const Tensor& t, int64_t rows, int64_t cols) {
    QuantizedMatrix w;
    w.format = is_f32(t) ? WeightFormat::kF32 : WeightFormat::kBF16;
    w.rows = rows;
    w.cols = cols;
    w.data = t.data;
    return w;
}

Tensor widened(Stream& stream, const Tensor& x) {
    const Tensor wide = stream.scratch.take(DType::kF32, {x.rows(), x.cols()});
    const bf16* from = x.as<bf16>();
    float* to = wide.as<float>();
    stream.threads().parallel_for(x.numel(), 4096, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            to[i] = to_float(from[i]);
        }
    });
    return wide;
}

// x is [rows, blocks * depth].
Product make_product(
    Stream& stream, const Tensor& x, const QuantizedMatrix& w, bool transposed, int64_t blocks = 1
) {
    Product p;
    p.depth = transposed ? w.rows : w.cols;
    CHECK_EQ(x.cols(), p.depth * blocks);
    p.ldx = x.cols();
    p.w = w;
    p.transposed = transposed;
    p.exact_values = is_f32(x);
    p.pairs = !is_f32(x) && stream.device.isa >= CpuIsa::kAvx512 && p.depth % 2 == 0;
    p.x = is_f32(x) || p.pairs ? x.data : widened(stream, x).data;
    return p;
}

int64_t round_up(int64_t value, int64_t to) {
    return (value + to - 1) / to * to;
}

// How the work is cut. Free to depend on anything: no cut changes a bit.
void plan_matmul(Matmul& m, int64_t num_threads) {
    m.panels = (m.width + kPanelWidth - 1) / kPanelWidth;
    const int64_t row_bytes_x = m.main.depth * (m.main.pairs ? 2 : 4);
    int64_t block = std::clamp(kRowBlockBytes / row_bytes_x, kRowBlockMin, kRowBlockMax);
    const int64_t columns = m.panels * m.blocks;
    if (columns < 8 && columns % num_threads != 0) {
        // Few panels: share the rows out too.
        block =
            std::min(block, std::max(kRowBlockMin, round_up(m.rows, num_threads) / num_threads));
    }
    const int64_t row_blocks = std::max<int64_t>(1, (m.rows + block - 1) / block);
    const int64_t tile = m.amx ? isa_amx::kTileRowsMax : 12;
    m.row_block = round_up((m.rows + row_blocks - 1) / row_blocks, tile);
    // On AMX a chunk's sums go through memory, which costs more than the overlap gains.
    const bool few = m.rows <= kFewRows && !m.amx;
    m.chunk = std::min(round_up(m.main.depth, 64), few ? kChunkFewRows : kChunk);
    m.num_items = (m.rows + m.row_block - 1) / m.row_block * columns;
    const int64_t cells = (m.row_block + kSumsPadding + m.chunk + m.low_rank.depth) * kPanelWidth;
    const int64_t padding = 16 * std::max(m.chunk, m.low_rank.depth) * 2;
    m.workspace_bytes = cells * static_cast<int64_t>(sizeof(float)) + padding;
}

void run_matmul(Stream& stream, Matmul& m) {
    if (m.rows == 0 || m.width == 0) {
        return;
    }
    const ScratchScope scope(stream.scratch);
    const int64_t num_threads = stream.threads().num_threads();
    m.amx = stream.device.isa == CpuIsa::kAmx;
    plan_matmul(m, num_threads);
    const int64_t bytes = round_up(m.workspace_bytes, 256);
    auto* workspace =
        static_cast<char*>(stream.scratch.take_bytes(static_cast<size_t>(bytes * num_threads)));
    const CpuIsa isa = stream.device.isa;
    stream.threads().parallel_for(m.num_items, 1, [&](int64_t begin, int64_t end, int thread) {
        ORBIT_CALL_KERNEL(isa, matmul_items, (m, begin, end, workspace + thread * bytes));
    });
}

Matmul make_matmul(const Product& main, const Tensor& y, int64_t blocks = 1) {
    Matmul m;
    m.main = main;
    m.rows = y.rows();
    m.blocks = blocks;
    m.width = y.cols() / blocks;
    m.y = y.data;
    m.ldy = y.cols();
    m.y_bf16 = y.dtype == DType::kBF16;
    CHECK_EQ(m.width, main.transposed ? main.w.cols : main.w.rows);
    return m;
}

// y = round(scale * (x w^T)), or x w when transposed.
void multiply(
    Stream& stream,
    const Tensor& x,
    const QuantizedMatrix& w,
    bool transposed,
    float scale,
    const Tensor& y
) {
    const ScratchScope scope(stream.scratch);
    Matmul m = make_matmul(make_product(stream, x, w, transposed), y);
    m.scale = scale;
    run_matmul(stream, m);
}

// y = round(x + x D) per block, or x + x D^T.
void rotate(
    Stream& stream,
    const Tensor& x,
    const Tensor& d,
    bool transposed,
    const Tensor& y,
    bool accumulate
) {
    const ScratchScope scope(stream.scratch);
    const int64_t blocks = d.shape[0];
    const int64_t b = d.shape[1];
    // x D contracts D's rows.
    Matmul m =
        make_matmul(make_product(stream, x, as_weight(d, b, b), !transposed, blocks), y, blocks);
    m.residual = x.data;
    m.accumulate = accumulate;
    run_matmul(stream, m);
}

void outer_sum(
    Stream& stream, const Tensor& a, const Tensor& b, int64_t blocks, float scale, float* out
) {
    if (out == nullptr || a.rows() == 0) {
        return;
    }
    OuterSum o;
    CHECK(a.dtype == b.dtype);
    CHECK_EQ(a.rows(), b.rows());
    o.a = a.data;
    o.b = b.data;
    o.is_bf16 = a.dtype == DType::kBF16;
    o.rows = a.rows();
    o.blocks = blocks;
    o.a_width = a.cols() / blocks;
    o.b_width = b.cols() / blocks;
    o.scale = scale;
    o.out = out;
    const CpuIsa isa = stream.device.isa;
    stream.threads().parallel_for(blocks * outer_tiles(o), 1, [&](int64_t begin, int64_t end, int) {
        ORBIT_CALL_KERNEL(isa, outer_sum_items, (o, begin, end));
    });
}

void check_linear(const LinearParams& p, const Tensor& y) {
    CHECK_EQ(p.x.cols(), p.w.cols);
    CHECK_EQ(y.cols(), p.w.rows);
    CHECK_EQ(y.rows(), p.x.rows());
    CHECK(y.dtype == p.x.dtype, "(x and y share the compute type)");
    CHECK(p.x.dtype == DType::kBF16 || is_f32(p.x), "(compute types are bf16 and f32)");
}

int64_t rank_of(const AdapterView& adapter) {
    return adapter.lora_a.rows();
}

// x after OFT (x itself without one).
Tensor rotated_input(Stream& stream, const LinearParams& p) {
    if (p.adapter.kind != AdapterKind::kOft) {
        return p.x;
    }
    const Tensor rotated = stream.scratch.take(p.x.dtype, {p.x.rows(), p.x.cols()});
    rotate(stream, p.x, p.adapter.oft_d, false, rotated, false);
    return rotated;
}

// U = round(x A^T), in p.lora_u if that is defined.
Tensor low_rank_input(Stream& stream, const LinearParams& p) {
    const Tensor u = p.lora_u.defined() ? p.lora_u : take_lora_u(stream, p);
    const QuantizedMatrix a = as_weight(p.adapter.lora_a, rank_of(p.adapter), p.w.cols);
    multiply(stream, p.x, a, false, 1.0f, u);
    return u;
}

void backward_base(Stream& stream, const LinearParams& p, Tensor dy, Tensor dx, bool accumulate) {
    const ScratchScope scope(stream.scratch);
    Matmul m = make_matmul(make_product(stream, dy, p.w, true), dx);
    m.accumulate = accumulate;
    run_matmul(stream, m);
}

void backward_lora(
    Stream& stream,
    const LinearParams& p,
    Tensor dy,
    Tensor dx,
    bool accumulate_dx,
    const AdapterGrad& grad
) {
    const ScratchScope scope(stream.scratch);
    const AdapterView& adapter = p.adapter;
    const int64_t rank = rank_of(adapter);
    if (grad.lora_b != nullptr) {
        const ScratchScope inner(stream.scratch);
        const Tensor u = p.lora_u.defined() ? p.lora_u : low_rank_input(stream, p);
        outer_sum(stream, dy, u, 1, adapter.lora_scale, grad.lora_b);
    }
    const Tensor du = stream.scratch.take(dy.dtype, {dy.rows(), rank});
    multiply(stream, dy, as_weight(adapter.lora_b, p.w.rows, rank), true, adapter.lora_scale, du);
    outer_sum(stream, du, p.x, 1, 1.0f, grad.lora_a);
    if (dx.defined()) {
        Matmul m = make_matmul(make_product(stream, dy, p.w, true), dx);
        m.low_rank = make_product(stream, du, as_weight(adapter.lora_a, rank, p.w.cols), true);
        m.low_rank_scale = 1.0f;
        m.accumulate = accumulate_dx;
        run_matmul(stream, m);
    }
}

void backward_oft(
    Stream& stream,
    const LinearParams& p,
    Tensor dy,
    Tensor dx,
    bool accumulate_dx,
    const AdapterGrad& grad
) {
    const ScratchScope scope(stream.scratch);
    const Tensor g = stream.scratch.take(dy.dtype, {dy.rows(), p.w.cols});
    backward_base(stream, p, dy, g, false);
    rotation_backward(stream, p.x, p.adapter.oft_d, g, dx, accumulate_dx, grad.oft_d);
}

}  // namespace

Tensor take_lora_u(Stream& stream, const LinearParams& p) {
    const int64_t rank = rank_of(p.adapter);
    const int64_t columns = stream.is_cpu() ? rank : (rank + 15) / 16 * 16;
    return stream.scratch.take(p.x.dtype, {p.x.rows(), columns});
}

void rotation_backward(
    Stream& stream, Tensor x, Tensor oft_d, Tensor g, Tensor dx, bool accumulate_dx, float* grad
) {
    outer_sum(stream, x, g, oft_d.shape[0], 1.0f, grad);
    if (dx.defined()) {
        rotate(stream, g, oft_d, true, dx, accumulate_dx);
    }
}

void linear(Stream& stream, const LinearParams& p, Tensor y) {
    if (!stream.is_cpu()) {
        return cuda::linear_group(stream, std::span(&p, 1), std::span(&y, 1));
    }
    check_linear(p, y);
    const ScratchScope scope(stream.scratch);
    Matmul m = make_matmul(make_product(stream, rotated_input(stream, p), p.w, false), y);
    if (p.adapter.kind == AdapterKind::kLora) {
        const QuantizedMatrix b = as_weight(p.adapter.lora_b, p.w.rows, rank_of(p.adapter));
        m.low_rank = make_product(stream, low_rank_input(stream, p), b, false);
        m.low_rank_scale = p.adapter.lora_scale;
    }
    m.bias = p.bias;
    m.residual = p.residual.data;
    run_matmul(stream, m);
}

SwigluResult linear_swiglu(
    Stream& stream,
    std::span<const LinearParams> params,
    std::span<const Tensor> y,
    const Tensor& oft_d
) {
    CHECK_EQ(params.size(), size_t{2});
    if (!stream.is_cpu()) {
        return cuda::linear_swiglu(stream, params, y, oft_d);
    }
    linear_group(stream, params, y);
    return SwigluResult::kGateAndUp;
}

void linear_group(Stream& stream, std::span<const LinearParams> params, std::span<const Tensor> y) {
    CHECK_EQ(params.size(), y.size());
    if (!stream.is_cpu()) {
        return cuda::linear_group(stream, params, y);
    }
    for (size_t i = 0; i < params.size(); ++i) {
        linear(stream, params[i], y[i]);
    }
}

void linear_backward(
    Stream& stream,
    const LinearParams& p,
    Tensor dy,
    Tensor dx,
    bool accumulate_dx,
    const AdapterGrad& grad
) {
    if (!stream.is_cpu()) {
        return cuda::linear_group_backward(
            stream, {&p, 1}, {&dy, 1}, dx, accumulate_dx, {&grad, 1}
        );
    }
    check_linear(p, dy);
    switch (p.adapter.kind) {
        case AdapterKind::kNone:
            if (dx.defined()) {
                backward_base(stream, p, dy, dx, accumulate_dx);
            }
            return;
        case AdapterKind::kLora:
            return backward_lora(stream, p, dy, dx, accumulate_dx, grad);
        case AdapterKind::kOft:
            return backward_oft(stream, p, dy, dx, accumulate_dx, grad);
    }
}

void linear_group_backward(
    Stream& stream,
    std::span<const LinearParams> params,
    std::span<const Tensor> dy,
    Tensor dx,
    bool accumulate_dx,
    std::span<const AdapterGrad> grads
) {
    CHECK(params.size() == dy.size() && params.size() == grads.size());
    for (const LinearParams& p : params) {
        CHECK(p.x.data == params[0].x.data);
    }
    if (!stream.is_cpu()) {
        return cuda::linear_group_backward(stream, params, dy, dx, accumulate_dx, grads);
    }
    for (size_t i = params.size(); i-- > 0;) {  // the last one first, as a tape has them
        linear_backward(stream, params[i], dy[i], dx, accumulate_dx, grads[i]);
        accumulate_dx = true;
    }
}

void linear_f32_out(Stream& stream, Tensor h, const QuantizedMatrix& w, Tensor logits) {
    if (!stream.is_cpu()) {
        return cuda::linear_f32_out(stream, h, w, logits);
    }
    CHECK(is_f32(logits));
    const ScratchScope scope(stream.scratch);
    Matmul m = make_matmul(make_product(stream, h, w, false), logits);
    run_matmul(stream, m);
}

void linear_f32_out_backward(Stream& stream, Tensor dlogits, const QuantizedMatrix& w, Tensor dh) {
    if (!stream.is_cpu()) {
        return cuda::linear_f32_out_backward(stream, dlogits, w, dh);
    }
    CHECK(is_f32(dlogits));
    const ScratchScope scope(stream.scratch);
    Tensor dy = dlogits;
    if (!is_f32(dh)) {
        dy = stream.scratch.take(DType::kBF16, {dlogits.rows(), dlogits.cols()});
        const float* from = dlogits.as<float>();
        bf16* to = dy.as<bf16>();
        stream.threads().parallel_for(dy.numel(), 4096, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) {
                to[i] = to_bf16(from[i]);
            }
        });
    }
    Matmul m = make_matmul(make_product(stream, dy, w, true), dh);
    run_matmul(stream, m);
}

}  // namespace orbit
