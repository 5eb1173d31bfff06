// Instantiated once per weight format, in grouped_*_cuda.cu.
#pragma once

#include "ops/decode_weight_cuda.cuh"
#include "ops/grouped_cuda.cuh"
#include "ops/matmul_format_cuda.cuh"

namespace orbit::cuda {

// Every block of these kernels waits for its predecessor before it reads the offsets.

constexpr int kGroupedDecodeWarps = 4;

template <WeightFormat kFormat, int kTiles>
__device__ __forceinline__ void decode_expert(
    const MatmulArgs& a, WeightStream<kFormat, kDecodeStages<kFormat>>& stream, int32_t row0
) {
    float acc[kTiles][4] = {};
    LoraOperands<kTiles> lora = {};
    if (a.epilogue.lora_u != nullptr) {
        lora.load_b(a, row0, 0);
        lora.load_u(a, 0);
    }
    multiply_segment(a, stream, 0, a.k, acc);
    store_decode(a, acc, lora, row0);
}

// Up to 16 rows of an expert; a warp takes 16 rows of its weight.
template <WeightFormat kFormat>
__global__ void __launch_bounds__(32 * kGroupedDecodeWarps)
    grouped_decode_kernel(const __grid_constant__ GroupedArgs g, int32_t blocks_n) {
    extern __shared__ __align__(1024) char shared[];
    release_successor();
    wait_for_predecessor();
    const auto block = static_cast<int32_t>(blockIdx.x);
    int32_t expert = 0;
    int32_t row = 0;
    if (!find_tile<kDecodeMaxRows>(g.offsets, g.experts, block / blocks_n, expert, row)) {
        return;
    }
    MatmulArgs a = args_of_expert(g, expert, row);
    a.m = min(a.m, kDecodeMaxRows);
    const int warp = threadIdx.x >> 5;
    const int32_t row0 = (block % blocks_n * kGroupedDecodeWarps + warp) * kDecodeRows;
    if (row0 >= a.epilogue.columns) {
        return;
    }
    WeightStream<kFormat, kDecodeStages<kFormat>>
        stream(a.w, row0, 0, a.k, shared + warp * kRingBytes<kFormat, kDecodeStages<kFormat>>);
#pragma unroll 1
    for (int c = 0; c < kDecodeStages<kFormat> - 1; ++c) {
        stream.issue(a);
    }
    if (a.m <= 8) {
        decode_expert<kFormat, 1>(a, stream, row0);
    } else {
        decode_expert<kFormat, 2>(a, stream, row0);
    }
}

template <typename Shape, WeightFormat kFormat, bool kBackward>
__global__ void __launch_bounds__(Shape::kThreads)
    grouped_tile_kernel(const __grid_constant__ GroupedArgs g, int32_t tiles_n) {
    extern __shared__ __align__(1024) char shared[];
    release_successor();
    wait_for_predecessor();
    const auto block = static_cast<int32_t>(blockIdx.x);
    int32_t expert = 0;
    int32_t row = 0;
    if (find_tile<Shape::kM>(g.offsets, g.experts, block / tiles_n, expert, row)) {
        const MatmulArgs a = args_of_expert(g, expert, row);
        multiply_through_tile<Shape, kFormat, kBackward, false, 1>(
            a, 0, block % tiles_n * Shape::kN, shared
        );
    }
}

template <WeightFormat kFormat, bool kBackward>
__global__ void __launch_bounds__(256, 2)
    grouped_wgmma_kernel(const __grid_constant__ GroupedArgs g, int32_t tiles_n) {
    extern __shared__ __align__(1024) char shared[];
    using Shape = WgmmaTile<false>;
    release_successor();
    wait_for_predecessor();
    const auto block = static_cast<int32_t>(blockIdx.x);
    int32_t expert = 0;
    int32_t row = 0;
    if (find_tile<Shape::kM>(g.offsets, g.experts, block / tiles_n, expert, row)) {
        const MatmulArgs a = args_of_expert(g, expert, row);
        multiply_through_wgmma<kFormat, kBackward, false>(
            a, 0, block % tiles_n * Shape::kN, shared
        );
    }
}

// One warp a tile of 16 x 8, elements read one by one: for shapes whose rows are not aligned.
template <WeightFormat kFormat, bool kBackward>
__global__ void __launch_bounds__(32)
    grouped_plain_kernel(const __grid_constant__ GroupedArgs g, int32_t tiles_n) {
    release_successor();
    wait_for_predecessor();
    const auto block = static_cast<int32_t>(blockIdx.x);
    int32_t expert = 0;
    int32_t row = 0;
    if (find_tile<16>(g.offsets, g.experts, block / tiles_n, expert, row)) {
        multiply_plain<kFormat, kBackward>(args_of_expert(g, expert, row), 0, block % tiles_n * 8);
    }
}

// Block (share of the weight, expert).
template <WeightFormat kFormat>
__global__ void __launch_bounds__(kUnpackThreads)
    decode_experts_kernel(const __grid_constant__ GroupedArgs g, int32_t first, bf16* to) {
    release_successor();
    wait_for_predecessor();
    const int32_t expert = first + static_cast<int32_t>(blockIdx.y);
    if (g.offsets[expert] == g.offsets[expert + 1]) {
        return;
    }
    const WeightView w = args_of_expert(g, expert, 0).w;
    bf16* out = to + static_cast<int64_t>(blockIdx.y) * w.rows * w.cols;
    decode_share<kFormat>(w, 0, w.cols / 8, static_cast<int32_t>(blockIdx.x), out);
}

template <WeightFormat kFormat>
void decode_experts(
    cudaStream_t queue, const GroupedArgs& g, int32_t first, int32_t count, bf16* to
) {
    const int64_t eights = static_cast<int64_t>(g.one.w.rows) * (g.one.w.cols / 8);
    CHECK_LT(eights, int64_t{1} << 30);
    const dim3 grid(grid_dim(ceil_div(eights, kUnpackEights)), grid_dim_yz(count));
    launch_early(decode_experts_kernel<kFormat>, grid, kUnpackThreads, 0, queue, g, first, to);
}

// No counts need more m-tiles than this.
inline int64_t tiles_bound(const GroupedArgs& g, int64_t tile_rows) {
    return ceil_div(g.rows, tile_rows) + std::min(g.experts, g.rows);
}

// Launches a kernel of one block for each tile of `tile_m` rows and `tile_n` columns.
template <typename Kernel>
void launch_grouped(
    cudaStream_t queue,
    const GroupedArgs& g,
    Kernel* kernel,
    int64_t tile_m,
    int64_t tile_n,
    unsigned threads,
    size_t shared_bytes
) {
    allow_shared_memory(kernel, shared_bytes);
    const int64_t tiles_n = ceil_div(g.one.epilogue.columns, tile_n);
    const dim3 grid(grid_dim(tiles_bound(g, tile_m) * tiles_n));
    launch_early(kernel, grid, threads, shared_bytes, queue, g, static_cast<int32_t>(tiles_n));
}

template <typename Shape, WeightFormat kFormat, bool kBackward>
void launch_grouped_tile(cudaStream_t queue, const GroupedArgs& g) {
    const auto kernel = grouped_tile_kernel<Shape, kFormat, kBackward>;
    launch_grouped(queue, g, kernel, Shape::kM, Shape::kN, Shape::kThreads, Shape::kSharedBytes);
}

template <WeightFormat kFormat>
bool rows_are_aligned(const GroupedArgs& g) {
    const MatmulArgs& a = g.one;
    const auto address = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.w.data) |
                         static_cast<uintptr_t>(g.weight_distance);
    constexpr int32_t kUnit = kFormat == WeightFormat::kBF16 ? 8 : 32;  // of a row's columns
    return a.k % 8 == 0 && a.ldx % 8 == 0 && a.w.cols % kUnit == 0 && address % 16 == 0;
}

