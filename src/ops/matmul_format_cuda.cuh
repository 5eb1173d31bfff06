// Instantiated once per weight format, in matmul_*_cuda.cu: which member runs, and the plain one.
#pragma once

#include "ops/matmul_decode_cuda.cuh"
#include "ops/matmul_narrow_int4_cuda.cuh"
#include "ops/matmul_one_row_cuda.cuh"
#include "ops/matmul_wgmma_cuda.cuh"

namespace orbit::cuda {

// Member R, plain: one warp a tile of 16 x 8, elements read one by one. For shapes whose rows are
// not 16-byte aligned.
template <WeightFormat kFormat, bool kBackward>
__device__ __forceinline__ void multiply_plain(const MatmulArgs& a, int32_t m0, int32_t n0) {
    const int lane = threadIdx.x;
    const int g = lane >> 2;
    const int q2 = 2 * (lane & 3);
    const auto x_at = [&](int32_t m, int32_t k) -> uint32_t {
        return m < a.m && k < a.k ? a.x[m * a.ldx + k].bits : 0u;
    };
    const auto w_at = [&](int32_t n, int32_t k) -> uint32_t {
        if (n >= a.n || k >= a.k) {
            return 0u;
        }
        return kBackward ? weight_value<kFormat>(a.w, k, n).bits
                         : weight_value<kFormat>(a.w, n, k).bits;
    };
    const auto x_pair = [&](int32_t m, int32_t k) { return x_at(m, k) | (x_at(m, k + 1) << 16); };
    const auto w_pair = [&](int32_t n, int32_t k) { return w_at(n, k) | (w_at(n, k + 1) << 16); };
    float acc[4] = {};
    float total[4] = {};
    for (int32_t k = 0; k < a.k; k += 16) {
        if (k > 0 && k % a.segment == 0) {
            for (int c = 0; c < 4; ++c) {
                total[c] = __fadd_rn(total[c], acc[c]);
                acc[c] = 0.0f;
            }
        }
        const uint32_t x[4] = {
            x_pair(m0 + g, k + q2),
            x_pair(m0 + g + 8, k + q2),
            x_pair(m0 + g, k + q2 + 8),
            x_pair(m0 + g + 8, k + q2 + 8)};
        mma_16816(acc, x, w_pair(n0 + g, k + q2), w_pair(n0 + g, k + q2 + 8));
    }
    if (a.segment < a.k) {
        for (int c = 0; c < 4; ++c) {
            acc[c] = __fadd_rn(total[c], acc[c]);
        }
    }
    const Epilogue& e = a.epilogue;
    float lora[4] = {};
    if (e.lora_u != nullptr) {
        uint32_t u[4];
        lora_u_fragment(u, e, m0 + g, a.m, 0);
        const uint2 b = lora_b_fragment<kBackward>(e, n0, a.n, 0);
        lora_fragment<kBackward>(lora, e, u, b, m0 + g, a.m, n0, a.n);
    }
    for (int c = 0; c < 4; ++c) {
        const int32_t m = m0 + g + 8 * (c >> 1);
        if (m < a.m) {
            finish_one(e, add_lora(e, acc[c], lora[c]), m, n0 + q2 + (c & 1), a.n);
        }
    }
}

template <WeightFormat kFormat, bool kBackward>
__global__ void __launch_bounds__(32) matmul_plain_kernel(const __grid_constant__ MatmulArgs a) {
    multiply_plain<kFormat, kBackward>(
        a, static_cast<int32_t>(blockIdx.y) * 16, static_cast<int32_t>(blockIdx.x) * 8
    );
}

// Rows [first, first + count) of a product.
inline MatmulArgs rows_of_product(const MatmulArgs& a, int32_t first, int32_t count) {
    MatmulArgs part = a;
    Epilogue& e = part.epilogue;
    part.m = count;
    part.x += first * a.ldx;
    e.y = static_cast<char*>(e.y) + first * e.ldy * (e.f32_out ? 4 : 2);
    e.residual = e.residual == nullptr ? nullptr : e.residual + first * e.ldy;
    e.lora_u = e.lora_u == nullptr ? nullptr : e.lora_u + static_cast<int64_t>(first) * e.ldu;
    return part;
}

template <WeightFormat kFormat, bool kBackward>
void launch_plain(cudaStream_t queue, const MatmulArgs& a) {
    // Rows in slices: the grid's second axis is short.
    constexpr int32_t kSlice = 32768 * 16;
    for (int32_t m = 0; m < a.m; m += kSlice) {
        const MatmulArgs part = rows_of_product(a, m, std::min(kSlice, a.m - m));
        const dim3 grid(
            grid_dim(ceil_div(a.epilogue.columns, 8)), grid_dim_yz(ceil_div(part.m, 16))
        );
        matmul_plain_kernel<kFormat, kBackward><<<grid, 32, 0, queue>>>(part);
        LAUNCH_CHECK();
    }
}

inline int64_t count_blocks(const MatmulGroup& group, int64_t tile_m, int64_t tile_n) {
    int64_t blocks = 0;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        blocks += ceil_div(a.m, tile_m) * ceil_div(a.epilogue.columns, tile_n);
    }
    return blocks;
}

