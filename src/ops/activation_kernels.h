#pragma once

#include "ops/isa.h"

namespace orbit {

// Elements [0, count).
ORBIT_KERNEL(void, swiglu_range, (const float* gate, const float* up, float* y, int64_t count))
ORBIT_KERNEL(void, swiglu_range, (const bf16* gate, const bf16* up, bf16* y, int64_t count))
ORBIT_KERNEL(
    void,
    swiglu_backward_range,
    (const float* gate, const float* up, const float* dy, float* dgate, float* dup, int64_t count)
)
ORBIT_KERNEL(
    void,
    swiglu_backward_range,
    (const bf16* gate, const bf16* up, const bf16* dy, bf16* dgate, bf16* dup, int64_t count)
)
ORBIT_KERNEL(void, add_range, (const float* a, const float* b, float* y, int64_t count))
ORBIT_KERNEL(void, add_range, (const bf16* a, const bf16* b, bf16* y, int64_t count))

}  // namespace orbit
