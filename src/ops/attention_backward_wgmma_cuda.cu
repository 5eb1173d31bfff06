// Attention backward on Hopper: two groups of four warps a thread block. Weights are rebuilt from
// the log-sum-exp; every sum has one owner and one order, as in attention_backward_cuda.cu:
//   dq   128 query rows, over ascending tiles of 128 keys: s = q k^T, dp = do v^T, dq += ds k
//   dkv  128 key rows, over the heads of the group, then ascending tiles of 64 queries, transposed
//        so that weights stay in registers: s = k q^T, dp = v do^T, dv += p do, dk += ds q
// ds is formed without the softmax scale, which the finished sums are multiplied with.
#include "ops/attention_backward_cuda.cuh"
#include "ops/attention_wgmma_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 128;    // rows that a thread block owns
constexpr int kQueries = 64;  // of a step of the dkv pass
constexpr int kStages = 2;    // of the dkv pass

__device__ __forceinline__ SequenceSlot locate_rows(const BackwardArgs& a, int32_t index) {
    return locate(a.sequence_begin, a.num_sequences, index, [](int32_t length) {
        return (length + kRows - 1) / kRows;
    });
}

// The row of a group's 64 that a lane's fragments have in c = 0, 1; c = 2, 3 are eight further on.
__device__ __forceinline__ int32_t lane_row() {
    return static_cast<int32_t>((threadIdx.x >> 5 & 3) * 16 + (threadIdx.x & 31) / 4);
}

