// OFT kernels over one block, compiled once per instruction set; all give the same bits.
#pragma once

#include "adapter/oft_math.h"
#include "ops/isa.h"

namespace orbit {

// Writes the block's D to `copy` ([b, b] of the compute type) and its bounds.
ORBIT_KERNEL(
    void,
    oft_derive_block,
    (const float* v,
     int64_t b,
     const OftTransform& transform,
     DType compute,
     void* copy,
     OftBound* bound,
     float* work)
)

// Adds dL/dv of the block to `dv`.
ORBIT_KERNEL(
    void,
    oft_gradient_block,
    (const float* v,
     const float* delta,
     int64_t b,
     const OftTransform& transform,
     float* dv,
     float* work)
)

ORBIT_KERNEL(void, oft_bound_block, (const float* v, int64_t b, OftBound* bound, float* work))

}  // namespace orbit
