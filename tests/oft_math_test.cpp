// The numeric core of OFT: golden values, identities, finite differences in float64.
#include "adapter/oft_math.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "adapter_inputs.h"

namespace orbit {
namespace {

double dot(const std::vector<double>& a, const std::vector<double>& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        sum += a[i] * b[i];
    }
    return sum;
}

// max |R^T R - I - expected|, R = I + d.
double orthogonality_error(
    const std::vector<double>& d, int64_t b, const std::vector<double>* expected
) {
    double worst = 0;
    for (int64_t i = 0; i < b; ++i) {
        for (int64_t j = 0; j < b; ++j) {
            double sum = 0;
            for (int64_t k = 0; k < b; ++k) {
                const auto r = [&](int64_t row, int64_t col) {
                    return d[static_cast<size_t>(row * b + col)] + (row == col ? 1.0 : 0.0);
                };
                sum += r(k, i) * r(k, j);
            }
            const double identity = i == j ? 1.0 : 0.0;
            const double want =
                expected == nullptr ? 0.0 : (*expected)[static_cast<size_t>(i * b + j)];
            worst = std::max(worst, std::abs(sum - identity - want));
        }
    }
    return worst;
}

TEST(OftMath, GoldenRotation) {
    const std::vector<double> v = {.01, .02, .03, .04, .05, .06};
    const double golden[16] = {
        0.9972121,
        0.01533493,
        0.03676874,
        0.06290253,
        -0.02449307,
        0.99163758,
        0.07294912,
        0.10323889,
        -0.04234326,
        -0.08569088,
        0.98885032,
        0.11374766,
        -0.05613347,
        -0.09487711,
        -0.12410034,
        0.98606306};
    const auto d = delta_of(v, 4, kSeries5);
    for (size_t i = 0; i < 16; ++i) {
        EXPECT_NEAR(d[i] + (i % 5 == 0 ? 1.0 : 0.0), golden[i], 1e-8) << i;
    }
    const double x[4] = {1, 2, 3, 4};
    const double rotated[4] = {0.5966623, 1.36202901, 2.65281658, 4.55487553};
    for (size_t c = 0; c < 4; ++c) {
        double sum = x[c];
        for (size_t k = 0; k < 4; ++k) {
            sum += x[k] * d[k * 4 + c];
        }
        EXPECT_NEAR(sum, rotated[c], 1e-8);
    }
    EXPECT_NEAR(orthogonality_error(d, 4, nullptr), 1.26e-4, 1e-6);
}

TEST(OftMath, GoldenGradient) {
    const std::vector<double> v = {.01, .02, .03, .04, .05, .06};
    const double x[4] = {1, 2, 3, 4};
    const double dxr[4] = {1, -1, .5, 2};
    std::vector<double> g(16);
    for (size_t i = 0; i < 16; ++i) {
        g[i] = x[i / 4] * dxr[i % 4];
    }
    const double golden[6] = {-4.98559, -5.003168, -5.95488, 7.1285355, 14.205959, 5.7287475};
    const auto dv = gradient_of(v, g, 4, kSeries5);
    for (size_t i = 0; i < 6; ++i) {
        EXPECT_NEAR(dv[i], golden[i], 1e-9) << i;
    }
}

TEST(OftMath, PeftTermsMapToDegrees) {
    EXPECT_EQ(neumann_transform(1, false).degree, 0);
    EXPECT_EQ(neumann_transform(2, false).degree, 1);
    EXPECT_EQ(neumann_transform(2, false).last, 2.0f);
    EXPECT_EQ(neumann_transform(3, false).degree, 3);
    EXPECT_EQ(neumann_transform(4, false).degree, 3);
    EXPECT_EQ(neumann_transform(5, false).degree, 4);
    EXPECT_EQ(neumann_transform(5, false).last, 1.0f);
    EXPECT_EQ(neumann_transform(3, true).degree, 2);
    EXPECT_EQ(neumann_transform(5, true).last, 2.0f);
}

// The series summed power by power, another way than the code under test.
std::vector<double> plain_series(const std::vector<double>& v, int64_t b, const OftTransform& t) {
    const auto size = static_cast<size_t>(b * b);
    std::vector<double> q(size);
    oft_unpack(v.data(), b, q.data());
    std::vector<double> power = q;
    std::vector<double> next(size);
    std::vector<double> d(size, 0.0);
    for (int32_t k = 1; k <= t.degree; ++k) {
        const double c = k == t.degree ? static_cast<double>(t.last) : 2.0;
        for (size_t i = 0; i < size; ++i) {
            d[i] += c * power[i];
        }
        oft_product(power.data(), q.data(), next.data(), b);
        power = next;
    }
    return d;
}

TEST(OftMath, SeriesEqualsTheSumOfPowers) {
    for (const int64_t b : {2, 3, 4, 8, 20, 32, 64}) {
        const auto v = noises(oft_parameters(b), 0.05, 7);
        const std::vector<float> v32(v.begin(), v.end());
        const std::vector<double> exact_v(v32.begin(), v32.end());
        for (const int32_t terms : {1, 2, 3, 4, 5, 6, 9}) {
            for (const bool old_rule : {false, true}) {
                const OftTransform t = neumann_transform(terms, old_rule);
                const auto want = plain_series(exact_v, b, t);
                const auto got = delta_of(exact_v, b, t);
                const auto got32 = delta_of(v32, b, t);
                for (size_t i = 0; i < want.size(); ++i) {
                    ASSERT_NEAR(got[i], want[i], 1e-14);
                    ASSERT_NEAR(static_cast<double>(got32[i]), want[i], 3e-7 * double(b));
                }
            }
        }
    }
}

TEST(OftMath, ShrinkIdentityOfTheDefaultSeries) {  // R^T R - I = -2 Q^4 + Q^8
    const int64_t b = 8;
    const auto v = noises(oft_parameters(b), 0.2, 3);
    std::vector<double> q(64);
    std::vector<double> q2(64);
    std::vector<double> q4(64);
    std::vector<double> q8(64);
    oft_unpack(v.data(), b, q.data());
    oft_product(q.data(), q.data(), q2.data(), b);
    oft_product(q2.data(), q2.data(), q4.data(), b);
    oft_product(q4.data(), q4.data(), q8.data(), b);
    std::vector<double> expected(64);
    for (size_t i = 0; i < 64; ++i) {
        expected[i] = -2 * q4[i] + q8[i];
    }
    EXPECT_LT(orthogonality_error(delta_of(v, b, kSeries5), b, &expected), 1e-14);
    EXPECT_GT(orthogonality_error(delta_of(v, b, kSeries5), b, nullptr), 1e-6);  // control
}

TEST(OftMath, ExactCayleyIsTheLimitOfTheSeriesAndOrthogonal) {
    const OftTransform exact{.exact = true};
    for (const int64_t b : {2, 5, 8, 32}) {
        const auto v = noises(oft_parameters(b), 0.3 / static_cast<double>(b), 11);
        const auto d = delta_of(v, b, exact);
        EXPECT_LT(orthogonality_error(d, b, nullptr), 1e-13);
        const auto series = delta_of(v, b, neumann_transform(60, false));
        auto flipped = v;
        for (double& value : flipped) {
            value = -value;
        }
        const auto inverse = delta_of(flipped, b, exact);
        double difference = 0;
        double transposed = 0;
        double flipped_difference = 0;
        for (int64_t i = 0; i < b; ++i) {
            for (int64_t j = 0; j < b; ++j) {
                const auto at = static_cast<size_t>(i * b + j);
                difference = std::max(difference, std::abs(d[at] - series[at]));
                transposed =
                    std::max(transposed, std::abs(d[at] - inverse[static_cast<size_t>(j * b + i)]));
                flipped_difference = std::max(flipped_difference, std::abs(d[at] - inverse[at]));
            }
        }
        EXPECT_LT(difference, 1e-12);
        EXPECT_LT(transposed, 1e-13);         // C(-Q) = C(Q)^T, PEFT's exact sign
        EXPECT_GT(flipped_difference, 1e-3);  // and not C(Q): the sign matters
    }
    const auto large = noises(oft_parameters(32), 3.0, 12);  // no limit on the size of Q
    EXPECT_LT(orthogonality_error(delta_of(large, 32, exact), 32, nullptr), 1e-11);
}

TEST(OftMath, GradientsMatchFiniteDifferences) {
    std::vector<OftTransform> transforms = {OftTransform{.exact = true}};
    for (const int32_t terms : {2, 3, 5, 6, 8}) {
        transforms.push_back(neumann_transform(terms, false));
        transforms.push_back(neumann_transform(terms, true));
    }
    for (const OftTransform& t : transforms) {
        for (const int64_t b : {2, 4, 7, 32}) {
            const auto v = noises(oft_parameters(b), 0.5 / static_cast<double>(b), 21);
            const auto g = noises(b * b, 1.0, 22);
            const auto dv = gradient_of(v, g, b, t);
            for (uint32_t direction = 0; direction < 4; ++direction) {
                const auto u = noises(oft_parameters(b), 1.0, 30 + direction);
                const double h = 1e-5;
                auto plus = v;
                auto minus = v;
                for (size_t i = 0; i < v.size(); ++i) {
                    plus[i] += h * u[i];
                    minus[i] -= h * u[i];
                }
                const double numeric =
                    (dot(g, delta_of(plus, b, t)) - dot(g, delta_of(minus, b, t))) / (2 * h);
                const double analytic = dot(dv, u);
                ASSERT_NEAR(analytic, numeric, 1e-8 * std::abs(numeric) + 2e-9)
                    << "b " << b << " degree " << t.degree << " exact " << t.exact;
            }
        }
    }
    // Control: one flipped entry of v is seen.
    auto v = noises(6, 0.1, 21);
    const auto g = noises(16, 1.0, 22);
    const auto before = gradient_of(v, g, 4, kSeries5);
    v[3] = -v[3];
    EXPECT_GT(std::abs(gradient_of(v, g, 4, kSeries5)[3] - before[3]), 1e-4);
}

TEST(OftMath, BoundsAreAboveTheta) {
    // One plane of parameter theta: both bounds are exact.
    std::vector<double> v(oft_parameters(4), 0.0);
    v[2] = 0.4;
    std::vector<double> work(static_cast<size_t>(oft_workspace(4, kSeries5)));
    const OftBound bound = oft_bound(v.data(), 4, work.data());
    EXPECT_NEAR(bound.theta, 0.4, 1e-12);
    EXPECT_NEAR(bound.norm, 0.4 * std::sqrt(2.0), 1e-12);
    const std::vector<double> golden = {.01, .02, .03, .04, .05, .06};
    EXPECT_GE(oft_bound(golden.data(), 4, work.data()).theta, 0.09502);
    EXPECT_LE(oft_bound(golden.data(), 4, work.data()).theta, 0.0955);
}

}  // namespace
}  // namespace orbit