// Keeps the assembler from moving what follows, a wait for the matrix unit, to before `value` is
// known: a branch that is never taken, since no weight is negative.
__device__ __forceinline__ void hold_until(float value) {
    if (__any_sync(kFullWarp, value < 0.0f) != 0) {
        __trap();
    }
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

// Queries and output gradients of the block's rows, then two stages of keys and values.
template <int kHeadDim>
struct QueryShared {
    static constexpr int kTileBytes = kRows * kHeadDim * 2;
    static constexpr int kBytes = 6 * kTileBytes;
};

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) dq_wgmma_kernel(BackwardArgs a) {
    extern __shared__ __align__(1024) char shared[];
    constexpr int kTileBytes = QueryShared<kHeadDim>::kTileBytes;
    const auto head = static_cast<int32_t>(blockIdx.x);
    const int32_t kv_head = head / (a.heads / a.kv_heads);
    const SequenceSlot slot = locate_rows(a, static_cast<int32_t>(gridDim.y - 1 - blockIdx.y));
    if (slot.sequence < 0) {
        return;
    }
    const int32_t begin = a.sequence_begin[slot.sequence];
    const int32_t end = a.sequence_begin[slot.sequence + 1];
    const int32_t row0 = begin + slot.offset * kRows;
    const int32_t tiles = slot.offset + 1;
    const uint32_t q_tile = shared_address(shared);
    const uint32_t o_tile = q_tile + kTileBytes;
    const auto k_tile = [&](int32_t tile) { return o_tile + kTileBytes * (1 + 2 * (tile & 1)); };
    const auto load = [&](int32_t tile) {
        if (tile < tiles) {
            const int32_t row = begin + tile * kRows;
            const uint32_t to = k_tile(tile);
            load_rows<kHeadDim, kRows, kThreads>(to, a.k, a.kv_heads, kv_head, row, end);
            load_rows<kHeadDim, kRows, kThreads>(
                to + kTileBytes, a.v, a.kv_heads, kv_head, row, end
            );
        }
        copy_async_commit();
    };
    load_rows<kHeadDim, kRows, kThreads>(q_tile, a.q, a.heads, head, row0, end);
    load_rows<kHeadDim, kRows, kThreads>(o_tile, a.d_o, a.heads, head, row0, end);
    load(0);

    const int group = warp_group();
    const int32_t row = 64 * group + lane_row();  // of the block's
    float lse2[2];
    float delta[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const bool valid = row0 + row + 8 * i < end;
        const int64_t at = static_cast<int64_t>(row0 + row + 8 * i) * a.heads + head;
        lse2[i] = valid ? __fmul_rn(a.lse[at], kLog2E) : 0.0f;
        delta[i] = valid ? a.delta[at] : 0.0f;
    }
    const uint32_t group_rows = group * 64 * 128;
    float dq[kHeadDim / 8][4] = {};
    float s[kRows / 8][4];
    float dp[kRows / 8][4];
#pragma unroll 1
    for (int32_t tile = 0; tile < tiles; ++tile) {
        wait_for_tiles<kThreads>();  // Both groups are done with the last tile, too.
        wgmma_begin();
        start_scores<kHeadDim, kRows, kRows>(s, q_tile + group_rows, k_tile(tile));
        start_scores<kHeadDim, kRows, kRows>(dp, o_tile + group_rows, k_tile(tile) + kTileBytes);
        load(tile + 1);
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
        if (tile + 1 == tiles) {
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
        start_sum<kHeadDim, kRows>(dq, ds, k_tile(tile));
        wgmma_wait<0>();
        pin_registers(dq);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t token = row0 + row + 8 * i;
        if (token < end) {
            bf16* to = a.dq + (token * a.heads + head) * kHeadDim + 2 * (threadIdx.x & 3);
            store_scaled<kHeadDim>(to, dq, a.scale, i);
        }
    }
}

// Keys and values of the block's rows, then stages of queries and output gradients, then of their
// rows' numbers: lse, delta.
template <int kHeadDim>
struct KeyShared {
    static constexpr int kKeyBytes = kRows * kHeadDim * 2;
    static constexpr int kQueryBytes = kQueries * kHeadDim * 2;
    static constexpr int kStage = 2 * kKeyBytes;
    static constexpr int kNumbers = kStage + kStages * 2 * kQueryBytes;
    static constexpr int kBytes = kNumbers + kStages * 2 * kQueries * 4;
};

// The steps of a dkv block: heads of the group, then tiles of queries from the block's keys on.
template <int kHeadDim>
struct QueryTiles {
    const BackwardArgs& a;
    uint32_t shared;
    int32_t begin;  // rows of the sequence
    int32_t end;
    int32_t first_head;
    int32_t first_tile;
    int32_t tiles;  // of a head
    int32_t steps;
    // Of the step that is loaded next.
    int32_t step = 0;
    int32_t head = 0;
    int32_t tile = 0;

    __device__ __forceinline__ void load_next() {
        using Shared = KeyShared<kHeadDim>;
        if (step < steps) {
            const int32_t row = begin + (first_tile + tile) * kQueries;
            const int32_t stage = step % kStages;
            const uint32_t to = shared + Shared::kStage + stage * 2 * Shared::kQueryBytes;
            load_rows<kHeadDim, kQueries, kThreads>(to, a.q, a.heads, first_head + head, row, end);
            load_rows<kHeadDim, kQueries, kThreads>(
                to + Shared::kQueryBytes, a.d_o, a.heads, first_head + head, row, end
            );
            if (threadIdx.x < 2 * kQueries) {
                const auto r = static_cast<int32_t>(threadIdx.x % kQueries);
                const float* from = threadIdx.x < kQueries ? a.lse : a.delta;
                const int64_t at = static_cast<int64_t>(row + r) * a.heads + first_head + head;
                const bool valid = row + r < end;
                copy_async_4(
                    shared + Shared::kNumbers + (stage * 2 * kQueries + threadIdx.x) * 4,
                    valid ? from + at : from,
                    valid
                );
            }
            ++step;
            if (++tile == tiles) {
                tile = 0;
                ++head;
            }
        }
        copy_async_commit();
    }
};

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) dkv_wgmma_kernel(BackwardArgs a) {
    extern __shared__ __align__(1024) char shared[];
    using Shared = KeyShared<kHeadDim>;
    const auto kv_head = static_cast<int32_t>(blockIdx.x);
    const int32_t group_heads = a.heads / a.kv_heads;
    const SequenceSlot slot = locate_rows(a, static_cast<int32_t>(blockIdx.y));
    if (slot.sequence < 0) {
        return;
    }
    const int32_t begin = a.sequence_begin[slot.sequence];
    const int32_t end = a.sequence_begin[slot.sequence + 1];
    const int32_t first_tile = slot.offset * (kRows / kQueries);
    const int32_t tiles = (end - begin + kQueries - 1) / kQueries - first_tile;
    const int32_t steps = tiles * group_heads;
    const uint32_t k_tile = shared_address(shared);
    const uint32_t v_tile = k_tile + Shared::kKeyBytes;
    const int32_t key_row = begin + slot.offset * kRows;
    load_rows<kHeadDim, kRows, kThreads>(k_tile, a.k, a.kv_heads, kv_head, key_row, end);
    load_rows<kHeadDim, kRows, kThreads>(v_tile, a.v, a.kv_heads, kv_head, key_row, end);
    QueryTiles<kHeadDim> queries{
        a, k_tile, begin, end, kv_head * group_heads, first_tile, tiles, steps};
    queries.load_next();

    const int group = warp_group();
    const uint32_t group_rows = group * 64 * 128;
    const int32_t key = 64 * group + lane_row();  // of the block's, as is `row` below
    const int quad = threadIdx.x & 3;
    float dk[kHeadDim / 8][4] = {};
    float dv[kHeadDim / 8][4] = {};
    float s[kQueries / 8][4];
    float dp[kQueries / 8][4];
    uint32_t p[kQueries / 16][4];
    uint32_t ds[kQueries / 16][4];
    int32_t tile = 0;
#pragma unroll 1
    for (int32_t step = 0; step < steps; ++step) {
        wait_for_tiles<kThreads>();  // Both groups are done with the last step, too.
        const int32_t stage = step % kStages;
        const uint32_t q_tile = k_tile + Shared::kStage + stage * 2 * Shared::kQueryBytes;
        const uint32_t o_tile = q_tile + Shared::kQueryBytes;
        wgmma_begin();
        start_scores<kHeadDim, kRows, kQueries>(s, k_tile + group_rows, q_tile);
        start_scores<kHeadDim, kRows, kQueries>(dp, v_tile + group_rows, o_tile);
        queries.load_next();
        const auto* lse =
            reinterpret_cast<const float2*>(shared + Shared::kNumbers) + stage * kQueries + quad;
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
        // Rows past the end need no mask: their queries and gradients are zeros, and so are all
        // products with them.
        if (tile < kRows / kQueries) {
            const int32_t row = tile * kQueries + 2 * quad;
#pragma unroll
            for (int j = 0; j < kQueries / 8; ++j) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    s[j][c] = key + 8 * (c >> 1) <= row + 8 * j + (c & 1) ? s[j][c] : 0.0f;
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
        tile = tile + 1 == tiles ? 0 : tile + 1;
    }
    wgmma_wait<0>();
    pin_registers(dk);
    pin_registers(dv);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t token = key_row + key + 8 * i;
        if (token < end) {
            const int64_t at = (token * a.kv_heads + kv_head) * kHeadDim + 2 * quad;
            store_scaled<kHeadDim>(a.dk + at, dk, a.scale, i);
            store_fragments<kHeadDim>(a.dv + at, dv, i);
        }
    }
}

