// The language-model head: golden values, the race's random numbers, filters, draws.
#include "ops/logprob.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "base/philox.h"
#include "ops/logprob_kernels.h"

namespace orbit {
namespace {

constexpr int64_t kWidth = 64;

// A head whose logits are given: row i of h is a unit vector, column i of W the logits of row i.
// Columns from 32 on are the identity, so that dh carries dL/dz of the first 32 ids.
struct GivenLogits {
    int64_t vocabulary;
    std::vector<float> w;
    std::vector<float> h;
    int32_t num_tokens;

    GivenLogits(const std::vector<std::vector<float>>& logits, const std::vector<size_t>& rows)
        : vocabulary(static_cast<int64_t>(logits[0].size())),
          w(static_cast<size_t>(vocabulary * kWidth)),
          h(rows.size() * kWidth),
          num_tokens(static_cast<int32_t>(vocabulary)) {
        for (size_t v = 0; v < logits[0].size(); ++v) {
            for (size_t i = 0; i < logits.size(); ++i) {
                w[v * kWidth + i] = logits[i][v];
            }
            if (v < 32) {
                w[v * kWidth + 32 + v] = 1.0f;
            }
        }
        for (size_t i = 0; i < rows.size(); ++i) {
            h[i * kWidth + rows[i]] = 1.0f;
        }
    }

