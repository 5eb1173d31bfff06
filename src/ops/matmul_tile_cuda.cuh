// Member P/B: output tiles of kM x kN, contraction in steps of 64, x (and bf16 weights) through a
// cp.async ring, packed weights fetched into registers some steps ahead and decoded into the ring.
// Backward reads the same packed tile with the roles of rows and columns exchanged
// (ldmatrix.trans).
#pragma once

#include <type_traits>
#include <utility>

#include "device/cuda/check.cuh"
#include "device/cuda/tma.cuh"
#include "ops/matmul_cuda.cuh"

namespace orbit::cuda {

// kWeightColumns: at least 64 for backward, whose weight rows are 64 columns wide.
template <
    int kTileM,
    int kTileN,
    int kWarpsAlongM,
    int kWarpsAlongN,
    int kRing,
    int kWeightColumns = kTileN>
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
    static constexpr int kBytesW = kWeightColumns * kTileK * 2;
    static constexpr int kStageBytes = kBytesX + kBytesW;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    // The output tile in fp32, on its way to memory; rows padded against bank conflicts.
    static constexpr int kRowFloats = kN + 8;
    static constexpr int kOutputBytes = kM * kRowFloats * 4;

    // A block may hold several teams of kThreads, each with a segment of the contraction.
    static __device__ __forceinline__ int thread() {
        return static_cast<int>(threadIdx.x) % kThreads;
    }

    static __device__ __forceinline__ int warp() { return thread() >> 5; }
};

// Rows of 128 bytes, their 16-byte granules permuted so that eight consecutive rows of one granule
// column lie in different banks: the matrix unit's own 128-byte swizzle.
__device__ __forceinline__ uint32_t swizzled(int row, int granule) {
    return static_cast<uint32_t>(row * 128 + ((granule ^ (row & 7)) << 4));
}

// Weight tiles are stored as rows of 64 values: forward, one row a weight row, along the
// contraction; backward, one row a weight row too, but 64 columns of the output at a time.
constexpr int kColumnBlockBytes = kTileK * 128;

template <bool kBackward>
__device__ __forceinline__ uint32_t weight_offset(int row, int granule) {
    if constexpr (kBackward) {
        return static_cast<uint32_t>(granule >> 3) * kColumnBlockBytes + swizzled(row, granule & 7);
    }
    return swizzled(row, granule);
}

// Loaders keep their addresses and only add to them: a warp alone on its scheduler pays for every
// instruction of the loop. Rows and columns past the end of a matrix repeat its last ones, because
// what they lead to is never stored; only the contraction's tail must be zeros.

// The x tile: rows m0.., 64 of the contraction a step.
template <typename Shape>
struct TileX {
    static constexpr int kCount = Shape::kM * 8 / Shape::kThreads;
    static constexpr int kRowStep = Shape::kThreads / 8;  // a multiple of 8: one swizzle for all
    const char* from[kCount];
    uint32_t to;

    __device__ __forceinline__ TileX(const MatmulArgs& a, int32_t m0, int32_t k_begin) {
        const int granule = Shape::thread() & 7;
        const int row = Shape::thread() >> 3;
        to = swizzled(row, granule);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int64_t m = min(m0 + row + i * kRowStep, a.m - 1);
            from[i] = reinterpret_cast<const char*>(a.x + m * a.ldx + k_begin + granule * 8);
        }
    }

    // `left` of the contraction, from this step on.
    __device__ __forceinline__ void load(uint32_t tile, int32_t left) {
        if (left >= kTileK) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                copy_async_16(tile + to + i * kRowStep * 128, from[i]);
                from[i] += kTileK * 2;
            }
            return;
        }
        const bool valid = (Shape::thread() & 7) * 8 < left;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            copy_async_16(tile + to + i * kRowStep * 128, valid ? from[i] : from[0], valid);
        }
    }
};

