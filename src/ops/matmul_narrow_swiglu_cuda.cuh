// How the member N for INT4 ends in silu(gate) up (MatmulGroup::swiglu). Where gate and up have one
// input, a warp group has rows of both; where each has its own (swiglu_apart()), the two blocks of
// a cluster do, and the result may be rotated for the next layer.
#pragma once

#include "device/cuda/math.cuh"
#include "device/cuda/quad.cuh"
#include "ops/matmul_narrow_cuda.cuh"
#include "ops/oft_cuda.cuh"

namespace orbit::cuda {

constexpr int kSwigluRows = kNarrowRows / 2;  // of gate, and of up, of a warp group

// silu(gate) up of a warp group's rows from row0 on, gate in the tile's first kSwigluRows columns.
template <int kTokens>
__device__ __forceinline__ void store_swiglu_tile(
    const MatmulGroup& products, const float* tile, int32_t row0
) {
    const MatmulArgs& gate = products.args[0];
    const float* const bias[2] = {gate.epilogue.bias, products.args[1].epilogue.bias};
    constexpr int kEights = kSwigluRows / 8;
    for (int i = static_cast<int>(threadIdx.x) % 128; i < kTokens * kEights; i += 128) {
        const int32_t m = i / kEights;
        const int column = i % kEights * 8;
        const int32_t n = row0 + column;
        if (m >= gate.m || n >= gate.n) {
            continue;
        }
        float v[2][8];
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            load_eight(v[p], tile + m * NarrowRoom<8>::kStride + p * kSwigluRows + column);
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                const float added =
                    bias[p] == nullptr ? v[p][c] : __fadd_rn(v[p][c], bias[p][n + c]);
                v[p][c] = to_float(round_bf16(added));
            }
        }
        uint32_t pair[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            pair[c] = pack_bf16(
                swiglu_of(v[0][2 * c], v[1][2 * c]), swiglu_of(v[0][2 * c + 1], v[1][2 * c + 1])
            );
        }
        bf16* y = products.swiglu + static_cast<int64_t>(m) * gate.n + n;
        *reinterpret_cast<uint4*>(y) = uint4{pair[0], pair[1], pair[2], pair[3]};
    }
}

// Shared memory of a warp group where gate and up are apart: the sums for the other block, then
// silu(gate) up of the tokens that this one ends, and D of the group's rows.
template <int kTokens>
struct SwigluApartRoom {
    static constexpr int kFragments = kTokens / 8;
    static constexpr int kEnded = kFragments / 2;  // by one block
    static constexpr int kRowBytes = kNarrowRows * 2 + 16;
    static constexpr int kTile = 4 * kFragments * 32 * static_cast<int>(sizeof(float4));
    static constexpr int kRotations = kTile + kEnded * 8 * kRowBytes;
    static constexpr int kBytes = kRotations + kNarrowRows * kRotationRowBytes;
};

// silu(gate) up of a warp's rows from row0 on and the tokens from fragment `first` on that the
// block ends, to the group's tile.
template <int kTokens>
__device__ __forceinline__ void put_swiglu(
    const MatmulGroup& products, int32_t row0, int first, const float4* sums, char* tile
) {
    using Room = SwigluApartRoom<kTokens>;
    const int lane = static_cast<int>(threadIdx.x) & 31;
    const int32_t row = static_cast<int>(threadIdx.x) / 32 % 4 * kDecodeRows + lane / 4;
    float4 parts[2][Room::kEnded];
    float bias[2][2] = {};
#pragma unroll
    for (int p = 0; p < 2; ++p) {
        const float4* of_block = in_block_of_cluster(sums + 32 * first + lane, p);
        const float* all = products.args[p].epilogue.bias;
#pragma unroll
        for (int t = 0; t < Room::kEnded; ++t) {
            parts[p][t] = of_block[32 * t];
        }
        if (all != nullptr) {
            const int32_t n = products.args[p].n;
            bias[p][0] = all[min(row0 + row, n - 1)];
            bias[p][1] = all[min(row0 + row + 8, n - 1)];
        }
    }
#pragma unroll
    for (int t = 0; t < Room::kEnded; ++t) {
        float v[2][4];
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            const float4& four = parts[p][t];
            const float sum[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Epilogue& e = products.args[p].epilogue;
                const float scaled = __fmul_rn(sum[i], e.scale);
                const float added = e.bias == nullptr ? scaled : __fadd_rn(scaled, bias[p][i / 2]);
                v[p][i] = to_float(round_bf16(added));
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = 8 * t + 2 * (lane & 3) + i % 2;
            auto* of_token = reinterpret_cast<bf16*>(tile + token * Room::kRowBytes);
            of_token[row + 8 * (i / 2)] = round_bf16(swiglu_of(v[0][i], v[1][i]));
        }
    }
}

