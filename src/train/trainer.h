// Trainer: packed ragged batches -> adapter gradients -> one AdamW step. It knows coefficients per
// token, not rewards.
//
// accumulate() runs the same forward as the rollout, so the log-probs it sees are the sampler's
// bits; it asks the objective for (dL/dlogp, dL/dentropy) of every response token and walks the
// layers back, re-running each one, attention excepted (train.recompute). Memory of one batch: per
// layer an input and attention's output (with train.activation_offloading two inputs in all, the
// others in host memory), one layer's activations, and a chunk of logits.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/forward.h"
#include "ops/optimizer.h"
#include "train/options.h"

namespace orbit {

// One sequence of a training batch.
struct TrainSequence {
    const std::vector<int32_t>* ids = nullptr;  // prompt then response
    int32_t prompt_length = 0;
    int64_t index = 0;  // the caller's name for it
    // The experts that the rollout took, as Completion::routing has them; null or empty: unknown.
    const std::vector<uint8_t>* routing = nullptr;
};

// Columns of one sequence, one entry per response token.
struct TokenColumns {
    std::vector<float> logprob;  // current policy
    std::vector<float> entropy;
};

struct TokenCoefficients {
    std::vector<float> d_logprob;  // dL/dlogp, one per response token
    std::vector<float> d_entropy;  // empty: none
};

// Fills the coefficients of the batch's sequences, given their columns.
using CoefficientsFn = std::function<
    void(std::span<const TrainSequence>, std::span<const TokenColumns>, std::span<TokenCoefficients>)>;

// The router's choices of the training forward beside those of the rollout. The pairs are of token
// and layer.
struct RoutingCheck {
    int64_t pairs = 0;
    int64_t mismatches = 0;
    std::string first;  // where they differ first
};

struct Update {
    double grad_norm = 0;
    double grad_scale = 1;  // < 1: clipped
    double lr = 0;
    bool skipped = false;    // the gradient was not finite; nothing changed
    int64_t num_asleep = 0;  // parameters that AdamW left alone: see Trainer::apply
};

class Trainer {
  public:
    Trainer(
        Stream& stream,
        const Model& model,
        AdapterStore& adapter,
        const TrainOptions& options,
        SamplingFilter filter,
        bool replay_routing = false,  // take the recorded experts instead of the router's choice
        int64_t offload_tokens = 0    // of the largest batch, with train.activation_offloading
    );

    // Adds the gradient of one batch. Sequences are whole; slot: the adapter version to
    // differentiate. The check covers the sequences that bring their routing.
    RoutingCheck accumulate(
        std::span<const TrainSequence> batch, int slot, const CoefficientsFn& coefficients
    );
    // Clip, AdamW, zero the gradients. Three non-finite gradients in a row are a UserError.
    // A tensor whose gradient and moments are all zero - that of an expert which no token has
    // reached yet - is left alone, which is what AdamW without weight decay does to it, bit for
    // bit. An expert that was reached once is updated in every step: its moments go on moving it.
    Update apply();

    AdapterStore& adapter() { return *adapter_; }

    // Host memory of layer inputs; 0 without train.activation_offloading.
    int64_t offloaded_bytes() const { return offload_ ? offload_->bytes() : 0; }

    int64_t optimizer_step() const { return optimizer_step_; }

    // After moments were written from outside, too.
    void set_optimizer_step(int64_t step) {
        optimizer_step_ = step;
        awake_.clear();
    }

    double learning_rate(int64_t applied_steps) const;

  private:
    void wake();
    int64_t update_awake(const AdamWParams& params);

    Stream* stream_;
    const Model* model_;
    AdapterStore* adapter_;
    TrainOptions options_;
    SamplingFilter filter_;
    bool replay_routing_;
    std::unique_ptr<ActivationOffload> offload_;
    int64_t optimizer_step_ = 0;  // applied steps
    int skipped_in_a_row_ = 0;
    // By tensor of the adapter: false while its moments are known to be zero. Empty: not known.
    std::vector<bool> awake_;
};

}  // namespace orbit
