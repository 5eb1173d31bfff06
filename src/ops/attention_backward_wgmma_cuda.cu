// Attention backward on Hopper: two groups of four warps a thread block multiply what a warp of its
// own brings by tensor copies; blocks stay for several pieces of work. Weights are rebuilt from the
// log-sum-exp; every sum has one owner and one order, as in attention_backward_cuda.cu:
//   dq   128 query rows, over ascending tiles of 128 keys: s = q k^T, dp = do v^T, dq += ds k
//   dkv  128 key rows, over the heads of the group, then ascending tiles of 64 queries, transposed
//        so that weights stay in registers: s = k q^T, dp = v do^T, dv += p do, dk += ds q
// ds is formed without the softmax scale, which the finished sums are multiplied with.
#include "ops/attention_backward_cuda.cuh"
#include "ops/attention_wgmma_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int kGroups = 2;  // that multiply; a warp of a third one brings what they read
constexpr int kThreads = 128 * (kGroups + 1);
constexpr int kRows = 64 * kGroups;  // rows of a piece of work
constexpr int kQueries = 64;         // of a step of the dkv pass

struct PassArgs {
    BackwardArgs a;
    CUtensorMap q;  // [T, heads * head_dim], as is do; boxes of 64 rows
    CUtensorMap d_o;
    CUtensorMap k;  // [T, kv_heads * head_dim], as is v
    CUtensorMap v;
    int32_t row_blocks;  // of all sequences, at the most
    uint32_t* counter;   // WorkQueue
};

// Rows of a sequence: of a query head in the dq pass, of a KV head in the dkv pass.
struct Piece {
    int32_t head;
    int32_t begin;  // the sequence's tokens in the batch
    int32_t end;
    int32_t block;  // of kRows, in the sequence
};

__device__ __forceinline__ bool find_piece(
    const BackwardArgs& a, int32_t block, int32_t head, Piece& piece
) {
    const SequenceSlot slot = locate(a.sequence_begin, a.num_sequences, block, [](int32_t length) {
        return (length + kRows - 1) / kRows;
    });
    if (slot.sequence < 0) {
        return false;
    }
    piece.head = head;
    piece.begin = a.sequence_begin[slot.sequence];
    piece.end = a.sequence_begin[slot.sequence + 1];
    piece.block = slot.offset;
    return true;
}

template <int kHeadDim>
__device__ __forceinline__ void store_scaled(
    bf16* to, float (&acc)[kHeadDim / 8][4], float scale, int half
) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
        acc[j][2 * half] = __fmul_rn(acc[j][2 * half], scale);
        acc[j][2 * half + 1] = __fmul_rn(acc[j][2 * half + 1], scale);
    }
    store_fragments<kHeadDim>(to, acc, half);
}

// One thread: 64 kBoxes rows of a head, from `row` on, to a tile. Rows past the sequence's end are
// others'.
template <int kHeadDim, int kBoxes>
__device__ __forceinline__ void copy_rows(
    uint32_t to, const CUtensorMap& map, int32_t row, int32_t head, uint32_t barrier
) {
#pragma unroll
    for (int half = 0; half < kHeadDim / 64; ++half) {
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
            const uint32_t at = to + (half * kBoxes + box) * 64 * 128;
            copy_box(at, map, row + 64 * box, head * kHeadDim + 64 * half, barrier);
        }
    }
}

// ---- dq -----------------------------------------------------------------------------------------

// Each group's queries and output gradients, then stages of keys, and of values.
template <int kHeadDim>
struct QueryPipes {
    static constexpr int kStages = 2;
    static constexpr int kHalf = 64 * kHeadDim * 2;
    static constexpr int kTileBytes = kRows * kHeadDim * 2;
    static constexpr int kKeys = kGroups * 2 * kHalf;
    static constexpr int kBarriers = kKeys + 2 * kStages * kTileBytes;
    static constexpr int kQueue = kBarriers + 16 * (2 * kStages + kGroups);
    static constexpr int kBytes = kQueue + WorkQueue::kBytes;
    static_assert(kBytes <= 227 * 1024);
    using Tiles = Places<kStages, kTileBytes>;
    uint32_t base;

    __device__ __forceinline__ WorkQueue queue() const { return WorkQueue(base + kQueue); }

    __device__ __forceinline__ Tiles keys() const { return {base + kKeys, base + kBarriers}; }

    __device__ __forceinline__ Tiles values() const {
        return {base + kKeys + kStages * kTileBytes, base + kBarriers + 16 * kStages};
    }

