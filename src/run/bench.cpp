#include "run/bench.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <set>

#include "base/hash.h"
#include "base/log.h"
#include "base/philox.h"
#include "rollout/engine.h"
#include "run/host_experts.h"
#include "run/memory_plan.h"
#include "train/trainer.h"

namespace orbit {
namespace {

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

// Median seconds of `body`, which is called until it has run `inner` times between two
// synchronisations, `repeats` times.
double time_of(Stream& stream, int repeats, int inner, const std::function<void(int)>& body) {
    std::vector<double> times;
    body(0);
    synchronize(stream);
    for (int r = 0; r < repeats; ++r) {
        const double start = now_s();
        for (int i = 0; i < inner; ++i) {
            body(r * inner + i);
        }
        synchronize(stream);
        times.push_back((now_s() - start) / inner);
    }
    return median(times);
}

std::vector<int32_t> random_ids(const Model& model, int64_t count, uint32_t stream) {
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t word = philox(static_cast<uint32_t>(i), stream, 0, 0, 99, 0).word[0];
        ids.push_back(static_cast<int32_t>(word % static_cast<uint32_t>(model.config.vocab_size)));
    }
    return ids;
}

// Tokens and log-probs of all answers, in the order of their requests.
std::string digest_of(std::vector<Completion>& answers) {
    std::sort(answers.begin(), answers.end(), [](const Completion& a, const Completion& b) {
        return std::pair(a.ticket, a.sample) < std::pair(b.ticket, b.sample);
    });
    uint64_t hash = 0;
    for (const Completion& a : answers) {
        hash = hash64(a.ids.data(), a.ids.size() * sizeof(int32_t), hash);
        hash = hash64(a.logprobs.data(), a.logprobs.size() * sizeof(float), hash);
    }
    return hash_hex(hash);
}

std::string digest_of(Stream& stream, AdapterStore& adapter) {
    constexpr int64_t kChunk = 1 << 22;
    std::vector<float> values;
    uint64_t hash = 0;
    for (int64_t done = 0; done < adapter.num_parameters(); done += kChunk) {
        values.resize(static_cast<size_t>(std::min(kChunk, adapter.num_parameters() - done)));
        const size_t bytes = values.size() * sizeof(float);
        copy_to_host(stream, values.data(), adapter.masters() + done, bytes);
        hash = hash64(values.data(), bytes, hash);
    }
    return hash_hex(hash);
}

// Experts of a layer that the answers' tokens number `from` and later chose, all answers together,
// at one position: the mean over layers and positions. Answers of one length.
double mean_active_experts(
    const ModelConfig& c, const std::vector<Completion>& answers, int64_t from
) {
    const int64_t layers = c.num_expert_layers();
    const int64_t per_token = layers * c.experts_per_token;
    const int64_t id_bytes = c.num_experts > 256 ? 2 : 1;
    const int64_t tokens = static_cast<int64_t>(answers[0].routing.size()) / (per_token * id_bytes);
    double total = 0;
    for (int64_t at = from * layers; at < tokens * layers; ++at) {
        std::set<int> chosen;
        for (const Completion& a : answers) {
            for (int64_t k = 0; k < c.experts_per_token; ++k) {
                const auto i = static_cast<size_t>((at * c.experts_per_token + k) * id_bytes);
                chosen.insert(a.routing[i] + (id_bytes == 2 ? a.routing[i + 1] << 8 : 0));
            }
        }
        total += static_cast<double>(chosen.size());
    }
    return total / static_cast<double>((tokens - from) * layers);
}

class Bench {
  public:
    Bench(Stream& stream, const Model& model, const BenchOptions& options)
        : stream_(stream), model_(model), options_(options) {
        if (options.adapter != "none") {
            AdapterOptions adapter;
            adapter.kind = options.adapter;
            adapter_ = std::make_unique<AdapterStore>(
                stream.device, adapter, model.sites, model.compute, 2, 1
            );
        }
    }

