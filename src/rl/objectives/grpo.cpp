#include "rl/objectives/grpo.h"

#include <algorithm>
#include <cmath>

namespace orbit {

void grpo_advantages(Group& group) {
    double sum = 0;
    double lowest = 0;
    double highest = 0;
    int64_t scored = 0;
    for (const auto& sample : group.samples) {
        if (sample.score.status != ScoreStatus::kScored) {
            continue;
        }
        lowest = scored == 0 ? sample.score.value : std::min(lowest, sample.score.value);
        highest = scored == 0 ? sample.score.value : std::max(highest, sample.score.value);
        sum += sample.score.value;
        ++scored;
    }
    const double mean = scored > 0 ? sum / static_cast<double>(scored) : 0.0;
    for (auto& sample : group.samples) {
        const bool counts = sample.score.status == ScoreStatus::kScored && lowest != highest;
        sample.advantage = counts ? sample.score.value - mean : 0.0;
    }
}

GrpoToken grpo_token(
    const GrpoOptions& options, double advantage, double logprob, double old, double reference
) {
    GrpoToken token;
    const double rho = std::exp(logprob - old);
    const double clipped = std::clamp(rho, 1.0 - options.clip_low, 1.0 + options.clip_high);
    token.loss = -std::min(rho * advantage, clipped * advantage);
    token.clipped = (advantage >= 0 && rho > 1.0 + options.clip_high) ||
                    (advantage < 0 && rho < 1.0 - options.clip_low);
    token.d_logprob = token.clipped ? 0.0 : -rho * advantage;
    if (options.kl_coef != 0) {
        const double u = logprob - reference;
        token.loss += options.kl_coef * rho * (std::exp(-u) - 1.0 + u);
        token.d_logprob += options.kl_coef * rho * u;
    }
    return token;
}

}  // namespace orbit
