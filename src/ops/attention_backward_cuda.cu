// Attention backward for batches of whole sequences: weights are rebuilt from the log-sum-exp. Two
// passes, so that every sum has one owner and one order: dq by query rows over ascending key tiles;
// dk and dv by key rows over the heads of the group, then ascending query tiles. Hopper has its own
// kernels for both.
#include "device/cuda/rows.cuh"
#include "ops/attention_backward_cuda.cuh"
#include "ops/cuda_ops.h"
#include "ops/matmul_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;  // rows of every tile, 16 a warp

template <int kHeadDim>
struct BackwardTile {
    static constexpr int kBytes = kRows * kHeadDim * 2;
};

// One warp a (token, head).
template <int kHeadDim>
__global__ void __launch_bounds__(256) delta_kernel(BackwardArgs a, int64_t count) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5);
    if (row >= count) {
        return;
    }
    const int lane = threadIdx.x & 31;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 64; ++i) {
        const int64_t at = row * kHeadDim + 64 * i + 2 * lane;
        const auto o = *reinterpret_cast<const uint32_t*>(a.o + at);
        const auto d = *reinterpret_cast<const uint32_t*>(a.d_o + at);
        sum = __fmaf_rn(low_bf16(o), low_bf16(d), sum);
        sum = __fmaf_rn(high_bf16(o), high_bf16(d), sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
        a.delta[row] = sum;
    }
}

// s[i][j] = a row . b row, both tiles in shared memory: 16 rows of a, 8 kFragments rows of b.
template <int kHeadDim, int kFragments>
__device__ __forceinline__ void score_rows(
    float (&s)[kFragments][4], uint32_t a_tile, int a_row, uint32_t b_tile, int b_row
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
        uint32_t a[4];
        ldmatrix_x4(
            a[0],
            a[1],
            a[2],
            a[3],
            a_tile + tile_offset<kRows>(a_row + (lane & 15), 2 * step + (lane >> 4))
        );
#pragma unroll
        for (int j = 0; j < kFragments; j += 2) {
            uint32_t b[4];
            const int row = b_row + 8 * j + (lane & 7) + ((lane >> 4) << 3);
            ldmatrix_x4(
                b[0],
                b[1],
                b[2],
                b[3],
                b_tile + tile_offset<kRows>(row, 2 * step + ((lane >> 3) & 1))
            );
            mma_16816(s[j], a, b[0], b[1]);
            mma_16816(s[j + 1], a, b[2], b[3]);
        }
    }
}

