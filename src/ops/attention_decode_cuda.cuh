// Attention of single query rows: decode steps, and the rows of short chunks. One thread block
// takes a row and a KV head (attention_decode_cuda.cu); where that leaves most of the GPU idle, a
// cluster of eight does (attention_spread_cuda.cu). Both give the bits of the prefill kernels. Here
// is what they share.
//
// Where every sequence has one row, the kernels before them in the queue have written its last key
// and value and nothing else: the batch's numbers and all other keys and values are those of
// earlier forwards, which something that kernels do not overtake (a copy, advance_decode) parts
// from this one. The first tiles are therefore loaded before the wait, but for the last.
#pragma once

#include "device/cuda/tma.cuh"
#include "ops/attention_cuda.cuh"
#include "ops/matmul_cuda.cuh"
#include "ops/oft_cuda.cuh"

namespace orbit::cuda::single_row {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16;  // query heads of a KV head, padded
static_assert(kWarps * kKeyBlock == kKeyTile);

// The weights of a tile, the A operand of the product with its values: bf16 [kRows][128 + 8].
constexpr int kWeightRow = kKeyTile * 2 + 16;  // bytes, padded
constexpr int kWeightTile = kRows * kWeightRow;

// What the warps of a block tell each other about a tile; warp w has keys 32w...
struct TileParts {
    float max[kRows][kWarps];
    float4 sum[kWarps][kRows];  // of the four lanes of a quad
};

// The work of a block, or of a cluster.
struct DecodeRow {
    int32_t sequence;
    int32_t kv_head;
    int32_t num_rows;  // query heads
    int32_t head;      // the first of them
    int64_t head_row;  // the same in [T * heads]
    int32_t last_key;
    int32_t tiles;
};

__device__ __forceinline__ DecodeRow
decode_row(const AttentionArgs& a, int32_t sequence, int32_t token) {
    const int32_t group = a.heads / a.kv_heads;
    const int32_t first = static_cast<int32_t>(blockIdx.z) * kRows;
    DecodeRow d;
    d.sequence = sequence;
    d.kv_head = static_cast<int32_t>(blockIdx.y);
    d.num_rows = min(kRows, group - first);
    d.head = d.kv_head * group + first;
    d.head_row = static_cast<int64_t>(token) * a.heads + d.head;
    d.last_key = a.positions[token];
    d.tiles = d.last_key / kKeyTile + 1;
    return d;
}

template <int kHeadDim>
__device__ __forceinline__ void load_heads(
    uint32_t (&q)[kHeadDim / 16][4], const AttentionArgs& a, const DecodeRow& d
) {
    const int g = static_cast<int>(threadIdx.x & 31) >> 2;
    load_query<kHeadDim>(
        q,
        g < d.num_rows ? a.q + (d.head_row + g) * kHeadDim : nullptr,
        g + 8 < d.num_rows ? a.q + (d.head_row + g + 8) * kHeadDim : nullptr
    );
}

// The warp's 32 keys of a tile: scores, and each row's maximum to the parts.
template <int kHeadDim>
__device__ __forceinline__ void score_block(
    float (&s)[4][4],
    const uint32_t (&q)[kHeadDim / 16][4],
    uint32_t k_tile,
    int32_t tile,
    int32_t last_key,
    TileParts& parts
) {
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int quad = lane & 3;
    score_keys<kKeyTile, kHeadDim>(s, q, k_tile, kKeyBlock * warp);
    const int32_t key0 = tile * kKeyTile + kKeyBlock * warp + 2 * quad;
    float max[2] = {negative_infinity(), negative_infinity()};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            s[j][c] = key0 + 8 * j + (c & 1) <= last_key ? s[j][c] : negative_infinity();
            max[c >> 1] = fmaxf(max[c >> 1], s[j][c]);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        max[i] = quad_max(max[i]);
        if (quad == 0) {
            parts.max[(lane >> 2) + 8 * i][warp] = max[i];
        }
    }
}

__device__ __forceinline__ float max_of(float4 m) {
    return fmaxf(fmaxf(m.x, m.y), fmaxf(m.z, m.w));
}

// The warp's scores become weights: rounded to the tile, their sums to the parts.
__device__ __forceinline__ void weigh_block(
    const float (&s)[4][4],
    const SoftmaxRow (&row)[2],
    float scale_log2,
    char* weights,
    TileParts& parts
) {
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int quad = lane & 3;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int r = (lane >> 2) + 8 * i;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float p0 = row[i].weight(s[j][2 * i], scale_log2);
            const float p1 = row[i].weight(s[j][2 * i + 1], scale_log2);
            sum = __fadd_rn(__fadd_rn(sum, p0), p1);
            *reinterpret_cast<uint32_t*>(
                weights + r * kWeightRow + (kKeyBlock * warp + 8 * j + 2 * quad) * 2
            ) = pack_bf16(p0, p1);
        }
        reinterpret_cast<float*>(&parts.sum[warp][r])[quad] = sum;
    }
}

