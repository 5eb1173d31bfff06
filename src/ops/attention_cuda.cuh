// The arithmetic of one attention row, shared by the prefill kernels and the decode kernel so that
// a row gets the same bits from all: KV tiles of 128 keys at absolute positions, ascending; scores
// by mma.sync.m16n8k16 along the head width, weights 2^((s - m) c) with m the running maximum,
// always rescaled; the sum of a tile in the order of join_blocks(); weights rounded to bf16 and
// multiplied with V in k16 steps of keys, ascending. Hopper's wgmma gives the bits of mma.sync, in
// the same fragments.
//
// A tile of keys that are all masked leaves a row's state exactly as it was (factor 1, zeros
// added), so it does not matter which of them a kernel visits.
#pragma once

#include "device/cuda/check.cuh"
#include "device/cuda/math.cuh"
#include "device/cuda/mma.cuh"
#include "ops/attention.h"

namespace orbit::cuda {

constexpr int kKeyTile = 128;
constexpr int kShortRows = 15;  // sequences of up to that many rows go to the decode kernel
constexpr int kKeyBlock = 32;   // keys whose weights are summed together first
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kRing = 3;  // key and value tiles in turn: K0 V0 K1 V1 ...

template <int kHeadDim>
struct Tile {
    static constexpr int kBytes = kKeyTile * kHeadDim * 2;
};

struct AttentionArgs {
    const bf16* q;  // [T, heads, head_dim]
    const bf16* k_pages;
    const bf16* v_pages;
    const int32_t* positions;
    const int32_t* sequence_of;
    const int32_t* sequence_begin;
    const int32_t* sequence_position;
    const int32_t* block_table;
    bf16* o;
    float* lse;         // or null
    const bf16* oft_d;  // the rotation of o, where decode_rotates(); or null
    int32_t num_tokens;
    int32_t num_sequences;
    int32_t max_blocks;
    int32_t heads;
    int32_t kv_heads;
    float scale;
    float scale_log2;  // scale * log2(e)
};

__device__ __forceinline__ float negative_infinity() {
    return __uint_as_float(0xff800000u);
}

__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, 1));
    return fmaxf(v, __shfl_xor_sync(kFullWarp, v, 2));
}

__device__ __forceinline__ float quad_sum(float v) {
    v = __fadd_rn(v, __shfl_xor_sync(kFullWarp, v, 1));
    return __fadd_rn(v, __shfl_xor_sync(kFullWarp, v, 2));
}

// The running state of one row in one lane: maximum, and the lane's share of the sum (keys 2q and
// 2q + 1 of every eight); the shares meet once, at the end.
struct SoftmaxRow {
    float max = negative_infinity();
    float sum = 0.0f;
    float base = 0.0f;  // max * scale_log2, rounded: what weights are formed against

    // Takes a tile's maximum in; returns the factor for everything accumulated so far.
    __device__ __forceinline__ float raise(float tile_max, float scale_log2) {
        const float next = fmaxf(max, tile_max);
        // A row with nothing visible yet (padding) keeps a finite base.
        const float finite = next == negative_infinity() ? 0.0f : next;
        const float factor = exp2_sfu(__fmul_rn(__fsub_rn(max, finite), scale_log2));
        max = next;
        base = __fmul_rn(finite, scale_log2);
        return factor;
    }

    __device__ __forceinline__ float weight(float score, float scale_log2) const {
        return exp2_sfu(__fmaf_rn(score, scale_log2, -base));
    }

    __device__ __forceinline__ void add(float factor, float tile_sum) {
        sum = __fmaf_rn(sum, factor, tile_sum);
    }

    __device__ __forceinline__ float total() const { return quad_sum(sum); }
};

// Sum of a lane's four block sums of a tile.
__device__ __forceinline__ float join_blocks(float b0, float b1, float b2, float b3) {
    return __fadd_rn(__fadd_rn(__fadd_rn(b0, b1), b2), b3);
}

__device__ __forceinline__ float log_sum_exp(float max, float sum, float scale) {
    return __fadd_rn(__fmul_rn(max, scale), log_f32(sum));
}