inline int32_t widest(const MatmulGroup& group) {
    int32_t columns = 0;
    for (int32_t i = 0; i < group.count; ++i) {
        columns = std::max(columns, group.args[i].epilogue.columns);
    }
    return columns;
}

// A team for each of kSegments segments where their rings fit; else one team for all of them.
template <typename Shape, WeightFormat kFormat, bool kSegmented>
void launch_teams(cudaStream_t queue, MatmulGroup& group, bool all_cut) {
    if (all_cut && int64_t{Shape::kSharedBytes} * kSegments <= shared_memory_limit()) {
        launch_tile<Shape, kFormat, false, false, kSegments>(queue, group);
    } else {
        launch_tile<Shape, kFormat, false, kSegmented>(queue, group);
    }
}

// Few rows, few columns: small tiles, and a team for each segment when all products have as many.
template <WeightFormat kFormat, bool kSegmented>
void launch_small_tile(cudaStream_t queue, MatmulGroup& group) {
    bool all_cut = true;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        all_cut = all_cut && num_segments(a.k, a.segment) == kSegments;
    }
    if (widest(group) <= TinyTile::kN || count_blocks(group, 64, 32) < 66) {
        launch_teams<TinyTile, kFormat, kSegmented>(queue, group, all_cut);
    } else {
        launch_teams<NarrowTile, kFormat, kSegmented>(queue, group, all_cut);
    }
}

// Weights of few rows, whose product is quickest over many small blocks: routers, and LoRA's narrow
// side where it is not MatmulGroup::spreads and no wide product beside it needs the
// multiprocessors.
inline bool fits_row_tiles(const MatmulGroup& group) {
    const int32_t rows = group.args[0].m;
    const int32_t columns = widest(group);
    return columns <= TinyTile::kN ? rows > kNarrowMaxRows && rows <= 512
                                   : columns <= 128 && rows <= kNarrowMaxRows;
}

// MatmulGroup::spreads: products of as many segments each.
template <WeightFormat kFormat>
void launch_spread(cudaStream_t queue, MatmulGroup& group) {
    const MatmulArgs& a = group.args[0];
    if (num_segments(a.k, a.segment) == 1) {
        launch_tile<SpreadTile, kFormat, false, false>(queue, group);
    } else {
        launch_tile_spread<SpreadTile, kFormat>(queue, group);
    }
}

// Up to 64 rows on Hopper; false where no kernel for them takes the products.
template <WeightFormat kFormat, int kTokens>
bool launch_best_narrow(cudaStream_t queue, MatmulGroup& group) {
    if constexpr (kFormat == WeightFormat::kInt4) {
        if (launch_narrow_int4<kTokens>(queue, group)) {
            return true;
        }
        CHECK(group.swiglu == nullptr && group.args[0].x_flag == nullptr);
    }
    return launch_narrow<kFormat, kTokens>(queue, group);
}

template <WeightFormat kFormat>
bool launch_few_rows(cudaStream_t queue, MatmulGroup& group) {
    return group.args[0].m <= 32 ? launch_best_narrow<kFormat, 32>(queue, group)
                                 : launch_best_narrow<kFormat, 64>(queue, group);
}

// INT4 of so many rows by the kernel for 64, 64 at a time, as measured: it reads the weights again
// for each, but the tiles for many rows are far from what memory or the matrix unit allow.
constexpr int32_t kSlicedMaxRows = 512;

template <WeightFormat kFormat>
bool launch_slices(cudaStream_t queue, const MatmulGroup& group) {
    const int32_t rows = group.args[0].m;
    if (rows > kSlicedMaxRows || widest(group) <= 128 || !has_wgmma() || !fits_narrow_int4(group)) {
        return false;
    }
    for (int32_t first = 0; first < rows; first += kNarrowMaxRows) {
        MatmulGroup slice = group;
        for (int32_t i = 0; i < group.count; ++i) {
            const int32_t count = std::min(kNarrowMaxRows, rows - first);
            slice.args[i] = rows_of_product(group.args[i], first, count);
        }
        CHECK(launch_few_rows<kFormat>(queue, slice));
    }
    return true;
}

// Up to 16 rows of a weight of many rows: where the matrix unit of Hopper is quicker, as measured.
template <WeightFormat kFormat>
bool launch_narrow_16(cudaStream_t queue, MatmulGroup& group) {
    int32_t least = kFormat == WeightFormat::kBF16 ? 4 : 9;
    if constexpr (kFormat == WeightFormat::kInt4) {
        least = fits_narrow_int4(group) ? kNarrowInt4MinRows : least;
    }
    return group.args[0].m >= least && widest(group) > 128 && has_wgmma() &&
           launch_few_rows<kFormat>(queue, group);
}