    std::vector<BenchRow> run() {
        ceilings();
        if (options_.kernels && model_.staged_bytes == 0) {  // they are the same then
            linears();
            experts();
        }
        if (options_.decode) {
            for (const int64_t batch : options_.decode_batches) {
                decode(batch);
            }
        }
        if (options_.train && adapter_ != nullptr) {
            train();
        }
        if (options_.rl && adapter_ != nullptr) {
            rl_step();
        }
        return rows_;
    }

  private:
    void add(BenchRow row) {
        log_line(fmt::format(
            "{:<12} {:<44} {:>11.1f} us  floor {:>9.1f} us  {:>5.1f} %  {:>10.0f} tok/s  {}",
            row.what,
            row.shape,
            row.time_us,
            row.floor_us,
            row.floor_us > 0 ? 100 * row.floor_us / row.time_us : 0.0,
            row.tokens_per_s,
            row.note
        ));
        rows_.push_back(std::move(row));
    }

    // A device copy, bytes read and written; larger than any cache.
    void ceilings() {
        const ScratchScope scope(stream_.scratch);
        const size_t bytes = stream_.is_cpu() ? size_t{256} << 20 : size_t{1} << 30;
        void* from = stream_.scratch.take_bytes(bytes);
        void* to = stream_.scratch.take_bytes(bytes);
        const double seconds =
            time_of(stream_, 5, 2, [&](int) { copy_on_device(stream_, to, from, bytes); });
        const double measured = 2.0 * static_cast<double>(bytes) / seconds;
        bandwidth_ = options_.copy_bytes_per_s > 0 ? options_.copy_bytes_per_s : measured;
        BenchRow row;
        row.what = "ceiling";
        row.shape = "device copy";
        row.time_us = seconds * 1e6;
        row.note = fmt::format("{:.3f} TB/s", measured * 1e-12);
        add(row);
        if (model_.staged_bytes > 0) {
            host_rate_ = host_link_rate(stream_, model_.staged_bytes);
            row.shape = "copies from page-locked host memory";
            row.time_us = 1e6 * static_cast<double>(model_.staged_bytes) / host_rate_;
            row.note = fmt::format(
                "{:.1f} GB/s; time of a layer's experts, {:.1f} of {:.1f} MiB pinned",
                host_rate_ * 1e-9,
                static_cast<double>(model_.staged_bytes) / (1 << 20),
                static_cast<double>(model_.host.total_bytes()) / (1 << 20)
            );
            add(row);
        }
    }

    // What `passes` forwards over `tokens` tokens read from host memory, in time and in the floor.
    void add_streamed(BenchRow& row, int64_t tokens, int passes) const {
        const auto held = static_cast<int64_t>(model_.host.total_bytes());
        const double bytes = passes * streamed_bytes(model_.config, held, tokens);
        row.streamed_us = 1e6 * bytes / host_rate_;
        row.floor_us += row.floor_us > 0 ? row.streamed_us : 0;
        if (held > 0) {
            row.note += fmt::format(", {:.2f} GB from host memory predicted", bytes * 1e-9);
        }
    }

    // One block of scratch for what follows, and nothing left of what was before.
    void prepare(const MemoryPlan& plan) {
        stream_.scratch.reserve(plan.scratch);
        memory_bytes_ = 0;
    }

    MemoryPlan plan(const RolloutShape& rollout, const TrainShape& train) const {
        AdapterOptions adapter;
        adapter.kind = options_.adapter;
        ScratchModel scratch = scratch_model(stream_.device, model_.config, adapter);
        scratch.staged = model_.staged_bytes;
        scratch.packed = packed_parts(model_);
        return plan_memory(
            scratch, static_cast<int64_t>(model_.arena.total_bytes()), rollout, train
        );
    }