// The tile of a bf16 weight.
template <typename Shape, bool kBackward>
struct TileBF16 {
    static constexpr int kRowGranules = kBackward ? Shape::kN / 8 : 8;
    static constexpr int kCount = Shape::kN * 8 / Shape::kThreads;
    static constexpr int kRowStep = Shape::kThreads / kRowGranules;
    static_assert(kRowStep % 8 == 0);
    const char* from[kCount];
    int64_t step_bytes;
    uint32_t to;
    int32_t at_k;  // of the first granule: its place in the contraction, inside a step

    __device__ __forceinline__ TileBF16(const MatmulArgs& a, int32_t n0, int32_t k_begin) {
        const int granule = Shape::thread() % kRowGranules;
        const int row = Shape::thread() / kRowGranules;
        to = weight_offset<kBackward>(row, granule);
        at_k = kBackward ? row : granule * 8;
        step_bytes = kBackward ? kTileK * a.w.row_bytes : kTileK * 2;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int32_t w_row = row + i * kRowStep;
            const int64_t at = kBackward ? min(w_row, a.w.rows - 1) : min(n0 + w_row, a.w.rows - 1);
            const int32_t col =
                kBackward ? min(n0 + granule * 8, a.w.cols - 8) : k_begin + granule * 8;
            from[i] = reinterpret_cast<const char*>(a.w.data + at * a.w.row_bytes + col * 2);
        }
    }

    __device__ __forceinline__ void load(uint32_t tile, int32_t left) {
        if (left >= kTileK) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                copy_async_16(tile + to + i * kRowStep * 128, from[i]);
                from[i] += step_bytes;
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const bool valid = at_k + (kBackward ? i * kRowStep : 0) < left;
            copy_async_16(tile + to + i * kRowStep * 128, valid ? from[i] : from[0], valid);
        }
    }
};

// The tile of a packed weight: a thread moves units of 32 columns through registers, which hold
// kDepth steps so that the memory's latency is not paid in every step. Step s uses slot s % kDepth.
template <typename Shape, WeightFormat kFormat, bool kBackward, int kSteps>
struct TilePacked {
    static constexpr int kDepth = RawUnit<kFormat>::kWords > 5 ? 2 : kSteps;
    static constexpr int kRowUnits = kBackward ? Shape::kN / 32 : 2;
    static constexpr int kUnits = Shape::kN * 2;
    static constexpr int kPerThread = (kUnits + Shape::kThreads - 1) / Shape::kThreads;
    static constexpr int kRowStep = Shape::kThreads / kRowUnits;
    static constexpr int kBlock = BlockBytes<kFormat>::value;
    RawUnit<kFormat> raw[kDepth][kPerThread];
    const uint8_t* block[kPerThread];
    const uint8_t* scale[kPerThread];  // of the unit's row, in formats with scales apart
    int32_t column;                    // of the units, in the matrix
    int32_t at_k;                      // of the first unit, inside a step
    int32_t step_row = 0;              // kFp8, backward: the first row of the step

    static __device__ __forceinline__ int first_row() { return Shape::thread() / kRowUnits; }

