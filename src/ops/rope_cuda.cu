// Per-head RMSNorm and rotary embedding: one warp a head, the head in shared memory as float32; or,
// for heads of 128 channels whose halves are rotated against each other, four heads a warp in
// registers.
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
    release_successor();
    wait_for_predecessor();
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

// Heads of 128 channels, all of them rotated, channel i with i + 64: a lane holds channels 2 l,
// 2 l + 1 and their partners. The sums run in the order of norm_rope_kernel.
constexpr int kWideHead = 128;
constexpr int kWideRows = 4;  // of a warp

struct LaneHead {
    float2 low;
    float2 high;

    static __device__ __forceinline__ LaneHead load(const bf16* row) {
        const auto* words = reinterpret_cast<const uint32_t*>(row) + (threadIdx.x & 31);
        const uint32_t a = words[0];
        const uint32_t b = words[32];
        return {{low_bf16(a), high_bf16(a)}, {low_bf16(b), high_bf16(b)}};
    }

    static __device__ __forceinline__ LaneHead load(const float* row) {
        const auto* words = reinterpret_cast<const float2*>(row) + (threadIdx.x & 31);
        return {words[0], words[32]};
    }

    __device__ __forceinline__ void store(bf16* row) const {
        auto* words = reinterpret_cast<uint32_t*>(row) + (threadIdx.x & 31);
        words[0] = pack_bf16(low.x, low.y);
        words[32] = pack_bf16(high.x, high.y);
    }
};

__device__ __forceinline__ LaneHead scaled(const LaneHead& h, float scale) {
    return {
        {__fmul_rn(h.low.x, scale), __fmul_rn(h.low.y, scale)},
        {__fmul_rn(h.high.x, scale), __fmul_rn(h.high.y, scale)}};
}

__device__ __forceinline__ LaneHead times(const LaneHead& h, const LaneHead& w) {
    return {
        {__fmul_rn(h.low.x, w.low.x), __fmul_rn(h.low.y, w.low.y)},
        {__fmul_rn(h.high.x, w.high.x), __fmul_rn(h.high.y, w.high.y)}};
}

// The warp's sum of a times b.
__device__ __forceinline__ float dot_of(const LaneHead& a, const LaneHead& b) {
    float sum = __fmaf_rn(a.low.x, b.low.x, 0.0f);
    sum = __fmaf_rn(a.low.y, b.low.y, sum);
    sum = __fmaf_rn(a.high.x, b.high.x, sum);
    sum = __fmaf_rn(a.high.y, b.high.y, sum);
    return warp_sum(sum);
}

// The lane's two angles at the row's position.
struct LaneAngles {
    float2 c;
    float2 s;

    __device__ __forceinline__ LaneAngles(const RopeArgs& p, int64_t row) {
        const int64_t at = static_cast<int64_t>(p.positions[row / p.heads]) * (kWideHead / 2) +
                           2 * (threadIdx.x & 31);
        c = *reinterpret_cast<const float2*>(p.rope.cosine + at);
        s = *reinterpret_cast<const float2*>(p.rope.sine + at);
    }
};

__global__ void __launch_bounds__(kWarps * 32) norm_rope_wide_kernel(RopeArgs p, bf16* y) {
    release_successor();
    wait_for_predecessor();
    const int64_t first =
        (static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5)) * kWideRows;
    LaneHead heads[kWideRows];
#pragma unroll
    for (int r = 0; r < kWideRows; ++r) {
        const int64_t row = min(first + r, p.num_rows - 1);
        heads[r] = LaneHead::load(p.x + row * kWideHead);
    }
    const bool norms = p.norm_weight != nullptr;
    const LaneHead weight = norms ? LaneHead::load(p.norm_weight) : LaneHead{};
