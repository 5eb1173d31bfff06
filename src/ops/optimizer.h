// AdamW (Loshchilov & Hutter 2019, PyTorch's order of operations) on flat float32 buffers, and the
// global norm.
#pragma once

#include <span>

#include "base/number_formats.h"
#include "device/device.h"

namespace orbit {

struct AdamWParams {
    double lr = 0;
    double beta1 = 0.9;
    double beta2 = 0.95;
    double eps = 1e-8;
    double weight_decay = 0;
    int64_t step = 1;       // counts from 1
    double grad_scale = 1;  // multiplies g first (clipping)
};

// p, m, v updated in place; all float32 [count] device memory.
void adamw(
    Stream& stream,
    const AdamWParams& params,
    float* p,
    float* m,
    float* v,
    const float* g,
    int64_t count
);

// Whether all values are zero (of either sign). Host memory.
bool all_zero(const float* values, int64_t count);

struct RoundRange {  // in elements
    int64_t from;
    int64_t to;
    int64_t count;
};

namespace cuda {
// copies[to + i] = bf16(values[from + i]) for every range, which are host memory. (On a CPU the
// adapter store does this with its threads.)
void round_ranges(
    Stream& stream, std::span<const RoundRange> ranges, const float* values, bf16* copies
);
}  // namespace cuda

// sqrt(sum g^2) in float64: partial sums of fixed tiles of 4096, added in ascending order. Not
// finite if any g is not.
double global_norm(Stream& stream, const float* g, int64_t count);

}  // namespace orbit
