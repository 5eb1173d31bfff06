// Products of attention tiles on Hopper's matrix unit. A tile of kRows rows holds 64 channels at a
// time, rows of 128 bytes (tile_offset); four warps take 64 rows of a result in the fragments of
// mma.sync.m16n8k16, 16 rows a warp.
#pragma once

#include "device/cuda/wgmma.cuh"
#include "ops/attention_cuda.cuh"

namespace orbit::cuda {

// This thread's group of four warps, in a form that the compiler knows to be one for a warp.
__device__ __forceinline__ int warp_group() {
    return __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x >> 7), 0);
}

// Copies four bytes into shared memory; zeros when !valid (the source is then not read).
__device__ __forceinline__ void copy_async_4(uint32_t to, const void* from, bool valid) {
    const int size = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(size)
                 : "memory");
}

// Waits until the copies of this thread have arrived, and then until those of all threads have and
// can be seen by the matrix unit. Warps may call it from different places.
template <int kThreads>
__device__ __forceinline__ void wait_for_tiles() {
    copy_async_wait<0>();
    fence_for_wgmma();
    asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// s = a b^T over the channels: 64 rows of a tile of kRowsA from `a` on, and all kRowsB rows of tile
// b. One group of wgmma, committed.
template <int kHeadDim, int kRowsA, int kRowsB>
__device__ __forceinline__ void start_scores(float (&s)[kRowsB / 8][4], uint32_t a, uint32_t b) {
    const uint64_t from_a = descriptor_along_k(a);
    const uint64_t from_b = descriptor_along_k(b);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
        // A descriptor counts in units of 16 bytes.
        const uint64_t at_a = from_a + (step / 4 * kRowsA * 128 + step % 4 * 32) / 16;
        const uint64_t at_b = from_b + (step / 4 * kRowsB * 128 + step % 4 * 32) / 16;
        wgmma_shared<kRowsB>(s, at_a, at_b, step > 0 ? 1 : 0);
    }
    wgmma_commit();
}

// o += p v over the kRows rows of a tile, ascending. One group of wgmma, committed.
template <int kHeadDim, int kRows>
__device__ __forceinline__ void start_sum(
    float (&o)[kHeadDim / 8][4], const uint32_t (&p)[kRows / 16][4], uint32_t v
) {
    const uint64_t from = descriptor_across_k(v, kRows * 128);
#pragma unroll
    for (int step = 0; step < kRows / 16; ++step) {
        wgmma_registers<kHeadDim>(o, p[step], from + step * 16 * 128 / 16);
    }
    wgmma_commit();
}

// The weights of a tile as the A operand of start_sum().
template <int kKeys>
__device__ __forceinline__ void pack_tile(
    uint32_t (&p)[kKeys / 16][4], const float (&s)[kKeys / 8][4]
) {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
        pack_fragments(p[step], s[2 * step], s[2 * step + 1]);
    }
}

}  // namespace orbit::cuda