    __device__ __forceinline__ TilePacked(const MatmulArgs& a, int32_t n0, int32_t k_begin) {
        const int unit_column = Shape::thread() % kRowUnits * 32;
        at_k = kBackward ? first_row() : unit_column;
        column = kBackward ? min(n0 + unit_column, a.w.cols - 32) : k_begin + unit_column;
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
            const int32_t w_row = first_row() + i * kRowStep;
            const int64_t row =
                kBackward ? min(w_row, a.w.rows - 1) : min(n0 + w_row, a.w.rows - 1);
            block[i] = a.w.data + row * a.w.row_bytes + (column >> 5) * kBlock;
            if constexpr (kScalesApart<kFormat>) {
                scale[i] = scale_row<kFormat>(a.w, row);
            }
        }
    }

    __device__ __forceinline__ bool owns(int i) const {
        return kUnits % Shape::kThreads == 0 || Shape::thread() + i * Shape::kThreads < kUnits;
    }

    template <int kSlot>
    __device__ __forceinline__ void fetch(const MatmulArgs& a, int32_t left) {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
            if (owns(i) && at_k + (kBackward ? i * kRowStep : 0) < left) {
                const uint8_t* scale_at = nullptr;
                if constexpr (kScalesApart<kFormat>) {
                    scale_at = scale[i] + scale_offset<kFormat>(a.w, column);
                }
                fetch_unit<kFormat>(raw[kSlot][i], block[i], scale_at);
            } else {
                zero_unit<kFormat>(raw[kSlot][i]);
            }
            block[i] += kBackward ? kTileK * a.w.row_bytes : 2 * kBlock;
            if constexpr (kFormat == WeightFormat::kFp8 && kBackward) {
                // A row of scales serves 128 rows, two steps.
                scale[i] += (step_row & kTileK) != 0 ? a.w.scale_stride : 0;
            } else if constexpr (kScalesApart<kFormat> && kBackward) {
                scale[i] += kTileK * a.w.scale_stride;
            }
        }
        column += kBackward ? 0 : kTileK;
        step_row += kTileK;
    }

    template <int kSlot>
    __device__ __forceinline__ void store(const MatmulArgs& a, char* tile) const {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
            if (owns(i)) {
                const int row = first_row() + i * kRowStep;
                const int granule = Shape::thread() % kRowUnits * 4;
                uint32_t pairs[16];
                decode_unit<kFormat>(a.w, raw[kSlot][i], pairs);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    auto* at =
                        reinterpret_cast<uint4*>(tile + weight_offset<kBackward>(row, granule + j));
                    *at = uint4{pairs[4 * j], pairs[4 * j + 1], pairs[4 * j + 2], pairs[4 * j + 3]};
                }
            }
        }
    }
};

template <typename Shape, WeightFormat kFormat, bool kBackward, int kSteps>
using WeightTile = std::conditional_t<
    kFormat == WeightFormat::kBF16,
    TileBF16<Shape, kBackward>,
    TilePacked<Shape, kFormat, kBackward, kSteps>>;

template <typename Weights>
constexpr int slots_of() {
    if constexpr (requires { Weights::kDepth; }) {
        return Weights::kDepth;
    }
    return 1;
}

// Calls body(std::integral_constant<int, 0>) .. (kCount - 1): slots must be known at compile time.
template <int kCount, typename Body>
__device__ __forceinline__ void for_slots(const Body& body) {
    [&]<int... kSlot>(std::integer_sequence<int, kSlot...>) {
        (body(std::integral_constant<int, kSlot>{}), ...);
    }(std::make_integer_sequence<int, kCount>{});
}

// Fetches the first steps, decodes step 0 into `tile`, and leaves every slot full.
template <typename Weights>
__device__ __forceinline__ void start_packed(
    Weights& w, const MatmulArgs& a, int32_t length, char* tile
) {
    for_slots<Weights::kDepth>([&](auto slot) {
        w.template fetch<slot.value>(a, length - slot.value * kTileK);
    });
    w.template store<0>(a, tile);
    w.template fetch<0>(a, length - Weights::kDepth * kTileK);
}

// During step `step`: decodes step + 1, which is in kSlot, and refills the slot.
template <int kSlot, typename Weights>
__device__ __forceinline__ void advance_packed(
    Weights& w, const MatmulArgs& a, int32_t length, int32_t step, char* tile
) {
    w.template store<kSlot>(a, tile);
    w.template fetch<kSlot>(a, length - (step + 1 + Weights::kDepth) * kTileK);
}

// Where a lane's ldmatrix rows lie in the two tiles.
template <typename Shape, bool kBackward>
struct FragmentOffsets {
    static constexpr int kSteps = kTileK / 16;
    static constexpr int kPairs = Shape::kFragN / 2;
    uint32_t x[kSteps];
    uint32_t w[kBackward ? kPairs : kSteps];