    HeadParams params() {
        HeadParams p;
        p.h = make_tensor(h.data(), DType::kF32, {static_cast<int64_t>(h.size()) / kWidth, kWidth});
        p.w.format = WeightFormat::kF32;
        p.w.rows = vocabulary;
        p.w.cols = kWidth;
        p.w.data = w.data();
        p.num_tokens = num_tokens;
        return p;
    }
};

class Head : public ::testing::Test {
  protected:
    Device device_ = make_device("cpu", "auto", 2);
    Stream stream_{device_};
};

std::vector<float> random_logits(uint64_t seed, size_t count, float scale) {
    std::mt19937_64 engine(seed);
    std::uniform_real_distribution<float> uniform(-scale, scale);
    std::vector<float> values(count);
    for (float& value : values) {
        value = uniform(engine);
    }
    return values;
}

TEST_F(Head, GoldenValues) {
    GivenLogits head({{1.0f, -0.5f, 0.25f, 2.0f, 0.0f}}, {0});
    SamplingFilter filter;
    filter.temperature = 0.7f;
    const int32_t target = 2;
    float logprob = 0;
    float entropy = 0;
    token_logprobs(stream_, head.params(), &target, filter, &logprob, &entropy);
    EXPECT_NEAR(logprob, -2.8416618288503037, 1e-6);
    EXPECT_NEAR(entropy, 0.9187146534723856, 1e-6);

    std::vector<float> dh(kWidth);
    const Tensor gradient = make_tensor(dh.data(), DType::kF32, {1, kWidth});
    const float c = -1.1779825586946506f;
    token_logprobs_backward(stream_, head.params(), &target, filter, &c, nullptr, gradient);
    const double want_c[5] = {
        0.286574989327, 0.033620738771, -1.584674889464, 1.195801168156, 0.068677993210};
    for (size_t i = 0; i < 5; ++i) {
        EXPECT_NEAR(dh[32 + i], want_c[i], 2e-6);
    }
    const float zero = 0;
    const float one = 1;
    token_logprobs_backward(stream_, head.params(), &target, filter, &zero, &one, gradient);
    const double want_e[5] = {
        0.207154115345, 0.085462322021, 0.160232741139, -0.585781543774, 0.132932365269};
    for (size_t i = 0; i < 5; ++i) {
        EXPECT_NEAR(dh[32 + i], want_e[i], 1e-6);
    }
}

TEST_F(Head, RaceNumbersMatchTheCheckVector) {
    const uint64_t rid = 0x0123456789abcdefu;
    const DrawKey key = {42, 0, 17, static_cast<uint32_t>(rid), static_cast<uint32_t>(rid >> 32)};
    const PhiloxWords words = philox(12 >> 2, 17, key.request_low, key.request_high, 42, 0);
    EXPECT_EQ(words.word[0], 0x00b41577u);
    EXPECT_EQ(words.word[3], 0x29ac63d2u);
    const double want[4] = {
        5.895556780794453, -0.14362215050768892, -0.43050328989723347, 1.727791270177282};
    float got[16];
    isa_reference::gumbel_block(key, 0, got);
    for (size_t i = 0; i < 4; ++i) {
        EXPECT_NEAR(got[12 + i], want[i], 1e-5 * std::abs(want[i]));
    }
    if (best_cpu_isa() >= CpuIsa::kAvx512) {
        float wide[16];
        isa_avx512::gumbel_block(key, 0, wide);
        EXPECT_TRUE(std::equal(got, got + 16, wide));
    }
}

TEST_F(Head, RowStatsHaveTheSameBitsOnEveryInstructionSet) {
    const std::vector<float> z = random_logits(5, 3000, 9.0f);
    const RowStats want = isa_reference::row_stats(z.data(), 3000);
    const RowStats got =
        ORBIT_CALL_KERNEL(device_.isa, row_stats, (z.data(), static_cast<int64_t>(z.size())));
    EXPECT_EQ(got.largest, want.largest);
    EXPECT_EQ(got.sum, want.sum);
    EXPECT_EQ(got.weighted, want.weighted);
}

// Kept ids by a plain reading of the rules, in float64 with a full sort.
std::vector<bool> plain_filter(const std::vector<float>& z, const SamplingFilter& f) {
    const size_t count = z.size();
    std::vector<size_t> order(count);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return z[a] > z[b]; });
    std::vector<bool> kept(count, true);
    if (f.top_k > 0 && static_cast<size_t>(f.top_k) < count) {
        const float last = z[order[static_cast<size_t>(f.top_k) - 1]];
        for (size_t i = 0; i < count; ++i) {
            kept[i] = z[i] >= last;
        }
    }
    const auto weight = [&](size_t i) {
        const double gap = static_cast<double>(z[i]) - static_cast<double>(z[order[0]]);
        return std::exp(gap / static_cast<double>(f.temperature));
    };
    if (f.top_p < 1.0f) {
        double total = 0;
        for (size_t i = 0; i < count; ++i) {
            total += kept[i] ? weight(i) : 0.0;
        }
        double sum = 0;
        for (const size_t i : order) {
            if (sum >= static_cast<double>(f.top_p) * total) {
                kept[i] = false;
            } else if (kept[i]) {
                sum += weight(i);
            }
        }
    }
    for (size_t i = 0; i < count && f.min_p > 0.0f; ++i) {
        kept[i] = kept[i] && weight(i) >= static_cast<double>(f.min_p);
    }
    return kept;
}

TEST_F(Head, FiltersKeepWhatThePlainRulesKeep) {
    for (const size_t count : {size_t{7}, size_t{300}, size_t{2500}}) {
        std::vector<float> z = random_logits(count, count, 4.0f);
        z[3] = z[5];  // a tie
        std::vector<int32_t> targets(count);
        std::iota(targets.begin(), targets.end(), 0);
        GivenLogits head({z}, std::vector<size_t>(count, 0));
        std::vector<float> logprob(count);
        std::vector<float> entropy(count);
        for (const int32_t k : {0, 1, 5, 40, 100000}) {
            for (const float p : {0.1f, 0.73f, 0.95f, 1.0f}) {
                for (const float m : {0.0f, 0.03f, 0.5f}) {
                    const SamplingFilter f = {0.8f, p, k, m};
                    token_logprobs(
                        stream_, head.params(), targets.data(), f, logprob.data(), entropy.data()
                    );
                    const std::vector<bool> want = plain_filter(z, f);
                    double total = 0;
                    double plogp = 0;
                    for (size_t i = 0; i < count; ++i) {
                        ASSERT_EQ(std::isfinite(logprob[i]), want[i])
                            << count << " id " << i << " k " << k << " p " << p << " m " << m;
                        const double q = std::exp(static_cast<double>(logprob[i]));
                        total += q;
                        plogp += q > 0 ? q * static_cast<double>(logprob[i]) : 0.0;
                    }
                    EXPECT_NEAR(total, 1.0, 1e-5);
                    EXPECT_NEAR(entropy[0], -plogp, 2e-5);
                }
            }
        }
    }
}

