// GRPO (Shao et al. 2024) with today's defaults: group mean without std (Dr.GRPO, Liu et al. 2025),
// clip 0.2 / 0.28 (DAPO), token-mean over the global batch, no KL. Two plain functions: advantages
// of all groups of a step, and (dL/dlogp) per token.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "data/example.h"

namespace orbit {

// One prompt and its answers.
struct Group {
    const Example* example = nullptr;
    std::vector<Trajectory> samples;
};

// advantage = reward - mean of the group's scored rewards; exactly 0 when all are equal and for
// unscored samples.
void grpo_advantages(Group& group);

struct GrpoOptions {
    double clip_low = 0.2;
    double clip_high = 0.28;
    double kl_coef = 0;
};

struct GrpoToken {
    double d_logprob = 0;  // dL/dlogp of the un-normalised token loss
    double loss = 0;
    bool clipped = false;
};

// The clipped surrogate -min(rho A, clip(rho) A) with rho = exp(logprob - old), and kl_coef * rho *
// k3 against `reference` (ignored when kl_coef is 0; algorithms.md 2.1 and 2.5).
GrpoToken grpo_token(
    const GrpoOptions& options, double advantage, double logprob, double old, double reference
);

}  // namespace orbit