// Keys 16 * step.. of a tile of weights.
__device__ __forceinline__ void load_weights(uint32_t (&p)[4], uint32_t tile, int step) {
    const int lane = threadIdx.x & 31;
    ldmatrix_x4(
        p[0],
        p[1],
        p[2],
        p[3],
        tile + static_cast<uint32_t>((lane & 15) * kWeightRow + (2 * step + (lane >> 4)) * 16)
    );
}

// Rows g and g + 8 divided by their sums and rounded.
template <int kFragments>
__device__ __forceinline__ void finish_rows(
    const float (&o)[kFragments][4], const SoftmaxRow (&row)[2], uint32_t (&pairs)[2][kFragments]
) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float inverse = __frcp_rn(row[i].total());
#pragma unroll
        for (int j = 0; j < kFragments; ++j) {
            pairs[i][j] =
                pack_bf16(__fmul_rn(o[j][2 * i], inverse), __fmul_rn(o[j][2 * i + 1], inverse));
        }
    }
}

// Writes the lane's rows, channels channel0.. of the head; whoever has channel 0 writes the
// log-sum-exp.
template <int kHeadDim, int kFragments>
__device__ __forceinline__ void store_channels(
    const AttentionArgs& a,
    const DecodeRow& d,
    const uint32_t (&pairs)[2][kFragments],
    const SoftmaxRow (&row)[2],
    int channel0
) {
    const int lane = threadIdx.x & 31;
    const int quad = lane & 3;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int r = (lane >> 2) + 8 * i;
        const float total = row[i].total();
        if (r < d.num_rows) {
            bf16* out = a.o + (d.head_row + r) * kHeadDim + channel0 + 2 * quad;
#pragma unroll
            for (int j = 0; j < kFragments; ++j) {
                *reinterpret_cast<uint32_t*>(out + 8 * j) = pairs[i][j];
            }
            if (a.lse != nullptr && channel0 == 0 && quad == 0) {
                a.lse[d.head_row + r] = log_sum_exp(row[i].max, total, a.scale);
            }
        }
    }
}

// ---- the rotation of o by an OFT adapter --------------------------------------------------------
//
// Every head has blocks of its own, so each of a warp's rows is multiplied with one block after the
// other, and kept from its own.

constexpr int kWideHead = 128;  // channels of heads that are rotated here
constexpr int kFusedHeads = 8;  // of a KV head, at most: rows g

// Adds to row g, of which `pairs` has kTiles fragments, those of its product with head g's block.
// `multiply`: gives a fragment of all rows' product with a head's block.
template <int kTiles, typename Multiply>
__device__ __forceinline__ void rotate_heads(
    int32_t heads, const Multiply& multiply, uint32_t (&pairs)[kTiles]
) {
    const int g = static_cast<int>(threadIdx.x & 31) >> 2;
    float v[kTiles][2] = {};
#pragma unroll 1
    for (int32_t head = 0; head < heads; ++head) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            float acc[4];
            multiply(acc, head, t);
            v[t][0] = head == g ? acc[0] : v[t][0];
            v[t][1] = head == g ? acc[1] : v[t][1];
        }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        pairs[t] = add_rotated(pairs[t], v[t][0], v[t][1]);
    }
}

// ---- host ---------------------------------------------------------------------------------------

inline int64_t head_groups(const AttentionArgs& a) {  // of a KV head, of up to kRows
    return ceil_div(a.heads / a.kv_heads, kRows);
}

// `cluster` blocks for each of `rows` rows, KV heads and their groups of query heads.
template <typename Kernel>
void launch_rows(
    cudaStream_t queue,
    Kernel* kernel,
    const AttentionArgs& a,
    int64_t rows,
    unsigned cluster,
    size_t shared_bytes
) {
    allow_shared_memory(kernel, shared_bytes);
    const dim3 grid(grid_dim(rows * cluster), grid_dim_yz(a.kv_heads), grid_dim_yz(head_groups(a)));
    launch_clusters_early(cluster, kernel, grid, kThreads, shared_bytes, queue, a);
}

// Sequences of one row each by clusters. False: too many of them, or contexts too short to pay.
template <int kHeadDim>
bool launch_spread(cudaStream_t queue, const AttentionArgs& a, int32_t max_positions);

}  // namespace orbit::cuda::single_row
