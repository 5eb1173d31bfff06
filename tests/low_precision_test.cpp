// The byte-exact meaning of the packed weight formats (models.md 10, 14.3), apart from any model.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "base/number_formats.h"
#include "device/device.h"
#include "quant/place.h"
#include "quant/quantized_matrix.h"

namespace orbit {
namespace {

std::vector<float> decode(const QuantizedMatrix& w, int64_t row) {
    std::vector<float> values(static_cast<size_t>(w.cols));
    decode_f32(w, row, 0, w.cols, values.data());
    std::vector<bf16> rounded(values.size());
    decode_bf16(w, row, 0, w.cols, rounded.data());
    for (size_t i = 0; i < values.size(); ++i) {
        EXPECT_EQ(to_float(rounded[i]), values[i]) << "column " << i;
    }
    return values;
}

TEST(LowPrecision, E4m3HasTheValuesOfItsDefinition) {
    for (int code = 0; code < 256; ++code) {
        const float value = e4m3_to_float(static_cast<uint8_t>(code));
        const int exponent = (code >> 3) & 15;
        const int mantissa = code & 7;
        if ((code & 127) == 127) {
            EXPECT_TRUE(std::isnan(value)) << code;
            continue;
        }
        const double magnitude = exponent == 0
                                     ? mantissa * std::ldexp(1.0, -9)
                                     : (1 + mantissa / 8.0) * std::ldexp(1.0, exponent - 7);
        EXPECT_EQ(static_cast<double>(value), code >= 128 ? -magnitude : magnitude) << code;
        EXPECT_EQ(std::signbit(value), code >= 128) << code;
    }
    EXPECT_EQ(e4m3_to_float(0x38), 1.0f);
    EXPECT_EQ(e4m3_to_float(0x7e), 448.0f);
    EXPECT_EQ(e4m3_to_float(0xb8), -1.0f);
    EXPECT_EQ(e4m3_to_float(0x01), std::ldexp(1.0f, -9));
}

TEST(LowPrecision, E8m0IsAPowerOfTwo) {
    EXPECT_EQ(e8m0_to_float(0), std::ldexp(1.0f, -127));
    EXPECT_EQ(e8m0_to_float(1), std::ldexp(1.0f, -126));
    EXPECT_EQ(e8m0_to_float(127), 1.0f);
    EXPECT_EQ(e8m0_to_float(128), 2.0f);
    EXPECT_EQ(e8m0_to_float(254), std::ldexp(1.0f, 127));
    EXPECT_TRUE(std::isnan(e8m0_to_float(255)));
}

TEST(LowPrecision, E2m1HasEightMagnitudes) {
    const float values[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    for (uint32_t code = 0; code < 16; ++code) {
        const float value = e2m1_to_float(code);
        EXPECT_EQ(std::abs(value), values[code & 7]) << code;
        EXPECT_EQ(std::signbit(value), code >= 8) << code;
    }
}

TEST(LowPrecision, Int4WordsHoldTheLowestNibbleFirst) {
    const uint32_t words[4] = {0xfedcba98, 0x76543210, 0xfedcba98, 0x76543210};
    const bf16 scales[1] = {to_bf16(1.0f)};
    QuantizedMatrix w{WeightFormat::kInt4, 1, 32, 32, words, scales};
    const auto values = decode(w, 0);
    for (int i = 0; i < 32; ++i) {
        const int expected = i % 16 < 8 ? i % 16 : i % 16 - 16;
        EXPECT_EQ(values[static_cast<size_t>(i)], static_cast<float>(expected)) << i;
    }
}

TEST(LowPrecision, MxFp4TakesTheLowNibbleFirst) {
    uint8_t bytes[32] = {0x52, 0xf1};
    const uint8_t scales[2] = {128, 126};
    bytes[16] = 0x52;
    QuantizedMatrix w;
    w.format = WeightFormat::kMxFp4;
    w.rows = 1;
    w.cols = 64;
    w.data = bytes;
    w.block_scales = scales;
    const auto values = decode(w, 0);
    EXPECT_EQ(values[0], 2.0f);
    EXPECT_EQ(values[1], 6.0f);
    EXPECT_EQ(values[2], 1.0f);
    EXPECT_EQ(values[3], -12.0f);
    EXPECT_EQ(values[4], 0.0f);
    EXPECT_EQ(values[32], 0.5f);
    EXPECT_EQ(values[33], 1.5f);
    EXPECT_EQ(w.bytes(), 34);
}

TEST(LowPrecision, NvFp4DividesOrMultipliesByItsGlobalScale) {
    uint8_t bytes[16] = {0x52};
    bytes[8] = 0xf1;
    const uint8_t scales[2] = {0x7e, 0x39};  // 448 and 1.125
    QuantizedMatrix w;
    w.format = WeightFormat::kNvFp4;
    w.rows = 1;
    w.cols = 32;
    w.data = bytes;
    w.block_scales = scales;
    w.global_scale = 3.0f;
    w.global_divides = true;
    const auto divided = decode(w, 0);
    EXPECT_EQ(divided[0], round_to_bf16(1.0f * (448.0f / 3.0f)));
    EXPECT_EQ(divided[1], round_to_bf16(3.0f * (448.0f / 3.0f)));
    EXPECT_EQ(divided[16], round_to_bf16(0.5f * (1.125f / 3.0f)));
    EXPECT_EQ(divided[17], round_to_bf16(-6.0f * (1.125f / 3.0f)));
    w.global_scale = 1.0f / 3.0f;
    w.global_divides = false;
    const auto multiplied = decode(w, 0);
    EXPECT_EQ(multiplied[0], round_to_bf16(1.0f * (448.0f * (1.0f / 3.0f))));
    EXPECT_EQ(multiplied[17], round_to_bf16(-6.0f * (1.125f * (1.0f / 3.0f))));
    EXPECT_EQ(w.bytes(), 18);
}

// 130 x 192 has a partial block in both directions.
TEST(LowPrecision, Fp8HasOneScaleForABlock) {
    constexpr int64_t kRows = 130;
    constexpr int64_t kCols = 192;
    std::vector<uint8_t> codes(kRows * kCols);
    for (size_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<uint8_t>(i * 7 % 127 + (i % 3 == 0 ? 128 : 0));
    }
    const float scales[4] = {0.3f, 0.7f, 1.1f, std::ldexp(1.0f, -127)};
    QuantizedMatrix w;
    w.format = WeightFormat::kFp8;
    w.rows = kRows;
    w.cols = kCols;
    w.data = codes.data();
    w.block_scales = scales;
    EXPECT_EQ(w.bytes(), kRows * kCols + 16);
    for (const int64_t row : {0, 127, 128, 129}) {
        const auto values = decode(w, row);
        for (int64_t c = 0; c < kCols; ++c) {
            const float scale = scales[row / 128 * 2 + c / 128];
            const float code = e4m3_to_float(codes[static_cast<size_t>(row * kCols + c)]);
            EXPECT_EQ(values[static_cast<size_t>(c)], round_to_bf16(code * scale))
                << row << ' ' << c;
        }
    }
}

TEST(LowPrecision, PlacedMatricesKeepTheirScales) {
    const Device device = make_device("cpu", "auto", 2);
    Stream stream(device);
    Arena arena(device);
    uint8_t bytes[16] = {0x52};
    const uint8_t scales[2] = {0x38, 0x38};
    QuantizedMatrix w;
    w.format = WeightFormat::kNvFp4;
    w.rows = 1;
    w.cols = 32;
    w.data = bytes;
    w.block_scales = scales;
    w.global_scale = 2.0f;
    const QuantizedMatrix placed = place_weight(stream, arena, "w", w);
    EXPECT_NE(placed.block_scales, w.block_scales);
    EXPECT_EQ(decode(placed, 0)[1], 6.0f);
}

TEST(LowPrecision, ExpertsLieAtOneDistance) {
    const Device device = make_device("cpu", "auto", 2);
    Stream stream(device);
    Arena arena(device);
    MatrixStack stack(arena, "experts", 3);
    std::vector<QuantizedMatrix> placed;
    for (uint8_t i = 0; i < 3; ++i) {
        uint8_t bytes[16] = {static_cast<uint8_t>(0x50 + i)};
        const uint8_t scales[2] = {0x38, 0x38};
        QuantizedMatrix w;
        w.format = WeightFormat::kNvFp4;
        w.rows = 1;
        w.cols = 32;
        w.data = bytes;
        w.block_scales = scales;
        placed.push_back(stack.add(stream, w));
    }
    const auto at = [](const void* p) { return static_cast<const char*>(p); };
    EXPECT_EQ(at(placed[1].data) - at(placed[0].data), at(placed[2].data) - at(placed[1].data));
    EXPECT_EQ(
        at(placed[1].block_scales) - at(placed[0].block_scales),
        at(placed[2].block_scales) - at(placed[1].block_scales)
    );
    EXPECT_EQ(decode(placed[1], 0)[0], 0.5f);
    EXPECT_EQ(decode(placed[2], 0)[0], 1.0f);
    const float other[4] = {1, 2, 3, 4};
    QuantizedMatrix plain;
    plain.format = WeightFormat::kF32;
    plain.rows = 1;
    plain.cols = 4;
    plain.data = other;
    EXPECT_EQ(static_cast<const float*>(stack.add(stream, plain).data)[3], 4.0f);
}

}  // namespace
}  // namespace orbit
