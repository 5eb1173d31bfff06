// Routing on the GPU: softmax and top-k, the stable sort of rows by expert, gather and combine,
// and their backward. Nothing here waits for the host: the counts stay on the device.
#include "device/cuda/check.cuh"
#include "device/cuda/math.cuh"
#include "device/cuda/rows.cuh"
#include "ops/cuda_ops.h"

namespace orbit::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRouteWarps = 4;     // tokens of one block
constexpr int kRoutedMost = 1024;  // experts
constexpr int kFewPerLane = 4;     // experts of a lane: 128, most models' number
constexpr int kMostPerLane = kRoutedMost / 32;
constexpr int kSortThreads = 256;

struct RouteArgs {
    float* scores;  // [tokens, experts]: logits in, softmax out
    int32_t* expert;
    float* weight;
    int32_t tokens;
    int32_t experts;
    int32_t selected;
    bool normalize;
    BatchView batch;
    int32_t layer;
    RoutingPages record;
    RoutingPages replay;
};

// Where the ids of a token lie.
__device__ __forceinline__ char* record_place(
    const RouteArgs& a, const RoutingPages& pages, int64_t token
) {
    const int64_t position = a.batch.positions[token];
    const int64_t row = static_cast<int64_t>(a.batch.sequence_of[token]) * a.batch.max_blocks;
    const int64_t page = a.batch.block_table[row + position / kPageTokens];
    const int64_t at = page * kPageTokens + position % kPageTokens;
    const int64_t layer_bytes = static_cast<int64_t>(pages.selected) * (pages.wide ? 2 : 1);
    return static_cast<char*>(pages.ids) + (at * pages.layers + a.layer) * layer_bytes;
}

// Keeps the token's choice, and takes the recorded one instead of it, each if asked to.
__device__ __forceinline__ void record_or_replay(
    const RouteArgs& a, int64_t token, int32_t* expert
) {
    const int lane = threadIdx.x & 31;
    if (a.record.ids != nullptr) {
        char* to = record_place(a, a.record, token);
        for (int32_t k = lane; k < a.selected; k += 32) {
            if (a.record.wide) {
                reinterpret_cast<uint16_t*>(to)[k] = static_cast<uint16_t>(expert[k]);
            } else {
                reinterpret_cast<uint8_t*>(to)[k] = static_cast<uint8_t>(expert[k]);
            }
        }
    }
    if (a.replay.ids != nullptr) {
        const char* from = record_place(a, a.replay, token);
        for (int32_t k = lane; k < a.selected; k += 32) {
            expert[k] = a.replay.wide ? reinterpret_cast<const uint16_t*>(from)[k]
                                      : reinterpret_cast<const uint8_t*>(from)[k];
        }
    }
    __syncwarp();
}

// A warp a token: lane l holds the experts l, l + 32, ...
template <int kPerLane>
__device__ __forceinline__ float softmax_row(float (&s)[kPerLane], int32_t experts) {
    const int lane = threadIdx.x & 31;
    float top = __uint_as_float(0xff800000u);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        top = lane + 32 * i < experts ? fmaxf(top, s[i]) : top;
    }
    top = warp_max(top);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        s[i] = lane + 32 * i < experts ? exp_f32(__fsub_rn(s[i], top)) : 0.0f;
        sum = __fadd_rn(sum, s[i]);
    }
    return warp_sum(sum);
}

// The expert with the largest score that is not taken yet; the lower one of equals.
template <int kPerLane>
__device__ __forceinline__ int32_t
next_expert(const float (&s)[kPerLane], uint32_t taken, int32_t experts) {
    const int lane = threadIdx.x & 31;
    float best = -1.0f;
    int32_t at = 0x7fffffff;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const int32_t e = lane + 32 * i;
        const float score = s[i] == s[i] ? s[i] : 0.0f;  // a NaN still leads to some expert
        if (e < experts && ((taken >> i) & 1u) == 0u && score > best) {
            best = score;
            at = e;
        }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        const float other = __shfl_xor_sync(kFullWarp, best, offset);
        const int32_t other_at = __shfl_xor_sync(kFullWarp, at, offset);
        if (other > best || (other == best && other_at < at)) {
            best = other;
            at = other_at;
        }
    }
    return at;
}

