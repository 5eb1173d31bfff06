// Routing on the CPU: who goes where, ties, empty experts. The arithmetic is opcheck's.
#include "ops/moe.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace orbit {
namespace {

class MoeTest : public ::testing::Test {
  protected:
    // x: identity rows pick columns of the router, so logits are what the test says.
    Routing route_logits(
        const std::vector<std::vector<float>>& logits, int32_t selected, bool raw
    ) {
        const auto tokens = static_cast<int64_t>(logits.size());
        const auto experts = static_cast<int64_t>(logits[0].size());
        x_.assign(static_cast<size_t>(tokens * tokens), 0.0f);
        router_.assign(static_cast<size_t>(experts * tokens), 0.0f);
        for (int64_t t = 0; t < tokens; ++t) {
            x_[static_cast<size_t>(t * tokens + t)] = 1.0f;
            for (int64_t e = 0; e < experts; ++e) {
                router_[static_cast<size_t>(e * tokens + t)] =
                    logits[static_cast<size_t>(t)][static_cast<size_t>(e)];
            }
        }
        RouterParams p;
        p.x = make_tensor(x_.data(), DType::kF32, {tokens, tokens});
        p.weight.format = WeightFormat::kF32;
        p.weight.rows = experts;
        p.weight.cols = tokens;
        p.weight.data = router_.data();
        p.num_selected = selected;
        p.normalize = !raw;
        const Routing routing = make_routing(stream_, tokens, experts, selected);
        route(stream_, p, routing);
        return routing;
    }

    Device device_ = make_device("cpu", "auto", 2);
    Stream stream_{device_};
    std::vector<float> x_;
    std::vector<float> router_;
};

TEST_F(MoeTest, TiesGoToTheLowerExpertAndOrderIsAscending) {
    const Routing r = route_logits({{0, 1, 1, 1}, {5, 1, 5, 0}, {2, 2, 2, 2}}, 2, false);
    const std::vector<int32_t> expert(r.expert, r.expert + 6);
    EXPECT_EQ(expert, (std::vector<int32_t>{1, 2, 0, 2, 0, 1}));
    for (int i = 0; i < 6; ++i) {
        EXPECT_FLOAT_EQ(r.weight[i], 0.5f) << i;
    }
}

TEST_F(MoeTest, RowsAreSortedByExpertThenToken) {
    const Routing r = route_logits({{0, 3, 2, 0, 1}, {3, 0, 0, 2, 0}, {0, 2, 0, 3, 0}}, 2, false);
    const std::vector<int32_t> offsets(r.offsets, r.offsets + 6);
    EXPECT_EQ(offsets, (std::vector<int32_t>{0, 1, 3, 4, 6, 6}));
    const std::vector<int32_t> token_of(r.token_of, r.token_of + 6);
    EXPECT_EQ(token_of, (std::vector<int32_t>{1, 0, 2, 0, 1, 2}));
    for (int i = 0; i < 6; ++i) {
        EXPECT_EQ(r.token_of[r.row_of[i]], i / 2);
    }
}

TEST_F(MoeTest, RawWeightsAreTheSoftmaxOverAllExperts) {
    const Routing raw = route_logits({{1, 0, 2}}, 1, true);
    EXPECT_EQ(raw.expert[0], 2);
    EXPECT_NEAR(raw.weight[0], 0.66524096f, 1e-6f);
    const Routing normal = route_logits({{1, 0, 2}}, 2, false);
    EXPECT_NEAR(normal.weight[0], 0.26894142f, 1e-6f);
    EXPECT_NEAR(normal.weight[1], 0.73105858f, 1e-6f);
}

// Experts 0, 2 and 3 of five have rows; two arrays of 100 and 37 bytes, at other distances here
// than there.
TEST_F(MoeTest, StagingCopiesWhatExpertsWithRowsHave) {
    const std::vector<int32_t> offsets = {0, 2, 2, 3, 9, 9};
    constexpr std::byte kOld{0xee};
    std::vector<std::byte> from(5 * 256 + 5 * 64);
    for (size_t i = 0; i < from.size(); ++i) {
        from[i] = static_cast<std::byte>(i * 7 % 200);
    }
    std::vector<std::byte> to(5 * 128 + 5 * 48, kOld);
    const ExpertArray arrays[] = {
        {from.data(), to.data(), 100, 256, 128},
        {from.data() + size_t{5} * 256, to.data() + size_t{5} * 128, 37, 64, 48}};
    stage_experts(stream_, offsets.data(), 5, arrays);
    for (const ExpertArray& a : arrays) {
        for (int64_t e = 0; e < 5; ++e) {
            const bool active = e == 0 || e == 2 || e == 3;
            for (int64_t i = 0; i < a.to_distance; ++i) {
                const std::byte expected =
                    active && i < a.bytes ? a.from[e * a.from_distance + i] : kOld;
                ASSERT_EQ(a.to[e * a.to_distance + i], expected) << "expert " << e << " byte " << i;
            }
        }
    }
}

}  // namespace
}  // namespace orbit
