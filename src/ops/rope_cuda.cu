// Per-head RMSNorm and rotary embedding: one warp a head, the head in shared memory as float32.
#include "device/cuda/check.cuh"
#include "device/cuda/math.cuh"
#include "device/cuda/rows.cuh"
#include "ops/cuda_ops.h"

namespace orbit::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxHeadDim = 256;

struct RopeArgs {
    const bf16* x;
    const float* norm_weight;
    float eps;
    RopeTable rope;
    const int32_t* positions;
    int32_t heads;
    int32_t head_dim;
    int64_t num_rows;  // tokens * heads
};

struct Pair {
    int a;      // channel of the first element
    int b;      // of the second
    int index;  // column of the table
};

// The rotated pair that channel i belongs to.
__device__ __forceinline__ Pair pair_of(const RopeTable& rope, int i) {
    if (rope.interleaved) {
        return Pair{i & ~1, i | 1, i >> 1};
    }
    const int half = rope.rotary_dim / 2;
    const int index = i < half ? i : i - half;
    return Pair{index, index + half, index};
}

__device__ __forceinline__ float head_scale(const RopeArgs& p, float squares) {
    const float mean = __fdiv_rn(squares, static_cast<float>(p.head_dim));
    return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, p.eps)));
}

// Channel i after the rotation.
__device__ __forceinline__ float rotated_channel(
    const RopeArgs& p, const float* head, int64_t table, int i
) {
    if (i >= p.rope.rotary_dim) {
        return head[i];
    }
    const Pair pair = pair_of(p.rope, i);
    const float c = p.rope.cosine[table + pair.index];
    const float s = p.rope.sine[table + pair.index];
    return i == pair.a ? __fsub_rn(__fmul_rn(head[i], c), __fmul_rn(head[pair.b], s))
                       : __fadd_rn(__fmul_rn(head[pair.a], s), __fmul_rn(head[i], c));
}

__global__ void __launch_bounds__(kWarps * 32) norm_rope_kernel(RopeArgs p, bf16* y) {
    __shared__ float shared[kWarps][kMaxHeadDim];
    release_successor();
    wait_for_predecessor();
    const int lane = threadIdx.x & 31;
    float* head = shared[threadIdx.x >> 5];
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5);
    if (row >= p.num_rows) {
        return;
    }
    // Two neighbouring channels a lane: head_dim is even.
    const bf16* x = p.x + row * p.head_dim;
    float squares = 0.0f;
    for (int i = 2 * lane; i < p.head_dim; i += 64) {
        const auto two = *reinterpret_cast<const uint32_t*>(x + i);
        head[i] = low_bf16(two);
        head[i + 1] = high_bf16(two);
        squares = __fmaf_rn(head[i], head[i], squares);
        squares = __fmaf_rn(head[i + 1], head[i + 1], squares);
    }
    if (p.norm_weight != nullptr) {
        const float scale = head_scale(p, warp_sum(squares));
        for (int i = 2 * lane; i < p.head_dim; i += 64) {
            const float2 w = *reinterpret_cast<const float2*>(p.norm_weight + i);
            head[i] = __fmul_rn(__fmul_rn(head[i], scale), w.x);
            head[i + 1] = __fmul_rn(__fmul_rn(head[i + 1], scale), w.y);
        }
    }
    __syncwarp();
    const int64_t table =
        static_cast<int64_t>(p.positions[row / p.heads]) * (p.rope.rotary_dim / 2);
    for (int i = 2 * lane; i < p.head_dim; i += 64) {
        *reinterpret_cast<uint32_t*>(y + row * p.head_dim + i) =
            pack_bf16(rotated_channel(p, head, table, i), rotated_channel(p, head, table, i + 1));
    }
}

