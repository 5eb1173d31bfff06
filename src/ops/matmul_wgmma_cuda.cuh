// Member P/B on Hopper: the same tiles as matmul_tile_cuda.cuh, multiplied by wgmma straight from
// shared memory. wgmma.m64nNk16 and mma.sync.m16n8k16 give the same bits (performance.md 3.1).
//
// All 256 threads load and decode; the matrix unit works on step i while they prepare step i + 1.
#pragma once

#include "device/cuda/wgmma.cuh"
#include "ops/matmul_tile_cuda.cuh"

namespace orbit::cuda {

template <bool kSegmented>
using WgmmaTile = TileShape<128, 128, 8, 1, kSegmented ? 5 : 3>;

// acc += x tile . weight tile for the 64 rows of this warp group, or with `fresh` acc = ...;
// asynchronous.
template <bool kBackward>
__device__ __forceinline__ void issue_wgmma(
    float (&acc)[16][4], uint32_t x_tile, uint32_t w_tile, bool fresh
) {
    const uint32_t rows = x_tile + (threadIdx.x >> 7) * 64 * 128;
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step) {
        const uint64_t a = descriptor_along_k(rows + step * 32);
        const uint64_t b = kBackward
                               ? descriptor_across_k(w_tile + step * 16 * 128, kColumnBlockBytes)
                               : descriptor_along_k(w_tile + step * 32);
        wgmma_shared<128, kBackward>(acc, a, b, step > 0 || !fresh ? 1 : 0);
    }
    wgmma_commit();
}

// The output tile at (m0, n0); the whole block works on it.
template <WeightFormat kFormat, bool kBackward, bool kSegmented>
__device__ __forceinline__ void multiply_through_wgmma(
    const MatmulArgs& a, int32_t m0, int32_t n0, char* shared
) {
    using Shape = WgmmaTile<kSegmented>;
    static_assert(Shape::kThreads == 256 && Shape::kOutputBytes <= Shape::kSharedBytes);
    constexpr bool kPlain = kFormat == WeightFormat::kBF16;
    // Alone on its multiprocessor a block keeps one step queued behind the running one; of two, one
    // multiplies while the other waits, and the stage is better spent on loading further ahead.
    constexpr bool kQueues = kSegmented;
    constexpr int kAhead = Shape::kStages - (kQueues ? 2 : 1);  // steps loaded before their turn
    const int32_t steps = (a.k + kTileK - 1) / kTileK;
    const int32_t segment_steps = a.segment / kTileK;
    const uint32_t base = shared_address(shared);
    const auto stage_of = [&](int32_t step) {
        return static_cast<uint32_t>(step % Shape::kStages) * Shape::kStageBytes;
    };

    if (!a.releases_late) {
        release_successor();
    }
    TileX<Shape> x(a, m0, 0);
    WeightTile<Shape, kFormat, kBackward, 2> w(a, n0, 0);
    const auto load_stage = [&](int32_t step) {
        const uint32_t stage = base + stage_of(step);
        const int32_t left = a.k - step * kTileK;
        if (left > 0) {
            x.load(stage, left);
            if constexpr (kPlain) {
                w.load(stage + Shape::kBytesX, left);
            }
        }
        copy_async_commit();
    };
    if constexpr (!kPlain) {
        start_packed(w, a, a.k, shared + Shape::kBytesX);
    }
    if (!a.x_is_ready) {
        wait_for_predecessor();
    }
    if (a.releases_late) {
        release_successor();
    }
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
        load_stage(s);
    }

    float acc[1][Shape::kFragN][4];  // the first wgmma of a segment does not read them
    float total[1][Shape::kFragN][4] = {};
    const auto run_step = [&](int32_t step, auto next_slot) {
        copy_async_wait<kAhead - 1>();
        if constexpr (!kQueues) {
            wgmma_wait<0>();
        }
        fence_for_wgmma();
        // This step's tiles are there, and nobody reads those that are loaded next.
        __syncthreads();
        if constexpr (kSegmented) {
            if (step > 0 && step % segment_steps == 0) {
                wgmma_wait<0>();
                add_fragments(total[0], acc[0]);
            }
        }
        const uint32_t stage = base + stage_of(step);
        const bool fresh = kSegmented ? step % segment_steps == 0 : step == 0;
        issue_wgmma<kBackward>(acc[0], stage, stage + Shape::kBytesX, fresh);
        load_stage(step + kAhead);
        if constexpr (!kPlain) {
            if (step + 1 < steps) {
                char* tile = shared + stage_of(step + 1) + Shape::kBytesX;
                advance_packed<next_slot.value>(w, a, a.k, step, tile);
            }
        }
        if constexpr (kQueues) {
            wgmma_wait<1>();
        }
    };
    constexpr int kUnroll = slots_of<decltype(w)>();
#pragma unroll 1
    for (int32_t first = 0; first < steps; first += kUnroll) {
        for_slots<kUnroll>([&](auto slot) {
            if (first + slot.value < steps) {
                run_step(
                    first + slot.value, std::integral_constant<int, (slot.value + 1) % kUnroll>{}
                );
            }
        });
    }
    wgmma_wait<0>();
    if (a.x_is_ready) {
        wait_for_predecessor();
    }
    __syncthreads();  // Nobody reads the ring any more; it takes the output now.
    auto* out = reinterpret_cast<float*>(shared);
    const bool has_lora = a.epilogue.lora_u != nullptr;
    if constexpr (kSegmented) {
        add_fragments(total[0], acc[0]);
        stage_output<Shape, kBackward>(a, total, has_lora, out, m0, n0);
    } else {
        stage_output<Shape, kBackward>(a, acc, has_lora, out, m0, n0);
    }
    __syncthreads();
    store_output<Shape>(
        a, [&](int) { return out; }, 1, nullptr, m0, n0
    );
}

template <WeightFormat kFormat, bool kBackward, bool kSegmented>
__global__ void __launch_bounds__(256, kSegmented ? 1 : 2)
    matmul_wgmma_kernel(const __grid_constant__ MatmulGroup group) {
    extern __shared__ __align__(1024) char shared[];
    int32_t block = 0;
    int32_t m0 = 0;
    int32_t n0 = 0;
    const MatmulArgs& a = product_of_block(group, block);
    tile_corner<WgmmaTile<kSegmented>>(a, block, m0, n0);
    multiply_through_wgmma<kFormat, kBackward, kSegmented>(a, m0, n0, shared);
}

template <WeightFormat kFormat, bool kBackward, bool kSegmented>
void launch_wgmma(cudaStream_t queue, MatmulGroup& group) {
    using Shape = WgmmaTile<kSegmented>;
    const auto kernel = matmul_wgmma_kernel<kFormat, kBackward, kSegmented>;
    allow_shared_memory(kernel, Shape::kSharedBytes);
    const dim3 grid(grid_dim(number_blocks(group, Shape::kM, Shape::kN)));
    launch_early(kernel, grid, Shape::kThreads, Shape::kSharedBytes, queue, group);
}

}  // namespace orbit::cuda
