// The matmul family (performance.md 3.4, contract CC): every member computes an output element as
// chains of mma.sync.m16n8k16 with k ascending, cut into the same contiguous segments, and ends in
// the same epilogue, so all members give the same bits and the choice among them is free.
#pragma once

#include <cuda_runtime.h>

#include "device/cuda/mma.cuh"
#include "ops/weight_cuda.cuh"

namespace orbit::cuda {

constexpr int kTileK = 64;  // segments are multiples of this

// y = round(scale acc + lora_scale (u b^T) + bias + residual), in this order, in fp32.
struct Epilogue {
    void* y = nullptr;  // [m, ldy], bf16 or fp32
    bool f32_out = false;
    int64_t ldy = 0;
    int32_t columns = 0;  // stored; those from n on are zero (padding of LoRA's u)
    float scale = 1.0f;
    const float* bias = nullptr;     // [n]
    const bf16* residual = nullptr;  // [m, ldy]; may be y
    const bf16* lora_u = nullptr;    // [m, ldu], zero from column `rank` on
    const bf16* lora_b = nullptr;    // [n, rank], or [rank, n] when lora_b_by_rank
    int32_t ldu = 0;                 // a multiple of 16
    int32_t rank = 0;
    bool lora_b_by_rank = false;
    float lora_scale = 0.0f;
};

struct MatmulArgs {
    const bf16* x = nullptr;  // [m, ldx]
    int64_t ldx = 0;
    WeightView w{};  // forward: [n, k]; backward (dgrad): [k, n]
    int32_t m = 0;
    int32_t n = 0;
    int32_t k = 0;        // the contraction
    int32_t segment = 0;  // its length cut into segments of this many
    Epilogue epilogue;
};

// Two bf16 of a row at even k, zero from `limit` on.
__device__ __forceinline__ uint32_t load_pair(const bf16* row, int k, int limit) {
    if ((limit & 1) == 0) {
        return k < limit ? *reinterpret_cast<const uint32_t*>(row + k) : 0u;
    }
    const uint32_t low = k < limit ? row[k].bits : 0u;
    const uint32_t high = k + 1 < limit ? row[k + 1].bits : 0u;
    return low | (high << 16);
}

// Row n of lora_b as bf16 pairs along the rank, whatever its layout.
__device__ __forceinline__ uint32_t
lora_b_pair(const Epilogue& e, int32_t n, int32_t num_n, int k) {
    if (n >= num_n) {
        return 0;
    }
    if (!e.lora_b_by_rank) {
        return load_pair(e.lora_b + static_cast<int64_t>(n) * e.rank, k, e.rank);
    }
    const bf16* column = e.lora_b + static_cast<int64_t>(k) * num_n + n;
    const uint32_t low = k < e.rank ? column[0].bits : 0u;
    const uint32_t high = k + 1 < e.rank ? column[num_n].bits : 0u;
    return low | (high << 16);
}

__device__ __forceinline__ uint32_t
lora_u_pair(const Epilogue& e, int32_t m, int32_t num_m, int k) {
    return m < num_m
               ? *reinterpret_cast<const uint32_t*>(e.lora_u + static_cast<int64_t>(m) * e.ldu + k)
               : 0u;
}

__device__ __forceinline__ float finish(
    const Epilogue& e, float acc, float lora, int64_t m, int32_t n
) {
    float v = __fmul_rn(acc, e.scale);
    if (e.lora_u != nullptr) {
        v = __fadd_rn(v, __fmul_rn(e.lora_scale, lora));
    }
    if (e.bias != nullptr) {
        v = __fadd_rn(v, e.bias[n]);
    }
    if (e.residual != nullptr) {
        v = __fadd_rn(v, to_float(e.residual[m * e.ldy + n]));
    }
    return v;
}

__device__ __forceinline__ void store_one(
    const Epilogue& e, float acc, float lora, int32_t m, int32_t n, int32_t num_n
) {
    if (n >= e.columns) {
        return;
    }
    const float v = n < num_n ? finish(e, acc, lora, m, n) : 0.0f;
    const int64_t at = static_cast<int64_t>(m) * e.ldy + n;
    if (e.f32_out) {
        static_cast<float*>(e.y)[at] = v;
    } else {
        static_cast<bf16*>(e.y)[at] = round_bf16(v);
    }
}

// Elements (m, n) and (m, n + 1), n even.
__device__ __forceinline__ void store_two(
    const Epilogue& e,
    float acc0,
    float acc1,
    float lora0,
    float lora1,
    int32_t m,
    int32_t n,
    int32_t num_n
) {
    if (n + 1 < num_n && (e.ldy & 1) == 0) {
        const float v0 = finish(e, acc0, lora0, m, n);
        const float v1 = finish(e, acc1, lora1, m, n + 1);
        const int64_t at = static_cast<int64_t>(m) * e.ldy + n;
        if (e.f32_out) {
            *reinterpret_cast<float2*>(static_cast<float*>(e.y) + at) = float2{v0, v1};
        } else {
            *reinterpret_cast<uint32_t*>(static_cast<bf16*>(e.y) + at) = pack_bf16(v0, v1);
        }
        return;
    }
    store_one(e, acc0, lora0, m, n, num_n);
    store_one(e, acc1, lora1, m, n + 1, num_n);
}

// Host side. Number of segments a weight's contraction is cut into: a function of its shape alone.
// Weights with few rows and a long contraction gain decode parallelism (one warp a segment).
int32_t forward_segment(int64_t n, int64_t k);  // columns in a segment, a multiple of 64
int32_t backward_segment(int64_t k);
int32_t num_segments(int64_t k, int32_t segment);

enum class Direction : uint8_t { kForward, kBackward };

// Runs one member; format and shape pick it. matmul_*_cuda.cu.
void matmul(cudaStream_t queue, WeightFormat format, Direction direction, const MatmulArgs& args);

template <WeightFormat kFormat>
void matmul_format(cudaStream_t queue, Direction direction, const MatmulArgs& args);

}  // namespace orbit::cuda