    __device__ __forceinline__ Places<1, 2 * kHalf> rows(int group) const {
        return {base + group * 2 * kHalf, base + kBarriers + 16 * (2 * kStages + group)};
    }

    __device__ __forceinline__ void init() const {
        queue().init(4 * kGroups);
        keys().init(1, 4 * kGroups);
        values().init(1, 4 * kGroups);
        for (int group = 0; group < kGroups; ++group) {
            rows(group).init(1, 4);
        }
        mbarrier_init_fence();
    }
};

// Of a sequence, long pieces of all heads come first.
__device__ __forceinline__ bool find_query_piece(
    const PassArgs& args, int32_t index, Piece& piece
) {
    const int32_t block = args.row_blocks - 1 - index / args.a.heads;
    return find_piece(args.a, block, index % args.a.heads, piece);
}

template <int kHeadDim>
__device__ __forceinline__ void fill_queries(const PassArgs& args, QueryPipes<kHeadDim> pipes) {
    using Pipes = QueryPipes<kHeadDim>;
    const bool leader = (threadIdx.x & 31) == 0;
    uint32_t use = 0;
    uint32_t pieces = 0;
    const uint32_t count = args.row_blocks * args.a.heads;
    pipes.queue().hand_out(args.counter, count, [&](int32_t index) {
        Piece piece;
        if (!find_query_piece(args, index, piece)) {
            return;
        }
        const int32_t kv_head = piece.head / (args.a.heads / args.a.kv_heads);
        for (int group = 0; group < kGroups; ++group) {
            const auto rows = pipes.rows(group);
            rows.wait_freed(pieces);
            if (leader) {
                const int32_t row = piece.begin + piece.block * kRows + 64 * group;
                const uint32_t filled = rows.filled(pieces);
                const uint32_t to = rows.at(pieces);
                mbarrier_expect(filled, 2 * Pipes::kHalf);
                copy_rows<kHeadDim, 1>(to, args.q, row, piece.head, filled);
                copy_rows<kHeadDim, 1>(to + Pipes::kHalf, args.d_o, row, piece.head, filled);
            }
        }
        ++pieces;
#pragma unroll 1
        for (int32_t tile = 0; tile <= piece.block; ++tile, ++use) {
            const int32_t row = piece.begin + tile * kRows;
            const auto fill = [&](const auto& places, const CUtensorMap& map) {
                places.wait_freed(use);
                if (leader) {
                    mbarrier_expect(places.filled(use), Pipes::kTileBytes);
                    copy_rows<kHeadDim, 2>(places.at(use), map, row, kv_head, places.filled(use));
                }
            };
            fill(pipes.keys(), args.k);
            fill(pipes.values(), args.v);
        }
    });
}

template <int kHeadDim>
__device__ __forceinline__ void sum_dq(
    const PassArgs& args, QueryPipes<kHeadDim> pipes, int group
) {
    const BackwardArgs& a = args.a;
    const auto keys = pipes.keys();
    const auto values = pipes.values();
    const auto rows = pipes.rows(group);
    const uint32_t q_rows = rows.at(0);
    const uint32_t o_rows = q_rows + QueryPipes<kHeadDim>::kHalf;
    uint32_t use = 0;
    uint32_t pieces = 0;
    const uint32_t count = args.row_blocks * args.a.heads;
    pipes.queue().take(count, [&](int32_t index) {
        Piece piece;
        if (!find_query_piece(args, index, piece)) {
            return;
        }
        const int32_t row = 64 * group + lane_row();  // of the piece's
        const int32_t token = piece.begin + piece.block * kRows + row;
        bool valid[2];
        float lse2[2];
        float delta[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            valid[i] = token + 8 * i < piece.end;
            const int64_t at = static_cast<int64_t>(token + 8 * i) * a.heads + piece.head;
            lse2[i] = valid[i] ? __fmul_rn(a.lse[at], kLog2E) : 0.0f;
            delta[i] = valid[i] ? a.delta[at] : 0.0f;
        }
        float dq[kHeadDim / 8][4] = {};
        float s[kRows / 8][4];
        float dp[kRows / 8][4];
        rows.wait_filled(pieces);
#pragma unroll 1
        for (int32_t left = piece.block; left >= 0; --left, ++use) {
            keys.wait_filled(use);
            values.wait_filled(use);
            wgmma_begin();
            start_scores<kHeadDim, 64, kRows>(s, q_rows, keys.at(use));
            start_scores<kHeadDim, 64, kRows>(dp, o_rows, values.at(use));
            wgmma_wait<1>();
            pin_registers(s);
            float least = 0.0f;
#pragma unroll
            for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    s[j][c] = exp2_sfu(__fmaf_rn(s[j][c], a.scale_log2, -lse2[c >> 1]));
                }
                least = fminf(least, s[j][3]);
            }
            if (left == 0) {
                const int32_t key0 = 2 * static_cast<int32_t>(threadIdx.x & 3);
#pragma unroll
                for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        s[j][c] = key0 + 8 * j + (c & 1) <= row + 8 * (c >> 1) ? s[j][c] : 0.0f;
                    }
                }
            }
            hold_until(least);
            wgmma_wait<0>();
            pin_registers(dp);
            values.free(use);
