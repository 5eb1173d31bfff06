// Products of attention tiles on Hopper's matrix unit. A tile of kRows rows holds 64 channels at a
// time, rows of 128 bytes (tile_offset); four warps take 64 rows of a result in the fragments of
// mma.sync.m16n8k16, 16 rows a warp.
#pragma once

#include "device/cuda/tma.cuh"
#include "device/cuda/wgmma.cuh"
#include "ops/attention_cuda.cuh"

namespace orbit::cuda {

// This thread's group of four warps, in a form that the compiler knows to be one for a warp.
__device__ __forceinline__ int warp_group() {
    return __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x >> 7), 0);
}

// The row of a group's 64 that a lane's fragments have in c = 0, 1; c = 2, 3 are eight further on.
__device__ __forceinline__ int32_t lane_row() {
    return static_cast<int32_t>((threadIdx.x >> 5 & 3) * 16 + (threadIdx.x & 31) / 4);
}

// Copies four bytes into shared memory; zeros when !valid (the source is then not read).
__device__ __forceinline__ void copy_async_4(uint32_t to, const void* from, bool valid) {
    const int size = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(size)
                 : "memory");
}

// An arrival at a barrier in shared memory when all copies of this thread so far are there.
__device__ __forceinline__ void copy_async_arrive(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

// Keeps the assembler from moving what follows, a wait for the matrix unit, to before `value` is
// known: a branch that is never taken, for no weight is negative. (With a trap in it the assembler
// would not use the registers of raise_registers().)
__device__ __forceinline__ void hold_until(float value) {
    if (__any_sync(kFullWarp, value < 0.0f) != 0) {
        asm volatile("nanosleep.u32 0;" ::: "memory");
    }
}

// Two barriers of each place: `filled` when its bytes are there, `freed` when all warps that read
// it have. Places are used in turn, so that the number of a use tells the place and the phase.
template <int kPlaces, int kBytes>
struct Places {
    uint32_t first;
    uint32_t barriers;

    __device__ __forceinline__ uint32_t at(uint32_t use) const {
        return first + use % kPlaces * kBytes;
    }

    __device__ __forceinline__ uint32_t filled(uint32_t use) const {
        return barriers + 16 * (use % kPlaces);
    }

    // Arrivals: of those that fill a place (with mbarrier_expect or otherwise), and of warps.
    __device__ __forceinline__ void init(uint32_t writers, uint32_t readers) const {
        for (uint32_t i = 0; i < kPlaces; ++i) {
            mbarrier_init(filled(i), writers);
            mbarrier_init(filled(i) + 8, readers);
        }
    }

    __device__ __forceinline__ void wait_filled(uint32_t use) const {
        mbarrier_wait(filled(use), use / kPlaces & 1);
    }

    __device__ __forceinline__ void wait_freed(uint32_t use) const {
        mbarrier_wait(filled(use) + 8, (use / kPlaces & 1) ^ 1);
    }

    // This warp has read it.
    __device__ __forceinline__ void free(uint32_t use) const {
        if ((threadIdx.x & 31) == 0) {
            mbarrier_arrive(filled(use) + 8);
        }
    }
};

// Pieces of work, handed out to thread blocks one after the other: by a counter in global memory,
// two words that are zero before and after (Stream::take_flag). In a block one warp takes a piece's
// number and hands it on to the others through two places in shared memory; `count` or more ends.
struct WorkQueue {
    static constexpr int kBytes = 2 * 16 + 2 * 16;  // with barriers
    Places<2, 16> numbers;

    __device__ __forceinline__ explicit WorkQueue(uint32_t at) : numbers{at, at + 2 * 16} {}

    __device__ __forceinline__ void init(uint32_t readers) const { numbers.init(1, readers); }

    // The warp that takes them; run(number). The next one is asked for when run() returns, not
    // before: who is busy with a long piece would keep another from those who are free.
    template <typename Run>
    __device__ __forceinline__ void hand_out(uint32_t* counter, uint32_t count, const Run& run)
        const {
        const bool leader = (threadIdx.x & 31) == 0;
#pragma unroll 1
        for (uint32_t use = 0;; ++use) {
            uint32_t number = leader ? atomicAdd(counter, 1u) : 0;
            number = __shfl_sync(kFullWarp, number, 0);
            numbers.wait_freed(use);
            if (leader) {
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(numbers.at(use)), "r"(number)
                             : "memory");
                mbarrier_arrive(numbers.filled(use));
            }
            if (number >= count) {
                break;
            }
            run(static_cast<int32_t>(number));
        }
        if (leader && atomicAdd(counter + 1, 1u) == gridDim.x - 1) {  // All have taken their last.
            counter[0] = 0;
            counter[1] = 0;
        }
    }

    // A warp that is handed them.
    template <typename Run>
    __device__ __forceinline__ void take(uint32_t count, const Run& run) const {
#pragma unroll 1
        for (uint32_t use = 0;; ++use) {
            uint32_t number = 0;
            numbers.wait_filled(use);
            asm volatile("ld.shared.u32 %0, [%1];"
                         : "=r"(number)
                         : "r"(numbers.at(use))
                         : "memory");
            __syncwarp();
            numbers.free(use);
            if (number >= count) {
                break;
            }
            run(static_cast<int32_t>(number));
        }
    }
};

// Starts a kernel whose blocks share out `pieces` of work by Args::counter: no more blocks than run
// at once.
template <typename Args>
void launch_pieces(
    Stream& stream,
    void (*kernel)(Args),
    Args args,
    int64_t pieces,
    unsigned threads,
    size_t shared_bytes
) {
    CHECK_LT(pieces, int64_t{1} << 31);
    args.counter = stream.take_flag();
    allow_shared_memory(kernel, shared_bytes);
    const dim3 grid(grid_dim(std::min<int64_t>(pieces, device_limits().multiprocessors)));
    kernel<<<grid, threads, shared_bytes, queue_of(stream)>>>(args);
    LAUNCH_CHECK();
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
