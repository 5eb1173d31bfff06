// Attention of single query rows: decode steps, and the rows of short chunks. One thread block
// takes a row and a KV head; where that leaves most of the GPU idle, a cluster of eight does. Both
// give the bits of the prefill kernels.
//
// Where every sequence has one row, the kernels before them in the queue have written its last key
// and value and nothing else: the batch's numbers and all other keys and values are those of
// earlier forwards, which something that kernels do not overtake (a copy, advance_decode) parts
// from this one. The first tiles are therefore loaded before the wait, but for the last.
#include "device/cuda/tma.cuh"
#include "ops/attention_cuda.cuh"
#include "ops/matmul_cuda.cuh"
#include "ops/oft_cuda.cuh"

namespace orbit::cuda {
namespace {

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

// ---- one thread block a row and KV head ---------------------------------------------------------

template <int kHeadDim>
struct BlockShared {
    static constexpr int kWeights = kRing * Tile<kHeadDim>::kBytes;
    static constexpr int kParts = kWeights + kWeightTile;
    static constexpr int kBytes = kParts + static_cast<int>(sizeof(TileParts));
};

// D of four heads in the room of a tile.
constexpr int kHeadsOfTile = 4;
static_assert(kHeadsOfTile * kWideHead * kRotationRowBytes == Tile<kWideHead>::kBytes);

// Heads [first, first + kHeadsOfTile) of the block's, as far as they exist.
__device__ __forceinline__ void load_rotations(
    const AttentionArgs& a, const DecodeRow& d, uint32_t to, int32_t first
) {
    const int32_t rows = min(kHeadsOfTile, d.num_rows - first) * kWideHead;
    const bf16* from = a.oft_d + static_cast<int64_t>(d.head + first) * kWideHead * kFusedRotation;
    copy_rotations(to, from, rows, static_cast<int>(threadIdx.x), kThreads);
}

// The warp's 32 channels of the block's heads, whose D the ring has from item `item` on.
__device__ __forceinline__ void rotate_channels(
    const DecodeRow& d, uint32_t ring, int32_t item, uint32_t (&pairs)[2][kRotationFragments]
) {
    uint32_t x[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        x[i / 4][i % 4] = pairs[i % 2][i / 2];
    }
    const int channel = static_cast<int>(threadIdx.x) / 32 * kFusedRotation;
    const auto multiply = [&](float(&acc)[4], int32_t head, int t) {
        const uint32_t tile = ring + (item + head / kHeadsOfTile) % kRing * Tile<kWideHead>::kBytes;
        multiply_rotation(acc, x, tile, head % kHeadsOfTile * kWideHead + channel, t);
    };
    rotate_heads(d.num_rows, multiply, pairs[0]);
}

// Warp w scores keys 32w.. of a tile and weighs channels w d/4.. of its values. `waits`: the kernel
// has not waited for its predecessor yet.
template <int kHeadDim>
__device__ __forceinline__ void attend(
    const AttentionArgs& a, char* shared, int32_t sequence, int32_t token, bool waits
) {
    using Shared = BlockShared<kHeadDim>;
    constexpr int kChannels = kHeadDim / kWarps;
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int g = lane >> 2;
    const DecodeRow d = decode_row(a, sequence, token);
    const uint32_t ring = shared_address(shared);
    char* weights = shared + Shared::kWeights;
    auto& parts = *reinterpret_cast<TileParts*>(shared + Shared::kParts);

    const auto load_item = [&](int32_t item, int32_t page_ids) {
        const int32_t tile = item >> 1;
        if (tile < d.tiles) {
            load_key_tile<kHeadDim, kThreads>(
                a,
                ring + item % kRing * Tile<kHeadDim>::kBytes,
                (item & 1) == 0 ? a.k_pages : a.v_pages,
                page_ids,
                d.kv_head,
                tile,
                d.last_key
            );
        } else if (kHeadDim == kWideHead && a.oft_d != nullptr && tile == d.tiles) {
            const uint32_t to = ring + item % kRing * Tile<kHeadDim>::kBytes;
            load_rotations(a, d, to, (item & 1) * kHeadsOfTile);
        }
        copy_async_commit();
    };
    int32_t pages = tile_pages(a, sequence, 0, d.last_key);
    if (waits && d.tiles == 1) {
        wait_for_predecessor();
    }
    load_item(0, pages);
    load_item(1, pages);
    if (waits && d.tiles > 1) {
        wait_for_predecessor();
    }
    pages = tile_pages(a, sequence, 1, d.last_key);

    uint32_t q[kHeadDim / 16][4];
    load_heads<kHeadDim>(q, a, d);
    SoftmaxRow row[2];
    float o[kChannels / 8][4] = {};
    for (int32_t tile = 0; tile < d.tiles; ++tile) {
        const int32_t next_pages = tile_pages(a, sequence, tile + 2, d.last_key);
        copy_async_wait<1>();
        __syncthreads();  // Keys of this tile are there; the last tile's values are done with.
        load_item(2 * tile + 2, pages);
        const uint32_t k_tile = ring + 2 * tile % kRing * Tile<kHeadDim>::kBytes;
        const uint32_t v_tile = ring + (2 * tile + 1) % kRing * Tile<kHeadDim>::kBytes;
        float s[4][4];
        score_block<kHeadDim>(s, q, k_tile, tile, d.last_key, parts);
        __syncthreads();  // Maxima are there; the keys are done with.
        load_item(2 * tile + 3, pages);
        pages = next_pages;
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto m = *reinterpret_cast<const float4*>(parts.max[g + 8 * i]);
            factor[i] = row[i].raise(max_of(m), a.scale_log2);
        }
        weigh_block(s, row, a.scale_log2, weights, parts);
        copy_async_wait<2>();
        __syncthreads();  // Weights, sums and values are there.
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto* sums =
                reinterpret_cast<const float*>(&parts.sum[0][g + 8 * i]) + (lane & 3);
            row[i].add(
                factor[i], join_blocks(sums[0], sums[4 * kRows], sums[8 * kRows], sums[12 * kRows])
            );
        }
        rescale(o, factor);
#pragma unroll
        for (int step = 0; step < kKeyTile / 16; ++step) {
            uint32_t p[4];
            load_weights(p, shared_address(weights), step);
            weigh_values<kKeyTile>(o, p, v_tile, 16 * step, warp * kChannels / 8);
        }
    }
    uint32_t pairs[2][kChannels / 8];
    finish_rows(o, row, pairs);
    if constexpr (kHeadDim == kWideHead) {
        if (a.oft_d != nullptr) {
            copy_async_wait<0>();
            __syncthreads();  // D is there.
            rotate_channels(d, ring, 2 * d.tiles, pairs);
        }
    }
    store_channels<kHeadDim>(a, d, pairs, row, warp * kChannels);
}

