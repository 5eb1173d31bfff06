#include <gtest/gtest.h>

#include <cmath>

#include "rl/objectives/grpo.h"
#include "rl/step.h"
#include "rollout/page_pool.h"

namespace orbit {
namespace {

Group group_of(const std::vector<double>& rewards) {
    Group group;
    for (const double reward : rewards) {
        Trajectory t;
        t.score.value = reward;
        group.samples.push_back(t);
    }
    return group;
}

TEST(Grpo, AdvantagesAreRewardsMinusTheGroupMean) {
    Group group = group_of({1, 0, 0, 1, 0, 0, 0, 0});
    grpo_advantages(group);
    EXPECT_DOUBLE_EQ(group.samples[0].advantage, 0.75);
    EXPECT_DOUBLE_EQ(group.samples[1].advantage, -0.25);
    double sum = 0;
    for (const auto& sample : group.samples) {
        sum += sample.advantage;
    }
    EXPECT_NEAR(sum, 0, 1e-12);
}

TEST(Grpo, EqualRewardsGiveExactlyZero) {
    Group group = group_of({0.1, 0.1, 0.1});
    grpo_advantages(group);
    for (const auto& sample : group.samples) {
        EXPECT_EQ(sample.advantage, 0.0);
    }
}

TEST(Grpo, UnscoredSamplesLeaveTheBaseline) {
    Group group = group_of({1, 0, 0});
    group.samples[2].score.status = ScoreStatus::kTimeout;
    grpo_advantages(group);
    EXPECT_DOUBLE_EQ(group.samples[0].advantage, 0.5);
    EXPECT_EQ(group.samples[2].advantage, 0.0);
}

TEST(Grpo, GoldenCoefficient) {
    const GrpoToken token = grpo_token({0.2, 0.28, 0}, 1.5, -2.8416618288503037, -2.6, 0);
    EXPECT_NEAR(token.d_logprob, -1.1779825586946506, 1e-14);
    EXPECT_FALSE(token.clipped);
}

TEST(Grpo, CoefficientIsTheFiniteDifferenceOfTheLoss) {
    for (const double advantage : {1.5, -0.7}) {
        for (const double logprob : {-1.0, -0.9, -1.5, -0.2}) {
            const GrpoOptions options{0.2, 0.28, 0.1};
            const double old = -1.02;
            const double reference = -1.3;
            constexpr double h = 1e-6;
            const double difference =
                (grpo_token(options, advantage, logprob + h, old, reference).loss -
                 grpo_token(options, advantage, logprob - h, old, reference).loss) /
                (2 * h);
            EXPECT_NEAR(
                grpo_token(options, advantage, logprob, old, reference).d_logprob, difference, 1e-7
            );
        }
    }
}

TEST(Evaluate, PassAtKIsUnbiased) {
    EXPECT_NEAR(pass_at_k(10, 3, 1), 0.3, 1e-12);
    EXPECT_NEAR(pass_at_k(10, 3, 2), 0.533333333333, 1e-9);
    EXPECT_NEAR(pass_at_k(10, 3, 5), 0.916666666667, 1e-9);
    EXPECT_EQ(pass_at_k(10, 3, 8), 1.0);
}

std::vector<int32_t> counting(int32_t from, int32_t count) {
    std::vector<int32_t> ids;
    for (int32_t i = 0; i < count; ++i) {
        ids.push_back(from + i);
    }
    return ids;
}

TEST(PagePool, SharesFullPagesOfOneVersionOnly) {
    PagePool pool(8);
    const auto ids = counting(0, 40);  // two full pages and a part
    const std::vector<int32_t> pages = {pool.take(), pool.take(), pool.take()};
    pool.insert(3, ids, pages);
    EXPECT_EQ(pool.match(4, ids, 9).size(), 0u);
    const auto found = pool.match(3, ids, 9);
    ASSERT_EQ(found.size(), 2u);
    EXPECT_EQ(found[0], pages[0]);
    EXPECT_EQ(pool.match(3, ids, 1).size(), 1u);
    auto other = ids;
    other[17] = 999;
    EXPECT_EQ(pool.match(3, other, 9).size(), 1u);
}

TEST(PagePool, EvictsUnusedCachedPagesOnly) {
    PagePool pool(2);
    const auto ids = counting(0, 16);
    const int32_t page = pool.take();
    pool.insert(0, ids, std::vector<int32_t>{page});
    EXPECT_EQ(pool.num_available(), 1);
    pool.release(page);  // the cache still holds it
    EXPECT_EQ(pool.num_available(), 2);
    const int32_t a = pool.take();
    const int32_t b = pool.take();  // evicts the cached page
    EXPECT_NE(a, b);
    EXPECT_EQ(pool.num_available(), 0);
    EXPECT_EQ(pool.match(0, ids, 1).size(), 0u);
    pool.release(a);
    pool.release(b);
    EXPECT_EQ(pool.num_available(), 2);
}

}  // namespace
}  // namespace orbit