// Hides the keys of a tile that the lane's rows g and g + 8 must not see.
__device__ __forceinline__ void mask_scores(
    float (&s)[kKeyTile / 8][4], const int32_t (&position)[2], int32_t tile
) {
    const int32_t key0 = tile * kKeyTile + 2 * static_cast<int32_t>(threadIdx.x & 3);
    if (tile * kKeyTile + kKeyTile - 1 <= min(position[0], position[1])) {
        return;
    }
#pragma unroll
    for (int j = 0; j < kKeyTile / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            if (key0 + 8 * j + (c & 1) > position[c >> 1]) {
                s[j][c] = negative_infinity();
            }
        }
    }
}

// Turns the scores of a tile into weights and takes them into the rows; the factors are for what
// has been accumulated so far.
__device__ __forceinline__ void soften(
    float (&s)[kKeyTile / 8][4], SoftmaxRow (&row)[2], float (&factor)[2], float scale_log2
) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float max = negative_infinity();
#pragma unroll
        for (int j = 0; j < kKeyTile / 8; ++j) {
            max = fmaxf(max, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
        }
        factor[i] = row[i].raise(quad_max(max), scale_log2);
        float block[4];
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            block[b] = 0.0f;
#pragma unroll
            for (int j = 4 * b; j < 4 * b + 4; ++j) {
                s[j][2 * i] = row[i].weight(s[j][2 * i], scale_log2);
                s[j][2 * i + 1] = row[i].weight(s[j][2 * i + 1], scale_log2);
                block[b] = __fadd_rn(__fadd_rn(block[b], s[j][2 * i]), s[j][2 * i + 1]);
            }
        }
        row[i].add(factor[i], join_blocks(block[0], block[1], block[2], block[3]));
    }
}

template <int kFragments>
__device__ __forceinline__ void rescale(float (&o)[kFragments][4], const float (&factor)[2]) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            o[j][c] = __fmul_rn(o[j][c], factor[c >> 1]);
        }
    }
}

// Two neighbouring fragments of a result, rounded: a fragment of the A operand of the next product.
__device__ __forceinline__ void pack_fragments(
    uint32_t (&p)[4], const float (&low)[4], const float (&high)[4]
) {
    p[0] = pack_bf16(low[0], low[1]);
    p[1] = pack_bf16(low[2], low[3]);
    p[2] = pack_bf16(high[0], high[1]);
    p[3] = pack_bf16(high[2], high[3]);
}

// Writes a lane's rows g and g + 8; head_row[i] < 0 for padding.
template <int kHeadDim>
__device__ __forceinline__ void store_rows(
    const AttentionArgs& a,
    const float (&o)[kHeadDim / 8][4],
    const SoftmaxRow (&row)[2],
    const int64_t (&head_row)[2]
) {
    const int quad = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float total = row[i].total();
        const float inverse = __frcp_rn(total);
        if (head_row[i] >= 0) {
            bf16* out = a.o + head_row[i] * kHeadDim + 2 * quad;
#pragma unroll
            for (int j = 0; j < kHeadDim / 8; ++j) {
                *reinterpret_cast<uint32_t*>(out + 8 * j) =
                    pack_bf16(__fmul_rn(o[j][2 * i], inverse), __fmul_rn(o[j][2 * i + 1], inverse));
            }
            if (a.lse != nullptr && quad == 0) {
                a.lse[head_row[i]] = log_sum_exp(row[i].max, total, a.scale);
            }
        }
    }
}

// Byte of a 16-byte granule (eight channels) of a row. A tile of kRows rows is kept 64 channels at
// a time: rows of 128 bytes, their granules permuted by the row's number in its group of eight,
// which is the 128-byte swizzle of wgmma and keeps ldmatrix free of bank conflicts.
template <int kRows>
__device__ __forceinline__ uint32_t tile_offset(int row, int granule) {
    return static_cast<uint32_t>(
        (granule >> 3) * (kRows * 128) + row * 128 + (((granule & 7) ^ (row & 7)) << 4)
    );
}