// kOnlyShort: every sequence of the batch has one row.
template <int kHeadDim, bool kOnlyShort>
__global__ void __launch_bounds__(kThreads) attention_decode_kernel(AttentionArgs a) {
    extern __shared__ __align__(1024) char shared[];
    release_successor();
    int32_t token = static_cast<int32_t>(blockIdx.x);
    int32_t sequence = 0;
    if constexpr (kOnlyShort) {
        sequence = a.sequence_of[token];
    } else {
        wait_for_predecessor();
        const SequenceSlot slot =
            locate(a.sequence_begin, a.num_sequences, token, [](int32_t length) {
                return length <= kShortRows ? length : 0;
            });
        if (slot.sequence < 0) {
            return;
        }
        sequence = slot.sequence;
        token = a.sequence_begin[sequence] + slot.offset;
    }
    attend<kHeadDim>(a, shared, sequence, token, kOnlyShort);
}

// ---- a cluster of blocks a row and KV head ------------------------------------------------------
//
// The cluster goes through the context in rounds of eight tiles, or sixteen. Block c scores and
// weighs tile c of the round (and tile c + 8), whole, and takes the other blocks' weights from
// their shared memory; then it weighs d/8 channels of all of the round's values. Scores of a key,
// and sums of a channel, do not know who else is worked on beside them, and every block raises the
// rows' maxima over the tiles in ascending order, so the bits are those of one block.

constexpr int kSpread = 8;                   // blocks of a cluster
static_assert(kThreads == kSpread * kRows);  // a thread fetches the parts of a tile and row

