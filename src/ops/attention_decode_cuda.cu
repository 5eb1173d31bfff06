// One thread block a row and KV head (attention_decode_cuda.cuh), and which kernel a batch takes.
#include "device/cuda/check.cuh"
#include "ops/attention_decode_cuda.cuh"

namespace orbit::cuda {
namespace {

using namespace single_row;

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

template <int kHeadDim>
void launch(cudaStream_t queue, const AttentionArgs& a, bool only_short, int32_t max_positions) {
    constexpr int kBytes = BlockShared<kHeadDim>::kBytes;
    if (!only_short) {
        const int64_t rows = std::min<int64_t>(a.num_tokens, int64_t{kShortRows} * a.num_sequences);
        launch_rows(queue, attention_decode_kernel<kHeadDim, false>, a, rows, 1, kBytes);
    } else if (!launch_spread<kHeadDim>(queue, a, max_positions)) {
        launch_rows(queue, attention_decode_kernel<kHeadDim, true>, a, a.num_tokens, 1, kBytes);
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