    __device__ __forceinline__ FragmentOffsets() {
        const int lane = threadIdx.x & 31;
        const int warp = Shape::warp();
        const int warp_m = warp / Shape::kWarpsN * Shape::kWarpRows;
        const int warp_n = warp % Shape::kWarpsN * Shape::kWarpCols;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            x[step] = swizzled(warp_m + (lane & 15), 2 * step + (lane >> 4));
            if constexpr (!kBackward) {
                const int row = warp_n + (lane & 7) + ((lane >> 4) << 3);
                w[step] = weight_offset<false>(row, 2 * step + ((lane >> 3) & 1));
            }
        }
        if constexpr (kBackward) {
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
                w[pair] = weight_offset<true>(lane & 15, warp_n / 8 + 2 * pair + (lane >> 4));
            }
        }
    }

    __device__ __forceinline__ uint32_t weight(int step, int pair) const {
        return kBackward ? w[pair] + step * 16 * 128 : w[step] + pair * 16 * 128;
    }
};

// acc += x tile . weight tile over 64 of the contraction, in four k16 steps.
template <typename Shape, bool kBackward>
__device__ __forceinline__ void multiply_tile(
    float (&acc)[Shape::kFragM][Shape::kFragN][4],
    const FragmentOffsets<Shape, kBackward>& at,
    uint32_t x_tile,
    uint32_t w_tile
) {
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step) {
        uint32_t a[Shape::kFragM][4];
#pragma unroll
        for (int i = 0; i < Shape::kFragM; ++i) {
            ldmatrix_x4(a[i][0], a[i][1], a[i][2], a[i][3], x_tile + at.x[step] + i * 16 * 128);
        }
        uint32_t b[Shape::kFragN][2];
#pragma unroll
        for (int j = 0; j < Shape::kFragN; j += 2) {
            const uint32_t from = w_tile + at.weight(step, j / 2);
            if constexpr (kBackward) {
                ldmatrix_x4_trans(b[j][0], b[j][1], b[j + 1][0], b[j + 1][1], from);
            } else {
                ldmatrix_x4(b[j][0], b[j][1], b[j + 1][0], b[j + 1][1], from);
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

// Puts scale acc + lora_scale lora of a team's tile into shared memory, as rows of kRowFloats.
template <typename Shape, bool kByRank>
__device__ __forceinline__ void stage_output(
    const MatmulArgs& a,
    const float (&acc)[Shape::kFragM][Shape::kFragN][4],
    bool with_lora,
    float* out,
    int32_t m0,
    int32_t n0
) {
    const int lane = threadIdx.x & 31;
    const int row0 = Shape::warp() / Shape::kWarpsN * Shape::kWarpRows + (lane >> 2);
    const int col0 = Shape::warp() % Shape::kWarpsN * Shape::kWarpCols;
    const Epilogue& e = a.epilogue;
    // So many fragments of LoRA's B are loaded at once: their latency is most of the work, and the
    // loop over the rank keeps the compiler from doing it.
    constexpr int kBatch = std::min(8, Shape::kFragN);
    static_assert(Shape::kFragN % kBatch == 0);
#pragma unroll
    for (int i = 0; i < Shape::kFragM; ++i) {
        uint32_t u[4] = {};
        if (with_lora) {
            lora_u_fragment(u, e, m0 + row0 + 16 * i, a.m, 0);
        }
#pragma unroll
        for (int first = 0; first < Shape::kFragN; first += kBatch) {
            uint2 b[kBatch] = {};
#pragma unroll
            for (int j = 0; with_lora && j < kBatch; ++j) {
                b[j] = lora_b_fragment<kByRank>(e, n0 + col0 + 8 * (first + j), a.n, 0);
            }
#pragma unroll
            for (int k = 0; k < kBatch; ++k) {
                const int j = first + k;
                float v[4] = {acc[i][j][0], acc[i][j][1], acc[i][j][2], acc[i][j][3]};
                if (with_lora) {
                    float lora[4];
                    const int32_t n = n0 + col0 + 8 * j;
                    lora_fragment<kByRank>(lora, e, u, b[k], m0 + row0 + 16 * i, a.m, n, a.n);
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        v[c] = add_lora(e, v[c], lora[c]);
                    }
                }
                float* at =
                    out + (row0 + 16 * i) * Shape::kRowFloats + col0 + 8 * j + 2 * (lane & 3);
                *reinterpret_cast<float2*>(at) = float2{v[0], v[1]};
                *reinterpret_cast<float2*>(at + 8 * Shape::kRowFloats) = float2{v[2], v[3]};
            }
        }
    }
}

// LoRA's product alone, of a team's tile, into shared memory.
template <typename Shape, bool kByRank>
__device__ __forceinline__ void stage_lora(
    const MatmulArgs& a, float* out, int32_t m0, int32_t n0
) {
    const int lane = threadIdx.x & 31;
    const int row0 = Shape::warp() / Shape::kWarpsN * Shape::kWarpRows + (lane >> 2);
    const int col0 = Shape::warp() % Shape::kWarpsN * Shape::kWarpCols;
    uint2 b[Shape::kFragN];  // all loads at once: their latency is most of the work
#pragma unroll
    for (int j = 0; j < Shape::kFragN; ++j) {
        b[j] = lora_b_fragment<kByRank>(a.epilogue, n0 + col0 + 8 * j, a.n, 0);
    }
#pragma unroll
    for (int i = 0; i < Shape::kFragM; ++i) {
        const int32_t m = m0 + row0 + 16 * i;
        uint32_t u[4];
        lora_u_fragment(u, a.epilogue, m, a.m, 0);
#pragma unroll
        for (int j = 0; j < Shape::kFragN; ++j) {
            float lora[4];
            lora_fragment<kByRank>(lora, a.epilogue, u, b[j], m, a.m, n0 + col0 + 8 * j, a.n);
            float* at = out + (row0 + 16 * i) * Shape::kRowFloats + col0 + 8 * j + 2 * (lane & 3);
            *reinterpret_cast<float2*>(at) = float2{lora[0], lora[1]};
            *reinterpret_cast<float2*>(at + 8 * Shape::kRowFloats) = float2{lora[2], lora[3]};
        }
    }
}

__device__ __forceinline__ void load_eight(float (&v)[8], const float* from) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const auto four = reinterpret_cast<const float4*>(from)[i];
        v[4 * i] = four.x;
        v[4 * i + 1] = four.y;
        v[4 * i + 2] = four.z;
        v[4 * i + 3] = four.w;
    }
}