// kOwn: tiles of a block in a round.
template <int kHeadDim, int kOwn>
struct SpreadShared {
    static constexpr int kTiles = kSpread * kOwn;  // of a round
    static constexpr int kKeys = kTiles * kKeyTile;
    static constexpr int kChannels = kHeadDim / kSpread;
    static constexpr int kValues =
        kOwn * Tile<kHeadDim>::kBytes;  // after the block's tiles of keys
    static constexpr int kWeights = kValues + kKeys * kChannels * 2;
    static constexpr int kParts = kWeights + kTiles * kWeightTile;  // of the block's tiles
    static constexpr int kSum = kParts + kOwn * static_cast<int>(sizeof(TileParts));
    static constexpr int kMax = kSum + kTiles * kRows * static_cast<int>(sizeof(float4));
    // The heads' 32 channels that a pair of blocks has.
    static constexpr int kPair = kMax + kTiles * kRows * static_cast<int>(sizeof(float));
    static constexpr int kPairRow = kFusedRotation * 2 + 16;  // bytes, padded
    static constexpr int kBytes = kPair + kFusedHeads * kPairRow;
};

// 16 bytes at an address of this block's shared memory, out of that of block `block`.
__device__ __forceinline__ uint4 load_from_block(uint32_t address, int32_t block) {
    uint4 v{};
#if __CUDA_ARCH__ >= 900
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(block));
    asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(remote)
                 : "memory");
#endif
    return v;
}

__device__ __forceinline__ float4 load_floats_from_block(const void* at, int32_t block) {
    const uint4 v = load_from_block(shared_address(at), block);
    return float4{
        __uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

// Byte of granule `granule` of a key's d/8 channels. Rows of 32 bytes swap their granules every
// four rows, which keeps ldmatrix free of bank conflicts.
template <int kHeadDim>
__device__ __forceinline__ uint32_t slice_offset(int row, int granule) {
    constexpr int kGranules = kHeadDim / kSpread / 8;
    static_assert(kGranules <= 2);
    const int place = kGranules == 2 ? granule ^ ((row >> 2) & 1) : granule;
    return static_cast<uint32_t>((row * kGranules + place) * 16);
}

// Copies channels block d/8.. of the values of tiles [begin, end) of the round that starts with
// tile `first`; rows past last_key become zeros.
template <int kHeadDim>
__device__ __forceinline__ void load_value_slice(
    const AttentionArgs& a,
    const DecodeRow& d,
    uint32_t to,
    int32_t first,
    int32_t begin,
    int32_t end,
    int32_t block
) {
    constexpr int kGranules = kHeadDim / kSpread / 8;
    constexpr int kRowsPerPass = kThreads / kGranules;
    constexpr int kPart = 32 * kPageTokens;  // keys whose pages a warp knows, a lane each
    static_assert(
        kSpread * kKeyTile % kPart == 0 && kPart % kRowsPerPass == 0 && kKeyTile % kRowsPerPass == 0
    );
    constexpr int kTilesOfPart = kPart / kKeyTile;
    const int granule = static_cast<int>(threadIdx.x) % kGranules;
    const int32_t page_values = a.kv_heads * kPageTokens * kHeadDim;
    const bf16* from =
        a.v_pages + d.kv_head * kPageTokens * kHeadDim + block * (kHeadDim / kSpread) + granule * 8;
#pragma unroll 1
    for (int32_t tile0 = begin / kTilesOfPart * kTilesOfPart; tile0 < end; tile0 += kTilesOfPart) {
        const int32_t page = (first + tile0) * (kKeyTile / kPageTokens) + (threadIdx.x & 31);
        const int32_t page_id =
            page * kPageTokens <= d.last_key
                ? a.block_table[static_cast<int64_t>(d.sequence) * a.max_blocks + page]
                : 0;
#pragma unroll
        for (int pass = 0; pass < kPart / kRowsPerPass; ++pass) {
            const int32_t tile = tile0 + pass * kRowsPerPass / kKeyTile;
            if (tile < begin || tile >= end) {
                continue;
            }
            const int32_t in_part = pass * kRowsPerPass + threadIdx.x / kGranules;
            const int32_t row = tile0 * kKeyTile + in_part;
            const int32_t of_page = __shfl_sync(kFullWarp, page_id, in_part / kPageTokens);
            const int64_t at =
                static_cast<int64_t>(of_page) * page_values + row % kPageTokens * kHeadDim;
            const bool valid = first * kKeyTile + row <= d.last_key;
            copy_async_16(to + slice_offset<kHeadDim>(row, granule), from + at, valid);
        }
    }
}

// Copies the weights of the round's other tiles out of the blocks that have made them. The rows of
// padding stay what they are: they lead to rows that nobody stores.
template <int kOwn>
__device__ __forceinline__ void gather_weights(
    char* weights, int32_t num_rows, int32_t count, int32_t block
) {
    const int granule = threadIdx.x & 15;
    const auto place = [&](int tile, int row) {
        return weights + tile * kWeightTile + row * kWeightRow + granule * 16;
    };
    const auto is_elsewhere = [&](int tile) { return tile < count && tile % kSpread != block; };
#pragma unroll
    for (int first = 0; first < kSpread * kOwn; first += kSpread) {
        for (int row = static_cast<int>(threadIdx.x >> 4); row < num_rows; row += kThreads / 16) {
            uint4 granules[kSpread]{};
#pragma unroll
            for (int t = 0; t < kSpread; ++t) {
                if (is_elsewhere(first + t)) {
                    granules[t] = load_from_block(shared_address(place(first + t, row)), t);
                }
            }
#pragma unroll
            for (int t = 0; t < kSpread; ++t) {
                if (is_elsewhere(first + t)) {
                    *reinterpret_cast<uint4*>(place(first + t, row)) = granules[t];
                }
            }
        }
    }
}

// o += p v over a tile: eight channels of the slice, granule `granule`.
template <int kHeadDim>
__device__ __forceinline__ void weigh_slice(
    float (&o)[1][4], uint32_t weights, uint32_t values, int tile, int granule
) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int step = 0; step < kKeyTile / 16; step += 2) {
        uint32_t b[4];
        const int key = tile * kKeyTile + 16 * step + lane;
        ldmatrix_x4_trans(b[0], b[1], b[2], b[3], values + slice_offset<kHeadDim>(key, granule));
        uint32_t p[4];
        load_weights(p, weights + static_cast<uint32_t>(tile * kWeightTile), step);
        mma_16816(o[0], p, b[0], b[1]);
        load_weights(p, weights + static_cast<uint32_t>(tile * kWeightTile), step + 1);
        mma_16816(o[0], p, b[2], b[3]);
    }
}

