// Attention forward of long sequences on Hopper: kGroups groups of four warps, 64 query rows each,
// share tiles of 128 keys, which a warp of its own brings by tensor copies. While the matrix unit
// adds the values of one tile to a group's output, the scores of the next, multiplied just before,
// become weights; and one group multiplies while another one does so. Thread blocks stay for
// several pieces of work, so that the rows and keys of the next arrive while one ends. The
// arithmetic of a row, and so its bits, are those of attention_cuda.cuh.
#include "device/cuda/check.cuh"
#include "ops/attention_wgmma_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int kTilePages = kKeyTile / kPageTokens;

// Bytes of shared memory: each group's query rows, stages of keys, stages of values, barriers.
template <int kHeadDim, int kGroups>
struct PrefillShared {
    static constexpr int kStages = 2;
    static constexpr int kRows = 64 * kGroups;
    static constexpr int kGroupBytes = 64 * kHeadDim * 2;
    static constexpr int kTileBytes = kKeyTile * kHeadDim * 2;
    static constexpr int kKeys = kGroups * kGroupBytes;
    static constexpr int kValues = kKeys + kStages * kTileBytes;
    static constexpr int kBarriers = kValues + kStages * kTileBytes;
    static constexpr int kQueue = kBarriers + 16 * (2 * kStages + kGroups);
    static constexpr int kBytes = kQueue + WorkQueue::kBytes;
    static_assert(kBytes <= 227 * 1024);
};

// [pages, kv_heads, kPageTokens, head_dim].
struct PageMaps {
    CUtensorMap one;
    CUtensorMap tile;  // kTilePages pages that follow each other
};

struct PrefillArgs {
    AttentionArgs a;
    CUtensorMap q;  // [T, heads * head_dim]
    PageMaps k;
    PageMaps v;
    int32_t pages;
    int32_t row_blocks;  // of all sequences, at the most
    uint32_t* counter;   // WorkQueue

    __device__ __forceinline__ uint32_t count() const {
        return static_cast<uint32_t>(row_blocks) * a.heads;
    }
};

template <int kHeadDim, int kGroups>
struct Pipes {
    using Shared = PrefillShared<kHeadDim, kGroups>;
    using Tiles = Places<Shared::kStages, Shared::kTileBytes>;
    using Rows = Places<1, Shared::kGroupBytes>;
    uint32_t base;

    __device__ __forceinline__ uint32_t barriers(int index) const {
        return base + Shared::kBarriers + 16 * index;
    }

    __device__ __forceinline__ WorkQueue queue() const { return WorkQueue(base + Shared::kQueue); }

    __device__ __forceinline__ Tiles keys() const { return {base + Shared::kKeys, barriers(0)}; }

    __device__ __forceinline__ Tiles values() const {
        return {base + Shared::kValues, barriers(Shared::kStages)};
    }

    __device__ __forceinline__ Rows queries(int group) const {
        return {base + group * Shared::kGroupBytes, barriers(2 * Shared::kStages + group)};
    }
};

// A piece of work: kRows query rows of one head.
struct Piece {
    int32_t sequence;
    int32_t head;
    int32_t begin;  // the sequence's first token in the batch
    int32_t length;
    int32_t position0;
    int32_t row0;
    int32_t last_key;
    int32_t tiles;
};

// Piece `index`; false: there is none. Long ones of all heads come first. All lanes of a warp.
template <int kRows>
__device__ __forceinline__ bool find_piece(const PrefillArgs& args, int32_t index, Piece& piece) {
    const AttentionArgs& a = args.a;
    const int32_t block = args.row_blocks - 1 - index / a.heads;
    const SequenceSlot slot = locate(a.sequence_begin, a.num_sequences, block, [](int32_t length) {
        return length > kShortRows ? (length + kRows - 1) / kRows : 0;
    });
    if (slot.sequence < 0) {
        return false;
    }
    piece.sequence = slot.sequence;
    piece.head = index % a.heads;
    piece.begin = a.sequence_begin[slot.sequence];
    piece.length = a.sequence_begin[slot.sequence + 1] - piece.begin;
    piece.position0 = a.sequence_position[slot.sequence];
    piece.row0 = slot.offset * kRows;
    piece.last_key = piece.position0 + min(piece.length, piece.row0 + kRows) - 1;
    piece.tiles = piece.last_key / kKeyTile + 1;
    return true;
}