    // Remembers what the device holds now: on a GPU what its driver says, on a CPU what was
    // allocated.
    void measure(const RolloutEngine* engine, const Trainer* trainer) {
        size_t bytes = 0;
        if (!stream_.is_cpu()) {
            const MemoryInfo info = memory_info(stream_.device);
            bytes = info.total - info.available - options_.memory_before;
        } else {
            bytes = model_.arena.total_bytes() + stream_.scratch.allocated_bytes();
            bytes += engine != nullptr ? engine->memory_bytes() : 0;
            bytes += trainer != nullptr ? static_cast<size_t>(trainer->offloaded_bytes()) : 0;
            if (adapter_ != nullptr) {
                for (const auto& entry : adapter_->ledger()) {
                    bytes += entry.bytes;
                }
            }
        }
        memory_bytes_ = std::max(memory_bytes_, static_cast<double>(bytes));
    }

    // Fills the row's memory of the device.
    void report_memory(BenchRow& row, const MemoryPlan& plan) const {
        constexpr double kMiB = 1 << 20;
        row.memory_bytes = memory_bytes_;
        row.note += fmt::format(
            ", memory predicted {:.0f} MiB, measured {:.0f} MiB (scratch {:.0f} of {:.0f} MiB in "
            "use)",
            static_cast<double>(plan.total()) / kMiB,
            memory_bytes_ / kMiB,
            static_cast<double>(stream_.scratch.peak_bytes()) / kMiB,
            static_cast<double>(plan.scratch) / kMiB
        );
        if (plan.pinned > 0) {
            row.note +=
                fmt::format(", pinned host {:.0f} MiB", static_cast<double>(plan.pinned) / kMiB);
        }
    }

    double floor_us(double bytes, double flops) const {
        const double matrix =
            options_.matrix_flops_per_s > 0 ? flops / options_.matrix_flops_per_s : 0.0;
        return 1e6 * std::max(bytes / bandwidth_, matrix);
    }

    // Each shape of a layer, walking through the layers so that the weights do not stay in the
    // cache.
    void linears() {
        const std::pair<const char*, LinearWeights LayerWeights::*> parts[] = {
            {"q", &LayerWeights::q},
            {"o", &LayerWeights::o},
            {"gate", &LayerWeights::gate},
            {"down", &LayerWeights::down},
        };
        for (const auto& [name, part] : parts) {
            if (!(model_.layers[0].*part).w.defined()) {  // a layer with experts
                continue;
            }
            for (const int64_t rows :
                 {int64_t{1},
                  int64_t{16},
                  int64_t{64},
                  int64_t{256},
                  int64_t{2048},
                  int64_t{8192}}) {
                if (stream_.is_cpu() && rows > 2048) {
                    continue;
                }
                linear_row(name, part, rows);
            }
        }
    }

    // The products of a layer's experts, with as many rows for each.
    void experts() {
        if (!model_.layers[0].moe) {
            return;
        }
        for (const bool down : {false, true}) {
            for (const int64_t rows : {1, 8, 64, 256, 1024}) {
                grouped_rows(down, rows, 0);
                if (rows < 256 || model_.layers[0].moe->gate.w[0].scale_bytes() == 0) {
                    continue;
                }
                for (const int64_t mib : {16, 64, 256}) {
                    grouped_rows(down, rows, mib << 20);
                }
            }
        }
    }

