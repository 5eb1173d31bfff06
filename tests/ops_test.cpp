// Known answers and golden values of the small ops; opcheck holds the sweeps.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "ops/activation.h"
#include "ops/attention.h"
#include "ops/norm.h"
#include "ops/optimizer.h"
#include "ops/rope.h"

namespace orbit {
namespace {

std::vector<float> random_values(uint64_t seed, int64_t count) {
    std::mt19937_64 engine(seed);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) {
        value = uniform(engine);
    }
    return values;
}

Tensor floats(std::vector<float>& values, std::initializer_list<int64_t> shape) {
    return make_tensor(values.data(), DType::kF32, shape);
}

TEST(AdamW, GoldenValues) {
    const Device device = make_device("cpu", "auto", 1);
    Stream stream(device);
    std::vector<float> p = {0.5f, -0.25f};
    std::vector<float> m(2), v(2);
    const std::vector<std::vector<float>> gradients = {{.1f, -.2f}, {.3f, .05f}, {-.1f, .4f}};
    const double want[3][2] = {
        {0.489500001, -0.23975},
        {0.479832690219559, -0.23481556910954468},
        {0.4745159393007922, -0.2385989993511739}};
    AdamWParams params;
    params.lr = 0.01;
    params.beta1 = 0.9;
    params.beta2 = 0.999;
    params.weight_decay = 0.1;
    for (size_t i = 0; i < 3; ++i) {
        params.step = static_cast<int64_t>(i) + 1;
        // Clipping by one half of twice the gradient is the gradient.
        std::vector<float> g = {2.0f * gradients[i][0], 2.0f * gradients[i][1]};
        params.grad_scale = 0.5;
        adamw(stream, params, p.data(), m.data(), v.data(), g.data(), 2);
        for (size_t k = 0; k < 2; ++k) {
            EXPECT_NEAR(static_cast<double>(p[k]), want[i][k], 1e-6 * std::abs(want[i][k]));
        }
    }
}

TEST(GlobalNorm, MatchesFloat64AndReportsNonFinite) {
    const Device device = make_device("cpu", "auto", 2);
    Stream stream(device);
    for (const int64_t count : {1, 7, 4096, 4097, 100'003}) {
        std::vector<float> g = random_values(static_cast<uint64_t>(count), count);
        double sum = 0;
        for (const float value : g) {
            sum += static_cast<double>(value) * static_cast<double>(value);
        }
        EXPECT_NEAR(global_norm(stream, g.data(), count), std::sqrt(sum), 1e-12 * std::sqrt(sum));
        g[static_cast<size_t>(count / 2)] = std::nanf("");
        EXPECT_FALSE(std::isfinite(global_norm(stream, g.data(), count)));
    }
}

// These ops use no fused multiply-add and no libm, so every instruction set gives the same bits.
TEST(SmallOps, EveryInstructionSetGivesTheSameBits) {
    constexpr int64_t kRows = 5;
    constexpr int64_t kHeads = 3;
    constexpr int64_t kHeadDim = 48;
    constexpr int64_t kWidth = kHeads * kHeadDim;
    constexpr int64_t kCount = kRows * kWidth;
    const auto results = [&](CpuIsa isa) {
        const Device device = make_device("cpu", isa_name(isa), 2);
        Stream stream(device);
        std::vector<float> x = random_values(1, kCount);
        std::vector<float> other = random_values(2, kCount);
        std::vector<float> weight = random_values(3, kWidth);
        std::vector<float> table = random_values(4, kRows * kHeadDim / 2);
        std::vector<int32_t> positions = {0, 1, 2, 3, 4};
        std::vector<float> normed(kCount), rotated(kCount), gated(kCount), dx(kCount);
        const auto flat = [&](std::vector<float>& v) { return floats(v, {kRows, kWidth}); };
        rms_norm(stream, flat(x), weight.data(), 1e-5f, flat(normed));
        rms_norm_backward(stream, flat(x), weight.data(), 1e-5f, flat(other), flat(dx), true);
        swiglu(stream, flat(x), flat(other), flat(gated));
        NormRopeParams p;
        p.x = floats(x, {kRows, kHeads, kHeadDim});
        p.norm_weight = weight.data();
        p.rope = {table.data(), table.data(), kHeadDim, kRows, false};
        p.positions = positions.data();
        norm_rope(stream, p, floats(rotated, {kRows, kHeads, kHeadDim}));
        std::vector<float> all = normed;
        for (const auto* part : {&rotated, &gated, &dx}) {
            all.insert(all.end(), part->begin(), part->end());
        }
        return all;
    };
    const std::vector<float> want = results(CpuIsa::kReference);
    for (const CpuIsa isa : {CpuIsa::kAvx2, CpuIsa::kAvx512}) {
        if (isa <= best_cpu_isa()) {
            EXPECT_EQ(results(isa), want) << isa_name(isa);
        }
    }
    std::vector<float> changed = want;
    changed[7] = std::nextafter(changed[7], 2.0f);
    EXPECT_NE(changed, want);
}

// A batch of sequences with its page table, and everything attention needs, in float32.
struct AttentionProblem {
    int64_t heads = 4, kv_heads = 2, d = 64;
    std::vector<int32_t> begin{0}, position, sequence_of, positions, table;
    std::vector<float> q, k, v, k_pages, v_pages, o, lse;
    int32_t max_blocks = 40;

    explicit AttentionProblem(const std::vector<int32_t>& lengths) {
        for (const int32_t length : lengths) {
            add(0, length);
        }
        const int64_t tokens = begin.back();
        q = random_values(1, tokens * heads * d);
        k = random_values(2, tokens * kv_heads * d);
        v = random_values(3, tokens * kv_heads * d);
        const auto num_pages = static_cast<int64_t>(lengths.size()) * max_blocks;
        k_pages.assign(static_cast<size_t>(num_pages * kv_heads * kPageTokens * d), std::nanf(""));
        v_pages = k_pages;
        for (int64_t i = 0; i < num_pages; ++i) {
            table.push_back(static_cast<int32_t>(num_pages - 1 - i));  // not in order
        }
        o.resize(q.size());
        lse.resize(static_cast<size_t>(tokens * heads));
    }

    void add(int32_t first, int32_t count) {
        for (int32_t i = 0; i < count; ++i) {
            sequence_of.push_back(static_cast<int32_t>(position.size()));
            positions.push_back(first + i);
        }
        position.push_back(first);
        begin.push_back(begin.back() + count);
    }

    AttentionParams params() {
        AttentionParams p;
        const int64_t tokens = begin.back();
        p.q = floats(q, {tokens, heads, d});
        p.k = floats(k, {tokens, kv_heads, d});
        p.v = floats(v, {tokens, kv_heads, d});
        const auto pages = static_cast<int64_t>(table.size());
        p.kv.k_pages = floats(k_pages, {pages, kv_heads, kPageTokens, d});
        p.kv.v_pages = floats(v_pages, {pages, kv_heads, kPageTokens, d});
        p.batch.num_tokens = static_cast<int32_t>(tokens);
        p.batch.num_sequences = static_cast<int32_t>(position.size());
        p.batch.max_blocks = max_blocks;
        p.batch.positions = positions.data();
        p.batch.sequence_of = sequence_of.data();
        p.batch.sequence_begin = begin.data();
        p.batch.sequence_position = position.data();
        p.batch.block_table = table.data();
        p.scale = 0.125f;
        return p;
    }
};

// o of one (token, head) of a whole sequence in float64.
std::vector<double> plain_attention(
    const AttentionProblem& a, size_t sequence, int64_t t, int64_t h
) {
    const int64_t first = a.begin[sequence];
    const int64_t g = h / (a.heads / a.kv_heads);
    std::vector<double> weights;
    double total = 0;
    for (int64_t j = 0; j <= t; ++j) {
        double score = 0;
        for (int64_t i = 0; i < a.d; ++i) {
            score +=
                static_cast<double>(a.q[static_cast<size_t>(((first + t) * a.heads + h) * a.d + i)]
                ) *
                static_cast<double>(
                    a.k[static_cast<size_t>(((first + j) * a.kv_heads + g) * a.d + i)]
                );
        }
        weights.push_back(std::exp(0.125 * score));
        total += weights.back();
    }
    std::vector<double> o(static_cast<size_t>(a.d));
    for (int64_t j = 0; j <= t; ++j) {
        for (int64_t i = 0; i < a.d; ++i) {
            o[static_cast<size_t>(i)] +=
                weights[static_cast<size_t>(j)] / total *
                static_cast<double>(
                    a.v[static_cast<size_t>(((first + j) * a.kv_heads + g) * a.d + i)]
                );
        }
    }
    return o;
}

TEST(Attention, MatchesThePlainFormOnEveryInstructionSet) {
    for (const char* isa : {"reference", "avx2", "avx512"}) {
        if (parse_cpu_isa("auto") < (isa[3] == '2'   ? CpuIsa::kAvx2
                                     : isa[3] == '5' ? CpuIsa::kAvx512
                                                     : CpuIsa::kReference)) {
            continue;
        }
        const Device device = make_device("cpu", isa, 2);
        Stream stream(device);
        AttentionProblem a({37, 1, 130});
        append_kv(stream, a.params());
        attention(stream, a.params(), floats(a.o, {168, 4, 64}), a.lse.data());
        for (size_t s = 0; s < 3; ++s) {
            for (int64_t t = 0; t < a.begin[s + 1] - a.begin[s]; t += 7) {
                for (int64_t h = 0; h < a.heads; ++h) {
                    const std::vector<double> want = plain_attention(a, s, t, h);
                    for (size_t i = 0; i < want.size(); ++i) {
                        const size_t at =
                            static_cast<size_t>(((a.begin[s] + t) * a.heads + h) * a.d) + i;
                        ASSERT_NEAR(static_cast<double>(a.o[at]), want[i], 2e-6)
                            << isa << " " << s << " " << t;
                    }
                }
            }
        }
    }
}

// The same sequence in chunks and token by token gives the bits of the whole.
TEST(Attention, ChunksAndDecodeGiveTheBitsOfTheWhole) {
    const Device device = make_device("cpu", "auto", 2);
    Stream stream(device);
    for (const int32_t chunk : {1, 16, 23}) {
        AttentionProblem whole({75});
        append_kv(stream, whole.params());
        attention(stream, whole.params(), floats(whole.o, {75, 4, 64}), whole.lse.data());
        AttentionProblem piece({75});
        for (int32_t from = 0; from < 75; from += chunk) {
            const int32_t count = std::min(chunk, 75 - from);
            piece.begin = {0};
            piece.position.clear();
            piece.sequence_of.clear();
            piece.positions.clear();
            piece.add(from, count);
            AttentionParams p = piece.params();
            p.q = make_tensor(piece.q.data() + from * 256, DType::kF32, {count, 4, 64});
            p.k = make_tensor(piece.k.data() + from * 128, DType::kF32, {count, 2, 64});
            p.v = make_tensor(piece.v.data() + from * 128, DType::kF32, {count, 2, 64});
            const Tensor o = make_tensor(piece.o.data() + from * 256, DType::kF32, {count, 4, 64});
            append_kv(stream, p);
            attention(stream, p, o, piece.lse.data() + from * 4);
        }
        EXPECT_EQ(whole.o, piece.o) << chunk;
        EXPECT_EQ(whole.lse, piece.lse) << chunk;
    }
}

}  // namespace
}  // namespace orbit