// A page row by row, for rows from `rows` on are to be zeros. One warp; its writes are done and
// ordered before the matrix unit's reads.
template <int kHeadDim>
__device__ __forceinline__ void copy_ragged_page(
    uint32_t tile, const bf16* from, int32_t index, int32_t rows
) {
    constexpr int kGranules = kHeadDim / 8;
    const auto lane = static_cast<int>(threadIdx.x & 31);
#pragma unroll
    for (int i = lane; i < kPageTokens * kGranules; i += 32) {
        const int row = i / kGranules;
        const uint32_t to = tile + tile_offset<kKeyTile>(index * kPageTokens + row, i % kGranules);
        copy_async_16(to, row < rows ? from + i * 8 : from, row < rows);
    }
    copy_async_commit();
    copy_async_wait<0>();
    fence_for_wgmma();
    __syncwarp();
}

// One warp: 128 rows of a head's pages to the next place. The pages' numbers are in lanes 0-7; rows
// past last_key become zeros, where `exact`, or anything, of a page that has others.
template <int kHeadDim, typename Tiles>
__device__ __forceinline__ void fill_tile(
    const PrefillArgs& args,
    const Tiles& places,
    uint32_t use,
    const PageMaps& maps,
    const bf16* pages,
    int32_t page,
    const Piece& piece,
    int32_t tile,
    bool exact
) {
    constexpr int kPageBytes = kPageTokens * kHeadDim * 2;
    const auto lane = static_cast<int32_t>(threadIdx.x & 31);
    const int32_t kv_head = piece.head / (args.a.heads / args.a.kv_heads);
    const int32_t left = piece.last_key + 1 - tile * kKeyTile;  // rows to be had
    const uint32_t to = places.at(use);
    const uint32_t filled = places.filled(use);
    const int32_t first_page = __shfl_sync(kFullWarp, page, 0);
    const bool in_order =
        __all_sync(kFullWarp, left >= kKeyTile && page == first_page + (lane & (kTilePages - 1)));
    places.wait_freed(use);
    if (in_order) {
        if (lane == 0) {
            mbarrier_expect(filled, kTilePages * kPageBytes);
#pragma unroll
            for (int half = 0; half < kHeadDim / 64; ++half) {
                const uint32_t columns = to + half * kKeyTile * 128;
                copy_pages(columns, maps.tile, page, kv_head, 64 * half, filled);
            }
        }
        return;
    }
    const int32_t ragged =
        exact && left < kKeyTile && left % kPageTokens != 0 ? left / kPageTokens : kTilePages;
    if (lane < kTilePages && lane != ragged) {
        const int32_t from = lane * kPageTokens < left ? page : args.pages;  // outside: zeros
#pragma unroll
        for (int half = 0; half < kHeadDim / 64; ++half) {
            const uint32_t rows = to + half * kKeyTile * 128 + lane * kPageTokens * 128;
            copy_pages(rows, maps.one, from, kv_head, 64 * half, filled);
        }
    }
    if (ragged < kTilePages) {
        const int64_t row =
            (int64_t{__shfl_sync(kFullWarp, page, ragged)} * args.a.kv_heads + kv_head) *
            kPageTokens;
        copy_ragged_page<kHeadDim>(to, pages + row * kHeadDim, ragged, left % kPageTokens);
    }
    if (lane == 0) {
        mbarrier_expect(filled, (kTilePages - (ragged < kTilePages ? 1 : 0)) * kPageBytes);
    }
}

