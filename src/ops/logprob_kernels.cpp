// No fused multiply-add: log-probs of equal logits, and draws, have the same bits on every
// instruction set. Sums run in 16 lanes over each tile of 1024 ids, then a fixed tree; tiles are
// merged in ascending order.
#include "ops/logprob_kernels.h"

#include "base/exact_math.h"
#include "base/philox.h"
#include "ops/lanes.h"

namespace orbit::ORBIT_ISA {
namespace {

// Below this exp is exactly 0; it keeps 0 * (z - m) finite for z = -infinity.
constexpr float kLowest = -100.0f;

ORBIT_LANES float clamped(float x) {
    return x > kLowest ? x : kLowest;
}

float largest_of(const float* z, int64_t count) {
    Lanes best = splat(-__builtin_inff());
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        best = larger(load(z + i), best);
    }
    float largest = largest_lane(best);
    for (; i < count; ++i) {
        largest = z[i] > largest ? z[i] : largest;
    }
    return largest;
}

RowStats tile_stats(const float* z, int64_t count) {
    const float largest = largest_of(z, count);
    float sum[kLanes] = {};
    float weighted[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const float x = clamped(z[i + lane] - largest);
            const float e = exact_exp(x);
            sum[lane] += e;
            weighted[lane] += e * x;
        }
    }
    for (int lane = 0; i < count; ++i, ++lane) {
        const float x = clamped(z[i] - largest);
        const float e = exact_exp(x);
        sum[lane] += e;
        weighted[lane] += e * x;
    }
    return {largest, sum_lanes(load(sum)), sum_lanes(load(weighted))};
}

RowStats merge(const RowStats& a, const RowStats& b) {
    if (b.sum == 0.0f) {
        return a;
    }
    if (a.sum == 0.0f) {
        return b;
    }
    const float largest = a.largest > b.largest ? a.largest : b.largest;
    const float shift_a = clamped(a.largest - largest);
    const float shift_b = clamped(b.largest - largest);
    const float fa = exact_exp(shift_a);
    const float fb = exact_exp(shift_b);
    RowStats r{};
    r.largest = largest;
    r.sum = fa * a.sum + fb * b.sum;
    r.weighted = fa * (a.weighted + shift_a * a.sum) + fb * (b.weighted + shift_b * b.sum);
    return r;
}

constexpr int kCounters = 16;
constexpr int kRaceBlock = 4 * kCounters;

constexpr int kWideLanes = kNativeLanes / 2;
using NativeWide [[gnu::vector_size(kWideLanes * 8)]] = uint64_t;
using NativeNarrow [[gnu::vector_size(kWideLanes * 4)]] = uint32_t;

// Products of the low halves of 64-bit lanes.
ORBIT_LANES NativeWide wide_product(NativeWide a, uint64_t b) {
    const NativeWide factor = b + NativeWide{};
#if defined(ORBIT_AVX512)
    return __builtin_bit_cast(
        NativeWide,
        _mm512_maskz_mul_epu32(
            0xff, __builtin_bit_cast(__m512i, a), __builtin_bit_cast(__m512i, factor)
        )
    );
#elif defined(ORBIT_AVX2)
    return __builtin_bit_cast(
        NativeWide,
        _mm256_mul_epu32(__builtin_bit_cast(__m256i, a), __builtin_bit_cast(__m256i, factor))
    );
#else
    return __builtin_bit_cast(
        NativeWide,
        _mm_mul_epu32(__builtin_bit_cast(__m128i, a), __builtin_bit_cast(__m128i, factor))
    );
#endif
}