// A tile from shared memory to y, eight columns at a time: the sum of the teams' tiles tile_of(0),
// tile_of(1), .. in ascending order (teams > 1), LoRA's tile (or null: already in), bias, residual,
// one rounding.
template <typename Shape, typename TileOf>
__device__ __forceinline__ void store_output(
    const MatmulArgs& a, const TileOf& tile_of, int teams, const float* lora, int32_t m0, int32_t n0
) {
    constexpr int kRowEights = Shape::kN / 8;
    const Epilogue& e = a.epilogue;
    const int32_t inside = min(e.columns, a.n);
#pragma unroll 1
    for (int i = threadIdx.x; i < Shape::kM * kRowEights; i += blockDim.x) {
        const int row = i / kRowEights;
        const int col = i % kRowEights * 8;
        const int32_t m = m0 + row;
        const int32_t n = n0 + col;
        if (m >= a.m || n >= e.columns) {
            continue;
        }
        const int at = row * Shape::kRowFloats + col;
        float v[8];
        load_eight(v, tile_of(0) + at);
        if (teams > 1) {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                v[c] = __fadd_rn(0.0f, v[c]);
            }
            for (int t = 1; t < teams; ++t) {
                float other[8];
                load_eight(other, tile_of(t) + at);
#pragma unroll
                for (int c = 0; c < 8; ++c) {
                    v[c] = __fadd_rn(v[c], other[c]);
                }
            }
        }
        float low_rank[8] = {};
        if (lora != nullptr) {
            load_eight(low_rank, lora + at);
        }
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            // Without LoRA, or with its tile apart, the scale is still to come.
            if (lora != nullptr) {
                v[c] = add_lora(e, v[c], low_rank[c]);
            } else if (e.lora_u == nullptr) {
                v[c] = __fmul_rn(v[c], e.scale);
            }
        }
        if (n + 8 <= inside && e.ldy % 8 == 0) {
            finish_eight(e, v, m, n);
        } else {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                finish_one(e, v[c], m, n + c, a.n);
            }
        }
    }
}