// The warp that brings everything: query rows, then tiles in the order in which they are needed.
template <int kHeadDim, int kGroups>
__device__ __forceinline__ void fill(const PrefillArgs& args, Pipes<kHeadDim, kGroups> pipes) {
    using Shared = PrefillShared<kHeadDim, kGroups>;
    uint32_t use = 0;  // of keys and values
    uint32_t pieces = 0;
    pipes.queue().hand_out(args.counter, args.count(), [&](int32_t index) {
        Piece piece;
        if (!find_piece<Shared::kRows>(args, index, piece)) {
            return;
        }
        const auto pages_of = [&](int32_t tile) {
            return tile_pages(args.a, piece.sequence, tile, piece.last_key);
        };
        const auto fill_keys = [&](int32_t tile, int32_t pages) {
            const auto keys = pipes.keys();
            fill_tile<kHeadDim>(
                args, keys, use + tile, args.k, args.a.k_pages, pages, piece, tile, false
            );
        };
        int32_t pages = pages_of(0);
        int32_t next_pages = pages_of(1);
        for (int group = 0; group < kGroups; ++group) {
            const auto rows = pipes.queries(group);
            rows.wait_freed(pieces);
            if ((threadIdx.x & 31) == 0) {
                const uint32_t filled = rows.filled(pieces);
                const int32_t row = piece.begin + piece.row0 + 64 * group;
                mbarrier_expect(filled, Shared::kGroupBytes);
#pragma unroll
                for (int half = 0; half < kHeadDim / 64; ++half) {
                    const int32_t column = piece.head * kHeadDim + 64 * half;
                    copy_box(rows.at(pieces) + half * 64 * 128, args.q, row, column, filled);
                }
            }
        }
        ++pieces;
        fill_keys(0, pages);
#pragma unroll 1
        for (int32_t tile = 0; tile < piece.tiles; ++tile) {
            const int32_t last_pages = pages;
            pages = next_pages;
            next_pages = pages_of(tile + 2);
            if (tile + 1 < piece.tiles) {
                fill_keys(tile + 1, pages);
            }
            const auto values = pipes.values();
            fill_tile<kHeadDim>(
                args, values, use + tile, args.v, args.a.v_pages, last_pages, piece, tile, true
            );
        }
        use += piece.tiles;
    });
}

// A group of four warps: its 64 rows of each piece.
template <int kHeadDim, int kGroups>
__device__ __forceinline__ void attend(
    const PrefillArgs& args, Pipes<kHeadDim, kGroups> pipes, int group
) {
    using Shared = PrefillShared<kHeadDim, kGroups>;
    const AttentionArgs& a = args.a;
    const auto keys = pipes.keys();
    const auto values = pipes.values();
    const auto queries = pipes.queries(group);
    const uint32_t q_rows = queries.at(0);
    uint32_t use = 0;  // of keys, and but for the last one of values
    uint32_t pieces = 0;
    pipes.queue().take(args.count(), [&](int32_t index) {
        Piece piece;
        if (!find_piece<Shared::kRows>(args, index, piece)) {
            return;
        }
        // Tiles that rows of this group see; a group of padding takes one, and a row whose keys are
        // all hidden stays finite.
        const int32_t group_row0 = piece.row0 + 64 * group;
        const int32_t seen = piece.position0 + min(piece.length, group_row0 + 64) - 1;
        const int32_t tiles = group_row0 < piece.length ? seen / kKeyTile + 1 : 1;
        const int32_t unseen = piece.tiles - tiles;
        const int32_t first_row =  // of the lane's two
            group_row0 + lane_row();
        const int32_t head_row0 = (piece.begin + first_row) * a.heads + piece.head;
        int32_t position[2];  // of rows g and g + 8; -1 for padding
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int32_t index = first_row + 8 * i;
            position[i] = index < piece.length ? piece.position0 + index : -1;
        }
        SoftmaxRow row[2];
        float factor[2];
        float o[kHeadDim / 8][4] = {};
        float s[kKeyTile / 8][4];
        uint32_t p[kKeyTile / 16][4];
        queries.wait_filled(pieces);
        keys.wait_filled(use);
        wgmma_begin();
        start_scores<kHeadDim, 64, kKeyTile>(s, q_rows, keys.at(use));
        wgmma_wait<0>();
        pin_registers(s);
        keys.free(use);
        mask_scores(s, position, 0);
        soften(s, row, factor, a.scale_log2);  // o is zero: nothing to rescale
        pack_tile<kKeyTile>(p, s);
        ++use;
#pragma unroll 1
        for (int32_t tile = 1; tile < tiles; ++tile, ++use) {
            keys.wait_filled(use);
            values.wait_filled(use - 1);
            pin_registers(o);
            pin_registers(p);
            wgmma_begin();
            start_scores<kHeadDim, 64, kKeyTile>(s, q_rows, keys.at(use));
            start_sum<kHeadDim, kKeyTile>(o, p, values.at(use - 1));
            wgmma_wait<1>();
            pin_registers(s);
            keys.free(use);
            mask_scores(s, position, tile);
            soften(s, row, factor, a.scale_log2);
            hold_until(fminf(row[0].sum, row[1].sum));  // formed while the values are being added
            wgmma_wait<0>();
            pin_registers(o);
            values.free(use - 1);
            rescale(o, factor);
            pack_tile<kKeyTile>(p, s);
        }
        queries.free(pieces);
        ++pieces;
        values.wait_filled(use - 1);
        pin_registers(o);
        pin_registers(p);
        wgmma_begin();
        start_sum<kHeadDim, kKeyTile>(o, p, values.at(use - 1));
        wgmma_wait<0>();
        pin_registers(o);
        values.free(use - 1);
#pragma unroll 1
        for (int32_t tile = 0; tile < unseen; ++tile, ++use) {  // by this group, not by others
            keys.wait_filled(use);
            keys.free(use);
            values.wait_filled(use);
            values.free(use);
        }
        int64_t head_row[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            head_row[i] = position[i] >= 0 ? head_row0 + 8 * i * a.heads : -1;
        }
        store_rows<kHeadDim>(a, o, row, head_row);
    });
}

