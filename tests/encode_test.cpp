// Packing: the nearest code everywhere, and the published files from the published weights.
#include "quant/encode.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>

#include "model/checkpoint.h"
#include "model/quantize.h"
#include "quant/quantized_matrix.h"

namespace orbit {
namespace {

TEST(Encode, E4m3IsTheNearestCode) {
    std::mt19937 random(3);
    for (int i = 0; i < 20000; ++i) {
        const float value = std::ldexp(
            static_cast<float>(static_cast<int>(random() % 4096) - 2048) / 256.0f,
            static_cast<int>(random() % 16) - 10
        );
        const float got = e4m3_to_float(to_e4m3(value));
        float best = INFINITY;
        for (int code = 0; code < 256; ++code) {
            if ((code & 127) != 127) {
                const float distance = std::abs(e4m3_to_float(static_cast<uint8_t>(code)) - value);
                best = std::min(best, distance);
            }
        }
        ASSERT_EQ(std::abs(got - value), best) << value;
    }
    EXPECT_EQ(to_e4m3(17.0f), to_e4m3(16.0f)) << "a tie goes to the even mantissa";
    EXPECT_EQ(to_e4m3(19.0f), to_e4m3(20.0f));
    EXPECT_EQ(to_e4m3(0x1p-10f), 0) << "half the smallest value";
    EXPECT_EQ(to_e4m3(-1e9f), 0xfe);
}

TEST(Encode, E2m1ThresholdsGoToTheEvenMantissa) {
    const float at[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
    const float rounded[7] = {0, 1, 1, 2, 2, 4, 4};
    for (int i = 0; i < 7; ++i) {
        EXPECT_EQ(e2m1_to_float(to_e2m1(at[i])), rounded[i]) << at[i];
        EXPECT_EQ(e2m1_to_float(to_e2m1(-at[i])), -rounded[i]) << at[i];
    }
    EXPECT_EQ(to_e2m1(5.01f), 7);
    EXPECT_EQ(to_e2m1(1e9f), 7);
}

TEST(Encode, ZerosStayZero) {
    const std::vector<float> zeros(64, 0.0f);
    uint8_t nibbles[32];
    uint8_t scales[4];
    encode_mxfp4(zeros.data(), 64, nibbles, scales);
    EXPECT_EQ(nibbles[5], 0);
    EXPECT_NE(scales[1], 255);
    encode_nvfp4(zeros.data(), 64, nvfp4_global_scale(0.0f), nibbles, scales);
    EXPECT_EQ(nibbles[5], 0);
    uint8_t codes[64];
    EXPECT_EQ(encode_fp8_block(zeros.data(), 1, 64, 64, codes), 1.0f);
    EXPECT_EQ(codes[63], 0);
}

TEST(Encode, MxFp4CutsNothingOff) {
    std::vector<float> row(32, 0.0f);
    for (const float largest : {1.0f, 1.49f, 1.5f, 1.51f, 1.99f, 2.0f, 6.0f, 6.01f}) {
        row[3] = -largest;
        uint8_t nibbles[16];
        uint8_t scales[1];
        encode_mxfp4(row.data(), 32, nibbles, scales);
        const float scale = e8m0_to_float(scales[0]);
        EXPECT_LE(largest, 6 * scale) << largest;
        EXPECT_GT(largest, 3 * scale) << largest << ": half the scale would do";
    }
}

// The packed reference folders were written from mini-qwen3-moe by other programs.
TEST(Encode, ReferenceFoldersComeOutEqual) {
    const char* models = std::getenv("ORBIT_MODELS");
    if (models == nullptr) {
        GTEST_SKIP() << "ORBIT_MODELS is not set";
    }
    const std::string root = models;
    const OpenOptions options{.weights = true, .tokenizer = false};
    const Checkpoint plain = open_checkpoint(root + "/mini-qwen3-moe", options);
    ThreadPool threads(2);
    for (const char* name : {"int4", "fp8", "mxfp4", "nvfp4"}) {
        const WeightFormat format = parse_quantized_format(name);
        const Checkpoint packed = open_checkpoint(root + "/packed/mini-qwen3-moe-" + name, options);
        for (const char* module : {"self_attn.k_proj", "mlp.experts.7.down_proj"}) {
            const std::string weight = std::string("model.layers.2.") + module + ".weight";
            const StoredWeight& want = packed.weights.at(weight);
            const PackedMatrix got = pack_matrix(threads, plain.weights.at(weight), format);
            ASSERT_EQ(want.format, format) << name;
            const auto equal = [](const std::vector<std::byte>& a, std::span<const std::byte> b) {
                return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0;
            };
            EXPECT_TRUE(equal(got.tensors[0].bytes, want.data)) << name << ' ' << weight;
            EXPECT_TRUE(equal(got.tensors[1].bytes, want.scales)) << name << ' ' << weight;
            EXPECT_GT(got.relative_error, 0.01) << name;
            EXPECT_LT(got.relative_error, 0.15) << name;
        }
    }
}

}  // namespace
}  // namespace orbit
