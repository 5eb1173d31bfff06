// Member P/B: output tiles of kM x kN, contraction in steps of 64, x (and bf16 weights) through a
// cp.async ring, packed weights fetched into registers one step ahead and decoded into the ring.
// Backward reads the same packed tile with the roles of rows and columns exchanged
// (ldmatrix.trans).
#pragma once

#include "device/cuda/check.cuh"
#include "ops/matmul_cuda.cuh"

namespace orbit::cuda {

template <int kTileM, int kTileN, int kWarpsAlongM, int kWarpsAlongN, int kRing>
struct TileShape {
    static constexpr int kM = kTileM;
    static constexpr int kN = kTileN;
    static constexpr int kWarpsM = kWarpsAlongM;
    static constexpr int kWarpsN = kWarpsAlongN;
    static constexpr int kStages = kRing;
    static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
    static constexpr int kWarpRows = kM / kWarpsM;  // of one warp's output
    static constexpr int kWarpCols = kN / kWarpsN;
    static constexpr int kFragM = kWarpRows / 16;
    static constexpr int kFragN = kWarpCols / 8;
    static constexpr int kBytesX = kM * kTileK * 2;
    static constexpr int kBytesW = kN * kTileK * 2;
    static constexpr int kStageBytes = kBytesX + kBytesW;
    static constexpr int kSharedBytes = kStages * kStageBytes;
};

// Rows of 128 bytes and more, their 16-byte granules permuted so that eight consecutive rows of one
// granule column lie in different banks.
__device__ __forceinline__ uint32_t swizzled(int row, int granule, int row_bytes) {
    return static_cast<uint32_t>(row * row_bytes + ((granule ^ (row & 7)) << 4));
}

template <typename Shape>
__device__ __forceinline__ void load_x_tile(
    const MatmulArgs& a, uint32_t to, int32_t m0, int32_t k0
) {
#pragma unroll
    for (int i = 0; i < Shape::kM * 8 / Shape::kThreads; ++i) {
        const int index = static_cast<int>(threadIdx.x) + i * Shape::kThreads;
        const int row = index >> 3;
        const int granule = index & 7;
        const int32_t m = m0 + row;
        const int32_t k = k0 + granule * 8;
        const bool valid = m < a.m && k < a.k;
        const bf16* from = valid ? a.x + m * a.ldx + k : a.x;
        copy_async_16(to + swizzled(row, granule, 128), from, valid);
    }
}

template <typename Shape, bool kBackward>
__device__ __forceinline__ void load_bf16_tile(
    const MatmulArgs& a, uint32_t to, int32_t n0, int32_t k0
) {
    constexpr int kRowGranules = kBackward ? Shape::kN / 8 : 8;
#pragma unroll
    for (int i = 0; i < Shape::kN * 8 / Shape::kThreads; ++i) {
        const int index = static_cast<int>(threadIdx.x) + i * Shape::kThreads;
        const int row = index / kRowGranules;
        const int granule = index % kRowGranules;
        const int32_t w_row = (kBackward ? k0 : n0) + row;
        const int32_t w_col = (kBackward ? n0 : k0) + granule * 8;
        const bool valid = w_row < a.w.rows && w_col < a.w.cols;
        const uint8_t* from = valid ? a.w.data + w_row * a.w.row_bytes + w_col * 2 : a.w.data;
        copy_async_16(to + swizzled(row, granule, kRowGranules * 16), from, valid);
    }
}

// The units of 32 columns that a thread moves for packed weights.
template <typename Shape, WeightFormat kFormat, bool kBackward>
struct PackedTile {
    static constexpr int kRowUnits = kBackward ? Shape::kN / 32 : 2;
    static constexpr int kUnits = Shape::kN * 2;
    static constexpr int kPerThread = (kUnits + Shape::kThreads - 1) / Shape::kThreads;
    RawUnit<kFormat> raw[kPerThread];

    __device__ __forceinline__ void fetch(const MatmulArgs& a, int32_t n0, int32_t k0) {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
            const int unit = static_cast<int>(threadIdx.x) + i * Shape::kThreads;
            const int32_t w_row = (kBackward ? k0 : n0) + unit / kRowUnits;
            const int32_t w_col = (kBackward ? n0 : k0) + unit % kRowUnits * 32;
            if (unit < kUnits && w_row < a.w.rows && w_col < a.w.cols) {
                fetch_unit<kFormat>(raw[i], a.w, w_row, w_col);
            } else {
                zero_unit<kFormat>(raw[i]);
            }
        }
    }

    __device__ __forceinline__ void store(char* to) const {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
            const int unit = static_cast<int>(threadIdx.x) + i * Shape::kThreads;
            if (unit < kUnits) {
                const int row = unit / kRowUnits;
                const int granule = unit % kRowUnits * 4;
                uint32_t pairs[16];
                decode_unit<kFormat>(raw[i], pairs);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    auto* at =
                        reinterpret_cast<uint4*>(to + swizzled(row, granule + j, kRowUnits * 64));
                    *at = uint4{pairs[4 * j], pairs[4 * j + 1], pairs[4 * j + 2], pairs[4 * j + 3]};
                }
            }
        }
    }
};