__global__ void __launch_bounds__(kWarps * 32)
    norm_rope_backward_kernel(RopeArgs p, const bf16* dy, bf16* dx) {
    __shared__ float shared[kWarps][kMaxHeadDim];
    const int lane = threadIdx.x & 31;
    float* grad = shared[threadIdx.x >> 5];
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5);
    if (row >= p.num_rows) {
        return;
    }
    const int64_t offset = row * p.head_dim;
    for (int i = lane; i < p.head_dim; i += 32) {
        grad[i] = to_float(dy[offset + i]);
    }
    __syncwarp();
    const int64_t table =
        static_cast<int64_t>(p.positions[row / p.heads]) * (p.rope.rotary_dim / 2);
    float turned[kMaxHeadDim / 32];
    float squares = 0.0f;
    float dot = 0.0f;
#pragma unroll
    for (int j = 0; j < kMaxHeadDim / 32; ++j) {
        const int i = lane + 32 * j;
        turned[j] = 0.0f;
        if (i < p.head_dim) {
            float value = grad[i];
            if (i < p.rope.rotary_dim) {
                const Pair pair = pair_of(p.rope, i);
                const float c = p.rope.cosine[table + pair.index];
                const float s = p.rope.sine[table + pair.index];
                value = i == pair.a ? __fadd_rn(__fmul_rn(value, c), __fmul_rn(grad[pair.b], s))
                                    : __fsub_rn(__fmul_rn(value, c), __fmul_rn(grad[pair.a], s));
            }
            const float xi = to_float(p.x[offset + i]);
            turned[j] = p.norm_weight != nullptr ? __fmul_rn(value, p.norm_weight[i]) : value;
            squares = __fmaf_rn(xi, xi, squares);
            dot = __fmaf_rn(turned[j], xi, dot);
        }
    }
    squares = warp_sum(squares);
    dot = warp_sum(dot);
    const float scale = head_scale(p, squares);
    const float factor = __fdiv_rn(
        __fmul_rn(__fmul_rn(__fmul_rn(scale, scale), scale), dot), static_cast<float>(p.head_dim)
    );
#pragma unroll
    for (int j = 0; j < kMaxHeadDim / 32; ++j) {
        const int i = lane + 32 * j;
        if (i < p.head_dim) {
            float value = turned[j];
            if (p.norm_weight != nullptr) {
                value = __fsub_rn(
                    __fmul_rn(value, scale), __fmul_rn(to_float(p.x[offset + i]), factor)
                );
            }
            dx[offset + i] = round_bf16(value);
        }
    }
}

RopeArgs rope_args(const NormRopeParams& p) {
    CHECK_EQ(p.x.rank, 3);
    CHECK_LE(p.x.shape[2], kMaxHeadDim);
    CHECK_EQ(p.x.shape[2] % 2, 0);
    CHECK_LE(p.rope.rotary_dim, p.x.shape[2]);
    return RopeArgs{
        activations(p.x),
        p.norm_weight,
        p.eps,
        p.rope,
        p.positions,
        static_cast<int32_t>(p.x.shape[1]),
        static_cast<int32_t>(p.x.shape[2]),
        p.x.shape[0] * p.x.shape[1],
    };
}

}  // namespace

void norm_rope(Stream& stream, const NormRopeParams& p, Tensor y) {
    const RopeArgs args = rope_args(p);
    if (args.num_rows == 0) {
        return;
    }
    launch_early(
        norm_rope_kernel,
        dim3(grid_dim(ceil_div(args.num_rows, kWarps))),
        kWarps * 32,
        0,
        queue_of(stream),
        args,
        activations(y)
    );
}

void norm_rope_backward(Stream& stream, const NormRopeParams& p, Tensor dy, Tensor dx) {
    const RopeArgs args = rope_args(p);
    if (args.num_rows == 0) {
        return;
    }
    norm_rope_backward_kernel<<<
        grid_dim(ceil_div(args.num_rows, kWarps)),
        kWarps * 32,
        0,
        queue_of(stream)>>>(args, activations(dy), activations(dx));
    LAUNCH_CHECK();
}

}  // namespace orbit::cuda