// D of the 32 channels that the block's pair has, of all heads.
__device__ __forceinline__ void load_pair_rotations(
    const AttentionArgs& a, const DecodeRow& d, uint32_t to, int32_t block
) {
    for (int32_t head = 0; head < d.num_rows; ++head) {
        const int64_t channel = (d.head + head) * kWideHead + block / 2 * kFusedRotation;
        copy_rotations(
            to + head * kFusedRotation * kRotationRowBytes,
            a.oft_d + channel * kFusedRotation,
            kFusedRotation,
            static_cast<int>(threadIdx.x),
            kThreads
        );
    }
}

// Row g of the block's eight channels to both blocks of the pair.
template <int kRowBytes>
__device__ __forceinline__ void send_to_pair(
    char* pair, int32_t block, int warp, int32_t num_rows, uint32_t value
) {
    const int lane = threadIdx.x & 31;
    const int channel = block % 2 * (kFusedRotation / 2) + 8 * warp + 2 * (lane & 3);
    auto* own = reinterpret_cast<uint32_t*>(pair + (lane >> 2) * kRowBytes + channel * 2);
    if (lane >> 2 < num_rows) {
        *own = value;
        *const_cast<uint32_t*>(in_block_of_cluster(own, block ^ 1)) = value;
    }
}

// The warp's eight channels of row g, in `value`.
template <int kRowBytes>
__device__ __forceinline__ void rotate_slice(
    const DecodeRow& d,
    uint32_t pair,
    uint32_t rotations,
    int32_t block,
    int warp,
    uint32_t (&value)[1]
) {
    const int lane = threadIdx.x & 31;
    uint32_t x[2][4];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
        const int at = (lane & 7) * kRowBytes + (2 * step + (lane >> 4)) * 16;  // rows twice
        ldmatrix_x4(x[step][0], x[step][1], x[step][2], x[step][3], pair + at);
    }
    const auto multiply = [&](float(&acc)[4], int32_t head, int) {
        multiply_rotation(acc, x, rotations, head * kFusedRotation, block % 2 * 2 + warp);
    };
    rotate_heads(d.num_rows, multiply, value);
}