template <int kPerLane>
__global__ void __launch_bounds__(32 * kRouteWarps) route_kernel(RouteArgs a) {
    release_successor();
    wait_for_predecessor();
    const int lane = threadIdx.x & 31;
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kRouteWarps + (threadIdx.x >> 5);
    if (token >= a.tokens) {
        return;
    }
    float* row = a.scores + token * a.experts;
    float s[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        s[i] = lane + 32 * i < a.experts ? row[lane + 32 * i] : 0.0f;
    }
    const float sum = softmax_row(s, a.experts);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        s[i] = __fdiv_rn(s[i], sum);
        if (lane + 32 * i < a.experts) {
            row[lane + 32 * i] = s[i];
        }
    }
    __syncwarp();  // the sums below read the row's scores of other lanes
    uint32_t taken = 0;
    for (int32_t k = 0; k < a.selected; ++k) {
        const int32_t e = next_expert(s, taken, a.experts);
        if ((e & 31) == lane) {
            taken |= 1u << (e >> 5);
        }
    }
    // In ascending order: 32 experts at a time, the lane's place is the number of taken ones below.
    int32_t before = 0;
    int32_t* expert = a.expert + token * a.selected;
    for (int i = 0; i * 32 < a.experts; ++i) {
        const bool mine = ((taken >> i) & 1u) != 0u;
        const uint32_t ballot = __ballot_sync(kFullWarp, mine);
        if (mine) {
            expert[before + __popc(ballot & ((1u << lane) - 1u))] = lane + 32 * i;
        }
        before += __popc(ballot);
    }
    __syncwarp();
    record_or_replay(a, token, expert);
    float chosen = 0.0f;
#pragma unroll 8
    for (int32_t k = 0; k < a.selected; ++k) {
        chosen = __fadd_rn(chosen, row[expert[k]]);
    }
    float* weight = a.weight + token * a.selected;
    for (int32_t k = lane; k < a.selected; k += 32) {
        const float score = row[expert[k]];
        weight[k] = a.normalize ? __fdiv_rn(score, chosen) : score;
    }
}

// Block e finds where the rows of expert e begin, and gives them their places in the order of
// tokens.
__global__ void __launch_bounds__(kSortThreads) sort_kernel(Routing r, int64_t rows) {
    release_successor();
    wait_for_predecessor();
    __shared__ int32_t shared[kSortThreads / 32];
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const auto e = static_cast<int32_t>(blockIdx.x);
    int32_t below = 0;
    for (int64_t i = threadIdx.x; i < rows; i += kSortThreads) {
        below += r.expert[i] < e ? 1 : 0;
    }
    int32_t next = block_sum<kSortThreads / 32>(below, shared);
    if (threadIdx.x == 0) {
        r.offsets[e] = next;
    }
    for (int64_t first = 0; first < rows; first += kSortThreads) {
        const int64_t i = first + threadIdx.x;
        const bool mine = i < rows && r.expert[i] == e;
        const uint32_t ballot = __ballot_sync(kFullWarp, mine);
        __syncthreads();
        if (lane == 0) {
            shared[warp] = __popc(ballot);
        }
        __syncthreads();
        int32_t before = 0;
        int32_t total = 0;
#pragma unroll
        for (int w = 0; w < kSortThreads / 32; ++w) {
            before += w < warp ? shared[w] : 0;
            total += shared[w];
        }
        if (mine) {
            const int32_t row = next + before + __popc(ballot & ((1u << lane) - 1u));
            r.row_of[i] = row;
            r.token_of[row] = static_cast<int32_t>(i / r.num_selected);
        }
        next += total;
    }
    if (threadIdx.x == 0 && e + 1 == r.num_experts) {
        r.offsets[e + 1] = next;
    }
}

