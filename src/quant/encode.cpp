#include "quant/encode.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/number_formats.h"
#include "quant/quantized_matrix.h"

namespace orbit {
namespace {

float largest_magnitude(const float* values, int64_t count) {
    float largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        largest = std::max(largest, std::abs(values[i]));
    }
    return largest;
}

// Two codes a byte, the low nibble first; scale > 0.
void pack_e2m1(const float* values, int64_t count, float scale, uint8_t* nibbles) {
    for (int64_t i = 0; i < count; i += 2) {
        const uint8_t low = to_e2m1(values[i] / scale);
        const uint8_t high = to_e2m1(values[i + 1] / scale);
        nibbles[i / 2] = static_cast<uint8_t>(low | (high << 4));
    }
}

}  // namespace

uint8_t to_e4m3(float value) {
    const auto sign = static_cast<uint8_t>(std::signbit(value) ? 0x80 : 0);
    const float magnitude = std::abs(value);
    if (magnitude >= 448.0f) {
        return static_cast<uint8_t>(sign | 0x7e);
    }
    // The step between codes: 2^-9 for subnormal values, else 2^(exponent - 3).
    const int exponent = magnitude < 0x1p-6f ? -6 : std::ilogb(magnitude);
    const float step = std::ldexp(1.0f, exponent - 3);
    const auto steps = static_cast<int>(std::nearbyint(magnitude / step));  // 0 to 16
    // Counted in steps the codes are consecutive, across powers of two as well.
    const int code = (exponent + 6) * 8 + steps;
    return static_cast<uint8_t>(sign | std::min(code, 0x7e));
}

uint8_t to_e2m1(float value) {
    constexpr float kThresholds[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
    const float magnitude = std::abs(value);
    int code = 0;
    for (int i = 0; i < 7; ++i) {
        // At the threshold itself the even code wins: below for even i, above for odd i.
        if (magnitude > kThresholds[i] || (magnitude == kThresholds[i] && i % 2 == 1)) {
            code = i + 1;
        }
    }
    return static_cast<uint8_t>(code | (std::signbit(value) ? 8 : 0));
}

float encode_fp8_block(
    const float* block, int64_t rows, int64_t cols, int64_t stride, uint8_t* codes
) {
    float largest = 0;
    for (int64_t r = 0; r < rows; ++r) {
        largest = std::max(largest, largest_magnitude(block + r * stride, cols));
    }
    const float scale = largest == 0 ? 1.0f : round_to_bf16(largest / 448.0f);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) {
            codes[r * stride + c] = to_e4m3(block[r * stride + c] / scale);
        }
    }
    return scale;
}

void encode_mxfp4(const float* row, int64_t cols, uint8_t* nibbles, uint8_t* scales) {
    CHECK_EQ(cols % kMxFp4Group, 0);
    for (int64_t g = 0; g < cols / kMxFp4Group; ++g) {
        const float* group = row + g * kMxFp4Group;
        const float largest = largest_magnitude(group, kMxFp4Group);
        // 6 is 1.5 * 2^2: a mantissa above 1.5 needs the next power.
        const uint32_t bits = float_bits(largest);
        const int code =
            static_cast<int>(bits >> 23) - 2 + ((bits & 0x7fffffu) > 0x400000u ? 1 : 0);
        scales[g] = static_cast<uint8_t>(std::clamp(code, 0, 252));
        pack_e2m1(group, kMxFp4Group, e8m0_to_float(scales[g]), nibbles + g * kMxFp4Group / 2);
    }
}

float nvfp4_global_scale(float largest) {
    return largest == 0 ? 1.0f : 448.0f * 6.0f / largest;
}

void encode_nvfp4(const float* row, int64_t cols, float global, uint8_t* nibbles, uint8_t* scales) {
    CHECK_EQ(cols % kNvFp4Group, 0);
    for (int64_t g = 0; g < cols / kNvFp4Group; ++g) {
        const float* group = row + g * kNvFp4Group;
        scales[g] = to_e4m3(global * (largest_magnitude(group, kNvFp4Group) / 6.0f));
        float scale = e4m3_to_float(scales[g]) / global;
        if (scale == 0) {
            scale = 1.0f;  // every value of the group is below half the smallest scale
        }
        pack_e2m1(group, kNvFp4Group, scale, nibbles + g * kNvFp4Group / 2);
    }
}

}  // namespace orbit