// base/philox.h for counters (first + i, ...) side by side, one in each 64-bit lane (whose high
// half holds rubbish).
ORBIT_LANES void philox_lanes(const DrawKey& key, uint32_t first, uint32_t* words) {
    NativeWide c0;
    for (int i = 0; i < kWideLanes; ++i) {
        c0[i] = first + static_cast<uint32_t>(i);
    }
    NativeWide c1 = key.position + NativeWide{};
    NativeWide c2 = key.request_low + NativeWide{};
    NativeWide c3 = key.request_high + NativeWide{};
    uint32_t k0 = key.seed_low;
    uint32_t k1 = key.seed_high;
    for (int round = 0; round < 10; ++round) {
        const NativeWide p0 = wide_product(c0, 0xD2511F53u);
        const NativeWide p1 = wide_product(c2, 0xCD9E8D57u);
        c0 = (p1 >> 32) ^ c1 ^ uint64_t { k0 };
        c2 = (p0 >> 32) ^ c3 ^ uint64_t { k1 };
        c1 = p1;
        c3 = p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    const NativeNarrow narrow[4] = {
        __builtin_convertvector(c0, NativeNarrow),
        __builtin_convertvector(c1, NativeNarrow),
        __builtin_convertvector(c2, NativeNarrow),
        __builtin_convertvector(c3, NativeNarrow)};
    for (int i = 0; i < kWideLanes; ++i) {
        for (int k = 0; k < 4; ++k) {
            words[4 * i + k] = narrow[k][i];
        }
    }
}

// -log E of ids [4 * first, 4 * first + 64).
//
// -log E with E = -log(1 - u) an exponential variate. w is 1 - u rounded; the factor u / (1 - w)
// takes the error of that rounding back, because log(w) / (1 - w) hardly changes over it (Kahan's
// log1p). So E keeps its full relative precision for u near 0, where races are won. For u below
// 2^-24 the largest w below 1 serves: that is 3e-8 off.
void gumbels(const DrawKey& key, uint32_t first, float* out) {
    constexpr float kBelowOne = 0.99999994f;
    uint32_t words[kRaceBlock];
    for (int i = 0; i < kCounters; i += kWideLanes) {
        philox_lanes(key, first + static_cast<uint32_t>(i), words + 4 * i);
    }
    // Apart from the logarithms, because the compiler does not vectorise a clamp followed by them.
    float u[kRaceBlock];
    float w[kRaceBlock];
    for (int i = 0; i < kRaceBlock; ++i) {
        u[i] = uniform_from_word(words[i]);
        const float rounded = 1.0f - u[i];
        w[i] = rounded < kBelowOne ? rounded : kBelowOne;
    }
    for (int i = 0; i < kRaceBlock; ++i) {
        const float e = -exact_log(w[i]) * (u[i] / (1.0f - w[i]));
        out[i] = -exact_log(e);
    }
}

// No -log E is above this (u = 2^-33).
constexpr float kLargestGumbel = 22.9f;

}  // namespace

void scale_row(float* z, int64_t count, float factor) {
    for (int64_t i = 0; i < count; ++i) {
        z[i] *= factor;
    }
}

float largest_of_row(const float* z, int64_t count) {
    return largest_of(z, count);
}

RowStats row_stats(const float* z, int64_t count) {
    RowStats all{-__builtin_inff(), 0.0f, 0.0f};
    for (int64_t from = 0; from < count; from += kVocabTile) {
        const int64_t size = count - from < kVocabTile ? count - from : kVocabTile;
        const RowStats tile = tile_stats(z + from, size);
        if (tile.largest == -__builtin_inff()) {
            continue;  // nothing kept in this tile
        }
        all = merge(all, tile);
    }
    return all;
}

void exp_row(const float* z, int64_t count, float largest, float* out) {
    for (int64_t i = 0; i < count; ++i) {
        out[i] = exact_exp(z[i] - largest);
    }
}

int32_t argmax_of_row(const float* z, int64_t count) {
    const float largest = largest_of(z, count);
    for (int64_t i = 0; i < count; ++i) {
        if (z[i] == largest) {
            return static_cast<int32_t>(i);
        }
    }
    return 0;  // all NaN
}

void gumbel_block(const DrawKey& key, uint32_t begin, float* out) {
    float block[kRaceBlock];
    gumbels(key, begin >> 2, block);
    for (int i = 0; i < kLanes; ++i) {
        out[i] = block[i];
    }
}

int32_t race_row(const float* z, int64_t count, const DrawKey& key) {
    // Starting from the largest logit lets most blocks be passed over unseen: an id whose logit
    // plus the largest possible -log E is below the best score cannot win.
    float best = -__builtin_inff();
    int64_t winner = argmax_of_row(z, count);
    const auto run_block = [&](int64_t from) {
        float score[kRaceBlock];
        gumbels(key, static_cast<uint32_t>(from >> 2), score);
        const int64_t size = count - from < kRaceBlock ? count - from : kRaceBlock;
        for (int64_t i = 0; i < size; ++i) {
            score[i] += z[from + i];
        }
        if (largest_of(score, size) < best) {
            return;
        }
        for (int64_t i = 0; i < size; ++i) {
            if (score[i] > best || (score[i] == best && from + i < winner)) {
                best = score[i];
                winner = from + i;
            }
        }
    };
    run_block(winner / kRaceBlock * kRaceBlock);
    for (int64_t from = 0; from < count; from += kRaceBlock) {
        const int64_t size = count - from < kRaceBlock ? count - from : kRaceBlock;
        if (largest_of(z + from, size) + kLargestGumbel >= best) {
            run_block(from);
        }
    }
    return static_cast<int32_t>(winner);
}

void head_gradient_row(const HeadGradient& gradient, float* z, int64_t count) {
    const HeadGradient g = gradient;
    for (int64_t i = 0; i < count; ++i) {
        const float log_p = clamped(z[i] - g.lse);
        const float p = exact_exp(log_p);
        const float hit = i == g.target ? g.c : 0.0f;
        z[i] = (hit - g.c * p - g.e * p * (log_p + g.entropy)) * g.factor;
    }
}

float log_of(float x) {
    return exact_log(x);
}

}  // namespace orbit::ORBIT_ISA