// Every member gives the same bits; rows per expert decide which is quickest.
template <WeightFormat kFormat, bool kBackward>
void launch_best_grouped(cudaStream_t queue, const GroupedArgs& g) {
    constexpr int64_t kMediumRows = 64;
    const int64_t rows_per_expert = g.rows / g.experts;
    if (!rows_are_aligned<kFormat>(g)) {
        launch_grouped(queue, g, grouped_plain_kernel<kFormat, kBackward>, 16, 8, 32, 0);
        return;
    }
    if constexpr (!kBackward) {
        if (rows_per_expert <= kDecodeMaxRows) {
            constexpr size_t kShared =
                size_t{kGroupedDecodeWarps} * kRingBytes<kFormat, kDecodeStages<kFormat>>;
            launch_grouped(
                queue,
                g,
                grouped_decode_kernel<kFormat>,
                kDecodeMaxRows,
                kGroupedDecodeWarps * kDecodeRows,
                32 * kGroupedDecodeWarps,
                kShared
            );
            return;
        }
    }
    if constexpr (kFormat == WeightFormat::kBF16) {
        if (g.one.epilogue.columns <= NarrowTile::kN) {  // an adapter's rank
            using Narrow = std::conditional_t<kBackward, NarrowBackwardTile, NarrowTile>;
            return launch_grouped_tile<Narrow, kFormat, kBackward>(queue, g);
        }
    }
    if (rows_per_expert <= kMediumRows || !has_wgmma()) {
        launch_grouped_tile<MediumTile, kFormat, kBackward>(queue, g);
    } else {
        using Shape = WgmmaTile<false>;
        const auto kernel = grouped_wgmma_kernel<kFormat, kBackward>;
        launch_grouped(
            queue, g, kernel, Shape::kM, Shape::kN, Shape::kThreads, Shape::kSharedBytes
        );
    }
}

template <WeightFormat kFormat>
void grouped_matmul_format(cudaStream_t queue, Direction direction, const GroupedArgs& g) {
    if (direction == Direction::kForward) {
        launch_best_grouped<kFormat, false>(queue, g);
    } else {
        launch_best_grouped<kFormat, true>(queue, g);
    }
}

}  // namespace orbit::cuda
