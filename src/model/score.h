// Log-probs of given texts: packed whole sequences, or cut into chunks through paged keys and
// values. Used by verify, parity, the reference policy (adapter off) and evaluation.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/forward.h"

namespace orbit {

struct ScoreOptions {
    int64_t tokens_per_batch = 8192;
    int64_t chunk = 0;  // > 0: each text alone, this many tokens a forward
    SamplingFilter filter;
    bool entropy = false;
};

struct TokenScores {
    std::vector<float> logprobs;   // [i] belongs to ids[i + 1]
    std::vector<float> entropies;  // same, when asked for
};

std::vector<TokenScores> score_texts(
    Stream& stream,
    const Model& model,
    AdapterStore* adapter,
    int slot,
    std::span<const std::vector<int32_t>> texts,
    const ScoreOptions& options = {}
);

}  // namespace orbit
