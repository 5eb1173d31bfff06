#pragma once

#include "ops/isa.h"

namespace orbit {

ORBIT_KERNEL(
    void, rms_norm_row, (const float* x, const float* weight, float eps, int64_t width, float* y)
)
ORBIT_KERNEL(
    void, rms_norm_row, (const bf16* x, const float* weight, float eps, int64_t width, bf16* y)
)
ORBIT_KERNEL(
    void,
    rms_norm_row_backward,
    (const float* x,
     const float* weight,
     float eps,
     int64_t width,
     const float* dy,
     float* dx,
     bool accumulate)
)
ORBIT_KERNEL(
    void,
    rms_norm_row_backward,
    (const bf16* x,
     const float* weight,
     float eps,
     int64_t width,
     const bf16* dy,
     bf16* dx,
     bool accumulate)
)

}  // namespace orbit
