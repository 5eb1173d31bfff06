// Instantiated once per weight format, in grouped_*_cuda.cu.
#pragma once

#include "ops/decode_weight_cuda.cuh"
#include "ops/grouped_decode_cuda.cuh"
#include "ops/matmul_format_cuda.cuh"

namespace orbit::cuda {

// Every block of these kernels, which take one product, waits for its predecessor before it reads
// the offsets.

template <typename Shape, WeightFormat kFormat, bool kBackward>
__global__ void __launch_bounds__(Shape::kThreads)
    grouped_tile_kernel(const __grid_constant__ GroupedArgs g, int32_t tiles_n) {
    extern __shared__ __align__(1024) char shared[];
    release_successor();
    wait_for_predecessor();
    const auto block = static_cast<int32_t>(blockIdx.x);
    ExpertRows rows;
    if (find_tile<Shape::kM>(g.offsets, g.experts, block / tiles_n, rows)) {
        const MatmulArgs a = args_of_expert(g, 0, rows);
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
    ExpertRows rows;
    if (find_tile<Shape::kM>(g.offsets, g.experts, block / tiles_n, rows)) {
        const MatmulArgs a = args_of_expert(g, 0, rows);
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
    ExpertRows rows;
    if (find_tile<16>(g.offsets, g.experts, block / tiles_n, rows)) {
        multiply_plain<kFormat, kBackward>(args_of_expert(g, 0, rows), 0, block % tiles_n * 8);
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
    const WeightView w = args_of_expert(g, 0, {expert}).w;
    bf16* out = to + static_cast<int64_t>(blockIdx.y) * w.rows * w.cols;
    decode_share<kFormat>(w, 0, w.cols / 8, static_cast<int32_t>(blockIdx.x), out);
}

template <WeightFormat kFormat>
void decode_experts(
    cudaStream_t queue, const GroupedArgs& g, int32_t first, int32_t count, bf16* to
) {
    const int64_t eights =
        static_cast<int64_t>(g.products[0].one.w.rows) * (g.products[0].one.w.cols / 8);
    CHECK_LT(eights, int64_t{1} << 30);
    const dim3 grid(grid_dim(ceil_div(eights, kUnpackEights)), grid_dim_yz(count));
    launch_early(decode_experts_kernel<kFormat>, grid, kUnpackThreads, 0, queue, g, first, to);
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
    const int64_t tiles_n = ceil_div(g.products[0].one.epilogue.columns, tile_n);
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
    const MatmulArgs& a = g.products[0].one;
    auto address = reinterpret_cast<uintptr_t>(a.x);
    for (int32_t i = 0; i < g.count; ++i) {
        address |= reinterpret_cast<uintptr_t>(g.products[i].one.w.data) |
                   static_cast<uintptr_t>(g.products[i].weight_distance);
    }
    constexpr int32_t kUnit = kFormat == WeightFormat::kBF16 ? 8 : 32;  // of a row's columns
    return a.k % 8 == 0 && a.ldx % 8 == 0 && a.w.cols % kUnit == 0 && address % 16 == 0;
}

// One product of many rows, or of unaligned ones.
template <WeightFormat kFormat, bool kBackward>
void launch_grouped_tiles(cudaStream_t queue, const GroupedArgs& g) {
    constexpr int64_t kMediumRows = 64;
    const int64_t rows_per_expert = g.rows / g.experts;
    if (!rows_are_aligned<kFormat>(g)) {
        launch_grouped(queue, g, grouped_plain_kernel<kFormat, kBackward>, 16, 8, 32, 0);
        return;
    }
    if constexpr (kFormat == WeightFormat::kBF16) {
        if (g.products[0].one.epilogue.columns <= NarrowTile::kN) {  // an adapter's rank
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

// Every member gives the same bits; rows per expert decide which is quickest.
template <WeightFormat kFormat>
bool grouped_matmul_format(cudaStream_t queue, Direction direction, const GroupedArgs& g) {
    const bool forward = direction == Direction::kForward;
    if (forward && rows_are_aligned<kFormat>(g) && launch_grouped_decode<kFormat>(queue, g)) {
        return g.products[0].one.releases_late;
    }
    for (int32_t i = 0; i < g.count; ++i) {
        const GroupedArgs alone = product_alone(g, i);
        if (forward) {
            launch_grouped_tiles<kFormat, false>(queue, alone);
        } else {
            launch_grouped_tiles<kFormat, true>(queue, alone);
        }
    }
    return false;
}

}  // namespace orbit::cuda
