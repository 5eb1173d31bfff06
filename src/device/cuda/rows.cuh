// Small helpers of the element-wise and row-wise kernels: eight bf16 values at a time, and the
// check that an activation is in the GPU's one compute type.
#pragma once

#include "base/number_formats.h"
#include "device/cuda/check.cuh"
#include "device/cuda/mma.cuh"
#include "device/tensor.h"

namespace orbit::cuda {

inline bf16* activations(const Tensor& t) {
    USER_CHECK(
        t.dtype == DType::kBF16,
        "the f32 check mode runs on the CPU only; set device = \"cpu\", or compute in bf16."
    );
    return static_cast<bf16*>(t.data);
}

struct Eight {
    float v[8];
};

__device__ __forceinline__ Eight unpack_eight(uint4 packed) {
    return Eight{
        {low_bf16(packed.x),
         high_bf16(packed.x),
         low_bf16(packed.y),
         high_bf16(packed.y),
         low_bf16(packed.z),
         high_bf16(packed.z),
         low_bf16(packed.w),
         high_bf16(packed.w)}};
}

__device__ __forceinline__ uint4 pack_eight(const Eight& e) {
    return uint4{
        pack_bf16(e.v[0], e.v[1]),
        pack_bf16(e.v[2], e.v[3]),
        pack_bf16(e.v[4], e.v[5]),
        pack_bf16(e.v[6], e.v[7])};
}

// Elements [8i, 8i + 8) of a row of n; a short or unaligned row is read and written one by one.
__device__ __forceinline__ Eight load_eight(const bf16* row, int64_t i, int64_t n, bool aligned) {
    if (aligned) {
        return unpack_eight(reinterpret_cast<const uint4*>(row)[i]);
    }
    Eight e{};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        e.v[j] = 8 * i + j < n ? to_float(row[8 * i + j]) : 0.0f;
    }
    return e;
}

__device__ __forceinline__ void store_eight(
    bf16* row, int64_t i, int64_t n, bool aligned, const Eight& e
) {
    if (aligned) {
        reinterpret_cast<uint4*>(row)[i] = pack_eight(e);
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (8 * i + j < n) {
            row[8 * i + j] = round_bf16(e.v[j]);
        }
    }
}

}  // namespace orbit::cuda