    // `dequant_bytes`: room for experts decoded first; 0: decoded inside the product.
    void grouped_rows(bool down, int64_t rows_each, int64_t dequant_bytes) {
        const ScratchScope scope(stream_.scratch);
        const auto weights = [&](int i) -> const std::vector<QuantizedMatrix>& {
            const auto& moe = model_.layers[static_cast<size_t>(i) % model_.layers.size()].moe;
            return down ? moe->down.w : moe->gate.w;
        };
        const QuantizedMatrix& w = weights(0)[0];
        const auto count = static_cast<int64_t>(weights(0).size());
        const int64_t rows = rows_each * count;
        const Tensor x = stream_.scratch.take(model_.compute, {rows, w.cols});
        const Tensor y = stream_.scratch.take(model_.compute, {rows, w.rows});
        const Tensor offsets = stream_.scratch.take(DType::kI32, {count + 1});
        std::vector<int32_t> first;
        for (int64_t e = 0; e <= count; ++e) {
            first.push_back(static_cast<int32_t>(e * rows_each));
        }
        copy_to_device(stream_, offsets.data, first.data(), first.size() * sizeof(int32_t));
        fill(x);
        std::optional<DequantBuffer> buffer;
        if (dequant_bytes > 0) {
            buffer.emplace(stream_, dequant_bytes);
        }
        DequantBuffer* dequant = buffer ? &*buffer : nullptr;
        const auto params = [&](int i) {
            return GroupedLinearParams{x, weights(i), {}, offsets.as<int32_t>(), dequant};
        };
        const int inner = static_cast<int>(model_.layers.size());
        const double n = static_cast<double>(rows);
        const double flops = 2.0 * n * static_cast<double>(w.rows) * static_cast<double>(w.cols);
        const double bytes =
            static_cast<double>(count * w.bytes()) + 2.0 * n * static_cast<double>(w.rows + w.cols);
        BenchRow row;
        row.shape = fmt::format(
            "{} {} {} x M={} N={} K={}{}",
            down ? "down" : "gate",
            format_name(w.format),
            count,
            rows_each,
            w.rows,
            w.cols,
            dequant_bytes > 0 ? fmt::format(" decoded first, {} MiB", dequant_bytes >> 20) : ""
        );
        const auto report = [&](const char* what, double seconds) {
            row.what = what;
            row.time_us = 1e6 * seconds;
            row.floor_us = floor_us(bytes, flops);
            row.note = fmt::format("{:.1f} TFLOP/s", flops / row.time_us * 1e-6);
            add(row);
        };
        report("grouped", time_of(stream_, 5, inner, [&](int i) {
                   grouped_linear(stream_, params(i), y);
               }));
        if (rows_each >= 64) {
            fill(y);
            report("grouped dgrad", time_of(stream_, 5, inner, [&](int i) {
                       grouped_linear_backward(stream_, params(i), y, x, false, {});
                   }));
        }
    }

    void linear_row(const char* name, LinearWeights LayerWeights::*part, int64_t rows) {
        const ScratchScope scope(stream_.scratch);
        const QuantizedMatrix& w = (model_.layers[0].*part).w;
        const Tensor x = stream_.scratch.take(model_.compute, {rows, w.cols});
        const Tensor dx = stream_.scratch.take(model_.compute, {rows, w.cols});
        const Tensor y = stream_.scratch.take(model_.compute, {rows, w.rows});
        fill(x);
        const auto params = [&](int i) {
            LinearParams p;
            p.x = x;
            p.w = (model_.layers[static_cast<size_t>(i) % model_.layers.size()].*part).w;
            return p;
        };
        const int inner = static_cast<int>(model_.layers.size());
        const double n = static_cast<double>(rows);
        const double flops = 2.0 * n * static_cast<double>(w.rows) * static_cast<double>(w.cols);
        const double bytes =
            static_cast<double>(w.bytes()) + 2.0 * n * static_cast<double>(w.rows + w.cols);
        BenchRow row;
        row.what = "linear";
        row.shape =
            fmt::format("{} {} M={} N={} K={}", name, format_name(w.format), rows, w.rows, w.cols);
        row.time_us =
            1e6 * time_of(stream_, 5, inner, [&](int i) { linear(stream_, params(i), y); });
        row.floor_us = floor_us(bytes, flops);
        row.note = fmt::format("{:.1f} TFLOP/s", flops / row.time_us * 1e-6);
        add(row);
        if (rows < 2048) {
            return;
        }
        fill(y);
        row.what = "dgrad";
        row.time_us = 1e6 * time_of(stream_, 5, inner, [&](int i) {
                          linear_backward(stream_, params(i), y, dx, false, AdapterGrad{});
                      });
        row.note = fmt::format("{:.1f} TFLOP/s", flops / row.time_us * 1e-6);
        add(row);
    }

