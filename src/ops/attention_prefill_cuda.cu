// Attention forward of long sequences on Hopper: kGroups groups of four warps, 64 query rows each,
// share tiles of 128 keys. While the matrix unit adds the values of one tile to the output, the
// scores of the next, multiplied just before, become weights. The arithmetic of a row, and so its
// bits, are those of attention_cuda.cuh.
#include "ops/attention_wgmma_cuda.cuh"

namespace orbit::cuda {
namespace {

// Bytes of shared memory: the query rows, two key tiles, two value tiles.
template <int kHeadDim, int kGroups>
struct PrefillShared {
    static constexpr int kRows = 64 * kGroups;
    static constexpr int kTileBytes = kKeyTile * kHeadDim * 2;
    static constexpr int kKeys = kRows * kHeadDim * 2;
    static constexpr int kValues = kKeys + 2 * kTileBytes;
    static constexpr int kBytes = kValues + 2 * kTileBytes;
};

template <int kRows>
__device__ __forceinline__ SequenceSlot locate_rows(const AttentionArgs& a, int32_t index) {
    return locate(a.sequence_begin, a.num_sequences, index, [](int32_t length) {
        return length > kShortRows ? (length + kRows - 1) / kRows : 0;
    });
}

template <int kHeadDim, int kGroups>
__global__ void __launch_bounds__(128 * kGroups, 1) prefill_wgmma_kernel(AttentionArgs a) {
    extern __shared__ __align__(1024) char shared[];
    using Shared = PrefillShared<kHeadDim, kGroups>;
    constexpr int kRows = Shared::kRows;
    constexpr int kThreads = 128 * kGroups;
    const auto head = static_cast<int32_t>(blockIdx.x);
    const int32_t kv_head = head / (a.heads / a.kv_heads);
    const SequenceSlot slot =
        locate_rows<kRows>(a, static_cast<int32_t>(gridDim.y - 1 - blockIdx.y));
    if (slot.sequence < 0) {
        return;
    }
    const int32_t begin = a.sequence_begin[slot.sequence];
    const int32_t length = a.sequence_begin[slot.sequence + 1] - begin;
    const int32_t position0 = a.sequence_position[slot.sequence];
    const int32_t row0 = slot.offset * kRows;
    const int32_t last_key = position0 + min(length, row0 + kRows) - 1;
    const int32_t tiles = last_key / kKeyTile + 1;
    // Tiles that rows of this group see; a group of padding takes one, and a row whose keys are all
    // hidden stays finite.
    const int group = warp_group();
    const int32_t group_row0 = row0 + 64 * group;
    const int32_t group_tiles =
        group_row0 < length ? (position0 + min(length, group_row0 + 64) - 1) / kKeyTile + 1 : 1;

    const uint32_t q_rows = shared_address(shared);
    const auto k_tile = [&](int32_t tile) {
        return q_rows + Shared::kKeys + (tile & 1) * Shared::kTileBytes;
    };
    const auto v_tile = [&](int32_t tile) {
        return q_rows + Shared::kValues + (tile & 1) * Shared::kTileBytes;
    };
    const auto load = [&](const bf16* pages, uint32_t to, int32_t page_ids, int32_t tile) {
        if (tile < tiles) {
            load_key_tile<kHeadDim, kThreads>(a, to, pages, page_ids, kv_head, tile, last_key);
        }
    };
    int32_t v_pages = tile_pages(a, slot.sequence, 0, last_key);
    int32_t k_pages = tile_pages(a, slot.sequence, 1, last_key);
    // Step t waits for keys t and values t - 1; behind its barrier it starts loading the next of
    // each over keys t - 1 and values t - 2, which every group has done with.
    const auto load_next = [&](int32_t tile) {
        const int32_t next_pages = tile_pages(a, slot.sequence, tile + 2, last_key);
        load(a.k_pages, k_tile(tile + 1), k_pages, tile + 1);
        load(a.v_pages, v_tile(tile), v_pages, tile);
        copy_async_commit();
        v_pages = k_pages;
        k_pages = next_pages;
    };

    load_rows<kHeadDim, kRows, kThreads>(q_rows, a.q, a.heads, head, begin + row0, begin + length);
    load(a.k_pages, k_tile(0), v_pages, 0);
    copy_async_commit();

    int32_t position[2];  // of rows g and g + 8; -1 for padding
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const auto lane_row =
            static_cast<int32_t>((threadIdx.x >> 5) * 16 + (threadIdx.x & 31) / 4);
        const int32_t row_index = row0 + lane_row + 8 * i;
        position[i] = row_index < length ? position0 + row_index : -1;
    }

