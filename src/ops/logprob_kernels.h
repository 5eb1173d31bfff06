#pragma once

#include "ops/isa.h"

namespace orbit {

constexpr int64_t kVocabTile = 1024;

// Of one row of tempered logits z: sums over e^(z - largest).
struct RowStats {
    float largest;
    float sum;       // sum e^(z - largest)
    float weighted;  // sum e^(z - largest) (z - largest)
};

// One draw: the row's stream of random numbers.
struct DrawKey {
    uint32_t seed_low;
    uint32_t seed_high;
    uint32_t position;
    uint32_t request_low;
    uint32_t request_high;
};

// All of these treat z = -infinity as an id that is not kept.
ORBIT_KERNEL(void, scale_row, (float* z, int64_t count, float factor))
ORBIT_KERNEL(float, largest_of_row, (const float* z, int64_t count))
ORBIT_KERNEL(RowStats, row_stats, (const float* z, int64_t count))
// out[j] = e^(z[j] - largest)
ORBIT_KERNEL(void, exp_row, (const float* z, int64_t count, float largest, float* out))
// Lowest id with the largest value.
ORBIT_KERNEL(int32_t, argmax_of_row, (const float* z, int64_t count))
// Lowest id with the largest z - log E.
ORBIT_KERNEL(int32_t, race_row, (const float* z, int64_t count, const DrawKey& key))
// -log E of ids [begin, begin + 16), begin a multiple of 16.
ORBIT_KERNEL(void, gumbel_block, (const DrawKey& key, uint32_t begin, float* out))

// z is replaced by (c (1[j = target] - p) - e p (log p + entropy)) * factor.
struct HeadGradient {
    float c;
    float e;
    float lse;
    float entropy;
    float factor;
    int32_t target;
};

ORBIT_KERNEL(void, head_gradient_row, (const HeadGradient& g, float* z, int64_t count))

// log of the sum in RowStats.
ORBIT_KERNEL(float, log_of, (float x))

}  // namespace orbit
