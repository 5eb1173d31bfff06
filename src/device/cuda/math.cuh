// Elementary functions and reductions with one fixed order, shared by every kernel. Multiplies and
// adds that two kernels must agree on are written with intrinsics, which the compiler never fuses,
// so the bits do not depend on -fmad or on the kernel they are inlined into.
#pragma once

#include <cstdint>

#include "base/number_formats.h"

namespace orbit::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// exp(x), the algorithm of base/exact_math.h with fused steps. 0 below -87.3, inf above 88.7.
__device__ __forceinline__ float exp_f32(float x) {
    const float clamped = fminf(fmaxf(x, -87.33f), 88.72f);
    const float shifted = __fmaf_rn(clamped, 1.4426950408889634f, 12582912.0f);
    const float n = __fsub_rn(shifted, 12582912.0f);
    const float r =
        __fmaf_rn(n, -1.42860682030941723e-6f, __fmaf_rn(n, -0.693145751953125f, clamped));
    float p = 1.3888889225e-3f;
    p = __fmaf_rn(p, r, 8.3333337680e-3f);
    p = __fmaf_rn(p, r, 4.1666667908e-2f);
    p = __fmaf_rn(p, r, 1.6666667163e-1f);
    p = __fmaf_rn(p, r, 0.5f);
    p = __fmaf_rn(p, r, 1.0f);
    p = __fmaf_rn(p, r, 1.0f);
    // p 2^n: n, the low bits of `shifted`, goes to the exponent. 0.7 < p < 1.42 and -126 <= n <=
    // 128; at 128 r is below zero and p below one, at -126 above both, so the result is a normal
    // number.
    float result = __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
    result = x < -87.33f ? 0.0f : result;
    result = x > 88.72f ? __uint_as_float(0x7f800000u) : result;
    return x != x ? x : result;
}

// log(x), x > 0 and normal; the algorithm of base/exact_math.h with every step rounded.
__device__ __forceinline__ float log_f32(float x) {
    const uint32_t bits = __float_as_uint(x);
    const uint32_t shifted = bits + (0x3f800000u - 0x3f3504f3u);
    const float e = static_cast<float>(static_cast<int32_t>(shifted >> 23) - 127);
    const float m = __uint_as_float((shifted & 0x007fffffu) + 0x3f3504f3u);
    const float f = __fsub_rn(m, 1.0f);
    const float s = __fdiv_rn(f, __fadd_rn(2.0f, f));
    const float z = __fmul_rn(s, s);
    const float w = __fmul_rn(z, z);
    const float t1 = __fmul_rn(w, __fmaf_rn(w, 0.24279078841f, 0.40000972152f));
    const float t2 = __fmul_rn(z, __fmaf_rn(w, 0.28498786688f, 0.66666662693f));
    const float hfsq = __fmul_rn(__fmul_rn(0.5f, f), f);
    float y = __fmul_rn(s, __fadd_rn(hfsq, __fadd_rn(t2, t1)));
    y = __fmaf_rn(e, 9.0580006145e-6f, y);
    y = __fadd_rn(__fsub_rn(y, hfsq), f);
    return __fmaf_rn(e, 0.69313812256f, y);
}

// 2^x on the special function unit: the same instruction wherever attention weights are formed.
__device__ __forceinline__ float exp2_sfu(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float sigmoid_f32(float x) {
    return __frcp_rn(__fadd_rn(1.0f, exp_f32(-x)));
}

__device__ __forceinline__ float swiglu_of(float gate, float up) {
    return __fmul_rn(__fmul_rn(gate, sigmoid_f32(gate)), up);
}

// Sums over the 32 lanes in the fixed butterfly order; all lanes get the result.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        value += __shfl_xor_sync(kFullWarp, value, offset);
    }
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
    }
    return value;
}

// Sum over a block of kWarps warps: lanes by butterfly, then warps in ascending order. `shared`
// holds kWarps values and may be reused after the next __syncthreads().
template <int kWarps, typename T>
__device__ __forceinline__ T block_sum(T value, T* shared) {
    value = warp_sum(value);
    if ((threadIdx.x & 31) == 0) {
        shared[threadIdx.x >> 5] = value;
    }
    __syncthreads();
    T total = shared[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) {
        total += shared[i];
    }
    __syncthreads();
    return total;
}

}  // namespace orbit::cuda
