#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "base/error.h"
#include "base/exact_math.h"
#include "base/philox.h"
#include "base/thread_pool.h"

namespace orbit {
namespace {

TEST(Philox, KnownAnswers) {
    const PhiloxWords zero = philox(0, 0, 0, 0, 0, 0);
    EXPECT_EQ(zero.word[0], 0x6627e8d5u);
    EXPECT_EQ(zero.word[3], 0x9b00dbd8u);
    const PhiloxWords pi =
        philox(0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0);
    EXPECT_EQ(pi.word[0], 0xd16cfe09u);
    EXPECT_EQ(pi.word[1], 0x94fdccebu);
    EXPECT_EQ(pi.word[2], 0x5001e420u);
    EXPECT_EQ(pi.word[3], 0x24126ea1u);
}

TEST(Philox, UniformStaysInsideTheOpenInterval) {
    EXPECT_GT(uniform_from_word(0), 0.0f);
    EXPECT_LT(uniform_from_word(0xffffffffu), 1.0f);
}

TEST(NumberFormats, Bf16RoundsToNearestEven) {
    EXPECT_EQ(to_bf16(1.0f).bits, 0x3f80);
    EXPECT_EQ(to_bf16(float_from_bits(0x3f808000u)).bits, 0x3f80);  // tie to even
    EXPECT_EQ(to_bf16(float_from_bits(0x3f818000u)).bits, 0x3f82);
    EXPECT_EQ(to_float(f16{0x3c00}), 1.0f);
    EXPECT_EQ(to_float(f16{0x0001}), 5.9604644775390625e-8f);
}

TEST(ThreadPool, CoversEveryIndexOnce) {
    ThreadPool pool(3);
    for (int round = 0; round < 200; ++round) {
        std::vector<int> hits(1000, 0);
        pool.parallel_for(1000, 1, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) {
                ++hits[static_cast<size_t>(i)];
            }
        });
        for (const int hit : hits) {
            ASSERT_EQ(hit, 1);
        }
    }
}

TEST(Errors, NearestName) {
    const std::vector<std::string> names = {"rollout.temperature", "train.lr", "adapter.rank"};
    EXPECT_EQ(nearest_name("train.lrr", names), "train.lr");
    EXPECT_EQ(nearest_name("zzzzzzzzzzzz", names), "");
}

TEST(ExactMath, ExpAndLogAreWithinTwoUlp) {
    double worst_exp = 0;
    double worst_log = 0;
    for (int i = 0; i < 200000; ++i) {
        const float x = -86.0f + 174.0f * static_cast<float>(i) / 200000.0f;
        const double e = std::exp(static_cast<double>(x));
        worst_exp = std::max(worst_exp, std::abs(static_cast<double>(exact_exp(x)) - e) / e);
        const float y = exact_exp(x) < 1e30f ? exact_exp(x) : 1.0f;
        const double l = std::log(static_cast<double>(y));
        worst_log = std::max(
            worst_log, std::abs(static_cast<double>(exact_log(y)) - l) / std::max(1e-3, std::abs(l))
        );
    }
    EXPECT_LT(worst_exp, 2.5e-7);
    EXPECT_LT(worst_log, 2.5e-7);
    EXPECT_EQ(exact_exp(0.0f), 1.0f);
    EXPECT_EQ(exact_log(1.0f), 0.0f);
    EXPECT_EQ(exact_exp(-200.0f), 0.0f);
    EXPECT_TRUE(std::isinf(exact_exp(200.0f)));
}

}  // namespace
}  // namespace orbit
