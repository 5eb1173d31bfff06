// The decoders against bytes and values worked out by hand from the formats' definitions, and the
// INT4 encoder against what it promises.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "quant/arrange.h"
#include "quant/quantized_matrix.h"

namespace orbit {
namespace {

QuantizedMatrix one_row(WeightFormat format, int64_t cols, const void* data) {
    QuantizedMatrix w;
    w.format = format;
    w.rows = 1;
    w.cols = cols;
    w.data = data;
    return w;
}

std::vector<float> decoded(const QuantizedMatrix& w, int64_t row = 0) {
    std::vector<float> values(static_cast<size_t>(w.cols));
    decode_f32(w, row, 0, w.cols, values.data());
    return values;
}

uint16_t half_bits_of_power(int exponent) {
    return static_cast<uint16_t>((exponent + 15) << 10);
}

TEST(Quant, RowBytesPerFormat) {
    EXPECT_EQ(row_bytes(WeightFormat::kBF16, 64), 128);
    EXPECT_EQ(row_bytes(WeightFormat::kF16, 64), 128);
    EXPECT_EQ(row_bytes(WeightFormat::kF32, 64), 256);
    EXPECT_EQ(row_bytes(WeightFormat::kInt4, 64), 32);
    EXPECT_EQ(row_bytes(WeightFormat::kQ8_0, 64), 68);
    EXPECT_EQ(row_bytes(WeightFormat::kQ4_0, 64), 36);
    EXPECT_EQ(row_bytes(WeightFormat::kQ4_1, 64), 40);
    QuantizedMatrix w = one_row(WeightFormat::kInt4, 64, nullptr);
    w.rows = 3;
    EXPECT_EQ(w.bytes(), 3 * (32 + 4));
}

// The words of models.md 10.4.
TEST(Quant, Int4WordsLowestNibbleFirst) {
    std::array<uint32_t, 4> words = {0xFEDCBA98u, 0x76543210u, 0x88888888u, 0x00000001u};
    const bf16 scale = to_bf16(0.5f);
    QuantizedMatrix w = one_row(WeightFormat::kInt4, 32, words.data());
    w.scales = &scale;
    const auto values = decoded(w);
    for (int i = 0; i < 8; ++i) {
        EXPECT_EQ(values[static_cast<size_t>(i)], 0.5f * static_cast<float>(i));
        EXPECT_EQ(values[static_cast<size_t>(8 + i)], 0.5f * static_cast<float>(i - 8));
        EXPECT_EQ(values[static_cast<size_t>(16 + i)], 0.0f);
    }
    EXPECT_EQ(values[24], 0.5f * -7.0f);
    EXPECT_EQ(values[25], 0.5f * -8.0f);
}

TEST(Quant, Int4ProductIsRoundedOnceToBf16) {
    // 7 * (1 + 1/128) = 7.0546875 needs 10 bits; bf16 near it has steps of 1/32: 7.0625.
    std::array<uint32_t, 4> words = {};
    words.fill(0xFFFFFFFFu);
    const bf16 scale = to_bf16(1.0f + 1.0f / 128);
    QuantizedMatrix w = one_row(WeightFormat::kInt4, 32, words.data());
    w.scales = &scale;
    EXPECT_EQ(to_float(scale) * 7.0f, 7.0546875f);
    EXPECT_EQ(decoded(w)[0], 7.0625f);
    bf16 as_bf16[32];
    decode_bf16(w, 0, 0, 32, as_bf16);
    EXPECT_EQ(to_float(as_bf16[0]), 7.0625f);
}

TEST(Quant, Int4GroupsAndRows) {
    for (const int32_t group : {32, 128}) {
        constexpr int64_t kCols = 256;
        std::vector<uint32_t> words(2 * kCols / 8, 0x99999999u);  // every code is 1
        std::vector<bf16> scales(static_cast<size_t>(2 * kCols / group));
        for (size_t i = 0; i < scales.size(); ++i) {
            scales[i] = to_bf16(static_cast<float>(i + 1));
        }
        QuantizedMatrix w = one_row(WeightFormat::kInt4, kCols, words.data());
        w.rows = 2;
        w.group_size = group;
        w.scales = scales.data();
        for (int64_t row = 0; row < 2; ++row) {
            const auto values = decoded(w, row);
            for (int64_t i = 0; i < kCols; ++i) {
                const auto expected = static_cast<float>(row * kCols / group + i / group + 1);
                ASSERT_EQ(values[static_cast<size_t>(i)], expected) << "row " << row << " " << i;
            }
        }
    }
}

TEST(Quant, Q8_0) {
    std::array<uint8_t, 34> block = {};
    const uint16_t d = half_bits_of_power(-2);
    std::memcpy(block.data(), &d, 2);
    block[2] = 0x80;       // -128
    block[3] = 0x7f;       // 127
    block[2 + 31] = 0xff;  // -1
    const auto values = decoded(one_row(WeightFormat::kQ8_0, 32, block.data()));
    EXPECT_EQ(values[0], -32.0f);
    EXPECT_EQ(values[1], 31.75f);
    EXPECT_EQ(values[2], 0.0f);
    EXPECT_EQ(values[31], -0.25f);
}

TEST(Quant, Q4_0LowNibblesAreTheFirstHalf) {
    std::array<uint8_t, 18> block = {};
    const uint16_t d = half_bits_of_power(1);
    std::memcpy(block.data(), &d, 2);
    block[2] = 0xF0;  // element 0: 0 - 8, element 16: 15 - 8
    block[3] = 0x9A;  // element 1: 10 - 8, element 17: 9 - 8
    const auto values = decoded(one_row(WeightFormat::kQ4_0, 32, block.data()));
    EXPECT_EQ(values[0], -16.0f);
    EXPECT_EQ(values[16], 14.0f);
    EXPECT_EQ(values[1], 4.0f);
    EXPECT_EQ(values[17], 2.0f);
}

TEST(Quant, Q4_1HasAMinimum) {
    std::array<uint8_t, 20> block = {};
    const uint16_t d = half_bits_of_power(-1);
    const auto m = static_cast<uint16_t>(half_bits_of_power(0) | 0x8000u);  // -1
    std::memcpy(block.data(), &d, 2);
    std::memcpy(block.data() + 2, &m, 2);
    block[4] = 0x3F;
    const auto values = decoded(one_row(WeightFormat::kQ4_1, 32, block.data()));
    EXPECT_EQ(values[0], 6.5f);
    EXPECT_EQ(values[16], 0.5f);
    EXPECT_EQ(values[1], -1.0f);
}

// The check mode keeps what a block says; every kernel has it rounded to bf16.
TEST(Quant, BlocksKeepFloat32InTheCheckModeOnly) {
    std::array<uint8_t, 34> block = {};
    const uint16_t d = 0x3C01;  // 1 + 2^-10
    std::memcpy(block.data(), &d, 2);
    block[2] = 1;
    const QuantizedMatrix w = one_row(WeightFormat::kQ8_0, 32, block.data());
    EXPECT_EQ(decoded(w)[0], 1.0009765625f);
    bf16 rounded[32];
    decode_bf16(w, 0, 0, 32, rounded);
    EXPECT_EQ(to_float(rounded[0]), 1.0f);
}

// Rows of a mapped file start anywhere.
TEST(Quant, PartsOfRowsAtOddAddresses) {
    std::mt19937 random(7);
    for (const WeightFormat format :
         {WeightFormat::kBF16, WeightFormat::kF16, WeightFormat::kQ8_0, WeightFormat::kQ4_1}) {
        constexpr int64_t kCols = 96;
        const auto bytes = static_cast<size_t>(2 * row_bytes(format, kCols));
        std::vector<uint8_t> memory(bytes + 1);
        for (auto& byte : memory) {
            byte = static_cast<uint8_t>(random() & 0x3f);  // finite in every format
        }
        QuantizedMatrix w = one_row(format, kCols, memory.data() + 1);
        w.rows = 2;
        const auto whole = decoded(w, 1);
        float part[32];
        decode_f32(w, 1, 64, 32, part);
        for (size_t i = 0; i < 32; ++i) {
            EXPECT_EQ(part[i], whole[64 + i]) << format_name(format) << " " << i;
        }
    }
}

TEST(Quant, EncodeInt4IsTheNearestCode) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    constexpr int64_t kCols = 128;
    std::vector<float> row(kCols);
    for (float& value : row) {
        value = normal(random);
    }
    std::fill(row.begin() + 32, row.begin() + 64, 0.0f);
    std::array<uint32_t, kCols / 8> words;
    std::array<bf16, kCols / 32> scales;
    encode_int4(row.data(), kCols, 32, words.data(), scales.data());
    QuantizedMatrix w = one_row(WeightFormat::kInt4, kCols, words.data());
    w.scales = scales.data();
    const auto values = decoded(w);
    for (size_t i = 0; i < kCols; ++i) {
        const float scale = to_float(scales[i / 32]);
        const uint32_t code = (words[i / 8] >> (4 * (i % 8))) & 15u;
        EXPECT_NE(code, 0u) << "the code -8 is not used";
        EXPECT_LE(std::abs(values[i] - row[i]), scale * 0.54f) << i;
    }
    EXPECT_EQ(scales[1].bits, 0);
    EXPECT_EQ(words[4], 0x88888888u) << "zeros are coded as 0, not as -8";
}

TEST(Quant, EncodeInt4TiesGoToEven) {
    std::vector<float> row(32, 0.0f);
    row[0] = 7.0f;  // scale 1
    row[1] = 0.5f;
    row[2] = 1.5f;
    row[3] = -2.5f;
    uint32_t words[4];
    bf16 scale;
    encode_int4(row.data(), 32, 32, words, &scale);
    EXPECT_EQ(to_float(scale), 1.0f);
    EXPECT_EQ(words[0] & 0xFFFFu, 0x6A8Fu);  // 7, 0, 2, -2
}

TEST(Quant, SmallScalesAreBelowTheLimitInMagnitude) {
    QuantizedMatrix w;
    w.format = WeightFormat::kInt4;
    w.rows = 2;
    w.cols = 96;
    std::vector<std::byte> bytes(1 + static_cast<size_t>(w.scale_bytes()));
    w.scales = reinterpret_cast<const bf16*>(bytes.data() + 1);  // as in a file: at any address
    const auto set = [&](size_t i, float scale) {
        const bf16 value = to_bf16(scale);
        std::memcpy(bytes.data() + 1 + i * sizeof value, &value, sizeof value);
    };
    for (size_t i = 0; i < 6; ++i) {
        set(i, -0.031f);
    }
    EXPECT_TRUE(has_small_scales(w));
    for (const float other : {kSmallScale, -kSmallScale, 1e30f, -1e-31f, 1e-40f}) {
        set(5, other);
        EXPECT_FALSE(has_small_scales(w)) << other;
    }
    for (const float small : {0.0f, -0.0f, kTinyScale}) {
        set(5, small);
        EXPECT_TRUE(has_small_scales(w)) << small;
    }
}

// A lane's word holds two columns that lie side by side 16 bits apart, and no two columns meet.
TEST(Arrange, IsAPermutationOfABlock) {
    std::set<int> bits;
    for (int32_t col = 0; col < 32; ++col) {
        EXPECT_EQ(arranged_word(col), col % 8 / 2) << col;
        EXPECT_EQ(arranged_word(col + 32), arranged_word(col)) << col;
        EXPECT_EQ(arranged_shift(col + 32), arranged_shift(col)) << col;
        EXPECT_EQ(arranged_shift(col | 1), arranged_shift(col & ~1) + 16) << col;
        EXPECT_EQ(arranged_shift(col & ~1), 4 * (col / 8)) << col;
        bits.insert(32 * arranged_word(col) + arranged_shift(col));
    }
    EXPECT_EQ(bits.size(), 32u);
    EXPECT_EQ(*bits.rbegin() + 4, 128);
}

}  // namespace
}  // namespace orbit