__device__ __forceinline__ SequenceSlot locate_tile(const BackwardArgs& a, int32_t index) {
    return locate(a.sequence_begin, a.num_sequences, index, [](int32_t length) {
        return (length + kRows - 1) / kRows;
    });
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) dq_kernel(BackwardArgs a) {
    extern __shared__ __align__(1024) char shared[];
    constexpr int kTileBytes = BackwardTile<kHeadDim>::kBytes;
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const auto head = static_cast<int32_t>(blockIdx.y);
    const int32_t kv_head = head / (a.heads / a.kv_heads);
    const SequenceSlot slot = locate_tile(a, static_cast<int32_t>(gridDim.x - 1 - blockIdx.x));
    if (slot.sequence < 0) {
        return;
    }
    const int32_t begin = a.sequence_begin[slot.sequence];
    const int32_t end = a.sequence_begin[slot.sequence + 1];
    const uint32_t base = shared_address(shared);
    const int32_t tiles = slot.offset + 1;
    const auto load = [&](int32_t tile) {
        if (tile < tiles) {
            const uint32_t to = base + (tile & 1) * 2 * kTileBytes;
            const int32_t row = begin + tile * kRows;
            load_rows<kHeadDim, kRows, kThreads>(to, a.k, a.kv_heads, kv_head, row, end);
            load_rows<kHeadDim, kRows, kThreads>(
                to + kTileBytes, a.v, a.kv_heads, kv_head, row, end
            );
        }
        copy_async_commit();
    };
    load(0);
    uint32_t q[kHeadDim / 16][4];
    uint32_t d_o[kHeadDim / 16][4];
    float lse2[2];
    float delta[2];
    int32_t row_index[2];
    int64_t head_row[2];
    {
        const bf16* q_row[2];
        const bf16* o_row[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            row_index[i] = slot.offset * kRows + warp * 16 + (lane >> 2) + 8 * i;
            head_row[i] = static_cast<int64_t>(begin + row_index[i]) * a.heads + head;
            const bool valid = begin + row_index[i] < end;
            q_row[i] = valid ? a.q + head_row[i] * kHeadDim : nullptr;
            o_row[i] = valid ? a.d_o + head_row[i] * kHeadDim : nullptr;
            lse2[i] = valid ? __fmul_rn(a.lse[head_row[i]], kLog2E) : 0.0f;
            delta[i] = valid ? a.delta[head_row[i]] : 0.0f;
        }
        load_query<kHeadDim>(q, q_row[0], q_row[1]);
        load_query<kHeadDim>(d_o, o_row[0], o_row[1]);
    }
    float dq[kHeadDim / 8][4] = {};
    for (int32_t tile = 0; tile < tiles; ++tile) {
        load(tile + 1);
        copy_async_wait<1>();
        __syncthreads();
        const uint32_t k_tile = base + (tile & 1) * 2 * kTileBytes;
        float s[kRows / 8][4];
        float dp[kRows / 8][4];
        score_keys<kRows, kHeadDim>(s, q, k_tile, 0);
        score_keys<kRows, kHeadDim>(dp, d_o, k_tile + kTileBytes, 0);
        const int32_t key0 = tile * kRows + 2 * (lane & 3);
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int i = c >> 1;
                const float p = exp2_sfu(__fmaf_rn(s[j][c], a.scale_log2, -lse2[i]));
                const float ds = __fmul_rn(__fmul_rn(p, __fsub_rn(dp[j][c], delta[i])), a.scale);
                s[j][c] = key0 + 8 * j + (c & 1) <= row_index[i] ? ds : 0.0f;
            }
        }
#pragma unroll
        for (int step = 0; step < kRows / 16; ++step) {
            const uint32_t ds[4] = {
                pack_bf16(s[2 * step][0], s[2 * step][1]),
                pack_bf16(s[2 * step][2], s[2 * step][3]),
                pack_bf16(s[2 * step + 1][0], s[2 * step + 1][1]),
                pack_bf16(s[2 * step + 1][2], s[2 * step + 1][3])};
            weigh_values<kRows>(dq, ds, k_tile, 16 * step, 0);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (begin + row_index[i] < end) {
            store_fragments<kHeadDim>(a.dq + head_row[i] * kHeadDim + 2 * (lane & 3), dq, i);
        }
    }
}

