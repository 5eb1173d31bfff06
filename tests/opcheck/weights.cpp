#include "opcheck/weights.h"

#include <cmath>
#include <cstring>

namespace orbit::opcheck {
namespace {

// About 0.02 to 0.1, so that sums over hundreds of columns stay near 1.
constexpr uint16_t kHalfScale = 0x2800;  // fp16 2^-5

template <typename T>
void append(std::vector<uint8_t>& bytes, T value) {
    const size_t at = bytes.size();
    bytes.resize(at + sizeof value);
    std::memcpy(&bytes[at], &value, sizeof value);
}

f16 random_half(Random& random, uint16_t base, bool any_sign) {
    const auto mantissa = static_cast<uint16_t>(random.below(1024));
    const auto sign = static_cast<uint16_t>(any_sign && random.below(2) == 1 ? 0x8000 : 0);
    return f16{static_cast<uint16_t>(base | mantissa | sign)};
}

void add_plain(WeightFormat format, int64_t count, Random& random, TestWeight& w) {
    for (int64_t i = 0; i < count; ++i) {
        const float value = 0.1f * random.normal();
        float exact = value;
        if (format == WeightFormat::kF32) {
            append(w.data, value);
        } else if (format == WeightFormat::kBF16) {
            append(w.data, to_bf16(value));
            exact = round_to_bf16(value);
        } else {
            const f16 half = random_half(random, kHalfScale, true);
            append(w.data, half);
            exact = to_float(half);
        }
        w.exact_values.push_back(exact);
    }
}

void add_int4_row(int64_t cols, int64_t group, float most, Random& random, TestWeight& w) {
    std::vector<float> scales;
    for (int64_t g = 0; g < cols / group; ++g) {
        const bf16 scale = to_bf16(random.uniform(0.01f, most));
        append(w.scales, scale);
        scales.push_back(to_float(scale));
    }
    for (int64_t c = 0; c < cols; c += 2) {
        const auto low = static_cast<int>(random.below(16));
        const auto high = static_cast<int>(random.below(16));
        append(w.data, static_cast<uint8_t>(low | (high << 4)));
        for (const int q : {low, high}) {
            const float scale = scales[static_cast<size_t>(c / group)];
            w.exact_values.push_back(round_to_bf16(static_cast<float>(q - 8) * scale));
        }
    }
}

// From the definition: sign, exponent of bias 7, mantissa of 3 bits, subnormals.
float e4m3(uint8_t code) {
    const int exponent = (code >> 3) & 15;
    const int mantissa = code & 7;
    const float magnitude = exponent == 0
                                ? std::ldexp(static_cast<float>(mantissa), -9)
                                : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    return (code & 128) != 0 ? -magnitude : magnitude;
}

uint8_t random_e4m3(Random& random) {
    const auto code = static_cast<uint8_t>(random.below(127));  // 127 is NaN
    return static_cast<uint8_t>(code | (random.below(2) << 7));
}

void add_fp8(int64_t rows, int64_t cols, Random& random, TestWeight& w) {
    const int64_t across = (cols + kFp8Block - 1) / kFp8Block;
    const int64_t down = (rows + kFp8Block - 1) / kFp8Block;
    std::vector<float> scales;
    for (int64_t i = 0; i < across * down; ++i) {
        scales.push_back(random.uniform(1e-4f, 3e-4f));
        append(w.scales, scales.back());
    }
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = 0; c < cols; ++c) {
            const uint8_t code = random_e4m3(random);
            append(w.data, code);
            const auto at = static_cast<size_t>(row / kFp8Block * across + c / kFp8Block);
            w.exact_values.push_back(round_to_bf16(e4m3(code) * scales[at]));
        }
    }
}

