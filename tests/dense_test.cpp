// What opcheck's cases cannot say about linear: accumulation, shared memory, empty batches, and
// gradient sums that do not see where a batch was cut.
#include "ops/dense.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

namespace orbit {
namespace {

constexpr int64_t kRows = 23;
constexpr int64_t kIn = 96;
constexpr int64_t kOut = 80;
constexpr int64_t kRank = 4;
constexpr int64_t kBlock = 32;

std::vector<bf16> random_bf16(int64_t count, uint64_t seed) {
    std::mt19937_64 engine(seed);
    std::vector<bf16> values(static_cast<size_t>(count));
    for (auto& value : values) {
        value = to_bf16(static_cast<float>(engine() >> 40) * 0x1p-23f - 1.0f);
    }
    return values;
}

Tensor view(std::vector<bf16>& values, std::initializer_list<int64_t> shape) {
    return make_tensor(values.data(), DType::kBF16, shape);
}

bool same_bits(const void* a, const void* b, size_t bytes) {
    return std::memcmp(a, b, bytes) == 0;
}

class Dense : public testing::TestWithParam<const char*> {
  protected:
    void SetUp() override {
        CpuIsa isa = CpuIsa::kReference;
        try {
            isa = parse_cpu_isa(GetParam());
        } catch (const UserError&) {
            GTEST_SKIP() << "this processor has no " << GetParam();
        }
        device = make_device("cpu", isa_name(isa), 2);
        p.x = view(x, {kRows, kIn});
        p.w.rows = kOut;
        p.w.cols = kIn;
        p.w.data = w.data();
    }

    void use_lora() {
        p.adapter.kind = AdapterKind::kLora;
        p.adapter.lora_a = view(a, {kRank, kIn});
        p.adapter.lora_b = view(b, {kOut, kRank});
        p.adapter.lora_scale = 0.5f;
    }

    void use_oft() {
        p.adapter.kind = AdapterKind::kOft;
        p.adapter.oft_d = view(d, {kIn / kBlock, kBlock, kBlock});
    }

    // Gradients of rows [begin, end), added to the given sums.
    void add_gradients(Stream& stream, int64_t begin, int64_t end, const AdapterGrad& grad) {
        LinearParams part = p;
        part.x = p.x.slice(begin, end);
        const Tensor dy_part = view(dy, {kRows, kOut}).slice(begin, end);
        linear_backward(stream, part, dy_part, Tensor{}, false, grad);
    }