template <int kHeadDim>
void launch(cudaStream_t queue, const BackwardArgs& a) {
    // Long blocks of all heads start first.
    const unsigned blocks = grid_dim_yz(a.num_tokens / kRows + a.num_sequences);
    constexpr int kQueryBytes = QueryShared<kHeadDim>::kBytes;
    allow_shared_memory(dq_wgmma_kernel<kHeadDim>, kQueryBytes);
    dq_wgmma_kernel<kHeadDim><<<dim3(grid_dim(a.heads), blocks), kThreads, kQueryBytes, queue>>>(a);
    LAUNCH_CHECK();
    constexpr int kKeyBytes = KeyShared<kHeadDim>::kBytes;
    allow_shared_memory(dkv_wgmma_kernel<kHeadDim>, kKeyBytes);
    dkv_wgmma_kernel<kHeadDim>
        <<<dim3(grid_dim(a.kv_heads), blocks), kThreads, kKeyBytes, queue>>>(a);
    LAUNCH_CHECK();
}

}  // namespace

void launch_backward_wgmma(cudaStream_t queue, const BackwardArgs& a, int64_t head_dim) {
    if (head_dim == 64) {
        launch<64>(queue, a);
    } else {
        launch<128>(queue, a);
    }
}

}  // namespace orbit::cuda
