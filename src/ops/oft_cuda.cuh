// The rotation of blocks of 32 channels in the end of a kernel that makes them, for the next linear
// layer: as oft_cuda.cu does it, from values as they are stored, x + x D by mma.sync.m16n8k16, k16
// steps ascending, the sum with x in fp32, one rounding. D lies in shared memory in rows of 64
// bytes, one for each channel, whose granules are permuted for ldmatrix.
#pragma once

#include "device/cuda/mma.cuh"

namespace orbit::cuda {

constexpr int kFusedRotation = 32;                      // channels of a block
constexpr int kRotationRowBytes = kFusedRotation * 2;   // of D
constexpr int kRotationFragments = kFusedRotation / 8;  // of eight columns

__device__ __forceinline__ uint32_t rotation_offset(int row, int granule) {
    return static_cast<uint32_t>(row * kRotationRowBytes + (granule ^ (row >> 1 & 3)) * 16);
}

// Copies `rows` rows of D to shared memory, by `threads` threads; not committed.
__device__ __forceinline__ void copy_rotations(
    uint32_t to, const bf16* from, int rows, int thread, int threads
) {
    for (int i = thread; i < rows * kRotationFragments; i += threads) {
        copy_async_16(
            to + rotation_offset(i / kRotationFragments, i % kRotationFragments), from + i * 8
        );
    }
}

// acc = x D in eight columns of a block, fragment `fragment`, whose rows start with `row0` of those
// at `rotations`. x: the M side of 32 columns.
__device__ __forceinline__ void multiply_rotation(
    float (&acc)[4], const uint32_t (&x)[2][4], uint32_t rotations, int row0, int fragment
) {
    uint32_t d[4];
    const int row = row0 + static_cast<int>(threadIdx.x & 31);
    ldmatrix_x4_trans(d[0], d[1], d[2], d[3], rotations + rotation_offset(row, fragment));
    acc[0] = acc[1] = acc[2] = acc[3] = 0.0f;
    mma_16816(acc, x[0], d[0], d[1]);
    mma_16816(acc, x[1], d[2], d[3]);
}

// Two neighbours of x, and their part of x D.
__device__ __forceinline__ uint32_t add_rotated(uint32_t x, float low, float high) {
    return pack_bf16(__fadd_rn(low_bf16(x), low), __fadd_rn(high_bf16(x), high));
}

}  // namespace orbit::cuda