TEST_F(Head, TiesAtTheTopKBoundaryAreKept) {
    GivenLogits head({{3.0f, 1.0f, 2.0f, 2.0f, 2.0f}}, {0, 0, 0, 0, 0});
    const std::vector<int32_t> targets = {0, 1, 2, 3, 4};
    std::vector<float> logprob(5);
    SamplingFilter f;
    f.top_k = 2;
    token_logprobs(stream_, head.params(), targets.data(), f, logprob.data(), nullptr);
    EXPECT_FALSE(std::isfinite(logprob[1]));
    EXPECT_TRUE(
        std::isfinite(logprob[2]) && std::isfinite(logprob[3]) && std::isfinite(logprob[4])
    );
}

TEST_F(Head, GreedyTakesTheLowestIdAndPaddingIsNeverDrawn) {
    GivenLogits head({{0.0f, 2.0f, 2.0f, 9.0f}}, std::vector<size_t>(400, 0));
    head.num_tokens = 3;
    std::vector<SampleRow> rows(400);
    std::vector<int32_t> tokens(400);
    std::vector<float> logprob(400);
    for (size_t i = 0; i < rows.size(); ++i) {
        rows[i].request = i;
        rows[i].filter.temperature = i % 2 == 0 ? 0.0f : 1.0f;
        rows[i].filter.top_k = i % 4 == 3 ? 1 : 0;
    }
    rows[8].forced = 3;
    sample_tokens(stream_, head.params(), rows.data(), tokens.data(), logprob.data());
    std::set<int32_t> seen;
    for (size_t i = 0; i < rows.size(); ++i) {
        if (i == 8) {
            EXPECT_EQ(tokens[i], 3);
            continue;
        }
        EXPECT_LT(tokens[i], 3);
        if (i % 2 == 0) {
            EXPECT_EQ(tokens[i], 1);
            EXPECT_NEAR(logprob[i], -7.0018, 1e-3);  // over the whole row, padding included
        }
        seen.insert(tokens[i]);
    }
    EXPECT_EQ(seen.size(), 3u);
}

TEST_F(Head, SampledLogprobsAreTheTrainersBitsWhateverTheBatch) {
    std::vector<std::vector<float>> logits;
    for (uint64_t i = 0; i < 6; ++i) {
        logits.push_back(random_logits(i, 3001, 6.0f));
    }
    const size_t count = 300;  // several chunks
    std::vector<size_t> which(count);
    std::vector<SampleRow> rows(count);
    const std::vector<SamplingFilter> filters = {
        {1.0f, 1.0f, 0, 0.0f}, {0.7f, 0.9f, 0, 0.0f}, {1.3f, 1.0f, 50, 0.02f}};
    for (size_t i = 0; i < count; ++i) {
        which[i] = i % 6;
        rows[i].filter = filters[i % 3];
        rows[i].seed = 7;
        rows[i].request = 1000 + i;
        rows[i].position = static_cast<int32_t>(i / 2);
    }
    GivenLogits head(logits, which);
    std::vector<int32_t> tokens(count);
    std::vector<float> logprob(count);
    sample_tokens(stream_, head.params(), rows.data(), tokens.data(), logprob.data());
    for (size_t f = 0; f < filters.size(); ++f) {
        std::vector<float> trained(count);
        std::vector<float> entropy(count);
        token_logprobs(
            stream_, head.params(), tokens.data(), filters[f], trained.data(), entropy.data()
        );
        for (size_t i = f; i < count; i += 3) {
            ASSERT_EQ(trained[i], logprob[i]) << i;
        }
    }
    const Device one = make_device("cpu", "auto", 1);
    Stream alone(one);
    for (size_t i = 0; i < count; i += 37) {
        HeadParams p = head.params();
        p.h = p.h.slice(static_cast<int64_t>(i), static_cast<int64_t>(i) + 1);
        int32_t token = -1;
        float value = 0;
        sample_tokens(alone, p, &rows[i], &token, &value);
        EXPECT_EQ(token, tokens[i]);
        EXPECT_EQ(value, logprob[i]);
    }
}