// s[j] = q . k for keys 8j.. of `key0` on: kFragments groups of eight keys (an even number) out of
// a tile of kRows.
template <int kRows, int kHeadDim, int kFragments>
__device__ __forceinline__ void score_keys(
    float (&s)[kFragments][4], const uint32_t (&q)[kHeadDim / 16][4], uint32_t k_tile, int key0
) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            s[j][c] = 0.0f;
        }
    }
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
#pragma unroll
        for (int j = 0; j < kFragments; j += 2) {
            uint32_t b[4];
            const int row = key0 + 8 * j + (lane & 7) + ((lane >> 4) << 3);
            ldmatrix_x4(
                b[0],
                b[1],
                b[2],
                b[3],
                k_tile + tile_offset<kRows>(row, 2 * step + ((lane >> 3) & 1))
            );
            mma_16816(s[j], q[step], b[0], b[1]);
            mma_16816(s[j + 1], q[step], b[2], b[3]);
        }
    }
}

// o += p v over 16 keys from `key` on out of a tile of kRows, channels of granule0 * 8 on.
template <int kRows, int kFragments>
__device__ __forceinline__ void weigh_values(
    float (&o)[kFragments][4], const uint32_t (&p)[4], uint32_t v_tile, int key, int granule0
) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < kFragments; j += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(
            b[0],
            b[1],
            b[2],
            b[3],
            v_tile + tile_offset<kRows>(key + (lane & 15), granule0 + j + (lane >> 4))
        );
        mma_16816(o[j], p, b[0], b[1]);
        mma_16816(o[j + 1], p, b[2], b[3]);
    }
}

// Fragments of 16 query rows straight from memory: lane rows g and g + 8, null for padding rows.
template <int kHeadDim>
__device__ __forceinline__ void load_query(
    uint32_t (&q)[kHeadDim / 16][4], const bf16* row_low, const bf16* row_high
) {
    const int q2 = 2 * (threadIdx.x & 3);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
        const int at = 16 * step + q2;
        const auto pair = [](const bf16* row, int col) {
            return row == nullptr ? 0u : *reinterpret_cast<const uint32_t*>(row + col);
        };
        q[step][0] = pair(row_low, at);
        q[step][1] = pair(row_high, at);
        q[step][2] = pair(row_low, at + 8);
        q[step][3] = pair(row_high, at + 8);
    }
}

// The eight page numbers of a key tile, one in each of lanes 0-7 (and copies above).
__device__ __forceinline__ int32_t
tile_pages(const AttentionArgs& a, int32_t sequence, int32_t tile, int32_t last_key) {
    constexpr int kPages = kKeyTile / kPageTokens;
    const int32_t block = tile * kPages + static_cast<int32_t>(threadIdx.x & (kPages - 1));
    return block * kPageTokens <= last_key
               ? a.block_table[static_cast<int64_t>(sequence) * a.max_blocks + block]
               : 0;
}

// Copies a tile of keys or values of one KV head; rows past last_key become zeros. All lanes call.
template <int kHeadDim, int kThreads>
__device__ __forceinline__ void load_key_tile(
    const AttentionArgs& a,
    uint32_t to,
    const bf16* pages,
    int32_t page_ids,
    int32_t kv_head,
    int32_t tile,
    int32_t last_key
) {
    constexpr int kRowGranules = kHeadDim / 8;
    constexpr int kRowsPerPass = kThreads / kRowGranules;
    static_assert(kRowsPerPass % 8 == 0);
    const int granule = static_cast<int>(threadIdx.x) % kRowGranules;
    const int first_row = static_cast<int>(threadIdx.x) / kRowGranules;
    const int32_t page_values = a.kv_heads * kPageTokens * kHeadDim;
    const bf16* from = pages + kv_head * kPageTokens * kHeadDim + granule * 8;
    to += tile_offset<kKeyTile>(first_row, granule);
#pragma unroll
    for (int pass = 0; pass < (kKeyTile + kRowsPerPass - 1) / kRowsPerPass; ++pass) {
        const int row = pass * kRowsPerPass + first_row;
        const int32_t page = __shfl_sync(kFullWarp, page_ids, row / kPageTokens);
        if (kKeyTile % kRowsPerPass != 0 && row >= kKeyTile) {
            continue;
        }
        // Page 0 stands in for pages past last_key, so the address is legal, read or not.
        const int64_t at = static_cast<int64_t>(page) * page_values + row % kPageTokens * kHeadDim;
        const bool valid = tile * kKeyTile + row <= last_key;
        copy_async_16(to + pass * kRowsPerPass * 128, from + at, valid);
    }
}

