// A cluster of thread blocks a row and KV head (attention_decode_cuda.cuh).
//
// The cluster goes through the context in rounds of eight tiles, or sixteen. Block c scores and
// weighs tile c of the round (and tile c + 8), whole, and takes the other blocks' weights from
// their shared memory; then it weighs d/8 channels of all of the round's values. Scores of a key,
// and sums of a channel, do not know who else is worked on beside them, and every block raises the
// rows' maxima over the tiles in ascending order, so the bits are those of one block.
#include "device/cuda/check.cuh"
#include "ops/attention_decode_cuda.cuh"

namespace orbit::cuda {
namespace {

using namespace single_row;

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

// Clusters are for batches that leave the GPU idle otherwise: those whose blocks, so many on a
// multiprocessor, all run at once. `tiles`: the context has more than that.
template <int kHeadDim, int kOwn>
bool launch_rounds(
    cudaStream_t queue, const AttentionArgs& a, int64_t at_once, int tiles, int32_t max_positions
) {
    constexpr int kBytes = SpreadShared<kHeadDim, kOwn>::kBytes;
    const int64_t blocks = a.num_tokens * a.kv_heads * head_groups(a) * kSpread;
    if (max_positions <= tiles * kKeyTile || !overlaps_launches() ||
        kBytes > shared_memory_limit() || blocks > at_once * device_limits().multiprocessors) {
        return false;
    }
    const auto kernel = attention_spread_kernel<kHeadDim, kOwn>;
    launch_rows(queue, kernel, a, a.num_tokens, kSpread, kBytes);
    return true;
}

}  // namespace

template <int kHeadDim>
bool single_row::launch_spread(cudaStream_t queue, const AttentionArgs& a, int32_t max_positions) {
    return launch_rounds<kHeadDim, 2>(queue, a, 1, kSpread, max_positions) ||
           launch_rounds<kHeadDim, 1>(queue, a, 2, 1, max_positions);
}

template bool single_row::launch_spread<64>(cudaStream_t, const AttentionArgs&, int32_t);
template bool single_row::launch_spread<128>(cudaStream_t, const AttentionArgs&, int32_t);

}  // namespace orbit::cuda