// acc += x tile . weight tile over 64 of the contraction, in four k16 steps.
template <typename Shape, bool kBackward>
__device__ __forceinline__ void multiply_tile(
    float (&acc)[Shape::kFragM][Shape::kFragN][4], uint32_t x_tile, uint32_t w_tile
) {
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int warp_m = warp / Shape::kWarpsN * Shape::kWarpRows;
    const int warp_n = warp % Shape::kWarpsN * Shape::kWarpCols;
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step) {
        uint32_t a[Shape::kFragM][4];
#pragma unroll
        for (int i = 0; i < Shape::kFragM; ++i) {
            const int row = warp_m + 16 * i + (lane & 15);
            const int granule = 2 * step + (lane >> 4);
            ldmatrix_x4(a[i][0], a[i][1], a[i][2], a[i][3], x_tile + swizzled(row, granule, 128));
        }
        uint32_t b[Shape::kFragN][2];
#pragma unroll
        for (int j = 0; j < Shape::kFragN; j += 2) {
            if constexpr (kBackward) {
                const int row = 16 * step + (lane & 15);
                const int granule = (warp_n + 8 * j) / 8 + (lane >> 4);
                ldmatrix_x4_trans(
                    b[j][0],
                    b[j][1],
                    b[j + 1][0],
                    b[j + 1][1],
                    w_tile + swizzled(row, granule, Shape::kN * 2)
                );
            } else {
                const int row = warp_n + 8 * j + (lane & 7) + ((lane >> 4) << 3);
                const int granule = 2 * step + ((lane >> 3) & 1);
                ldmatrix_x4(
                    b[j][0], b[j][1], b[j + 1][0], b[j + 1][1], w_tile + swizzled(row, granule, 128)
                );
            }
        }
#pragma unroll
        for (int i = 0; i < Shape::kFragM; ++i) {
#pragma unroll
            for (int j = 0; j < Shape::kFragN; ++j) {
                mma_16816(acc[i][j], a[i], b[j][0], b[j][1]);
            }
        }
    }
}