// Blocks in groups of eight row tiles, so that neighbours in time share weight tiles in L2.
__device__ __forceinline__ void tile_of_block(
    int32_t block, int32_t tiles_m, int32_t tiles_n, int32_t& tile_m, int32_t& tile_n
) {
    constexpr int32_t kGroup = 8;
    const int32_t first = block / (kGroup * tiles_n) * kGroup;
    const int32_t height = min(kGroup, tiles_m - first);
    const int32_t inside = block % (kGroup * tiles_n);
    tile_m = first + inside % height;
    tile_n = inside / height;
}

template <typename Shape>
__device__ __forceinline__ void tile_corner(
    const MatmulArgs& a, int32_t block, int32_t& m0, int32_t& n0
) {
    int32_t tile_m = 0;
    int32_t tile_n = 0;
    tile_of_block(
        block,
        (a.m + Shape::kM - 1) / Shape::kM,
        (a.epilogue.columns + Shape::kN - 1) / Shape::kN,
        tile_m,
        tile_n
    );
    m0 = tile_m * Shape::kM;
    n0 = tile_n * Shape::kN;
}

// total += acc, acc = 0: the end of a segment.
template <int kFragM, int kFragN>
__device__ __forceinline__ void close_segment(
    float (&total)[kFragM][kFragN][4], float (&acc)[kFragM][kFragN][4]
) {
#pragma unroll
    for (int i = 0; i < kFragM; ++i) {
#pragma unroll
        for (int j = 0; j < kFragN; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                total[i][j][c] = __fadd_rn(total[i][j][c], acc[i][j][c]);
                acc[i][j][c] = 0.0f;
            }
        }
    }
}

template <int kFragments>
__device__ __forceinline__ void add_fragments(
    float (&total)[kFragments][4], const float (&acc)[kFragments][4]
) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            total[j][c] = __fadd_rn(total[j][c], acc[j][c]);
        }
    }
}

// The output tile at (m0, n0); the whole block works on it.
// kTeams > 1: as many teams as the contraction has segments, each takes one; with kSpread they are
// the blocks of a cluster, for products without LoRA. Else one team walks through all of it, and
// with kSegmented adds up segment by segment.
template <
    typename Shape,
    WeightFormat kFormat,
    bool kBackward,
    bool kSegmented,
    int kTeams,
    bool kSpread = false>
