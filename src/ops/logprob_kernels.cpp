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

// -log E with E = -log(1 - u) an exponential variate. 1 - u rounded is w; the error of that
// rounding is taken back by the factor u / (1 - w) (1 - w is exact or nearly so), so that E keeps
// its full relative precision for u near 0, where races are won.
ORBIT_LANES float gumbel_from_word(uint32_t word) {
    const float u = uniform_from_word(word);
    const float w = 1.0f - u;
    const float gap = 1.0f - w;
    const float e = w == 1.0f ? u : -exact_log(w) * (u / (w == 1.0f ? 1.0f : gap));
    return -exact_log(e);
}

// Philox words of counters (first + i, ...), i < 16.
ORBIT_LANES void gumbels(const DrawKey& key, uint32_t first, float* out) {
    for (uint32_t i = 0; i < 16; ++i) {
        const PhiloxWords words = philox(
            first + i, key.position, key.request_low, key.request_high, key.seed_low, key.seed_high
        );
        for (uint32_t lane = 0; lane < 4; ++lane) {
            out[i * 4 + lane] = gumbel_from_word(words.word[lane]);
        }
    }
}

constexpr int64_t kRaceBlock = 64;
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
            const float value = z[from + i] + score[i];
            if (value > best || (value == best && from + i < winner)) {
                best = value;
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