void add_fp4_row(int64_t cols, Random& random, TestWeight& w) {
    constexpr float kMagnitudes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    const bool nvfp4 = w.shape.format == WeightFormat::kNvFp4;
    const int64_t group = nvfp4 ? kNvFp4Group : kMxFp4Group;
    std::vector<float> scales;
    for (int64_t g = 0; g < cols / group; ++g) {
        const auto code =
            static_cast<uint8_t>(nvfp4 ? 0x28 + random.below(32) : 119 + random.below(4));
        append(w.scales, code);
        const float global = w.shape.global_scale;
        const float scale = w.shape.global_divides ? e4m3(code) / global : e4m3(code) * global;
        scales.push_back(nvfp4 ? scale : std::ldexp(1.0f, code - 127));
    }
    for (int64_t c = 0; c < cols; c += 2) {
        const auto low = static_cast<int>(random.below(16));
        const auto high = static_cast<int>(random.below(16));
        append(w.data, static_cast<uint8_t>(low | (high << 4)));
        for (const int q : {low, high}) {
            const float magnitude = kMagnitudes[q & 7] * scales[static_cast<size_t>(c / group)];
            w.exact_values.push_back(round_to_bf16(q >= 8 ? -magnitude : magnitude));
        }
    }
}

void add_block(WeightFormat format, Random& random, TestWeight& w) {
    const f16 d =
        random_half(random, kHalfScale - (format == WeightFormat::kQ8_0 ? 0x1000 : 0), true);
    append(w.data, d);
    const bool q4_1 = format == WeightFormat::kQ4_1;
    f16 m{};
    if (q4_1) {
        m = random_half(random, kHalfScale, true);
        append(w.data, m);
    }
    float values[32];
    for (int64_t j = 0; j < (format == WeightFormat::kQ8_0 ? 32 : 16); ++j) {
        const auto byte = static_cast<uint8_t>(random.below(256));
        append(w.data, byte);
        if (format == WeightFormat::kQ8_0) {
            values[j] = to_float(d) * static_cast<float>(static_cast<int8_t>(byte));
        } else {
            const float offset = q4_1 ? 0.0f : 8.0f;
            values[j] = to_float(d) * (static_cast<float>(byte & 15) - offset) + to_float(m);
            values[j + 16] = to_float(d) * (static_cast<float>(byte >> 4) - offset) + to_float(m);
        }
    }
    w.exact_values.insert(w.exact_values.end(), values, values + 32);
}

}  // namespace

TestWeight make_weight(WeightFormat format, int64_t rows, int64_t cols, Random& random) {
    TestWeight w;
    w.shape.format = format;
    w.shape.rows = rows;
    w.shape.cols = cols;
    switch (format) {
        case WeightFormat::kBF16:
        case WeightFormat::kF32:
        case WeightFormat::kF16:
            add_plain(format, rows * cols, random, w);
            break;
        case WeightFormat::kInt4:
            w.shape.group_size = cols % 32 == 0 ? 32 : 16;
            w.shape.small_scales = rows % 16 != 0;
            for (int64_t row = 0; row < rows; ++row) {
                const float most = w.shape.small_scales ? 0.9f * kSmallScale : 0.05f;
                add_int4_row(cols, w.shape.group_size, most, random, w);
            }
            break;
        case WeightFormat::kFp8:
            add_fp8(rows, cols, random, w);
            break;
        case WeightFormat::kNvFp4:
            w.shape.global_divides = rows % 32 == 0;
            w.shape.global_scale = random.uniform(0.02f, 0.03f);
            if (w.shape.global_divides) {
                w.shape.global_scale = 1.0f / w.shape.global_scale;
            }
            [[fallthrough]];
        case WeightFormat::kMxFp4:
            for (int64_t row = 0; row < rows; ++row) {
                add_fp4_row(cols, random, w);
            }
            break;
        default:
            for (int64_t i = 0; i < rows * cols / 32; ++i) {
                add_block(format, random, w);
            }
            break;
    }
    if (w.scales.empty()) {
        w.scales.push_back(0);
    }
    for (const float value : w.exact_values) {
        w.bf16_values.push_back(round_to_bf16(value));
    }
    return w;
}

Input weight_input(const TestWeight& w, bool f32) {
    Input in = raw_input("w", w.data, f32 ? w.exact_values : w.bf16_values);
    in.weight = w.shape;
    return in;
}

QuantizedMatrix at_tensors(const QuantizedMatrix& shape, const Tensor& data, const Tensor& scales) {
    QuantizedMatrix w = shape;
    w.data = data.data;
    const bool is_int4 = shape.format == WeightFormat::kInt4;
    w.scales = is_int4 ? static_cast<const bf16*>(scales.data) : nullptr;
    w.block_scales = is_int4 ? nullptr : scales.data;
    return w;
}

}  // namespace orbit::opcheck