#pragma unroll
            for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    s[j][c] = __fmul_rn(s[j][c], __fsub_rn(dp[j][c], delta[c >> 1]));
                }
            }
            uint32_t ds[kRows / 16][4];
            pack_tile<kRows>(ds, s);
            pin_registers(ds);
            pin_registers(dq);
            wgmma_begin();
            start_sum<kHeadDim, kRows>(dq, ds, keys.at(use));
            wgmma_wait<0>();
            pin_registers(dq);
            keys.free(use);
        }
        rows.free(pieces);
        ++pieces;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (valid[i]) {
                const int64_t at = static_cast<int64_t>(token + 8 * i) * a.heads + piece.head;
                bf16* to = a.dq + at * kHeadDim + 2 * (threadIdx.x & 3);
                store_scaled<kHeadDim>(to, dq, a.scale, i);
            }
        }
    });
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    dq_wgmma_kernel(const __grid_constant__ PassArgs args) {
    extern __shared__ __align__(1024) char shared[];
    const QueryPipes<kHeadDim> pipes{shared_address(shared)};
    const int group = warp_group();
    if (threadIdx.x == 0) {
        pipes.init();
    }
    __syncthreads();
    if (group == kGroups) {
        lower_registers<40>();
        if (threadIdx.x < 128 * kGroups + 32) {
            fill_queries(args, pipes);
        }
    } else {
        raise_registers<232>();
        sum_dq(args, pipes, group);
    }
}

// ---- dk and dv ----------------------------------------------------------------------------------

// Each group's keys and values, stages of queries and output gradients, then of their rows'
// numbers: lse, delta.
template <int kHeadDim>
struct KeyPipes {
    static constexpr int kStages = 3;
    static constexpr int kHalf = 64 * kHeadDim * 2;  // of a group's rows, and of a stage
    static constexpr int kStage = kGroups * 2 * kHalf;
    static constexpr int kNumbers = kStage + kStages * 2 * kHalf;
    static constexpr int kNumbersBytes = 2 * kQueries * 4;  // of a stage
    static constexpr int kBarriers = kNumbers + kStages * kNumbersBytes;
    static constexpr int kQueue = kBarriers + 16 * (kStages + kGroups);
    static constexpr int kBytes = kQueue + WorkQueue::kBytes;
    static_assert(kBytes <= 227 * 1024);
    char* shared;

    __device__ __forceinline__ uint32_t base() const { return shared_address(shared); }

    __device__ __forceinline__ WorkQueue queue() const { return WorkQueue(base() + kQueue); }

    __device__ __forceinline__ Places<kStages, 2 * kHalf> queries() const {
        return {base() + kStage, base() + kBarriers};
    }

    __device__ __forceinline__ float* numbers(uint32_t use) const {
        return reinterpret_cast<float*>(shared + kNumbers + use % kStages * kNumbersBytes);
    }

    __device__ __forceinline__ Places<1, 2 * kHalf> rows(int group) const {
        return {base() + group * 2 * kHalf, base() + kBarriers + 16 * (kStages + group)};
    }

    __device__ __forceinline__ void init() const {
        queue().init(4 * kGroups);
        queries().init(1 + 32, 4 * kGroups);
        for (int group = 0; group < kGroups; ++group) {
            rows(group).init(1, 4);
        }
        mbarrier_init_fence();
    }
};

// Of a sequence, long pieces of all heads come first.
__device__ __forceinline__ bool find_key_piece(const PassArgs& args, int32_t index, Piece& piece) {
    return find_piece(args.a, index / args.a.kv_heads, index % args.a.kv_heads, piece);
}

// Tiles of queries from the piece's keys on.
__device__ __forceinline__ int32_t query_tiles(const Piece& piece) {
    return (piece.end - piece.begin + kQueries - 1) / kQueries - piece.block * (kRows / kQueries);
}