// Copies rows [row0, row0 + kRows) of one head of a tensor [T, heads, kHeadDim] into a tile; rows
// from `end` on become zeros.
template <int kHeadDim, int kRows, int kThreads>
__device__ __forceinline__ void load_rows(
    uint32_t to, const bf16* from, int32_t heads, int32_t head, int32_t row0, int32_t end
) {
    constexpr int kRowGranules = kHeadDim / 8;
    constexpr int kRowsPerPass = kThreads / kRowGranules;
    static_assert(kRows % kRowsPerPass == 0 && kRowsPerPass % 8 == 0);
    const int granule = static_cast<int>(threadIdx.x) % kRowGranules;
    const int32_t row = row0 + static_cast<int32_t>(threadIdx.x) / kRowGranules;
    const bf16* at = from + (static_cast<int64_t>(row) * heads + head) * kHeadDim + granule * 8;
    to += tile_offset<kRows>(row - row0, granule);
#pragma unroll
    for (int pass = 0; pass < kRows / kRowsPerPass; ++pass) {
        const bool valid = row + pass * kRowsPerPass < end;
        copy_async_16(to + pass * kRowsPerPass * 128, valid ? at : from, valid);
        at += heads * kRowsPerPass * kHeadDim;
    }
}

struct SequenceSlot {
    int32_t sequence;  // -1: past the end
    int32_t offset;    // index inside the sequence's share
};

// The sequence that unit `index` belongs to when sequence s has count(length of s) units; all lanes
// of a warp work together and get the answer.
template <typename Count>
__device__ __forceinline__ SequenceSlot
locate(const int32_t* sequence_begin, int32_t num_sequences, int32_t index, Count count) {
    const int lane = threadIdx.x & 31;
    int32_t before = 0;
    for (int32_t first = 0; first < num_sequences; first += 32) {
        const int32_t s = first + lane;
        const int32_t units =
            s < num_sequences ? count(sequence_begin[s + 1] - sequence_begin[s]) : 0;
        int32_t up_to = units;
#pragma unroll
        for (int d = 1; d < 32; d <<= 1) {
            const int32_t other = __shfl_up_sync(kFullWarp, up_to, d);
            up_to += lane >= d ? other : 0;
        }
        const unsigned beyond = __ballot_sync(kFullWarp, before + up_to > index);
        if (beyond != 0) {
            const int found = __ffs(static_cast<int>(beyond)) - 1;
            const int32_t start = __shfl_sync(kFullWarp, before + up_to - units, found);
            return SequenceSlot{first + found, index - start};
        }
        before += __shfl_sync(kFullWarp, up_to, 31);
    }
    return SequenceSlot{-1, 0};
}

// Whether launch_decode() can rotate o by an OFT adapter's blocks of this size.
bool decode_rotates(const AttentionArgs& a, int64_t head_dim, int64_t block);

// The rows of short sequences (`only_short`: all of the batch's, one each). max_positions: more
// than any position of the batch.
void launch_decode(
    cudaStream_t queue,
    const AttentionArgs& a,
    int64_t head_dim,
    bool only_short,
    int32_t max_positions
);

// The prefill kernel for Hopper; head_dim is 64 or 128. `pages`: how many there are.
void launch_prefill_wgmma(Stream& stream, const AttentionArgs& a, int64_t head_dim, int64_t pages);

}  // namespace orbit::cuda
