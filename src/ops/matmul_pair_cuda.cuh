// Pieces of the members that multiply by pairs of thread blocks on Hopper (matmul_tma_cuda.cu,
// matmul_cluster_cuda.cu). The blocks of a pair lie one above the other: each has a tile of 128
// rows and shares its half of the weight's tile with the other. One thread keeps a ring of stages
// full with tensor copies, and two warp groups of 64 rows each multiply what is there.
#pragma once

#include "device/cuda/check.cuh"
#include "device/cuda/math.cuh"
#include "device/cuda/quad.cuh"
#include "device/cuda/tma.cuh"
#include "device/cuda/wgmma.cuh"
#include "ops/matmul_tile_cuda.cuh"

namespace orbit::cuda {

constexpr int kPair = 2;         // blocks
constexpr int kMultipliers = 2;  // warp groups that multiply
constexpr int kTileM = 128;      // rows of a block's tile

// A block's tile, and the bytes of a stage: 64 of the contraction.
template <int kTileN>
struct PairBytes {
    static constexpr int kN = kTileN;
    static constexpr int kFragN = kN / 8;
    static constexpr int kBytesX = kTileM * kTileK * 2;
    static constexpr int kBytesW = kN * kTileK * 2;
};

// Pairs are neighbours in their cluster.
__device__ __forceinline__ int32_t half_of_pair() {
    return static_cast<int32_t>(block_in_cluster() % kPair);
}

// The stages, and two barriers for each: `filled` when its bytes are there, `freed` when all warps
// have read it, those of the other blocks too that get what this block brings.
template <typename Tile>
struct Ring {
    uint32_t base;  // shared address
    int32_t stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ explicit Ring(const char* shared) : base(shared_address(shared)) {}

    __device__ __forceinline__ uint32_t x() const { return base + stage * Tile::kStageBytes; }

    __device__ __forceinline__ uint32_t w() const { return x() + Tile::kBytesX; }

    __device__ __forceinline__ uint32_t filled(int32_t at) const {
        return base + Tile::kStages * Tile::kStageBytes + 16 * at;
    }

    __device__ __forceinline__ uint32_t freed(int32_t at) const { return filled(at) + 8; }

    // `readers`: blocks whose warps free a stage.
    __device__ __forceinline__ void init(uint32_t readers) const {
        for (int32_t at = 0; at < Tile::kStages; ++at) {
            mbarrier_init(filled(at), 1);
            mbarrier_init(freed(at), readers * kMultipliers * 4);
        }
        mbarrier_init_fence();
    }

    __device__ __forceinline__ void advance() {
        stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
        phase ^= stage == 0 ? 1 : 0;
    }

    __device__ __forceinline__ void wait_filled() const { mbarrier_wait(filled(stage), phase); }

    __device__ __forceinline__ void wait_freed() const { mbarrier_wait(freed(stage), phase ^ 1); }
};

// A pair's tiles: of which product, and where this block's one lies.
struct Place {
    int32_t product;
    int32_t m0;
    int32_t n0;
};

template <typename Tile>
__device__ __forceinline__ Place place_of(const MatmulGroup& group, int32_t pair) {
    Place place{0, 0, 0};
    while (place.product + 1 < group.count && pair >= group.first_block[place.product + 1]) {
        ++place.product;
    }
    const MatmulArgs& a = group.args[place.product];
    int32_t tile_m = 0;
    int32_t tile_n = 0;
    tile_of_block(
        pair - group.first_block[place.product],
        (a.m + kPair * kTileM - 1) / (kPair * kTileM),
        (a.epilogue.columns + Tile::kN - 1) / Tile::kN,
        tile_m,
        tile_n
    );
    place.m0 = (kPair * tile_m + half_of_pair()) * kTileM;
    place.n0 = tile_n * Tile::kN;
    return place;
}

// This block's half of a stage's tile of the weight, to both blocks of the pair, of which `first`
// is the first in the cluster.
template <typename Tile, bool kBackward>
__device__ __forceinline__ void share_weight(
    const Ring<Tile>& ring, const CUtensorMap& w, int32_t n0, int32_t k, uint32_t first
) {
    const auto both = static_cast<uint16_t>(3u << first);
    const uint32_t filled = ring.filled(ring.stage);
    const int32_t half = half_of_pair();
    if constexpr (kBackward) {
        constexpr int32_t kRows = kTileK / kPair;
#pragma unroll
        for (int32_t column = 0; column < Tile::kN; column += 64) {
            const uint32_t to = ring.w() + column / 64 * kColumnBlockBytes + half * kRows * 128;
            copy_box_to_blocks(to, w, k + half * kRows, n0 + column, filled, both);
        }
    } else {
        constexpr int32_t kRows = Tile::kN / kPair;
        const uint32_t to = ring.w() + half * kRows * 128;
        copy_box_to_blocks(to, w, n0 + half * kRows, k, filled, both);
    }
}

// acc (+)= 64 rows of x . columns [column, column + kN) of the weight, k16 step `step` of a stage.
template <typename Tile, bool kBackward, int kN>
__device__ __forceinline__ void issue_step(
    float (&acc)[kN / 8][4], const Ring<Tile>& ring, int warpgroup, int column, int step, int add
) {
    const uint64_t a = descriptor_along_k(ring.x() + warpgroup * 64 * 128);
    // Offsets in units of 16 bytes; the address is the lowest field.
    if constexpr (kBackward) {
        const uint64_t b =
            descriptor_across_k(ring.w() + column / 64 * kColumnBlockBytes, kColumnBlockBytes);
        wgmma_shared<kN, true>(acc, a + 2 * step, b + 128 * step, add);
    } else {
        const uint64_t b = descriptor_along_k(ring.w() + column * 128);
        wgmma_shared<kN>(acc, a + 2 * step, b + 2 * step, add);
    }
}

// What a lane loads and stores of its warp's 16 rows: eight columns of rows `row` and `row + 8`, of
// each 32 columns.
struct LaneRows {
    int64_t at[2];  // of the first eight, in y and residual
    bool inside[2];
    int32_t column;  // of the first eight
    int32_t columns;

