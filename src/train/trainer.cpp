#include "train/trainer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <numeric>

#include "base/log.h"
#include "model/token_batch.h"
#include "ops/embed.h"
#include "ops/norm.h"

namespace orbit {
namespace {

// The rows that predict response tokens, and those tokens, in batch order.
struct ResponseRows {
    TokenBatch batch;
    std::vector<int32_t> rows;
    std::vector<int32_t> targets;
    int64_t num_pages = 0;
};

ResponseRows pack(std::span<const TrainSequence> sequences) {
    ResponseRows packed;
    for (const auto& sequence : sequences) {
        const auto& ids = *sequence.ids;
        CHECK_GE(sequence.prompt_length, 1);
        // The last token predicts nothing that is trained.
        const auto count = static_cast<int32_t>(ids.size()) - 1;
        const int64_t pages = pages_for(count);
        std::vector<int32_t> table(static_cast<size_t>(pages));
        std::iota(table.begin(), table.end(), static_cast<int32_t>(packed.num_pages));
        packed.num_pages += pages;
        const int32_t first = packed.batch.num_tokens();
        packed.batch.add(std::span(ids).first(static_cast<size_t>(count)), 0, table);
        for (int32_t i = sequence.prompt_length - 1; i < count; ++i) {
            packed.rows.push_back(first + i);
            packed.targets.push_back(ids[static_cast<size_t>(i + 1)]);
        }
    }
    return packed;
}

bool has_routing(const TrainSequence& sequence) {
    return sequence.routing != nullptr && !sequence.routing->empty();
}

// The pages of pack() with the rollout's experts in them, for route() to take.
RoutingPages upload_replay(
    Stream& stream, std::span<const TrainSequence> sequences, RoutingPages like, int64_t num_pages
) {
    const int64_t page_bytes = kPageTokens * like.token_bytes();
    std::vector<uint8_t> ids(static_cast<size_t>(num_pages * page_bytes));
    int64_t page = 0;
    for (const auto& sequence : sequences) {
        const auto tokens = static_cast<int64_t>(sequence.ids->size()) - 1;
        CHECK(has_routing(sequence), "(nothing to replay)");
        CHECK_EQ(static_cast<int64_t>(sequence.routing->size()), tokens * like.token_bytes());
        std::copy(
            sequence.routing->begin(), sequence.routing->end(), ids.begin() + page * page_bytes
        );
        page += pages_for(tokens);
    }
    like.ids = upload_array<uint8_t>(stream, ids);
    return like;
}

// Compares what this forward recorded in the pages of pack() with what the rollout did.
RoutingCheck check_routing(
    Stream& stream, const KvCache& kv, std::span<const TrainSequence> sequences
) {
    RoutingCheck check;
    const RoutingPages& record = kv.routing();
    if (!record.defined()) {
        return check;
    }
    const auto bytes = static_cast<size_t>(record.layer_bytes());
    int64_t page = 0;
    for (const auto& sequence : sequences) {
        const auto tokens = static_cast<int64_t>(sequence.ids->size()) - 1;
        std::vector<int32_t> pages(static_cast<size_t>(pages_for(tokens)));
        std::iota(pages.begin(), pages.end(), static_cast<int32_t>(page));
        page += pages_for(tokens);
        if (!has_routing(sequence)) {
            continue;
        }
        const std::vector<uint8_t> ours = kv.read_routing(stream, pages, tokens);
        CHECK_EQ(ours.size(), sequence.routing->size());
        for (size_t at = 0; at < ours.size(); at += bytes) {
            ++check.pairs;
            if (std::memcmp(ours.data() + at, sequence.routing->data() + at, bytes) != 0 &&
                check.mismatches++ == 0) {
                const size_t pair = at / bytes;
                const auto layers = static_cast<size_t>(record.layers);
                check.first = fmt::format(
                    "sequence {} token {}: another choice of experts in expert layer {}",
                    sequence.index,
                    pair / layers,
                    pair % layers
                );
            }
        }
    }
    return check;
}

// Splits a flat array of all response tokens into one vector per sequence.
template <typename Assign>
void per_sequence(std::span<const TrainSequence> sequences, Assign assign) {
    size_t at = 0;
    for (size_t s = 0; s < sequences.size(); ++s) {
        const size_t count =
            sequences[s].ids->size() - static_cast<size_t>(sequences[s].prompt_length);
        assign(s, at, count);
        at += count;
    }
}

}  // namespace

Trainer::Trainer(
    Stream& stream,
    const Model& model,
    AdapterStore& adapter,
    const TrainOptions& options,
    SamplingFilter filter,
    bool replay_routing,
    int64_t offload_tokens
)
    : stream_(&stream),
      model_(&model),
      adapter_(&adapter),
      options_(options),
      filter_(filter),
      replay_routing_(replay_routing) {
    adapter_->zero_gradients(stream);
    if (options.activation_offloading) {
        offload_ = std::make_unique<ActivationOffload>(stream.device, model, offload_tokens);
    }
}

RoutingCheck Trainer::accumulate(
    std::span<const TrainSequence> sequences, int slot, const CoefficientsFn& coefficients
) {
    Stream& stream = *stream_;
    const ScratchScope scope(stream.scratch);
    const ResponseRows packed = pack(sequences);
    const auto count = static_cast<int64_t>(packed.rows.size());
    const bool routed = std::any_of(sequences.begin(), sequences.end(), has_routing);
    const KvCache kv(*model_, 1, packed.num_pages, routed);
    Pass pass{stream, *model_, packed.batch.upload(stream), kv, adapter_, slot};
    if (replay_routing_ && kv.routing().defined()) {
        pass.replay = upload_replay(stream, sequences, kv.routing(), packed.num_pages);
    }
    SavedActivations saved{offload_.get(), options_.keeps_attention()};
    const Tensor hidden = forward_hidden(pass, &saved);

    const int32_t* rows = upload_array<int32_t>(stream, packed.rows);
    const int32_t* targets = upload_array<int32_t>(stream, packed.targets);
    Tensor before_norm;
    const HeadParams head =
        head_params(*model_, head_hidden(pass, hidden, rows, count, &before_norm));
    auto* logprobs = stream.scratch.take(DType::kF32, {count}).as<float>();
    auto* entropies = stream.scratch.take(DType::kF32, {count}).as<float>();
    token_logprobs(stream, head, targets, filter_, logprobs, entropies);

    std::vector<float> logprob(packed.rows.size());
    std::vector<float> entropy(packed.rows.size());
    copy_to_host(stream, logprob.data(), logprobs, logprob.size() * sizeof(float));
    copy_to_host(stream, entropy.data(), entropies, entropy.size() * sizeof(float));
    const RoutingCheck routing = check_routing(stream, kv, sequences);
    std::vector<TokenColumns> columns(sequences.size());
    std::vector<TokenCoefficients> wanted(sequences.size());
    per_sequence(sequences, [&](size_t s, size_t at, size_t n) {
        const auto from = static_cast<int64_t>(at);
        const auto to = static_cast<int64_t>(at + n);
        columns[s].logprob.assign(logprob.begin() + from, logprob.begin() + to);
        columns[s].entropy.assign(entropy.begin() + from, entropy.begin() + to);
        wanted[s].d_logprob.assign(n, 0.0f);
    });
    coefficients(sequences, columns, wanted);
    bool any_entropy = false;
    std::fill(entropy.begin(), entropy.end(), 0.0f);
    per_sequence(sequences, [&](size_t s, size_t at, size_t n) {
        CHECK_EQ(wanted[s].d_logprob.size(), n);
        std::copy(
            wanted[s].d_logprob.begin(),
            wanted[s].d_logprob.end(),
            logprob.begin() + static_cast<int64_t>(at)
        );
        if (!wanted[s].d_entropy.empty()) {
            any_entropy = true;
            std::copy(
                wanted[s].d_entropy.begin(),
                wanted[s].d_entropy.end(),
                entropy.begin() + static_cast<int64_t>(at)
            );
        }
    });

    const float* d_logprob = upload_array<float>(stream, logprob);
    const float* d_entropy = any_entropy ? upload_array<float>(stream, entropy) : nullptr;
    const Tensor dh = stream.scratch.take(model_->compute, {count, model_->config.width});
    token_logprobs_backward(stream, head, targets, filter_, d_logprob, d_entropy, dh);
    const Tensor d_rows = stream.scratch.take(model_->compute, {count, model_->config.width});
    rms_norm_backward(
        stream, before_norm, model_->final_norm, model_->config.norm_eps, dh, d_rows, false
    );
    const Tensor d_hidden =
        stream.scratch.take(model_->compute, {pass.batch.num_tokens, model_->config.width});
    zero_fill(stream, d_hidden.data, static_cast<size_t>(d_hidden.bytes()));
    scatter_rows(stream, d_rows, rows, d_hidden);
    backward_layers(pass, saved, d_hidden);
    return routing;
}

double Trainer::learning_rate(int64_t applied) const {
    const auto total = static_cast<double>(options_.steps);
    const auto warmup = static_cast<double>(options_.warmup_steps);
    const auto done = static_cast<double>(applied);
    if (done < warmup) {
        return options_.lr * (done + 1.0) / warmup;
    }
    const double progress =
        total > warmup ? std::min(1.0, (done - warmup) / (total - warmup)) : 0.0;
    if (options_.schedule == "linear") {
        return options_.lr * (1.0 - progress);
    }
    if (options_.schedule == "cosine") {
        return options_.lr * (0.1 + 0.45 * (1.0 + std::cos(std::numbers::pi * progress)));
    }
    return options_.lr;
}

// Tensors with a gradient, or with moments when that is not known yet, are awake from now on.
void Trainer::wake() {
    const auto& tensors = adapter_->tensors();
    const bool look = awake_.empty();
    awake_.resize(tensors.size(), false);
    for (size_t t = 0; t < tensors.size(); ++t) {
        const int64_t at = tensors[t].offset;
        const int64_t count = tensors[t].shape[0] * tensors[t].shape[1];
        if (!awake_[t]) {
            awake_[t] = !all_zero(adapter_->gradients() + at, count) ||
                        (look && !(all_zero(adapter_->moments_m() + at, count) &&
                                   all_zero(adapter_->moments_v() + at, count)));
        }
    }
}

// AdamW on every run of tensors that are awake; returns their parameters.
int64_t Trainer::update_awake(const AdamWParams& params) {
    const auto step = [&](int64_t begin, int64_t end) {
        adamw(
            *stream_,
            params,
            adapter_->masters() + begin,
            adapter_->moments_m() + begin,
            adapter_->moments_v() + begin,
            adapter_->gradients() + begin,
            end - begin
        );
        return end - begin;
    };
    // Weight decay moves what sleeps; a GPU would have to be asked who does.
    if (params.weight_decay != 0 || !stream_->is_cpu()) {
        return step(0, adapter_->num_parameters());
    }
    wake();
    const auto& tensors = adapter_->tensors();
    int64_t updated = 0;
    int64_t begin = -1;
    for (size_t t = 0; t <= tensors.size(); ++t) {
        const bool awake = t < tensors.size() && awake_[t];
        if (awake && begin < 0) {
            begin = tensors[t].offset;
        } else if (!awake && begin >= 0) {
            const bool last = t == tensors.size();
            updated += step(begin, last ? adapter_->num_parameters() : tensors[t].offset);
            begin = -1;
        }
    }
    return updated;
}

Update Trainer::apply() {
    Stream& stream = *stream_;
    adapter_->finish_gradients(stream);
    const int64_t count = adapter_->num_parameters();
    Update update;
    update.grad_norm = global_norm(stream, adapter_->gradients(), count);
    update.lr = learning_rate(optimizer_step_);
    if (!std::isfinite(update.grad_norm)) {
        update.skipped = true;
        ++skipped_in_a_row_;
        USER_CHECK(
            skipped_in_a_row_ < 3,
            "the gradient was not finite in three steps in a row; lower train.lr (now {}) and "
            "resume from a checkpoint.",
            options_.lr
        );
        warn_line("the gradient is not finite; this step changes nothing");
    } else {
        skipped_in_a_row_ = 0;
        if (options_.clip_norm > 0) {
            update.grad_scale = std::min(1.0, options_.clip_norm / (update.grad_norm + 1e-6));
        }
        AdamWParams params;
        params.lr = update.lr;
        params.beta1 = options_.beta1;
        params.beta2 = options_.beta2;
        params.eps = options_.eps;
        params.weight_decay = options_.weight_decay;
        params.step = ++optimizer_step_;
        params.grad_scale = update.grad_scale;
        update.num_asleep = count - update_awake(params);
    }
    adapter_->zero_gradients(stream);
    return update;
}

}  // namespace orbit
