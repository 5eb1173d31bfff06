// Hopper's tensor copies into shared memory, the barriers that count their bytes, and pairs of
// thread blocks (clusters of two) whose copies land in both.
#pragma once

#include <cuda.h>  // CUtensorMap: types only, nothing of the driver is linked
#include <cuda_runtime.h>

#include <cstdint>

namespace orbit::cuda {

// Describes a matrix of 2-byte elements for copies of boxes of 64 columns and `box_rows` rows, at
// most 256, into the 128-byte swizzle of wgmma.cuh; what lies outside the matrix arrives as zeros.
// The data and `row_bytes` are multiples of 16 bytes.
CUtensorMap tensor_map(
    const void* data, int64_t rows, int64_t cols, int64_t row_bytes, int32_t box_rows
);

// The same for boxes of 8 columns, one row of 16 bytes after the other.
CUtensorMap tensor_map_unswizzled(
    const void* data, int64_t rows, int64_t cols, int64_t row_bytes, int32_t box_rows
);

// The same for [pages, heads, tokens, channels] and boxes of 64 channels of one head's tokens in
// `box_pages` pages, one row of 128 bytes after the other.
CUtensorMap tensor_map_pages(
    const void* data,
    int64_t pages,
    int64_t heads,
    int64_t tokens,
    int64_t channels,
    int32_t box_pages
);

// Barriers are 8 bytes of shared memory, at a shared address. A phase ends when all arrivals and
// all announced bytes are there.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

// After the last init, before cluster_sync().
__device__ __forceinline__ void mbarrier_init_fence() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// One arrival that also announces bytes.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// One arrival at the barrier that lies at the same address in block `block` of the cluster.
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t barrier, uint32_t block) {
#if __CUDA_ARCH__ >= 900
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(barrier), "r"(block));
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
#endif
}

// Waits for the end of the phase of this parity; before the first phase, parity 1 has ended.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
    uint32_t done = 0;
    while (done == 0) {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
            "selp.u32 %0, 1, 0, p; }"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory"
        );
    }
#endif
}

// Whether that phase has ended already.
__device__ __forceinline__ bool mbarrier_ended(uint32_t barrier, uint32_t parity) {
    uint32_t done = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory"
    );
#endif
    return done != 0;
}

// Between what a thread knows to be written and its tensor copies of it.
__device__ __forceinline__ void fence_for_copies() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
#if __CUDA_ARCH__ >= 900
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// The box at (row, col) to shared memory; its bytes arrive at the barrier. One thread.
__device__ __forceinline__ void copy_box(
    uint32_t to, const CUtensorMap& map, int32_t row, int32_t col, uint32_t barrier
) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(&map),
        "r"(col),
        "r"(row),
        "r"(barrier)
        : "memory"
    );
#endif
}

// The same of tensor_map_pages(), from page `page` and channel `channel` on.
__device__ __forceinline__ void copy_pages(
    uint32_t to,
    const CUtensorMap& map,
    int32_t page,
    int32_t head,
    int32_t channel,
    uint32_t barrier
) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
        "l"(&map),
        "r"(channel),
        "r"(0),
        "r"(head),
        "r"(page),
        "r"(barrier)
        : "memory"
    );
#endif
}

// copy_box() into all blocks of the cluster whose bits are set in `blocks`, at the same address and
// barrier in each.
__device__ __forceinline__ void copy_box_to_blocks(
    uint32_t to, const CUtensorMap& map, int32_t row, int32_t col, uint32_t barrier, uint16_t blocks
) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map),
        "r"(col),
        "r"(row),
        "r"(barrier),
        "h"(blocks)
        : "memory"
    );
#endif
}

__device__ __forceinline__ uint32_t block_in_cluster() {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

// Where block `block` of the cluster has what this block has at `own`, in shared memory.
template <typename T>
__device__ __forceinline__ const T* in_block_of_cluster(const T* own, int block) {
    const T* other = own;
#if __CUDA_ARCH__ >= 900
    asm("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(own), "r"(block));
#endif
    return other;
}

// The two halves of a cluster_sync(), for writes to shared memory that the other blocks read.
__device__ __forceinline__ void cluster_publish() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// In the place of cluster_publish(), where no writes need an order: enough before a block ends
// whose shared memory the others read.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

// All threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_sync() {
    cluster_publish();
    cluster_wait();
}

}  // namespace orbit::cuda