// The tile's tokens, of which the first is m0, rotated to y.
template <int kTokens>
__device__ __forceinline__ void store_rotated_tile(
    const MatmulGroup& products, int32_t row0, int32_t m0, const char* tile, uint32_t rotations
) {
    using Room = SwigluApartRoom<kTokens>;
    const int32_t n = products.args[0].n;
    const int lane = static_cast<int>(threadIdx.x) & 31;
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
    constexpr int kAcross = kNarrowRows / kFusedRotation;
    constexpr int kItems = Room::kEnded / 2 * kAcross;  // of 16 tokens and a block of D
    for (int item = warp; item < kItems; item += 4) {
        const int token0 = item / kAcross * 16;
        const int column0 = item % kAcross * kFusedRotation;
        if (row0 + column0 >= n) {
            continue;
        }
        uint32_t x[2][4];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            const int at = (token0 + (lane & 15)) * Room::kRowBytes +
                           (column0 + 16 * step + (lane >> 4) * 8) * 2;
            ldmatrix_x4(x[step][0], x[step][1], x[step][2], x[step][3], shared_address(tile + at));
        }
        float acc[kRotationFragments][4];
#pragma unroll
        for (int t = 0; t < kRotationFragments; ++t) {
            multiply_rotation(acc[t], x, rotations, column0, t);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t pairs[4];
#pragma unroll
            for (int t = 0; t < 4; ++t) {  // as the M side has them
                pairs[t] =
                    add_rotated(x[t / 2][t % 2 * 2 + half], acc[t][2 * half], acc[t][2 * half + 1]);
            }
            transpose_quad(pairs);
            const int32_t m = m0 + token0 + lane / 4 + 8 * half;
            if (m < products.args[0].m) {
                bf16* y = products.swiglu + static_cast<int64_t>(m) * n + row0 + column0;
                *reinterpret_cast<uint4*>(y + 8 * (lane & 3)) =
                    uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
            }
        }
    }
}

// The end of a warp group's 64 rows where gate and up are apart; acc: of this block's product.
template <int kTokens>
__device__ __forceinline__ void store_swiglu_apart(
    const MatmulGroup& products, int32_t row0, const float (&acc)[kTokens / 8][4], char* room
) {
    using Room = SwigluApartRoom<kTokens>;
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const int lane = thread & 31;
    const int warp = thread / 32;
    const MatmulArgs& gate = products.args[0];
    const int first = static_cast<int>(block_in_cluster()) * Room::kEnded;
    char* tile = room + Room::kTile;
    const uint32_t rotations = shared_address(room + Room::kRotations);
    if (products.swiglu_d != nullptr) {
        const bf16* from = products.swiglu_d + static_cast<int64_t>(row0) * kFusedRotation;
        copy_rotations(rotations, from, min(kNarrowRows, gate.n - row0), thread, 128);
        copy_async_commit();
    }
    auto* sums = reinterpret_cast<float4*>(room) + warp * Room::kFragments * 32;
#pragma unroll
    for (int j = 0; j < Room::kFragments; ++j) {
        sums[32 * j + lane] = float4{acc[j][0], acc[j][1], acc[j][2], acc[j][3]};
    }
    cluster_sync();
    put_swiglu<kTokens>(products, row0, first, sums, tile);
    copy_async_wait<0>();
    wait_for_group();
    if (products.swiglu_d != nullptr) {
        store_rotated_tile<kTokens>(products, row0, first * 8, tile, rotations);
    } else {
        for (int i = thread; i < Room::kEnded * 8 * 8; i += 128) {
            const int32_t m = first * 8 + i / 8;
            const int32_t n = row0 + i % 8 * 8;
            if (m < gate.m && n < gate.n) {
                *reinterpret_cast<uint4*>(products.swiglu + static_cast<int64_t>(m) * gate.n + n) =
                    *reinterpret_cast<const uint4*>(tile + i / 8 * Room::kRowBytes + i % 8 * 16);
            }
        }
    }
    cluster_arrive();  // This block has used the other one's sums.
    cluster_wait();
}

}  // namespace orbit::cuda
