#pragma once

#include "ops/isa.h"

namespace orbit {

// The constants of one AdamW step, formed in float64 on the host and rounded once.
struct AdamWConstants {
    float grad_scale;
    float decay;  // 1 - lr * weight_decay
    float beta1;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float step_size;    // lr / (1 - beta1^n)
    float denominator;  // sqrt(1 - beta2^n)
    float eps;
};

ORBIT_KERNEL(
    void,
    adamw_range,
    (const AdamWConstants& k, float* p, float* m, float* v, const float* g, int64_t count)
)
// sum of g^2 over at most one tile, in float64: 8 lanes, then a fixed tree.
ORBIT_KERNEL(double, square_sum, (const float* g, int64_t count))

}  // namespace orbit