template <int kHeadDim>
__device__ __forceinline__ void fill_keys(const PassArgs& args, KeyPipes<kHeadDim> pipes) {
    using Pipes = KeyPipes<kHeadDim>;
    const BackwardArgs& a = args.a;
    const auto lane = static_cast<int32_t>(threadIdx.x & 31);
    const auto places = pipes.queries();
    const int32_t group_heads = a.heads / a.kv_heads;
    uint32_t use = 0;
    uint32_t pieces = 0;
    const uint32_t count = args.row_blocks * args.a.kv_heads;
    pipes.queue().hand_out(args.counter, count, [&](int32_t index) {
        Piece piece;
        if (!find_key_piece(args, index, piece)) {
            return;
        }
        const int32_t row0 = piece.begin + piece.block * kRows;
        for (int group = 0; group < kGroups; ++group) {
            const auto rows = pipes.rows(group);
            rows.wait_freed(pieces);
            if (lane == 0) {
                const uint32_t filled = rows.filled(pieces);
                const uint32_t to = rows.at(pieces);
                const int32_t row = row0 + 64 * group;
                mbarrier_expect(filled, 2 * Pipes::kHalf);
                copy_rows<kHeadDim, 1>(to, args.k, row, piece.head, filled);
                copy_rows<kHeadDim, 1>(to + Pipes::kHalf, args.v, row, piece.head, filled);
            }
        }
        ++pieces;
        const int32_t tiles = query_tiles(piece);
#pragma unroll 1
        for (int32_t head = piece.head * group_heads; head < (piece.head + 1) * group_heads;
             ++head) {
#pragma unroll 1
            for (int32_t tile = 0; tile < tiles; ++tile, ++use) {
                const int32_t row = row0 + tile * kQueries;
                const uint32_t filled = places.filled(use);
                places.wait_freed(use);
                if (lane == 0) {
                    const uint32_t to = places.at(use);
                    mbarrier_expect(filled, 2 * Pipes::kHalf);
                    copy_rows<kHeadDim, 1>(to, args.q, row, head, filled);
                    copy_rows<kHeadDim, 1>(to + Pipes::kHalf, args.d_o, row, head, filled);
                }
                const uint32_t numbers = shared_address(pipes.numbers(use));
#pragma unroll
                for (int i = 0; i < kQueries; i += 32) {
                    const int32_t token = row + i + lane;
                    const bool valid = token < piece.end;
                    const int64_t at = valid ? static_cast<int64_t>(token) * a.heads + head : 0;
                    copy_async_4(numbers + 4 * (i + lane), a.lse + at, valid);
                    copy_async_4(numbers + 4 * (kQueries + i + lane), a.delta + at, valid);
                }
                copy_async_arrive(filled);
            }
        }
    });
}

