#pragma once

#include "ops/isa.h"

namespace orbit {

constexpr int32_t kMaxHeadDim = 1024;

// One head of one token. cosine, sine: the row of the token's position.
struct NormRopeHead {
    const float* norm_weight;  // [head_dim], or null
    float eps;
    const float* cosine;
    const float* sine;
    int32_t rotary_dim;
    int32_t head_dim;
    bool interleaved;
};

ORBIT_KERNEL(void, norm_rope_head, (const NormRopeHead& p, const float* x, float* y))
ORBIT_KERNEL(void, norm_rope_head, (const NormRopeHead& p, const bf16* x, bf16* y))
ORBIT_KERNEL(
    void,
    norm_rope_head_backward,
    (const NormRopeHead& p, const float* x, const float* dy, float* dx)
)
ORBIT_KERNEL(
    void, norm_rope_head_backward, (const NormRopeHead& p, const bf16* x, const bf16* dy, bf16* dx)
)

}  // namespace orbit
