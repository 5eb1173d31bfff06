// PTX wrappers: cp.async, ldmatrix, mma.sync.m16n8k16 on bf16, packing of bf16 pairs.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "base/number_formats.h"

namespace orbit::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes into shared memory; zeros when !valid (the source is then not read, but must
// still be a legal address).
__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from, bool valid) {
    const int size = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size)
                 : "memory");
}

// Blocks until the kernels before this one on the queue are done and their writes are visible.
// Before Hopper kernels do not overlap, and there is nothing to wait for.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the queue start (and wait) once every thread block has said so.
__device__ __forceinline__ void release_successor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A word in global memory by which a thread tells others, of any block, that what it knows to be
// there is there.
__device__ __forceinline__ void set_flag(uint32_t* flag) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(1u) : "memory");
}

__device__ __forceinline__ void wait_for_flag(const uint32_t* flag) {
    uint32_t value = 0;
    while (value == 0) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    }
}

// A flag's second word counts the blocks that have waited for it. Returns how many had before.
__device__ __forceinline__ uint32_t count_waiter(uint32_t* flag) {
    return atomicAdd(flag + 1, 1u);
}

// For the last of them, by count_waiter()'s answer: both words are zero again.
__device__ __forceinline__ void clear_after_last(uint32_t* flag, uint32_t counted) {
    if (counted == gridDim.x - 1) {
        flag[0] = 0;
        flag[1] = 0;
    }
}

// A barrier of `threads` threads of the block; 0 is __syncthreads' own.
__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Counts for a barrier_sync() of `threads` threads, this one among them, without waiting.
__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// 4, 8 or 16 bytes; `to` and `from` are multiples of as many.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes)
                 : "memory");
}

__device__ __forceinline__ void prefetch_to_l2(const void* at) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(
    uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address
) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(
    uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address
) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
                 : "r"(address)
                 : "memory");
}

// d[16x8] += a[16x16] b[16x8]. Lane (g = lane / 4, q = lane % 4) holds
//   a: {row g, k 2q..}, {row g+8, k 2q..}, {row g, k 2q+8..}, {row g+8, k 2q+8..}
//   b: {k 2q.., column g}, {k 2q+8.., column g}
//   d: (g, 2q), (g, 2q+1), (g+8, 2q), (g+8, 2q+1)
__device__ __forceinline__ void mma_16816(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1
) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
        "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// bf16 of `low` in the low half, of `high` in the high half; nearest even.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float low_bf16(uint32_t packed) {
    return __uint_as_float(packed << 16);
}

__device__ __forceinline__ float high_bf16(uint32_t packed) {
    return __uint_as_float(packed & 0xffff0000u);
}

__device__ __forceinline__ bf16 round_bf16(float value) {
    return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

}  // namespace orbit::cuda