// Shared memory of the dk, dv pass: keys and values, then two stages of queries, output gradients
// and their rows' numbers.
template <int kHeadDim>
struct KeyShared {
    static constexpr int kTileBytes = BackwardTile<kHeadDim>::kBytes;
    static constexpr int kStage = 2 * kTileBytes;
    static constexpr int kNumbers = 2 * kTileBytes + 2 * kStage;  // float [2][2][64]
    static constexpr int kBytes = kNumbers + 2 * 2 * kRows * 4;
};

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) dkv_kernel(BackwardArgs a) {
    extern __shared__ __align__(1024) char shared[];
    using Shared = KeyShared<kHeadDim>;
    constexpr int kSub = 32;  // query rows taken at once
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const auto kv_head = static_cast<int32_t>(blockIdx.y);
    const int32_t group = a.heads / a.kv_heads;
    const SequenceSlot slot = locate_tile(a, static_cast<int32_t>(blockIdx.x));
    if (slot.sequence < 0) {
        return;
    }
    const int32_t begin = a.sequence_begin[slot.sequence];
    const int32_t end = a.sequence_begin[slot.sequence + 1];
    const int32_t tiles = (end - begin + kRows - 1) / kRows - slot.offset;  // of queries, a head
    const int32_t items = tiles * group;
    const uint32_t k_tile = shared_address(shared);
    const uint32_t v_tile = k_tile + Shared::kTileBytes;
    const uint32_t stages = v_tile + Shared::kTileBytes;
    auto* numbers = reinterpret_cast<float*>(shared + Shared::kNumbers);
    const auto load = [&](int32_t item) {
        if (item < items) {
            const int32_t head = kv_head * group + item / tiles;
            const int32_t row = begin + (slot.offset + item % tiles) * kRows;
            const uint32_t to = stages + (item & 1) * Shared::kStage;
            load_rows<kHeadDim, kRows, kThreads>(to, a.q, a.heads, head, row, end);
            load_rows<kHeadDim, kRows, kThreads>(
                to + Shared::kTileBytes, a.d_o, a.heads, head, row, end
            );
            const auto t = static_cast<int32_t>(threadIdx.x);
            if (t < kRows) {
                const bool valid = row + t < end;
                const int64_t at = static_cast<int64_t>(row + t) * a.heads + head;
                float* to_numbers = numbers + (item & 1) * 2 * kRows;
                to_numbers[t] = valid ? __fmul_rn(a.lse[at], kLog2E) : 0.0f;
                to_numbers[kRows + t] = valid ? a.delta[at] : 0.0f;
            }
        }
        copy_async_commit();
    };
    const int32_t key_row = begin + slot.offset * kRows;
    load_rows<kHeadDim, kRows, kThreads>(k_tile, a.k, a.kv_heads, kv_head, key_row, end);
    load_rows<kHeadDim, kRows, kThreads>(v_tile, a.v, a.kv_heads, kv_head, key_row, end);
    load(0);
    float dk[kHeadDim / 8][4] = {};
    float dv[kHeadDim / 8][4] = {};
    const int32_t key0 = key_row + warp * 16 + (lane >> 2);
    for (int32_t item = 0; item < items; ++item) {
        load(item + 1);
        copy_async_wait<1>();
        __syncthreads();
        const uint32_t q_tile = stages + (item & 1) * Shared::kStage;
        const uint32_t o_tile = q_tile + Shared::kTileBytes;
        const float* lse2 = numbers + (item & 1) * 2 * kRows;
        const float* delta = lse2 + kRows;
        const int32_t row0 = begin + (slot.offset + item % tiles) * kRows;
#pragma unroll
        for (int sub = 0; sub < kRows; sub += kSub) {
            float p[kSub / 8][4];
            score_rows<kHeadDim>(p, k_tile, warp * 16, q_tile, sub);
#pragma unroll
            for (int j = 0; j < kSub / 8; ++j) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int r = sub + 8 * j + 2 * (lane & 3) + (c & 1);
                    const bool visible = key0 + 8 * (c >> 1) <= row0 + r && row0 + r < end;
                    const float weight = exp2_sfu(__fmaf_rn(p[j][c], a.scale_log2, -lse2[r]));
                    p[j][c] = visible ? weight : 0.0f;
                }
            }
#pragma unroll
            for (int step = 0; step < kSub / 16; ++step) {
                const uint32_t packed[4] = {
                    pack_bf16(p[2 * step][0], p[2 * step][1]),
                    pack_bf16(p[2 * step][2], p[2 * step][3]),
                    pack_bf16(p[2 * step + 1][0], p[2 * step + 1][1]),
                    pack_bf16(p[2 * step + 1][2], p[2 * step + 1][3])};
                weigh_values<kRows>(dv, packed, o_tile, sub + 16 * step, 0);
            }
            float dp[kSub / 8][4];
            score_rows<kHeadDim>(dp, v_tile, warp * 16, o_tile, sub);
#pragma unroll
            for (int j = 0; j < kSub / 8; ++j) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int r = sub + 8 * j + 2 * (lane & 3) + (c & 1);
                    dp[j][c] =
                        __fmul_rn(__fmul_rn(p[j][c], __fsub_rn(dp[j][c], delta[r])), a.scale);
                }
            }
