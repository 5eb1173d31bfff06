#include "model/rope_table.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/error.h"

namespace orbit {
namespace {

double llama3_frequency(double f, const RopeScaling& s) {
    const double wavelength = 2 * std::numbers::pi / f;
    if (wavelength < s.original_max_positions / s.high_freq_factor) {
        return f;
    }
    if (wavelength > s.original_max_positions / s.low_freq_factor) {
        return f / s.factor;
    }
    const double blend = (s.original_max_positions / wavelength - s.low_freq_factor) /
                         (s.high_freq_factor - s.low_freq_factor);
    return (1 - blend) * f / s.factor + blend * f;
}

void apply_yarn(std::vector<double>& frequency, const ModelConfig& config) {
    const RopeScaling& s = config.rope_scaling;
    const auto dim = static_cast<double>(config.head_dim);
    const auto channel = [&](double rotations) {
        return dim * std::log(s.original_max_positions / (2 * std::numbers::pi * rotations)) /
               (2 * std::log(config.rope_theta));
    };
    double low = channel(s.beta_fast);
    double high = channel(s.beta_slow);
    if (s.truncate) {
        low = std::floor(low);
        high = std::ceil(high);
    }
    low = std::max(low, 0.0);
    high = std::min(high, dim - 1);
    if (low == high) {
        high += 0.001;
    }
    for (size_t i = 0; i < frequency.size(); ++i) {
        const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
        frequency[i] = frequency[i] / s.factor * ramp + frequency[i] * (1 - ramp);
    }
}

}  // namespace

RopeFrequencies rope_frequencies(const ModelConfig& config, const std::vector<float>& factors) {
    const RopeScaling& scaling = config.rope_scaling;
    RopeFrequencies result;
    result.frequency.resize(static_cast<size_t>(config.head_dim / 2));
    for (size_t i = 0; i < result.frequency.size(); ++i) {
        const double exponent = 2 * static_cast<double>(i) / static_cast<double>(config.head_dim);
        result.frequency[i] = std::pow(config.rope_theta, -exponent);
    }
    if (scaling.type == "linear") {
        for (double& f : result.frequency) {
            f /= scaling.factor;
        }
    } else if (scaling.type == "llama3") {
        for (double& f : result.frequency) {
            f = llama3_frequency(f, scaling);
        }
    } else if (scaling.type == "yarn") {
        apply_yarn(result.frequency, config);
        const double derived = scaling.factor <= 1 ? 1 : 0.1 * std::log(scaling.factor) + 1;
        result.attention_factor = scaling.attention_factor > 0 ? scaling.attention_factor : derived;
    } else {
        CHECK(scaling.type == "default", "(the config reader admits no other type)");
    }
    CHECK(factors.empty() || factors.size() == result.frequency.size());
    for (size_t i = 0; i < factors.size(); ++i) {
        result.frequency[i] /= static_cast<double>(factors[i]);
    }
    return result;
}

RopeTable make_rope_table(
    Stream& stream, Arena& arena, const ModelConfig& config, const std::vector<float>& factors
) {
    const RopeFrequencies rope = rope_frequencies(config, factors);
    const int64_t rows = std::min(config.max_positions, kRopeRowsMax);
    const auto half = static_cast<int64_t>(rope.frequency.size());
    std::vector<float> cosine(static_cast<size_t>(rows * half));
    std::vector<float> sine(cosine.size());
    stream.threads().parallel_for(rows, 64, [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
            for (int64_t i = 0; i < half; ++i) {
                const double angle =
                    static_cast<double>(t) * rope.frequency[static_cast<size_t>(i)];
                const auto at = static_cast<size_t>(t * half + i);
                cosine[at] = static_cast<float>(std::cos(angle) * rope.attention_factor);
                sine[at] = static_cast<float>(std::sin(angle) * rope.attention_factor);
            }
        }
    });
    const Tensor cosine_table = arena.take("rope.cos", DType::kF32, {rows, half});
    const Tensor sine_table = arena.take("rope.sin", DType::kF32, {rows, half});
    copy_to_device(stream, cosine_table.data, cosine.data(), cosine.size() * sizeof(float));
    copy_to_device(stream, sine_table.data, sine.data(), sine.size() * sizeof(float));
    synchronize(stream);
    RopeTable table;
    table.cosine = cosine_table.as<float>();
    table.sine = sine_table.as<float>();
    table.rotary_dim = static_cast<int32_t>(config.head_dim);
    table.max_positions = static_cast<int32_t>(rows);
    return table;
}

}  // namespace orbit
