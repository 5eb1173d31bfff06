// Rotary frequencies and their cos/sin table (models.md 1.2, 1.3).
#pragma once

#include <string_view>
#include <vector>

#include "device/device.h"
#include "model/model.h"

namespace orbit {

constexpr int64_t kRopeRowsMax = 131072;  // longer contexts would only fill memory

struct RopeFrequencies {
    std::vector<double> frequency;  // [head_dim / 2]
    double attention_factor = 1;    // multiplies cos and sin
};

// `factors`: empty, or one divisor per frequency (rope_freqs.weight of a GGUF file).
RopeFrequencies rope_frequencies(const ModelConfig& config, const std::vector<float>& factors);

// float32 tables of min(max_positions, kRopeRowsMax) rows in `arena`, computed in double.
RopeTable make_rope_table(
    Stream& stream, Arena& arena, const ModelConfig& config, const std::vector<float>& factors
);

}  // namespace orbit