    const uint32_t q_group = q_rows + group * 64 * 128;
    SoftmaxRow row[2];
    float factor[2];
    float o[kHeadDim / 8][4] = {};
    float s[kKeyTile / 8][4];
    uint32_t p[kKeyTile / 16][4];
    wait_for_tiles<kThreads>();
    wgmma_begin();
    start_scores<kHeadDim, kRows, kKeyTile>(s, q_group, k_tile(0));
    load_next(0);
    wgmma_wait<0>();
    pin_registers(s);
    mask_scores(s, position, 0);
    soften(s, row, factor, a.scale_log2);  // o is zero: nothing to rescale
    pack_tile<kKeyTile>(p, s);
#pragma unroll 1
    for (int32_t tile = 1; tile < group_tiles; ++tile) {
        wait_for_tiles<kThreads>();
        pin_registers(o);
        pin_registers(p);
        wgmma_begin();
        start_scores<kHeadDim, kRows, kKeyTile>(s, q_group, k_tile(tile));
        start_sum<kHeadDim, kKeyTile>(o, p, v_tile(tile - 1));
        load_next(tile);
        wgmma_wait<1>();
        pin_registers(s);
        mask_scores(s, position, tile);
        soften(s, row, factor, a.scale_log2);
        // Never true: a branch on the new sums keeps the assembler from moving the wait up to where
        // the weights have not been formed yet. They are formed while the values are being added.
        if (__any_sync(kFullWarp, fminf(row[0].sum, row[1].sum) < 0.0f) != 0) {
            __trap();
        }
        wgmma_wait<0>();
        pin_registers(o);
        rescale(o, factor);
        pack_tile<kKeyTile>(p, s);
    }
    wait_for_tiles<kThreads>();
    pin_registers(o);
    pin_registers(p);
    wgmma_begin();
    start_sum<kHeadDim, kKeyTile>(o, p, v_tile(group_tiles - 1));
    load_next(group_tiles);
    wgmma_wait<0>();
    pin_registers(o);
#pragma unroll 1
    for (int32_t tile = group_tiles + 1; tile <= tiles; ++tile) {
        // The other groups still need this one's share of the tiles.
        wait_for_tiles<kThreads>();
        load_next(tile);
    }
    int64_t head_row[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        // Read again, which costs less than keeping registers over the loop.
        const int64_t token =
            a.sequence_begin[slot.sequence] + position[i] - a.sequence_position[slot.sequence];
        head_row[i] = position[i] >= 0 ? token * a.heads + head : -1;
    }
    store_rows<kHeadDim>(a, o, row, head_row);
}

template <int kHeadDim, int kGroups>
void launch(cudaStream_t queue, const AttentionArgs& a) {
    using Shared = PrefillShared<kHeadDim, kGroups>;
    const auto kernel = prefill_wgmma_kernel<kHeadDim, kGroups>;
    allow_shared_memory(kernel, Shared::kBytes);
    // Long blocks of all heads start first.
    const dim3 grid(grid_dim(a.heads), grid_dim_yz(a.num_tokens / Shared::kRows + a.num_sequences));
    kernel<<<grid, 128 * kGroups, Shared::kBytes, queue>>>(a);
    LAUNCH_CHECK();
}

}  // namespace

void launch_prefill_wgmma(cudaStream_t queue, const AttentionArgs& a, int64_t head_dim) {
    if (head_dim == 64) {
        launch<64, 3>(queue, a);
    } else {
        launch<128, 2>(queue, a);
    }
}

}  // namespace orbit::cuda