template <WeightFormat kFormat, bool kBackward, bool kSegmented>
void launch_best_tile(cudaStream_t queue, MatmulGroup& group) {
    constexpr int64_t kEnoughBlocks = 100;  // of about 132 multiprocessors
    constexpr int64_t kEnoughWide = 64;     // large tiles pay earlier
    // LoRA's narrow side: reading x is all the work.
    const bool narrow = widest(group) <= TinyTile::kN;
    if constexpr (kFormat == WeightFormat::kBF16) {
        constexpr auto kDirection = kBackward ? Direction::kBackward : Direction::kForward;
        if (!kBackward && !narrow && fits_clusters(group)) {
            return matmul_clusters(queue, group);
        }
        if (!narrow && fits_pairs(group)) {
            return matmul_pairs(queue, kDirection, group);
        }
    }
    if constexpr (kFormat == WeightFormat::kInt4 && !kBackward) {
        if (group.args[0].m > kNarrowMaxRows && launch_slices<kFormat>(queue, group)) {
            return;
        }
    }
    if (!narrow && group.args[0].m > 64 && count_blocks(group, 128, 128) >= kEnoughWide) {
        if (has_wgmma()) {
            return launch_wgmma<kFormat, kBackward, kSegmented>(queue, group);
        }
        if (WideTile::kSharedBytes <= shared_memory_limit()) {
            return launch_tile<WideTile, kFormat, kBackward, kSegmented>(queue, group);
        }
    }
    if constexpr (!kBackward) {
        if (fits_row_tiles(group)) {
            return launch_decode<kFormat>(queue, group);
        }
        if (!narrow && group.args[0].m <= kNarrowMaxRows && has_wgmma()) {
            if (launch_few_rows<kFormat>(queue, group)) {
                return;
            }
        }
        if (!narrow && count_blocks(group, 64, 128) >= kEnoughBlocks) {
            return launch_tile<BroadTile, kFormat, false, kSegmented>(queue, group);
        }
        if (narrow || count_blocks(group, 64, 64) < kEnoughBlocks) {
            return launch_small_tile<kFormat, kSegmented>(queue, group);
        }
    }
    launch_tile<MediumTile, kFormat, kBackward, kSegmented>(queue, group);
}

// All members give the same bits; which one runs is a matter of speed and alignment only.
template <WeightFormat kFormat>
void matmul_format(cudaStream_t queue, Direction direction, MatmulGroup& group) {
    bool aligned = true;
    bool segmented = false;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        aligned = aligned && is_aligned(a, kFormat == WeightFormat::kBF16 ? 8 : 32);
        segmented = segmented || a.segment < a.k;
    }
    const bool forward = direction == Direction::kForward;
    if constexpr (kFormat == WeightFormat::kBF16) {
        if (group.spreads && aligned) {
            return launch_spread<kFormat>(queue, group);
        }
    }
    if (forward && launch_one_row<kFormat>(queue, group)) {
        return;
    }
    if constexpr (kFormat == WeightFormat::kBF16) {
        if (group.makes_u) {
            return matmul_clusters(queue, group);
        }
    }
    const bool asks = group.args[0].x_flag != nullptr;
    if constexpr (kFormat == WeightFormat::kInt4) {
        if (group.swiglu != nullptr || asks) {
            CHECK(launch_few_rows<kFormat>(queue, group));
            return;
        }
    }
    if constexpr (kFormat == WeightFormat::kBF16) {
        if (asks && group.args[0].m <= 8) {
            return launch_decode<kFormat>(queue, group);
        }
        if (asks) {
            return segmented ? launch_small_tile<kFormat, true>(queue, group)
                             : launch_small_tile<kFormat, false>(queue, group);
        }
    }
    CHECK(group.swiglu == nullptr && !asks);
    if (!aligned) {
        for (int32_t i = 0; i < group.count; ++i) {
            if (forward) {
                launch_plain<kFormat, false>(queue, group.args[i]);
            } else {
                launch_plain<kFormat, true>(queue, group.args[i]);
            }
        }
    } else if (forward && group.args[0].m <= kDecodeMaxRows) {
        if (!launch_narrow_16<kFormat>(queue, group)) {
            launch_decode<kFormat>(queue, group);
        }
    } else if (forward && segmented) {
        launch_best_tile<kFormat, false, true>(queue, group);
    } else if (forward) {
        launch_best_tile<kFormat, false, false>(queue, group);
    } else if (segmented) {
        launch_best_tile<kFormat, true, true>(queue, group);
    } else {
        launch_best_tile<kFormat, true, false>(queue, group);
    }
}

}  // namespace orbit::cuda