template <int kHeadDim>
__device__ __forceinline__ void sum_dkv(const PassArgs& args, KeyPipes<kHeadDim> pipes, int group) {
    using Pipes = KeyPipes<kHeadDim>;
    const BackwardArgs& a = args.a;
    const auto places = pipes.queries();
    const auto rows = pipes.rows(group);
    const uint32_t k_rows = rows.at(0);
    const uint32_t v_rows = k_rows + Pipes::kHalf;
    const int32_t key = 64 * group + lane_row();  // of the piece's, as is `row` below
    const int quad = threadIdx.x & 3;
    uint32_t use = 0;
    uint32_t pieces = 0;
    const uint32_t count = args.row_blocks * args.a.kv_heads;
    pipes.queue().take(count, [&](int32_t index) {
        Piece piece;
        if (!find_key_piece(args, index, piece)) {
            return;
        }
        const int32_t tiles = query_tiles(piece);
        const int32_t queries = piece.end - piece.begin - piece.block * kRows;
        float dk[kHeadDim / 8][4] = {};
        float dv[kHeadDim / 8][4] = {};
        float s[kQueries / 8][4];
        float dp[kQueries / 8][4];
        uint32_t p[kQueries / 16][4];
        uint32_t ds[kQueries / 16][4];
        rows.wait_filled(pieces);
        int32_t tile = 0;
#pragma unroll 1
        for (int32_t left = tiles * (a.heads / a.kv_heads); left > 0; --left, ++use) {
            places.wait_filled(use);
            const uint32_t q_tile = places.at(use);
            const uint32_t o_tile = q_tile + Pipes::kHalf;
            wgmma_begin();
            start_scores<kHeadDim, 64, kQueries>(s, k_rows, q_tile);
            start_scores<kHeadDim, 64, kQueries>(dp, v_rows, o_tile);
            const auto* lse = reinterpret_cast<const float2*>(pipes.numbers(use)) + quad;
            const float2* delta = lse + kQueries / 2;
            wgmma_wait<1>();
            pin_registers(s);
#pragma unroll
            for (int j = 0; j < kQueries / 8; ++j) {
                const float2 l = lse[4 * j];
                const float lse2[2] = {__fmul_rn(l.x, kLog2E), __fmul_rn(l.y, kLog2E)};
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    s[j][c] = exp2_sfu(__fmaf_rn(s[j][c], a.scale_log2, -lse2[c & 1]));
                }
            }
            if (tile < kRows / kQueries || (tile + 1) * kQueries > queries) {
                const int32_t row = tile * kQueries + 2 * quad;
#pragma unroll
                for (int j = 0; j < kQueries / 8; ++j) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        const int32_t query = row + 8 * j + (c & 1);
                        const bool seen = key + 8 * (c >> 1) <= query && query < queries;
                        s[j][c] = seen ? s[j][c] : 0.0f;
                    }
                }
            }
            pack_tile<kQueries>(p, s);
            pin_registers(p);
            pin_registers(dv);
            wgmma_begin();
            start_sum<kHeadDim, kQueries>(dv, p, o_tile);
            wgmma_wait<1>();
            pin_registers(dp);
#pragma unroll
            for (int j = 0; j < kQueries / 8; ++j) {
                const float2 d = delta[4 * j];
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    dp[j][c] = __fmul_rn(s[j][c], __fsub_rn(dp[j][c], (c & 1) == 0 ? d.x : d.y));
                }
            }
            pack_tile<kQueries>(ds, dp);
            pin_registers(ds);
            pin_registers(dk);
            wgmma_begin();
            start_sum<kHeadDim, kQueries>(dk, ds, q_tile);
            wgmma_wait<0>();
            places.free(use);
            tile = tile + 1 == tiles ? 0 : tile + 1;
        }
        pin_registers(dk);
        pin_registers(dv);
        rows.free(pieces);
        ++pieces;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (key + 8 * i < queries) {
                const int64_t token = piece.begin + piece.block * kRows + key + 8 * i;
                const int64_t at = (token * a.kv_heads + piece.head) * kHeadDim + 2 * quad;
                store_scaled<kHeadDim>(a.dk + at, dk, a.scale, i);
                store_fragments<kHeadDim>(a.dv + at, dv, i);
            }
        }
    });
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    dkv_wgmma_kernel(const __grid_constant__ PassArgs args) {
    extern __shared__ __align__(1024) char shared[];
    const KeyPipes<kHeadDim> pipes{shared};
    const int group = warp_group();
    if (threadIdx.x == 0) {
        pipes.init();
    }
    __syncthreads();
    if (group == kGroups) {
        lower_registers<24>();
        if (threadIdx.x < 128 * kGroups + 32) {
            fill_keys(args, pipes);
        }
    } else {
        raise_registers<240>();
        sum_dkv(args, pipes, group);
    }
}

template <int kHeadDim>
void launch(Stream& stream, const BackwardArgs& a) {
    PassArgs args{};
    args.a = a;
    args.row_blocks = a.num_tokens / kRows + a.num_sequences;
    const auto map = [&](const bf16* data, int64_t heads) {
        return tensor_map(data, a.num_tokens, heads * kHeadDim, 2 * heads * kHeadDim, 64);
    };
    args.q = map(a.q, a.heads);
    args.d_o = map(a.d_o, a.heads);
    args.k = map(a.k, a.kv_heads);
    args.v = map(a.v, a.kv_heads);
    const int64_t blocks = args.row_blocks;
    launch_pieces(
        stream,
        dq_wgmma_kernel<kHeadDim>,
        args,
        blocks * a.heads,
        kThreads,
        QueryPipes<kHeadDim>::kBytes
    );
    launch_pieces(
        stream,
        dkv_wgmma_kernel<kHeadDim>,
        args,
        blocks * a.kv_heads,
        kThreads,
        KeyPipes<kHeadDim>::kBytes
    );
}

}  // namespace

void launch_backward_wgmma(Stream& stream, const BackwardArgs& a, int64_t head_dim) {
    if (head_dim == 64) {
        launch<64>(stream, a);
    } else {
        launch<128>(stream, a);
    }
}

}  // namespace orbit::cuda