template <int kHeadDim, int kOwn>
__global__ void __launch_bounds__(kThreads) attention_spread_kernel(AttentionArgs a) {
    using Shared = SpreadShared<kHeadDim, kOwn>;
    extern __shared__ __align__(1024) char shared[];
    release_successor();
    const auto block = static_cast<int32_t>(block_in_cluster());
    const auto token = static_cast<int32_t>(blockIdx.x) / kSpread;
    const DecodeRow d = decode_row(a, a.sequence_of[token], token);
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int g = lane >> 2;
    const uint32_t keys = shared_address(shared);
    const uint32_t values = keys + Shared::kValues;
    char* weights = shared + Shared::kWeights;
    auto* parts = reinterpret_cast<TileParts*>(shared + Shared::kParts);  // [kOwn]
    auto* tile_sum = reinterpret_cast<float4*>(shared + Shared::kSum);    // [kTiles][kRows]
    auto* tile_max = reinterpret_cast<float*>(shared + Shared::kMax);     // [kTiles][kRows]
    const int part_tile = static_cast<int>(threadIdx.x) / kRows;
    const int part_row = static_cast<int>(threadIdx.x) % kRows;

    // Of the round that starts with tile `first`, the tiles in [begin, end).
    const auto load_keys = [&](int32_t first, int32_t begin, int32_t end) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const int32_t tile = first + block + kSpread * i;
            if (tile >= begin && tile < end) {
                const int32_t pages = tile_pages(a, d.sequence, tile, d.last_key);
                load_key_tile<kHeadDim, kThreads>(
                    a,
                    keys + i * Tile<kHeadDim>::kBytes,
                    a.k_pages,
                    pages,
                    d.kv_head,
                    tile,
                    d.last_key
                );
            }
        }
        copy_async_commit();
    };
    const auto load_values = [&](int32_t first, int32_t begin, int32_t end) {
        if (first < d.tiles) {
            load_value_slice<kHeadDim>(
                a, d, values, first, begin - first, min(end - first, Shared::kTiles), block
            );
        }
        copy_async_commit();
    };
    const bool rotates = kHeadDim == kWideHead && a.oft_d != nullptr;
    const int32_t old = d.tiles - 1;  // tiles that no kernel under way writes to
    load_keys(0, 0, old);
    load_values(0, 0, old);
    wait_for_predecessor();
    load_keys(0, old, d.tiles);
    load_values(0, old, d.tiles);
    uint32_t q[kHeadDim / 16][4];
    load_heads<kHeadDim>(q, a, d);
    SoftmaxRow row[2];
    float o[1][4] = {};
    for (int32_t first = 0; first < d.tiles; first += Shared::kTiles) {
        const int32_t count = min(Shared::kTiles, d.tiles - first);
        const int32_t next = first + Shared::kTiles;
        copy_async_wait<1>();
        __syncthreads();  // Keys are there.
        float s[kOwn][4][4];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const int tile = block + kSpread * i;
            if (tile < count) {
                const uint32_t of_tile = keys + i * Tile<kHeadDim>::kBytes;
                score_block<kHeadDim>(s[i], q, of_tile, first + tile, d.last_key, parts[i]);
            }
        }
        cluster_sync();  // All blocks' maxima are there; the keys are done with.
        if (rotates && next >= d.tiles) {
            load_pair_rotations(a, d, keys, block);
        }
        load_keys(next, next, d.tiles);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            if (part_tile + kSpread * i < count) {
                tile_max[threadIdx.x + kThreads * i] =
                    max_of(load_floats_from_block(parts[i].max[part_row], part_tile));
            }
        }
        __syncthreads();
        SoftmaxRow reached[2] = {row[0], row[1]};
        int raised = 0;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const int tile = block + kSpread * i;
            if (tile < count) {
                for (; raised <= tile; ++raised) {
                    reached[0].raise(tile_max[raised * kRows + g], a.scale_log2);
                    reached[1].raise(tile_max[raised * kRows + g + 8], a.scale_log2);
                }
                weigh_block(s[i], reached, a.scale_log2, weights + tile * kWeightTile, parts[i]);
            }
        }
        cluster_sync();  // All blocks' weights and sums are there.
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            if (part_tile + kSpread * i < count) {
                float4 sums[kWarps];
#pragma unroll
                for (int w = 0; w < kWarps; ++w) {
                    sums[w] = load_floats_from_block(&parts[i].sum[w][part_row], part_tile);
                }
                tile_sum[threadIdx.x + kThreads * i] = float4{
                    join_blocks(sums[0].x, sums[1].x, sums[2].x, sums[3].x),
                    join_blocks(sums[0].y, sums[1].y, sums[2].y, sums[3].y),
                    join_blocks(sums[0].z, sums[1].z, sums[2].z, sums[3].z),
                    join_blocks(sums[0].w, sums[1].w, sums[2].w, sums[3].w)};
            }
        }
        gather_weights<kOwn>(weights, d.num_rows, count, block);
        copy_async_wait<1>();
        __syncthreads();  // Weights, sums and values are there.
        for (int t = 0; t < count; ++t) {
            float factor[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int at = t * kRows + g + 8 * i;
                factor[i] = row[i].raise(tile_max[at], a.scale_log2);
                row[i].add(factor[i], reinterpret_cast<const float*>(&tile_sum[at])[lane & 3]);
            }
            rescale(o, factor);
            if (warp < Shared::kChannels / 8) {
                weigh_slice<kHeadDim>(o, shared_address(weights), values, t, warp);
            }
        }
        __syncthreads();  // The values are done with.
        load_values(next, next, d.tiles);
    }
    const bool stores = warp < Shared::kChannels / 8;
    const int channel0 = block * Shared::kChannels + 8 * warp;
    uint32_t pairs[2][1];
    if (stores) {
        finish_rows(o, row, pairs);
        if (rotates) {
            char* pair = shared + Shared::kPair;
            send_to_pair<Shared::kPairRow>(pair, block, warp, d.num_rows, pairs[0][0]);
        } else {
            store_channels<kHeadDim>(a, d, pairs, row, channel0);
        }
    }
    copy_async_wait<0>();
    cluster_sync();  // D and the pair's channels are there. Nobody reads others' weights any more.
    if (rotates && stores) {
        const uint32_t pair = keys + Shared::kPair;
        rotate_slice<Shared::kPairRow>(d, pair, keys, block, warp, pairs[0]);
        store_channels<kHeadDim>(a, d, pairs, row, channel0);
    }
}