template <typename Shape>
__device__ __forceinline__ void store_tile(
    const MatmulArgs& a, const float (&acc)[Shape::kFragM][Shape::kFragN][4], int32_t m0, int32_t n0
) {
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int32_t m_base = m0 + warp / Shape::kWarpsN * Shape::kWarpRows + (lane >> 2);
    const int32_t n_base = n0 + warp % Shape::kWarpsN * Shape::kWarpCols;
    const int q2 = 2 * (lane & 3);
    const Epilogue& e = a.epilogue;
#pragma unroll
    for (int i = 0; i < Shape::kFragM; ++i) {
        const int32_t m = m_base + 16 * i;
#pragma unroll
        for (int j = 0; j < Shape::kFragN; ++j) {
            const int32_t n = n_base + 8 * j;
            float lora[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (e.lora_u != nullptr) {
                for (int k = 0; k < e.ldu; k += 16) {
                    const uint32_t u[4] = {
                        lora_u_pair(e, m, a.m, k + q2),
                        lora_u_pair(e, m + 8, a.m, k + q2),
                        lora_u_pair(e, m, a.m, k + q2 + 8),
                        lora_u_pair(e, m + 8, a.m, k + q2 + 8)};
                    const int32_t row = n + (lane >> 2);
                    mma_16816(
                        lora,
                        u,
                        lora_b_pair(e, row, a.n, k + q2),
                        lora_b_pair(e, row, a.n, k + q2 + 8)
                    );
                }
            }
            if (m < a.m) {
                store_two(e, acc[i][j][0], acc[i][j][1], lora[0], lora[1], m, n + q2, a.n);
            }
            if (m + 8 < a.m) {
                store_two(e, acc[i][j][2], acc[i][j][3], lora[2], lora[3], m + 8, n + q2, a.n);
            }
        }
    }
}

// Blocks in groups of eight row tiles, so that neighbours in time share weight tiles in L2.
__device__ __forceinline__ void tile_of_block(
    int32_t tiles_m, int32_t tiles_n, int32_t& tile_m, int32_t& tile_n
) {
    constexpr int32_t kGroup = 8;
    const auto block = static_cast<int32_t>(blockIdx.x);
    const int32_t first = block / (kGroup * tiles_n) * kGroup;
    const int32_t height = min(kGroup, tiles_m - first);
    const int32_t inside = block % (kGroup * tiles_n);
    tile_m = first + inside % height;
    tile_n = inside / height;
}

template <typename Shape, WeightFormat kFormat, bool kBackward, bool kSegmented>
__global__ void __launch_bounds__(Shape::kThreads) matmul_tile_kernel(MatmulArgs a) {
    extern __shared__ __align__(128) char shared[];
    constexpr bool kPlain = kFormat == WeightFormat::kBF16;
    int32_t tile_m = 0;
    int32_t tile_n = 0;
    tile_of_block(
        (a.m + Shape::kM - 1) / Shape::kM,
        (a.epilogue.columns + Shape::kN - 1) / Shape::kN,
        tile_m,
        tile_n
    );
    const int32_t m0 = tile_m * Shape::kM;
    const int32_t n0 = tile_n * Shape::kN;
    const int32_t steps = (a.k + kTileK - 1) / kTileK;
    const int32_t segment_steps = a.segment / kTileK;
    const uint32_t base = shared_address(shared);

    PackedTile<Shape, kPlain ? WeightFormat::kInt4 : kFormat, kBackward> packed;
    const auto load_stage = [&](int32_t step) {
        if (step < steps) {
            const uint32_t stage = base + step % Shape::kStages * Shape::kStageBytes;
            load_x_tile<Shape>(a, stage, m0, step * kTileK);
            if constexpr (kPlain) {
                load_bf16_tile<Shape, kBackward>(a, stage + Shape::kBytesX, n0, step * kTileK);
            }
        }
        copy_async_commit();
    };
    const auto store_packed = [&](int32_t step) {
        packed.store(shared + step % Shape::kStages * Shape::kStageBytes + Shape::kBytesX);
    };
#pragma unroll
    for (int s = 0; s < Shape::kStages - 1; ++s) {
        load_stage(s);
    }
    if constexpr (!kPlain) {
        packed.fetch(a, n0, 0);
        store_packed(0);
        packed.fetch(a, n0, kTileK);
    }

    float acc[Shape::kFragM][Shape::kFragN][4] = {};
    float total[kSegmented ? Shape::kFragM : 1][Shape::kFragN][4] = {};
    for (int32_t step = 0; step < steps; ++step) {
        copy_async_wait<Shape::kStages - 2>();
        __syncthreads();
        load_stage(step + Shape::kStages - 1);
        if constexpr (!kPlain) {
            if (step + 1 < steps) {
                store_packed(step + 1);
                packed.fetch(a, n0, (step + 2) * kTileK);
            }
        }
        if constexpr (kSegmented) {
            if (step > 0 && step % segment_steps == 0) {
#pragma unroll
                for (int i = 0; i < Shape::kFragM; ++i) {
#pragma unroll
                    for (int j = 0; j < Shape::kFragN; ++j) {
#pragma unroll
                        for (int c = 0; c < 4; ++c) {
                            total[i][j][c] = __fadd_rn(total[i][j][c], acc[i][j][c]);
                            acc[i][j][c] = 0.0f;
                        }
                    }
                }
            }
        }
        const uint32_t stage = base + step % Shape::kStages * Shape::kStageBytes;
        multiply_tile<Shape, kBackward>(acc, stage, stage + Shape::kBytesX);
    }
    if constexpr (kSegmented) {
#pragma unroll
        for (int i = 0; i < Shape::kFragM; ++i) {
#pragma unroll
            for (int j = 0; j < Shape::kFragN; ++j) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    acc[i][j][c] = __fadd_rn(total[i][j][c], acc[i][j][c]);
                }
            }
        }
    }
    store_tile<Shape>(a, acc, m0, n0);
}

template <typename Shape, WeightFormat kFormat, bool kBackward, bool kSegmented>
void launch_tile(cudaStream_t queue, const MatmulArgs& a) {
    const auto kernel = matmul_tile_kernel<Shape, kFormat, kBackward, kSegmented>;
    allow_shared_memory(kernel, Shape::kSharedBytes);
    const int64_t blocks = ceil_div(a.m, Shape::kM) * ceil_div(a.epilogue.columns, Shape::kN);
    kernel<<<grid_dim(blocks), Shape::kThreads, Shape::kSharedBytes, queue>>>(a);
    LAUNCH_CHECK();
}

using WideTile = TileShape<128, 128, 2, 4, 4>;
using MediumTile = TileShape<64, 64, 2, 2, 4>;
using NarrowTile = TileShape<64, 32, 2, 2, 4>;

template <WeightFormat kFormat, bool kBackward, bool kSegmented>
void launch_best_tile(cudaStream_t queue, const MatmulArgs& a) {
    constexpr int64_t kEnoughBlocks = 100;  // of about 132 multiprocessors
    const auto blocks = [&](int64_t m, int64_t n) {
        return ceil_div(a.m, m) * ceil_div(a.epilogue.columns, n);
    };
    if (a.m > 64 && blocks(128, 128) >= kEnoughBlocks) {
        launch_tile<WideTile, kFormat, kBackward, kSegmented>(queue, a);
    } else if (kBackward || blocks(64, 64) >= kEnoughBlocks) {
        launch_tile<MediumTile, kFormat, kBackward, kSegmented>(queue, a);
    } else if constexpr (!kBackward) {
        launch_tile<NarrowTile, kFormat, kBackward, kSegmented>(queue, a);
    }
}

}  // namespace orbit::cuda