    Device device;
    std::vector<bf16> x = random_bf16(kRows * kIn, 1);
    std::vector<bf16> w = random_bf16(kOut * kIn, 2);
    std::vector<bf16> a = random_bf16(kRank * kIn, 3);
    std::vector<bf16> b = random_bf16(kOut * kRank, 4);
    std::vector<bf16> d = random_bf16(kIn * kBlock, 5);
    std::vector<bf16> dy = random_bf16(kRows * kOut, 6);
    LinearParams p;
};

TEST_P(Dense, OutputMayBeTheResidualsMemory) {
    Stream stream(device);
    auto residual = random_bf16(kRows * kOut, 7);
    p.residual = view(residual, {kRows, kOut});
    std::vector<bf16> apart(residual.size());
    linear(stream, p, view(apart, {kRows, kOut}));
    EXPECT_FALSE(same_bits(apart.data(), residual.data(), apart.size() * 2));
    linear(stream, p, p.residual);
    EXPECT_TRUE(same_bits(apart.data(), residual.data(), apart.size() * 2));
}

TEST_P(Dense, AccumulatingAddsToWhatIsThere) {
    Stream stream(device);
    for (const AdapterKind kind : {AdapterKind::kNone, AdapterKind::kLora, AdapterKind::kOft}) {
        p.adapter = {};
        if (kind == AdapterKind::kLora) {
            use_lora();
        } else if (kind == AdapterKind::kOft) {
            use_oft();
        }
        std::vector<bf16> alone(x.size());
        linear_backward(stream, p, view(dy, {kRows, kOut}), view(alone, {kRows, kIn}), false, {});
        auto start = random_bf16(kRows * kIn, 8);
        auto sum = start;
        linear_backward(stream, p, view(dy, {kRows, kOut}), view(sum, {kRows, kIn}), true, {});
        for (size_t i = 0; i < sum.size(); ++i) {
            const float want = to_float(start[i]) + to_float(alone[i]);
            ASSERT_NEAR(to_float(sum[i]), want, 0.02f * (std::abs(want) + 1.0f)) << "at " << i;
        }
    }
}

TEST_P(Dense, AGroupsGradientIsThatOfItsLayersTheLastOneFirst) {
    Stream stream(device);
    use_lora();
    LinearParams plain = p;
    plain.adapter = {};
    const std::vector<LinearParams> params{p, plain, p};
    auto other = random_bf16(kRows * kOut, 9);
    const Tensor of_y = view(dy, {kRows, kOut});
    const std::vector<Tensor> gradients{of_y, view(other, {kRows, kOut}), of_y};
    const auto grads_at = [](std::vector<float>& sums) {
        sums.assign(size_t{2} * (kRank * kIn + kOut * kRank), 0.0f);
        std::vector<AdapterGrad> grads(3);
        grads[0].lora_a = sums.data();
        grads[0].lora_b = grads[0].lora_a + kRank * kIn;
        grads[2].lora_a = grads[0].lora_b + kOut * kRank;
        grads[2].lora_b = grads[2].lora_a + kRank * kIn;
        return grads;
    };
    std::vector<float> together;
    std::vector<float> apart;
    std::vector<bf16> sum(x.size());
    std::vector<bf16> one_by_one(x.size());
    linear_group_backward(
        stream, params, gradients, view(sum, {kRows, kIn}), false, grads_at(together)
    );
    const std::vector<AdapterGrad> grads = grads_at(apart);
    for (const size_t i : {2, 1, 0}) {
        const Tensor dx = view(one_by_one, {kRows, kIn});
        linear_backward(stream, params[i], gradients[i], dx, i < 2, grads[i]);
    }
    EXPECT_TRUE(same_bits(sum.data(), one_by_one.data(), sum.size() * 2));
    EXPECT_TRUE(same_bits(together.data(), apart.data(), together.size() * 4));
    EXPECT_NE(together[0], 0.0f);
}

TEST_P(Dense, GradientSumsDoNotSeeWhereABatchWasCut) {
    Stream stream(device);
    const auto run = [&](int64_t cut, std::vector<float>& first, std::vector<float>& second) {
        first.assign(static_cast<size_t>(kIn * kBlock), 0.25f);
        second.assign(static_cast<size_t>(kOut * kRank), -0.5f);
        AdapterGrad grad;
        if (p.adapter.kind == AdapterKind::kLora) {
            grad.lora_a = first.data();
            grad.lora_b = second.data();
        } else {
            grad.oft_d = first.data();
        }
        add_gradients(stream, 0, cut, grad);
        add_gradients(stream, cut, kRows, grad);
    };
    for (const bool oft : {false, true}) {
        oft ? use_oft() : use_lora();
        std::vector<float> whole_first;
        std::vector<float> whole_second;
        run(kRows, whole_first, whole_second);
        EXPECT_NE(whole_first[0], 0.25f);
        for (const int64_t cut : {int64_t{0}, int64_t{1}, int64_t{10}}) {
            std::vector<float> first;
            std::vector<float> second;
            run(cut, first, second);
            EXPECT_EQ(first, whole_first) << "cut at " << cut;
            EXPECT_EQ(second, whole_second) << "cut at " << cut;
        }
    }
}

TEST_P(Dense, AnEmptyBatchDoesNothing) {
    Stream stream(device);
    use_lora();
    p.x = view(x, {0, kIn});
    std::vector<float> sums(static_cast<size_t>(kIn * kRank), 1.0f);
    AdapterGrad grad;
    grad.lora_a = sums.data();
    linear(stream, p, view(dy, {0, kOut}));
    linear_backward(stream, p, view(dy, {0, kOut}), view(x, {0, kIn}), false, grad);
    EXPECT_EQ(sums, std::vector<float>(sums.size(), 1.0f));
}

TEST_P(Dense, TheHeadsGradientRoundsItsLogitsFirst) {
    Stream stream(device);
    std::vector<float> dlogits;
    std::vector<float> rounded;
    for (size_t i = 0; i < static_cast<size_t>(kRows * kOut); ++i) {
        dlogits.push_back(to_float(dy[i]) * 1.003f);
        rounded.push_back(round_to_bf16(dlogits.back()));
    }
    EXPECT_NE(dlogits, rounded);
    std::vector<bf16> dh(x.size());
    std::vector<bf16> dh_rounded(x.size());
    const auto back = [&](std::vector<float>& from, std::vector<bf16>& to) {
        linear_f32_out_backward(
            stream,
            make_tensor(from.data(), DType::kF32, {kRows, kOut}),
            p.w,
            view(to, {kRows, kIn})
        );
    };
    back(dlogits, dh);
    back(rounded, dh_rounded);
    EXPECT_TRUE(same_bits(dh.data(), dh_rounded.data(), dh.size() * 2));
}

INSTANTIATE_TEST_SUITE_P(
    Isa,
    Dense,
    testing::Values("reference", "avx2", "avx512", "amx"),
    [](const auto& test) { return std::string(test.param); }
);

}  // namespace
}  // namespace orbit
