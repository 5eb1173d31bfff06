// The language-model head: log-prob, entropy, sampling and their backward, without the full logits
// of a batch in memory (chunks of rows, float32 logits that are never rounded). One code path
// serves the sampler and the trainer, so a token's rollout log-prob and its training log-prob are
// the same bits.
//
// Tempered logits z = logit * fp32(1 / temperature) (temperature 1: untouched). Filters, in this
// order: top-k (ties at the boundary kept), top-p on the renormalised rest (sorted by logit then
// lower id; the crossing token is kept), min-p. A filter that is off is skipped. The recorded
// log-prob is that of the distribution drawn from. lse is merged over vocabulary tiles of 1024 in
// ascending order (algorithms.md 2.2). Draw: exponential race with Philox, key = seed, counter =
// (id >> 2, position, rid_lo, rid_hi), lane id & 3; temperature 0: the largest logit, lowest id on
// ties (log-prob of temperature 1 is recorded).
#pragma once

#include "device/device.h"
#include "quant/quantized_matrix.h"

namespace orbit {

struct SamplingFilter {
    float temperature = 1.0f;
    float top_p = 1.0f;  // >= 1: off
    int32_t top_k = 0;   // <= 0: off
    float min_p = 0.0f;  // <= 0: off

    bool plain() const { return top_p >= 1.0f && top_k <= 0 && min_p <= 0.0f; }
};

struct HeadParams {
    Tensor h;           // [N, D], after the final norm
    QuantizedMatrix w;  // [V, D]
    int32_t num_tokens =
        0;  // ids >= num_tokens (padding rows of the vocabulary) are never drawn; lse covers all V
};

// One row of a sampling batch; array in device memory.
struct SampleRow {
    SamplingFilter filter;
    uint64_t seed = 0;
    uint64_t request =
        0;  // rid: derived from (step, prompt, sample), never from a slot or arrival order
    int32_t position = 0;  // index, in the whole sequence, of the token being drawn
    int32_t forced = -1;   // >= 0: not drawn, this id is taken (its log-prob is recorded)
};

// logprob, entropy: float32 [N]; entropy may be null. targets: int32 [N]. All device memory.
void token_logprobs(
    Stream& stream,
    const HeadParams& p,
    const int32_t* targets,
    const SamplingFilter& filter,
    float* logprob,
    float* entropy
);

// dh (overwritten, [N, D]) from per-row dL/dlogp and dL/dentropy (null: 0). Rebuilds the logits
// chunk by chunk: dL/dz_j = (c (1[j = a] - p_j) - e p_j (log p_j + H)) / temperature over the kept
// ids.
void token_logprobs_backward(
    Stream& stream,
    const HeadParams& p,
    const int32_t* targets,
    const SamplingFilter& filter,
    const float* d_logprob,
    const float* d_entropy,
    Tensor dh
);

void sample_tokens(
    Stream& stream, const HeadParams& p, const SampleRow* rows, int32_t* tokens, float* logprob
);

}  // namespace orbit
