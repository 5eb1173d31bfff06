#include "adapter/oft_kernels.h"

namespace orbit::ORBIT_ISA {

void oft_derive_block(
    const float* v,
    int64_t b,
    const OftTransform& transform,
    DType compute,
    void* copy,
    OftBound* bound,
    float* work
) {
    float* d = work;
    float* rest = work + b * b;
    *bound = oft_bound(v, b, rest);
    oft_rotation_delta(v, b, transform, d, rest);
    if (compute == DType::kF32) {
        float* to = static_cast<float*>(copy);
        for (int64_t i = 0; i < b * b; ++i) {
            to[i] = d[i];
        }
    } else {
        bf16* to = static_cast<bf16*>(copy);
        for (int64_t i = 0; i < b * b; ++i) {
            to[i] = to_bf16(d[i]);
        }
    }
}

void oft_gradient_block(
    const float* v,
    const float* delta,
    int64_t b,
    const OftTransform& transform,
    float* dv,
    float* work
) {
    oft_gradient(v, delta, b, transform, dv, work);
}

void oft_bound_block(const float* v, int64_t b, OftBound* bound, float* work) {
    *bound = oft_bound(v, b, work);
}

}  // namespace orbit::ORBIT_ISA