// ---- host ---------------------------------------------------------------------------------------

// Clusters are for batches that leave the GPU idle otherwise: those whose blocks, so many on a
// multiprocessor, all run at once. `tiles`: the context has more than that.
bool spreads(
    int64_t units, int64_t shared_bytes, int64_t at_once, int tiles, int32_t max_positions
) {
    if (max_positions <= tiles * kKeyTile || !overlaps_launches() ||
        shared_bytes > shared_memory_limit()) {
        return false;
    }
    return units * kSpread <= at_once * device_limits().multiprocessors;
}

template <int kHeadDim>
void launch(cudaStream_t queue, const AttentionArgs& a, bool only_short, int32_t max_positions) {
    const int64_t groups = ceil_div(a.heads / a.kv_heads, kRows);
    const unsigned grid_y = grid_dim_yz(a.kv_heads);
    const unsigned grid_z = grid_dim_yz(groups);
    const auto run = [&](auto kernel, int64_t rows, unsigned cluster, size_t shared_bytes) {
        allow_shared_memory(kernel, shared_bytes);
        const dim3 grid(grid_dim(rows * cluster), grid_y, grid_z);
        launch_clusters_early(cluster, kernel, grid, kThreads, shared_bytes, queue, a);
    };
    constexpr int kBytes = BlockShared<kHeadDim>::kBytes;
    constexpr int kSpreadBytes = SpreadShared<kHeadDim, 1>::kBytes;
    constexpr int kDeepBytes = SpreadShared<kHeadDim, 2>::kBytes;
    const int64_t units = a.num_tokens * a.kv_heads * groups;
    if (!only_short) {
        const int64_t rows = std::min<int64_t>(a.num_tokens, int64_t{kShortRows} * a.num_sequences);
        run(attention_decode_kernel<kHeadDim, false>, rows, 1, kBytes);
    } else if (spreads(units, kDeepBytes, 1, kSpread, max_positions)) {
        run(attention_spread_kernel<kHeadDim, 2>, a.num_tokens, kSpread, kDeepBytes);
    } else if (spreads(units, kSpreadBytes, 2, 1, max_positions)) {
        run(attention_spread_kernel<kHeadDim, 1>, a.num_tokens, kSpread, kSpreadBytes);
    } else {
        run(attention_decode_kernel<kHeadDim, true>, a.num_tokens, 1, kBytes);
    }
}

}  // namespace

bool decode_rotates(const AttentionArgs& a, int64_t head_dim, int64_t block) {
    return a.num_tokens == a.num_sequences && head_dim == kWideHead && block == kFusedRotation &&
           a.heads / a.kv_heads <= kFusedHeads;
}

void launch_decode(
    cudaStream_t queue,
    const AttentionArgs& a,
    int64_t head_dim,
    bool only_short,
    int32_t max_positions
) {
    if (head_dim == 64) {
        launch<64>(queue, a, only_short, max_positions);
    } else {
        launch<128>(queue, a, only_short, max_positions);
    }
}

}  // namespace orbit::cuda