#pragma unroll
    for (int r = 0; r < kWideRows; ++r) {
        const int64_t row = first + r;
        if (row >= p.num_rows) {
            return;
        }
        const LaneAngles at(p, row);
        LaneHead h = heads[r];
        if (norms) {
            h = times(scaled(h, head_scale(p, dot_of(h, h))), weight);
        }
        LaneHead out;
        out.low.x = __fsub_rn(__fmul_rn(h.low.x, at.c.x), __fmul_rn(h.high.x, at.s.x));
        out.low.y = __fsub_rn(__fmul_rn(h.low.y, at.c.y), __fmul_rn(h.high.y, at.s.y));
        out.high.x = __fadd_rn(__fmul_rn(h.low.x, at.s.x), __fmul_rn(h.high.x, at.c.x));
        out.high.y = __fadd_rn(__fmul_rn(h.low.y, at.s.y), __fmul_rn(h.high.y, at.c.y));
        out.store(y + row * kWideHead);
    }
}

__global__ void __launch_bounds__(kWarps * 32)
    norm_rope_wide_backward_kernel(RopeArgs p, const bf16* dy, bf16* dx) {
    release_successor();
    wait_for_predecessor();
    const int64_t first =
        (static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5)) * kWideRows;
    LaneHead grads[kWideRows];
    LaneHead heads[kWideRows];
#pragma unroll
    for (int r = 0; r < kWideRows; ++r) {
        const int64_t row = min(first + r, p.num_rows - 1);
        grads[r] = LaneHead::load(dy + row * kWideHead);
        heads[r] = LaneHead::load(p.x + row * kWideHead);
    }
    const bool norms = p.norm_weight != nullptr;
    const LaneHead weight = norms ? LaneHead::load(p.norm_weight) : LaneHead{};
#pragma unroll
    for (int r = 0; r < kWideRows; ++r) {
        const int64_t row = first + r;
        if (row >= p.num_rows) {
            return;
        }
        const LaneAngles at(p, row);
        const LaneHead& g = grads[r];
        LaneHead out;
        out.low.x = __fadd_rn(__fmul_rn(g.low.x, at.c.x), __fmul_rn(g.high.x, at.s.x));
        out.low.y = __fadd_rn(__fmul_rn(g.low.y, at.c.y), __fmul_rn(g.high.y, at.s.y));
        out.high.x = __fsub_rn(__fmul_rn(g.high.x, at.c.x), __fmul_rn(g.low.x, at.s.x));
        out.high.y = __fsub_rn(__fmul_rn(g.high.y, at.c.y), __fmul_rn(g.low.y, at.s.y));
        if (norms) {
            const LaneHead turned = times(out, weight);
            const LaneHead& x = heads[r];
            const float scale = head_scale(p, dot_of(x, x));
            const float cube = __fmul_rn(__fmul_rn(scale, scale), scale);
            const float factor =
                __fdiv_rn(__fmul_rn(cube, dot_of(turned, x)), static_cast<float>(kWideHead));
            const LaneHead straight = scaled(turned, scale);
            const LaneHead away = scaled(x, factor);
            out.low.x = __fsub_rn(straight.low.x, away.low.x);
            out.low.y = __fsub_rn(straight.low.y, away.low.y);
            out.high.x = __fsub_rn(straight.high.x, away.high.x);
            out.high.y = __fsub_rn(straight.high.y, away.high.y);
        }
        out.store(dx + row * kWideHead);
    }
}

bool is_wide(const RopeArgs& p) {
    return p.head_dim == kWideHead && p.rope.rotary_dim == kWideHead && !p.rope.interleaved;
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
    const bool wide = is_wide(args);
    launch_early(
        wide ? norm_rope_wide_kernel : norm_rope_kernel,
        dim3(grid_dim(ceil_div(args.num_rows, wide ? kWarps * kWideRows : kWarps))),
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
    const bool wide = is_wide(args);
    launch_early(
        wide ? norm_rope_wide_backward_kernel : norm_rope_backward_kernel,
        dim3(grid_dim(ceil_div(args.num_rows, wide ? kWarps * kWideRows : kWarps))),
        kWarps * 32,
        0,
        queue_of(stream),
        args,
        activations(dy),
        activations(dx)
    );
}

}  // namespace orbit::cuda