    __device__ __forceinline__ LaneRows(const MatmulArgs& a, int32_t m, int32_t n0)
        : column(n0 + 8 * static_cast<int32_t>(threadIdx.x & 3)), columns(a.epilogue.columns) {
        const int32_t row = m + static_cast<int32_t>((threadIdx.x & 31) >> 2);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            at[i] = static_cast<int64_t>(row + 8 * i) * a.epilogue.ldy + column;
            inside[i] = row + 8 * i < a.m;
        }
    }

    __device__ __forceinline__ bool has(int i, int group) const {
        return inside[i] && column + 32 * group < columns;
    }
};

// Groups of 32 columns of the residual, from `first` on.
template <int kCount>
__device__ __forceinline__ void load_residual(
    uint4 (&to)[kCount][2], const Epilogue& e, const LaneRows& rows, int first
) {
    if (e.residual == nullptr) {
        return;
    }
#pragma unroll
    for (int g = 0; g < kCount; ++g) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            to[g][i] = uint4{0, 0, 0, 0};
            if (rows.has(i, first + g)) {
                to[g][i] =
                    *reinterpret_cast<const uint4*>(e.residual + rows.at[i] + 32 * (first + g));
            }
        }
    }
}

// Bias of a fragment's two columns of this lane.
__device__ __forceinline__ void add_bias(float (&v)[4], const MatmulArgs& a, int32_t n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const int32_t at = n + 2 * static_cast<int32_t>(threadIdx.x & 3) + (c & 1);
        v[c] = at < a.n ? __fadd_rn(v[c], a.epilogue.bias[at]) : v[c];
    }
}

// 32 columns of this warp's rows to a bf16 y: bias, residual, one rounding.
__device__ __forceinline__ void store_group(
    const MatmulArgs& a, float (*v)[4], const uint4 (&residual)[2], const LaneRows& rows, int group
) {
    const Epilogue& e = a.epilogue;
    if (e.bias != nullptr) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int32_t first = rows.column - 8 * static_cast<int32_t>(threadIdx.x & 3);
            add_bias(v[j], a, first + 32 * group + 8 * j);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (e.residual != nullptr) {
            uint32_t words[4] = {residual[i].x, residual[i].y, residual[i].z, residual[i].w};
            transpose_quad(words);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                v[j][2 * i] = __fadd_rn(v[j][2 * i], low_bf16(words[j]));
                v[j][2 * i + 1] = __fadd_rn(v[j][2 * i + 1], high_bf16(words[j]));
            }
        }
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            words[j] = pack_bf16(v[j][2 * i], v[j][2 * i + 1]);
        }
        transpose_quad(words);
        if (rows.has(i, group)) {
            *reinterpret_cast<uint4*>(static_cast<bf16*>(e.y) + rows.at[i] + 32 * group) =
                uint4{words[0], words[1], words[2], words[3]};
        }
    }
}

// One by one: any shape.
template <int kFragN>
__device__ __forceinline__ void store_elements(
    const MatmulArgs& a, const float (*v)[4], int32_t m, int32_t n0
) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < kFragN; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int32_t row = m + (lane >> 2) + 8 * (c >> 1);
            if (row < a.m) {
                finish_one(a.epilogue, v[j][c], row, n0 + 8 * j + 2 * (lane & 3) + (c & 1), a.n);
            }
        }
    }
}

}  // namespace orbit::cuda