__device__ __forceinline__ void multiply_through_tile(
    const MatmulArgs& a, int32_t m0, int32_t n0, char* shared
) {
    constexpr bool kPlain = kFormat == WeightFormat::kBF16;
    static_assert(Shape::kOutputBytes * 2 <= Shape::kSharedBytes || kTeams == 1);
    static_assert(Shape::kOutputBytes <= Shape::kSharedBytes);
    static_assert(!kBackward || Shape::kBytesW >= kColumnBlockBytes);
    constexpr bool kAlone = kTeams == 1 || kSpread;  // in its block
    const int team = kSpread  ? static_cast<int>(block_in_cluster())
                     : kAlone ? 0
                              : static_cast<int>(threadIdx.x) / Shape::kThreads;
    const int32_t k_begin = kTeams == 1 ? 0 : team * a.segment;
    const int32_t length = kTeams == 1 ? a.k : min(a.segment, a.k - k_begin);
    const int32_t steps = (length + kTileK - 1) / kTileK;
    const int32_t segment_steps = a.segment / kTileK;
    char* ring = shared + (kAlone ? 0 : team * Shape::kSharedBytes);
    const uint32_t base = shared_address(ring);
    const auto team_sync = [&] {
        if constexpr (kAlone) {
            __syncthreads();
        } else {
            barrier_sync(1 + team, Shape::kThreads);
        }
    };

    if (!a.releases_late) {
        release_successor();
    }
    TileX<Shape> x(a, m0, k_begin);
    WeightTile<Shape, kFormat, kBackward, 4> w(a, n0, k_begin);
    const FragmentOffsets<Shape, kBackward> at;
    const auto stage_of = [&](int32_t step) {
        return static_cast<uint32_t>(step % Shape::kStages) * Shape::kStageBytes;
    };
    const auto load_x = [&](int32_t step) {
        const int32_t left = length - step * kTileK;
        if (left > 0) {
            x.load(base + stage_of(step), left);
        }
    };
    const auto load_w = [&](int32_t step) {
        if constexpr (kPlain) {
            const int32_t left = length - step * kTileK;
            if (left > 0) {
                w.load(base + stage_of(step) + Shape::kBytesX, left);
            }
        }
    };
    constexpr int kUnrolled = Shape::kStages > 8 ? 1 : Shape::kStages;
    // The weights are constant: their loads need not wait.
#pragma unroll kUnrolled
    for (int s = 0; s < Shape::kStages - 1; ++s) {
        load_w(s);
    }
    if constexpr (!kPlain) {
        start_packed(w, a, length, ring + Shape::kBytesX);
    }
    if (!a.x_is_ready) {
        wait_for_predecessor();
    }
    if (a.releases_late) {
        release_successor();
    }
    if (a.x_flag != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
        set_flag(a.x_flag);
    }
#pragma unroll kUnrolled
    for (int s = 0; s < Shape::kStages - 1; ++s) {
        load_x(s);
        copy_async_commit();  // The first of these groups holds the weights' loads too.
    }

    float acc[Shape::kFragM][Shape::kFragN][4] = {};
    float total[kSegmented ? Shape::kFragM : 1][Shape::kFragN][4] = {};
    const auto run_step = [&](int32_t step, auto next_slot) {
        copy_async_wait<Shape::kStages - 2>();
        team_sync();
        load_x(step + Shape::kStages - 1);
        load_w(step + Shape::kStages - 1);
        copy_async_commit();
        if constexpr (!kPlain) {
            if (step + 1 < steps) {
                char* tile = ring + stage_of(step + 1) + Shape::kBytesX;
                advance_packed<next_slot.value>(w, a, length, step, tile);
            }
        }
        if constexpr (kSegmented) {
            if (step > 0 && step % segment_steps == 0) {
                close_segment(total, acc);
            }
        }
        const uint32_t stage = base + stage_of(step);
        multiply_tile<Shape, kBackward>(acc, at, stage, stage + Shape::kBytesX);
    };
    constexpr int kUnroll = slots_of<decltype(w)>();
    for (int32_t first = 0; first < steps; first += kUnroll) {
        for_slots<kUnroll>([&](auto slot) {
            if (first + slot.value < steps) {
                run_step(
                    first + slot.value, std::integral_constant<int, (slot.value + 1) % kUnroll>{}
                );
            }
        });
    }
    if constexpr (kSegmented) {
        close_segment(total, acc);
    }
    if (a.x_is_ready) {
        wait_for_predecessor();
    }
    team_sync();  // Nobody reads the ring any more; it takes the output now.
    auto* out = reinterpret_cast<float*>(ring);
    const bool has_lora = a.epilogue.lora_u != nullptr;
    if constexpr (kSegmented) {
        stage_output<Shape, kBackward>(a, total, has_lora, out, m0, n0);
    } else {
        stage_output<Shape, kBackward>(a, acc, has_lora && kTeams == 1, out, m0, n0);
    }
    if constexpr (kSpread) {
        cluster_sync();
        if (team == 0) {
            store_output<Shape>(
                a, [&](int t) { return in_block_of_cluster(out, t); }, kTeams, nullptr, m0, n0
            );
        }
        cluster_arrive();  // The first block has used the others' tiles.
        cluster_wait();
        return;
    }
    auto* lora = reinterpret_cast<float*>(shared + Shape::kOutputBytes);
    const bool lora_apart = kTeams > 1 && has_lora;
    if constexpr (kTeams > 1) {
        if (has_lora && team == 0) {
            stage_lora<Shape, kBackward>(a, lora, m0, n0);
        }
    }
    __syncthreads();
    const auto tile_of = [&](int t) {
        return reinterpret_cast<const float*>(shared + t * Shape::kSharedBytes);
    };
    store_output<Shape>(a, tile_of, kTeams, lora_apart ? lora : nullptr, m0, n0);
}