    void fill(Tensor t) {
        std::vector<bf16> values(static_cast<size_t>(t.numel()));
        constexpr size_t kPeriod = 4194301;  // a prime: no two rows are alike
        for (size_t i = 0; i < values.size(); ++i) {
            if (i >= kPeriod) {
                values[i] = values[i - kPeriod];
                continue;
            }
            const uint32_t word = philox(static_cast<uint32_t>(i), 5, 0, 0, 3, 0).word[0];
            values[i] = to_bf16(2.0f * uniform_from_word(word) - 1.0f);
        }
        copy_to_device(stream_, t.data, values.data(), values.size() * sizeof(bf16));
        synchronize(stream_);
    }

    // Bytes that one decode step must read: weights, head, adapter, keys and values. `active`:
    // experts of a layer that some token chose.
    double decode_bytes(int64_t batch, double context, double active) const {
        const ModelConfig& c = model_.config;
        double bytes = static_cast<double>(model_.head.bytes());
        for (const auto& layer : model_.layers) {
            for (const LinearWeights* l :
                 {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
                bytes += static_cast<double>(l->w.bytes());
            }
            if (layer.moe) {
                bytes += expert_bytes(*layer.moe, active);
            }
        }
        bytes += adapter_bytes();
        return bytes + static_cast<double>(batch) * context * static_cast<double>(c.num_layers) *
                           4.0 * static_cast<double>(c.num_kv_heads * c.head_dim);
    }

    // Of so many experts, and the router.
    double expert_bytes(const MoeWeights& moe, double active) const {
        const double each = static_cast<double>(
            moe.gate.w[0].bytes() + moe.up.w[0].bytes() + moe.down.w[0].bytes()
        );
        return each * active + static_cast<double>(moe.router.bytes());
    }

    double adapter_bytes() const {
        if (adapter_ == nullptr) {
            return 0;
        }
        const int slot = adapter_->pin_current();
        double bytes = 0;
        for (size_t site = 0; site < model_.sites.size(); ++site) {
            const AdapterView view = adapter_->view(slot, static_cast<int32_t>(site));
            for (const Tensor& t : {view.lora_a, view.lora_b, view.oft_d}) {
                bytes += t.defined() ? static_cast<double>(t.bytes()) : 0.0;
            }
        }
        adapter_->unpin(slot);
        return bytes;
    }

    // That one token meets.
    double linear_parameters() const {
        double parameters = 0;
        double in_experts = 0;
        for (const auto& site : model_.sites) {
            const bool expert = site.module.find(".experts.") != std::string::npos;
            (expert ? in_experts : parameters) +=
                static_cast<double>(site.in) * static_cast<double>(site.out);
        }
        const ModelConfig& c = model_.config;
        const double share = c.num_experts == 0 ? 0.0
                                                : static_cast<double>(c.experts_per_token) /
                                                      static_cast<double>(c.num_experts);
        return parameters + share * in_experts;
    }

    // Of a token in training: forward, what backward runs again (forward.h), and gradients. The
    // last product of a dense layer is not run again, nor is attention when it is kept.
    double train_flops() const {
        const ModelConfig& c = model_.config;
        const auto dense_layers = static_cast<double>(c.num_layers - c.num_expert_layers());
        const double once = dense_layers * static_cast<double>(c.mlp_width * c.width);
        const double products =
            6.0 * (linear_parameters() + static_cast<double>(c.vocab_size * c.width)) - 2.0 * once;
        const double attention =
            2.0 *
            static_cast<double>(options_.train_length * c.num_layers * c.num_heads * c.head_dim);
        const double again = train_options().keeps_attention() ? 0.0 : 1.0;
        return products + (1.0 + again + 2.5) * attention;
    }

    void decode(int64_t batch) {
        const ModelConfig& c = model_.config;
        const int64_t length = stream_.is_cpu() ? 16 : 96;
        EngineOptions options;
        options.max_batch = batch;
        options.prefill_chunk = 8192;
        options.kv_tokens = batch * (options_.context + length + 4 * kPageTokens);
        options.record_routing = c.num_experts > 0;
        const MemoryPlan memory =
            plan({options, options_.context, options_.context + length, SamplingFilter{}}, {});
        prepare(memory);
        RolloutEngine engine(stream_, model_, adapter_.get(), options);
        for (int64_t b = 0; b < batch; ++b) {
            Request request;
            request.prompt = random_ids(model_, options_.context, static_cast<uint32_t>(b));
            request.request_ids = {static_cast<uint64_t>(b)};
            request.max_tokens = length;
            request.ignore_stop = true;
            engine.submit(std::move(request));
        }
        const double start = now_s();
        while (engine.num_running() < batch) {
            CHECK(engine.step(), "(all requests fit)");
        }
        const double prefill = now_s() - start;
        // The first rounds capture the graph and are not timed.
        engine.step();
        std::vector<double> times;
        int64_t before = engine.stats().decoded_tokens;
        while (engine.num_running() == batch && times.size() < 8) {
            const double from = now_s();
            engine.step();
            const int64_t tokens = engine.stats().decoded_tokens - before;
            before += tokens;
            if (tokens > 0) {
                times.push_back(
                    (now_s() - from) * static_cast<double>(batch) / static_cast<double>(tokens)
                );
            }
        }
        BenchRow row;
        row.what = "decode step";
        row.shape = fmt::format(
            "{} batch {} context {} adapter {}",
            model_.name,
            batch,
            options_.context,
            options_.adapter
        );
        row.time_us = 1e6 * median(times);
        const double context = static_cast<double>(options_.context + length / 2);
        const double flops =
            2.0 * static_cast<double>(batch) *
            (linear_parameters() + static_cast<double>(c.vocab_size * c.width) +
             2.0 * context * static_cast<double>(c.num_layers * c.num_heads * c.head_dim));
        row.tokens_per_s = static_cast<double>(batch) / (row.time_us * 1e-6);
        row.note = fmt::format(
            "prefill {:.0f} tok/s", static_cast<double>(batch * options_.context) / prefill
        );
        measure(&engine, nullptr);
        while (engine.step()) {
        }
        std::vector<Completion> answers = engine.take_finished();
        row.digest = digest_of(answers);
        double active = 0;
        if (c.num_experts > 0) {
            active = mean_active_experts(c, answers, options_.context);
            row.note += fmt::format(
                ", experts active in a layer {:.1f} expected, {:.1f} met",
                active_experts(c.num_experts, c.experts_per_token, batch),
                active
            );
        }
        row.floor_us = floor_us(decode_bytes(batch, context, active), flops);
        add_streamed(row, batch, 1);
        report_memory(row, memory);
        add(row);
    }

    // One packed batch through forward, recomputed backward and the optimiser.
    void train() {
        std::vector<std::vector<int32_t>> texts;
        for (int64_t done = 0; done < options_.train_tokens; done += options_.train_length) {
            texts.push_back(
                random_ids(model_, options_.train_length + 1, static_cast<uint32_t>(7000 + done))
            );
        }
        std::vector<TrainSequence> sequences;
        for (size_t i = 0; i < texts.size(); ++i) {
            sequences.push_back({&texts[i], 1, static_cast<int64_t>(i)});
        }
        TrainShape shape;
        shape.sequences = static_cast<int64_t>(texts.size());
        shape.tokens = shape.sequences * options_.train_length;
        shape.rows = shape.tokens;
        shape.longest = options_.train_length;
        shape.offload = options_.activation_offloading;
        shape.keep_attention = train_options().keeps_attention();
        const MemoryPlan memory = plan({}, shape);
        prepare(memory);
        Trainer trainer = make_trainer(shape.tokens);
        const auto step = [&](int) {
            const int slot = adapter_->pin_current();
            trainer.accumulate(sequences, slot, [&](auto, auto, auto coefficients) {
                if (memory_bytes_ <= 0) {
                    measure(nullptr, &trainer);
                }
                for (auto& c : coefficients) {
                    std::fill(c.d_logprob.begin(), c.d_logprob.end(), -1e-4f);
                }
            });
            adapter_->unpin(slot);
            trainer.apply();
            adapter_->publish(stream_, adapter_->current_version() + 1);
        };
        const double seconds = time_of(stream_, 3, 1, step);
        const double tokens = static_cast<double>(options_.train_tokens);
        const double flops = tokens * train_flops();
        BenchRow row;
        row.what = "train step";
        row.shape = fmt::format(
            "{} {} x {} tokens adapter {}{}",
            model_.name,
            texts.size(),
            options_.train_length,
            options_.adapter,
            memory_text()
        );
        row.time_us = 1e6 * seconds;
        row.floor_us = options_.matrix_flops_per_s > 0 ? floor_us(0, flops) : 0;
        row.tokens_per_s = tokens / seconds;
        row.note = fmt::format("{:.1f} TFLOP/s (attention and head in)", flops / seconds * 1e-12);
        row.digest = digest_of(stream_, *adapter_);
        add_streamed(row, options_.train_tokens, 2);
        report_memory(row, memory);
        add(row);
    }

    TrainOptions train_options() const {
        TrainOptions options;
        options.recompute = options_.recompute;
        options.activation_offloading = options_.activation_offloading;
        return options;
    }

    // Of a row's shape: what is not the default.
    std::string memory_text() const {
        if (options_.activation_offloading) {
            return " offloading";
        }
        return train_options().keeps_attention() ? "" : " full recomputation";
    }

    Trainer make_trainer(int64_t tokens) {
        return {stream_, model_, *adapter_, train_options(), SamplingFilter{}, false, tokens};
    }

    // Rollout of prompts x samples, training on all of it, and the update; no reward program, no
    // text.
    void rl_step() {
        const int64_t count = options_.rl_prompts * options_.rl_samples;
        EngineOptions options;
        options.max_batch = std::min<int64_t>(count, 512);
        options.prefill_chunk = 8192;
        options.kv_tokens = options.max_batch * (options_.rl_prompt_tokens +
                                                 options_.rl_response_tokens + 4 * kPageTokens);
        const MemoryPlan memory = plan(
            {options,
             options_.rl_prompt_tokens,
             options_.rl_prompt_tokens + options_.rl_response_tokens,
             SamplingFilter{}},
            rl_batch()
        );
        prepare(memory);
        RolloutEngine engine(stream_, model_, adapter_.get(), options);
        std::vector<std::vector<int32_t>> prompts;
        for (int64_t p = 0; p < options_.rl_prompts; ++p) {
            prompts.push_back(
                random_ids(model_, options_.rl_prompt_tokens, static_cast<uint32_t>(9000 + p))
            );
            Request request;
            request.prompt = prompts.back();
            request.num_samples = static_cast<int32_t>(options_.rl_samples);
            for (int64_t s = 0; s < options_.rl_samples; ++s) {
                request.request_ids.push_back(static_cast<uint64_t>(p * options_.rl_samples + s));
            }
            request.max_tokens = options_.rl_response_tokens;
            request.ignore_stop = true;
            engine.submit(std::move(request));
        }
        const double start = now_s();
        while (engine.step()) {
        }
        const double rollout = now_s() - start;
        std::vector<Completion> done = engine.take_finished();
        BenchRow row;
        row.digest = digest_of(done);
        const double train = train_on(prompts, done, engine);
        row.what = "rl step";
        row.shape = fmt::format(
            "{} {} x {}, {} in, {} out, adapter {}{}",
            model_.name,
            options_.rl_prompts,
            options_.rl_samples,
            options_.rl_prompt_tokens,
            options_.rl_response_tokens,
            options_.adapter,
            memory_text()
        );
        row.time_us = 1e6 * (rollout + train);
        row.tokens_per_s =
            static_cast<double>(count * options_.rl_response_tokens) / (rollout + train);
        row.note = fmt::format(
            "rollout {:.2f} s, train and update {:.2f} s, parity {}/{}",
            rollout,
            train,
            mismatches_,
            compared_
        );
        report_memory(row, memory);
        add(row);
    }

    // What train_on packs: whole answers up to train_tokens.
    TrainShape rl_batch() const {
        const int64_t length = options_.rl_prompt_tokens + options_.rl_response_tokens;
        TrainShape shape;
        shape.sequences = std::min(
            std::max<int64_t>(1, options_.train_tokens / length),
            options_.rl_prompts * options_.rl_samples
        );
        shape.tokens = shape.sequences * (length - 1);
        shape.rows = shape.sequences * options_.rl_response_tokens;
        shape.longest = length;
        shape.offload = options_.activation_offloading;
        shape.keep_attention = train_options().keeps_attention();
        return shape;
    }

    double train_on(
        const std::vector<std::vector<int32_t>>& prompts,
        const std::vector<Completion>& done,
        const RolloutEngine& engine
    ) {
        Trainer trainer = make_trainer(rl_batch().tokens);
        const double start = now_s();
        const int slot = adapter_->pin_current();
        std::vector<std::vector<int32_t>> texts(done.size());
        std::vector<TrainSequence> batch;
        int64_t tokens = 0;
        const auto flush = [&] {
            trainer.accumulate(batch, slot, [&](auto sequences, auto columns, auto coefficients) {
                if (memory_bytes_ <= 0) {
                    measure(&engine, &trainer);
                }
                for (size_t i = 0; i < sequences.size(); ++i) {
                    const auto& sampled = done[static_cast<size_t>(sequences[i].index)].logprobs;
                    for (size_t t = 0; t < sampled.size(); ++t) {
                        ++compared_;
                        mismatches_ +=
                            float_bits(sampled[t]) != float_bits(columns[i].logprob[t]) ? 1 : 0;
                    }
                    std::fill(
                        coefficients[i].d_logprob.begin(), coefficients[i].d_logprob.end(), 1e-5f
                    );
                }
            });
            batch.clear();
            tokens = 0;
        };
        for (size_t i = 0; i < done.size(); ++i) {
            const auto& prompt = prompts[static_cast<size_t>(done[i].ticket)];
            texts[i] = prompt;
            texts[i].insert(texts[i].end(), done[i].ids.begin(), done[i].ids.end());
            if (tokens + static_cast<int64_t>(texts[i].size()) > options_.train_tokens) {
                flush();
            }
            batch.push_back(
                {&texts[i], static_cast<int32_t>(prompt.size()), static_cast<int64_t>(i)}
            );
            tokens += static_cast<int64_t>(texts[i].size());
        }
        flush();
        adapter_->unpin(slot);
        trainer.apply();
        adapter_->publish(stream_, adapter_->current_version() + 1);
        synchronize(stream_);
        return now_s() - start;
    }

    Stream& stream_;
    const Model& model_;
    BenchOptions options_;
    std::unique_ptr<AdapterStore> adapter_;
    std::vector<BenchRow> rows_;
    double bandwidth_ = 1;
    double host_rate_ = 1;     // bytes/s from host memory
    double memory_bytes_ = 0;  // the most that was measured since prepare()
    int64_t mismatches_ = 0;
    int64_t compared_ = 0;
};

}  // namespace

std::vector<HostExpertsRow> compare_host_experts(
    const std::vector<BenchRow>& device, const std::vector<BenchRow>& host
) {
    std::vector<HostExpertsRow> rows;
    for (const BenchRow& h : host) {
        const auto same = std::find_if(device.begin(), device.end(), [&](const BenchRow& d) {
            return d.what == h.what && d.shape == h.shape;
        });
        if (h.digest.empty() || same == device.end()) {
            continue;
        }
        const double predicted = h.streamed_us > 0 ? same->time_us + h.streamed_us : 0;
        rows.push_back(
            {h.what, h.shape, same->time_us, h.time_us, predicted, h.digest == same->digest}
        );
    }
    return rows;
}

std::vector<BenchRow> run_bench_table(
    Stream& stream, const Model& model, const BenchOptions& options
) {
    return Bench(stream, model, options).run();
}

}  // namespace orbit