// dz = s (ds - sum_j ds_j s_j), ds of the chosen from their weights; 1.6 of models.md.
__global__ void __launch_bounds__(32 * kRouteWarps)
    route_backward_kernel(Routing r, bool normalize, const float* d_weight, float* dz) {
    release_successor();
    wait_for_predecessor();
    const int lane = threadIdx.x & 31;
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kRouteWarps + (threadIdx.x >> 5);
    if (token >= r.num_tokens) {
        return;
    }
    const float* s = r.scores + token * r.num_experts;
    const float* dw = d_weight + token * r.num_selected;
    const int32_t* expert = r.expert + token * r.num_selected;
    float sum = 0.0f;
    float dot = 0.0f;
    for (int32_t k = 0; k < r.num_selected; ++k) {
        sum = __fadd_rn(sum, s[expert[k]]);
        dot = __fadd_rn(dot, __fmul_rn(dw[k], s[expert[k]]));
    }
    const auto ds = [&](int32_t k) {
        return normalize ? __fdiv_rn(__fsub_rn(dw[k], __fdiv_rn(dot, sum)), sum) : dw[k];
    };
    float through = 0.0f;
    for (int32_t k = 0; k < r.num_selected; ++k) {
        through = __fadd_rn(through, __fmul_rn(ds(k), s[expert[k]]));
    }
    float* out = dz + token * r.num_experts;
    for (int32_t e = lane; e < r.num_experts; e += 32) {
        float d = 0.0f;
        for (int32_t k = 0; k < r.num_selected; ++k) {
            d = expert[k] == e ? ds(k) : d;
        }
        out[e] = __fmul_rn(s[e], __fsub_rn(d, through));
    }
}

// y[r] = x[token_of[r]].
__global__ void __launch_bounds__(kThreads)
    dispatch_kernel(const bf16* x, const int32_t* token_of, bf16* y, int64_t cols) {
    release_successor();
    wait_for_predecessor();
    const bf16* from = x + token_of[blockIdx.x] * cols;
    bf16* to = y + blockIdx.x * cols;
    const bool aligned = cols % 8 == 0;
    for (int64_t i = threadIdx.x; 8 * i < cols; i += kThreads) {
        store_eight(to, i, cols, aligned, load_eight(from, i, cols, aligned));
    }
}

// y[t] = round(base + sum over k, ascending, of weight * x[row]). Without weights they are 1.
struct CombineArgs {
    const bf16* x;
    const int32_t* row_of;
    const float* weight;  // or null
    const bf16* base;     // or null
    bool base_first;      // the sum starts at base instead of ending with it
    bf16* y;
    int64_t cols;
    int32_t selected;
};

__global__ void __launch_bounds__(kThreads) combine_kernel(CombineArgs a) {
    release_successor();
    wait_for_predecessor();
    const int64_t token = blockIdx.x;
    const bool aligned = a.cols % 8 == 0;
    const Eight zero{};
    const int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
    if (8 * i < a.cols) {
        const Eight base =
            a.base == nullptr ? zero : load_eight(a.base + token * a.cols, i, a.cols, aligned);
        Eight sum = a.base_first ? base : zero;
#pragma unroll 8
        for (int32_t k = 0; k < a.selected; ++k) {
            const int64_t at = token * a.selected + k;
            const Eight v = load_eight(a.x + a.row_of[at] * a.cols, i, a.cols, aligned);
            const float w = a.weight == nullptr ? 1.0f : a.weight[at];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                sum.v[j] = __fadd_rn(sum.v[j], __fmul_rn(w, v.v[j]));
            }
        }
        if (!a.base_first) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                sum.v[j] = __fadd_rn(sum.v[j], base.v[j]);
            }
        }
        store_eight(a.y + token * a.cols, i, a.cols, aligned, sum);
    }
}

// dx[row] = weight dy[t] and d_weight = dy[t] . x[row]: a block for each (t, k).
__global__ void __launch_bounds__(kThreads) combine_backward_kernel(
    Routing r, const bf16* x, const bf16* dy, bf16* dx, float* d_weight, int64_t cols
) {
    release_successor();
    wait_for_predecessor();
    __shared__ float shared[kThreads / 32];
    const int64_t at = blockIdx.x;
    const bf16* g = dy + at / r.num_selected * cols;
    const int64_t row = r.row_of[at];
    const float weight = r.weight[at];
    const bool aligned = cols % 8 == 0;
    float dot = 0.0f;
    for (int64_t i = threadIdx.x; 8 * i < cols; i += kThreads) {
        Eight d = load_eight(g, i, cols, aligned);
        const Eight v = load_eight(x + row * cols, i, cols, aligned);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            dot = __fmaf_rn(d.v[j], v.v[j], dot);
            d.v[j] = __fmul_rn(weight, d.v[j]);
        }
        store_eight(dx + row * cols, i, cols, aligned, d);
    }
    dot = block_sum<kThreads / 32>(dot, shared);
    if (threadIdx.x == 0) {
        d_weight[at] = dot;
    }
}