template <
    typename Shape,
    WeightFormat kFormat,
    bool kBackward,
    bool kSegmented,
    int kTeams,
    bool kSpread>
__global__ void __launch_bounds__(Shape::kThreads*(kSpread ? 1 : kTeams))
    matmul_tile_kernel(const __grid_constant__ MatmulGroup group) {
    extern __shared__ __align__(1024) char shared[];
    int32_t block = 0;
    int32_t m0 = 0;
    int32_t n0 = 0;
    const MatmulArgs& a = product_of_block(group, block);
    tile_corner<Shape>(a, kSpread ? block / kTeams : block, m0, n0);
    multiply_through_tile<Shape, kFormat, kBackward, kSegmented, kTeams, kSpread>(
        a, m0, n0, shared
    );
}

// Numbers the blocks of a group's products; returns how many there are.
inline int64_t number_blocks(MatmulGroup& group, int64_t tile_m, int64_t tile_n) {
    int64_t blocks = 0;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        group.first_block[i] = static_cast<int32_t>(blocks);
        blocks += ceil_div(a.m, tile_m) * ceil_div(a.epilogue.columns, tile_n);
        CHECK_LT(blocks, int64_t{1} << 31);
    }
    group.first_block[group.count] = static_cast<int32_t>(blocks);
    return blocks;
}

template <typename Shape, WeightFormat kFormat, bool kBackward, bool kSegmented, int kTeams = 1>
void launch_tile(cudaStream_t queue, MatmulGroup& group) {
    const auto kernel = matmul_tile_kernel<Shape, kFormat, kBackward, kSegmented, kTeams, false>;
    constexpr size_t kShared = size_t{Shape::kSharedBytes} * kTeams;
    allow_shared_memory(kernel, kShared);
    const dim3 grid(grid_dim(number_blocks(group, Shape::kM, Shape::kN)));
    launch_early(kernel, grid, Shape::kThreads * kTeams, kShared, queue, group);
}

// A block for each of kSegments segments.
template <typename Shape, WeightFormat kFormat>
void launch_tile_spread(cudaStream_t queue, MatmulGroup& group) {
    const auto kernel = matmul_tile_kernel<Shape, kFormat, false, false, kSegments, true>;
    allow_shared_memory(kernel, Shape::kSharedBytes);
    const int64_t tiles = number_blocks(group, Shape::kM, Shape::kN);
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        CHECK_EQ(num_segments(a.k, a.segment), kSegments);
        CHECK(a.epilogue.lora_u == nullptr);
        group.first_block[i + 1] *= kSegments;
    }
    const dim3 grid(grid_dim(tiles * kSegments));
    launch_clusters_early(
        kSegments, kernel, grid, Shape::kThreads, Shape::kSharedBytes, queue, group
    );
}

using WideTile = TileShape<128, 128, 2, 4, 4>;
using MediumTile = TileShape<64, 64, 2, 2, 4>;
using NarrowTile = TileShape<64, 32, 2, 2, 4>;
using TinyTile = TileShape<64, 16, 4, 1, 4>;
using NarrowBackwardTile = TileShape<64, 32, 2, 2, 4, 64>;
using BroadTile = TileShape<64, 128, 2, 4, 4>;
// Of LoRA's low-rank side, by blocks that each read little: a deep ring hides the latency.
using SpreadTile = TileShape<32, 16, 2, 1, 16>;

}  // namespace orbit::cuda