#pragma unroll
            for (int step = 0; step < kSub / 16; ++step) {
                const uint32_t packed[4] = {
                    pack_bf16(dp[2 * step][0], dp[2 * step][1]),
                    pack_bf16(dp[2 * step][2], dp[2 * step][3]),
                    pack_bf16(dp[2 * step + 1][0], dp[2 * step + 1][1]),
                    pack_bf16(dp[2 * step + 1][2], dp[2 * step + 1][3])};
                weigh_values<kRows>(dk, packed, q_tile, sub + 16 * step, 0);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int32_t row = key0 + 8 * i;
        if (row < end) {
            const int64_t at =
                (static_cast<int64_t>(row) * a.kv_heads + kv_head) * kHeadDim + 2 * (lane & 3);
            store_fragments<kHeadDim>(a.dk + at, dk, i);
            store_fragments<kHeadDim>(a.dv + at, dv, i);
        }
    }
}

template <int kHeadDim>
void launch_backward(Stream& stream, const BackwardArgs& a) {
    const cudaStream_t queue = queue_of(stream);
    const int64_t head_rows = static_cast<int64_t>(a.num_tokens) * a.heads;
    delta_kernel<kHeadDim><<<grid_dim(ceil_div(head_rows, 8)), 256, 0, queue>>>(a, head_rows);
    LAUNCH_CHECK();
    if (has_wgmma()) {
        launch_backward_wgmma(stream, a, kHeadDim);
        return;
    }
    const unsigned tiles = grid_dim(a.num_tokens / kRows + a.num_sequences);
    constexpr int kQueryBytes = 4 * BackwardTile<kHeadDim>::kBytes;
    allow_shared_memory(dq_kernel<kHeadDim>, kQueryBytes);
    dq_kernel<kHeadDim><<<dim3(tiles, grid_dim_yz(a.heads)), kThreads, kQueryBytes, queue>>>(a);
    LAUNCH_CHECK();
    allow_shared_memory(dkv_kernel<kHeadDim>, KeyShared<kHeadDim>::kBytes);
    dkv_kernel<kHeadDim>
        <<<dim3(tiles, grid_dim_yz(a.kv_heads)), kThreads, KeyShared<kHeadDim>::kBytes, queue>>>(a);
    LAUNCH_CHECK();
}

}  // namespace

void attention_backward(
    Stream& stream,
    const AttentionParams& p,
    Tensor o,
    const float* lse,
    Tensor d_o,
    Tensor dq,
    Tensor dk,
    Tensor dv
) {
    if (p.batch.num_tokens == 0) {
        return;
    }
    const int64_t head_dim = p.q.shape[2];
    CHECK(head_dim == 64 || head_dim == 128);
    const ScratchScope scope(stream.scratch);
    BackwardArgs a{};
    a.q = activations(p.q);
    a.k = activations(p.k);
    a.v = activations(p.v);
    a.o = activations(o);
    a.d_o = activations(d_o);
    a.lse = lse;
    a.delta = stream.scratch.take(DType::kF32, {p.q.shape[0], p.q.shape[1]}).as<float>();
    a.dq = activations(dq);
    a.dk = activations(dk);
    a.dv = activations(dv);
    a.sequence_begin = p.batch.sequence_begin;
    a.num_tokens = p.batch.num_tokens;
    a.num_sequences = p.batch.num_sequences;
    a.heads = static_cast<int32_t>(p.q.shape[1]);
    a.kv_heads = static_cast<int32_t>(p.k.shape[1]);
    a.scale = p.scale;
    a.scale_log2 = p.scale * kLog2E;
    if (head_dim == 64) {
        launch_backward<64>(stream, a);
    } else {
        launch_backward<128>(stream, a);
    }
}

}  // namespace orbit::cuda