int64_t rows_of(const Routing& r) {
    return static_cast<int64_t>(r.num_tokens) * r.num_selected;
}

void launch_route(cudaStream_t queue, const RouteArgs& args) {
    const bool few = args.experts <= 32 * kFewPerLane;
    launch_early(
        few ? route_kernel<kFewPerLane> : route_kernel<kMostPerLane>,
        dim3(grid_dim(ceil_div(args.tokens, kRouteWarps))),
        32 * kRouteWarps,
        0,
        queue,
        args
    );
}

void launch_combine(Stream& stream, const Routing& r, const CombineArgs& args) {
    if (r.num_tokens > 0) {
        const dim3 grid(
            grid_dim(r.num_tokens), grid_dim_yz(ceil_div(args.cols, int64_t{8} * kThreads))
        );
        launch_early(combine_kernel, grid, kThreads, 0, queue_of(stream), args);
    }
}

}  // namespace

void route(Stream& stream, const RouterParams& p, const Routing& r) {
    CHECK_LE(r.num_experts, kRoutedMost);
    if (r.num_tokens == 0) {
        zero_fill(stream, r.offsets, sizeof(int32_t) * static_cast<size_t>(r.num_experts + 1));
        return;
    }
    cuda::linear_f32_out(
        stream, p.x, p.weight, make_tensor(r.scores, DType::kF32, {r.num_tokens, r.num_experts})
    );
    const cudaStream_t queue = queue_of(stream);
    const RouteArgs args{
        r.scores,
        r.expert,
        r.weight,
        r.num_tokens,
        r.num_experts,
        r.num_selected,
        p.normalize,
        p.batch,
        p.layer,
        p.record,
        p.replay};
    launch_route(queue, args);
    launch_early(sort_kernel, dim3(grid_dim(r.num_experts)), kSortThreads, 0, queue, r, rows_of(r));
}

void route_backward(
    Stream& stream, const RouterParams& p, const Routing& r, const float* d_weight, Tensor dx
) {
    if (r.num_tokens == 0) {
        return;
    }
    const ScratchScope scope(stream.scratch);
    const Tensor dz = stream.scratch.take(DType::kF32, {r.num_tokens, r.num_experts});
    launch_early(
        route_backward_kernel,
        dim3(grid_dim(ceil_div(r.num_tokens, kRouteWarps))),
        32 * kRouteWarps,
        0,
        queue_of(stream),
        r,
        p.normalize,
        d_weight,
        dz.as<float>()
    );
    const Tensor from_router = stream.scratch.take(dx.dtype, {dx.rows(), dx.cols()});
    cuda::linear_f32_out_backward(stream, dz, p.weight, from_router);
    cuda::add(stream, dx, from_router, dx);
}

void dispatch_rows(Stream& stream, const Routing& r, Tensor x, Tensor y) {
    if (rows_of(r) > 0) {
        launch_early(
            dispatch_kernel,
            dim3(grid_dim(rows_of(r))),
            kThreads,
            0,
            queue_of(stream),
            activations(x),
            r.token_of,
            activations(y),
            x.cols()
        );
    }
}

void dispatch_rows_backward(
    Stream& stream, const Routing& r, Tensor dy, Tensor dx, bool accumulate
) {
    bf16* out = activations(dx);
    const bf16* base = accumulate ? out : nullptr;
    launch_combine(
        stream, r, {activations(dy), r.row_of, nullptr, base, true, out, dx.cols(), r.num_selected}
    );
}

void combine_rows(Stream& stream, const Routing& r, Tensor x, Tensor residual, Tensor y) {
    const bf16* base = residual.defined() ? activations(residual) : nullptr;
    launch_combine(
        stream,
        r,
        {activations(x), r.row_of, r.weight, base, false, activations(y), y.cols(), r.num_selected}
    );
}

void combine_rows_backward(
    Stream& stream, const Routing& r, Tensor x, Tensor dy, Tensor dx, float* d_weight
) {
    if (rows_of(r) > 0) {
        launch_early(
            combine_backward_kernel,
            dim3(grid_dim(rows_of(r))),
            kThreads,
            0,
            queue_of(stream),
            r,
            activations(x),
            activations(dy),
            activations(dx),
            d_weight,
            dy.cols()
        );
    }
}

}  // namespace orbit::cuda