// The draw decided block by block with early exits equals the plain argmax of z - log E.
TEST_F(Head, RaceEqualsThePlainArgmax) {
    for (const float scale : {0.1f, 3.0f, 40.0f}) {
        for (uint32_t draw = 0; draw < 50; ++draw) {
            const std::vector<float> z = random_logits(draw, 1000, scale);
            const DrawKey key = {draw, 1, 2, 3, 4};
            float best = -INFINITY;
            int32_t want = -1;
            float gumbel[16];
            for (size_t i = 0; i < z.size(); ++i) {
                if (i % 16 == 0) {
                    isa_reference::gumbel_block(key, static_cast<uint32_t>(i), gumbel);
                }
                if (z[i] + gumbel[i % 16] > best) {
                    best = z[i] + gumbel[i % 16];
                    want = static_cast<int32_t>(i);
                }
            }
            EXPECT_EQ(isa_reference::race_row(z.data(), 1000, key), want);
            EXPECT_EQ(
                ORBIT_CALL_KERNEL(device_.isa, race_row, (z.data(), int64_t{1000}, key)), want
            );
        }
    }
}

// Chi-square of frequencies against the softmax; the bound is the quantile 1 - 1e-4 (Wilson and
// Hilferty's approximation).
TEST_F(Head, FrequenciesFollowTheSoftmax) {
    for (const size_t count : {size_t{2}, size_t{50}, size_t{1000}}) {
        const std::vector<float> z = random_logits(count + 1, count, 1.5f);
        const size_t draws = 100'000;
        GivenLogits head({z}, std::vector<size_t>(draws, 0));
        std::vector<SampleRow> rows(draws);
        for (size_t i = 0; i < draws; ++i) {
            rows[i].seed = 1234;
            rows[i].request = i / 50;
            rows[i].position = static_cast<int32_t>(i % 50);
            rows[i].filter.temperature = 0.8f;
        }
        std::vector<int32_t> tokens(draws);
        std::vector<float> logprob(draws);
        sample_tokens(stream_, head.params(), rows.data(), tokens.data(), logprob.data());
        std::vector<double> seen(count);
        for (const int32_t token : tokens) {
            seen[static_cast<size_t>(token)] += 1;
        }
        const auto chi_square = [&](double temperature) {
            double total = 0;
            for (const float value : z) {
                total += std::exp(static_cast<double>(value) / temperature);
            }
            double sum = 0;
            for (size_t i = 0; i < count; ++i) {
                const double want = std::exp(static_cast<double>(z[i]) / temperature) / total *
                                    static_cast<double>(draws);
                sum += (seen[i] - want) * (seen[i] - want) / want;
            }
            return sum;
        };
        const double freedom = static_cast<double>(count) - 1;
        const double root = 1 - 2 / (9 * freedom) + 3.719 * std::sqrt(2 / (9 * freedom));
        const double bound = freedom * root * root * root;
        EXPECT_LT(chi_square(0.8), bound) << count;
        EXPECT_GT(chi_square(0.9), bound) << "the test must notice another temperature";
    }
}

}  // namespace
}  // namespace orbit