template <int kHeadDim, int kGroups>
__global__ void __launch_bounds__(128 * (kGroups + 1), 1)
    prefill_wgmma_kernel(const __grid_constant__ PrefillArgs args) {
    extern __shared__ __align__(1024) char shared[];
    const Pipes<kHeadDim, kGroups> pipes{shared_address(shared)};
    const int group = warp_group();
    if (threadIdx.x == 0) {
        pipes.queue().init(4 * kGroups);
        pipes.keys().init(1, 4 * kGroups);
        pipes.values().init(1, 4 * kGroups);
        for (int g = 0; g < kGroups; ++g) {
            pipes.queries(g).init(1, 4);
        }
        mbarrier_init_fence();
        prefetch_map(args.q);
        prefetch_map(args.k.tile);
        prefetch_map(args.v.tile);
    }
    __syncthreads();
    if (group == kGroups) {
        lower_registers<kGroups == 2 ? 40 : 32>();
        if (threadIdx.x < 128 * kGroups + 32) {
            fill<kHeadDim, kGroups>(args, pipes);
        }
    } else {
        raise_registers<kGroups == 2 ? 232 : 160>();
        attend<kHeadDim, kGroups>(args, pipes, group);
    }
}

PageMaps page_maps(const bf16* data, int64_t pages, int64_t kv_heads, int64_t head_dim) {
    const auto map = [&](int32_t together) {
        return tensor_map_pages(data, pages, kv_heads, kPageTokens, head_dim, together);
    };
    return {map(1), map(kTilePages)};
}

template <int kHeadDim, int kGroups>
void launch(Stream& stream, const AttentionArgs& a, int64_t pages) {
    using Shared = PrefillShared<kHeadDim, kGroups>;
    PrefillArgs args{};
    args.a = a;
    CHECK_LT(int64_t{a.num_tokens} * a.heads, int64_t{1} << 31);  // rows of heads, in 32 bits
    const int64_t q_cols = int64_t{a.heads} * kHeadDim;
    args.q = tensor_map(a.q, a.num_tokens, q_cols, 2 * q_cols, 64);
    args.pages = static_cast<int32_t>(pages);
    args.k = page_maps(a.k_pages, pages, a.kv_heads, kHeadDim);
    args.v = page_maps(a.v_pages, pages, a.kv_heads, kHeadDim);
    args.row_blocks = a.num_tokens / Shared::kRows + a.num_sequences;
    launch_pieces(
        stream,
        prefill_wgmma_kernel<kHeadDim, kGroups>,
        args,
        int64_t{args.row_blocks} * a.heads,
        128 * (kGroups + 1),
        Shared::kBytes
    );
}

}  // namespace

void launch_prefill_wgmma(Stream& stream, const AttentionArgs& a, int64_t head_dim, int64_t pages) {
    if (head_dim == 64) {
        launch<64, 3>(stream, a, pages);
    } else {
        launch<128, 2>(stream, a, pages);
    }
}

}  // namespace orbit::cuda
