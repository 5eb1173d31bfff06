// Per-head RMSNorm and rotary embedding: one warp a head, the head in shared memory as float32; or,
// for heads of 128 channels whose halves are rotated against each other, one or four heads a warp
// in registers. One launch takes q, k and v, whose rows other warps append to the pages.
#include "device/cuda/check.cuh"
#include "device/cuda/math.cuh"
#include "device/cuda/rows.cuh"
#include "ops/cuda_ops.h"

namespace orbit::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxHeadDim = 256;

// The heads of one tensor.
struct HeadRows {
    const bf16* x;
    bf16* y;                   // null in backward
    const float* norm_weight;  // or null
    int32_t heads;             // of a token
    int32_t count;             // tokens * heads
};

struct RopeArgs {
    float eps;
    RopeTable rope;
    const int32_t* positions;
    int32_t head_dim;
    HeadRows q;  // or the only tensor
    HeadRows k;  // no rows: q is the only tensor
};

// Where k after the rotation, and v, go to. v has the rows of k.
struct AppendArgs {
    const bf16* v;
    bf16* k_pages;
    bf16* v_pages;
    const int32_t* sequence_of;
    const int32_t* block_table;
    int32_t max_blocks;
};

enum class Part { kQ, kK, kV };

// The rows of a warp: `first` and up to kRows - 1 after it.
struct WarpRows {
    Part part;
    int32_t first;
};

template <int kRows>
__device__ __forceinline__ WarpRows warp_rows(const RopeArgs& p) {
    int32_t unit =
        static_cast<int32_t>(blockIdx.x) * kWarps + static_cast<int32_t>(threadIdx.x >> 5);
    const int32_t of_q = (p.q.count + kRows - 1) / kRows;
    const int32_t of_k = (p.k.count + kRows - 1) / kRows;
    if (unit < of_q) {
        return WarpRows{Part::kQ, unit * kRows};
    }
    unit -= of_q;
    return unit < of_k ? WarpRows{Part::kK, unit * kRows}
                       : WarpRows{Part::kV, (unit - of_k) * kRows};
}

__device__ __forceinline__ int32_t token_of(int32_t row, int32_t heads) {
    return static_cast<int32_t>(static_cast<uint32_t>(row) / static_cast<uint32_t>(heads));
}

// First value of row `row` of k or v in the pages.
__device__ __forceinline__ int64_t
place_of(const RopeArgs& p, const AppendArgs& a, int32_t row, int32_t token) {
    const int32_t position = p.positions[token];
    const int64_t page =
        a.block_table
            [static_cast<int64_t>(a.sequence_of[token]) * a.max_blocks + position / kPageTokens];
    const int32_t head = row - token * p.k.heads;
    return ((page * p.k.heads + head) * kPageTokens + position % kPageTokens) * p.head_dim;
}

template <int kRows>
__device__ __forceinline__ void append_values(
    const RopeArgs& p, const AppendArgs& a, int32_t first
) {
    const int words = p.head_dim / 2;  // of two channels
    const int32_t end = min(first + kRows, p.k.count);
    for (int32_t row = first; row < end; ++row) {
        const auto* from =
            reinterpret_cast<const uint32_t*>(a.v) + static_cast<int64_t>(row) * words;
        auto* to =
            reinterpret_cast<uint32_t*>(a.v_pages + place_of(p, a, row, token_of(row, p.k.heads)));
        for (int i = static_cast<int>(threadIdx.x & 31); i < words; i += 32) {
            to[i] = from[i];
        }
    }
}

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

template <bool kAppends>
__global__ void __launch_bounds__(kWarps * 32) norm_rope_kernel(RopeArgs p, AppendArgs append) {
    __shared__ float shared[kWarps][kMaxHeadDim];
    release_successor();
    wait_for_predecessor();
    const int lane = threadIdx.x & 31;
    float* head = shared[threadIdx.x >> 5];
    const WarpRows w = warp_rows<1>(p);
    if (w.part == Part::kV) {
        if constexpr (kAppends) {
            append_values<1>(p, append, w.first);
        }
        return;
    }
    const HeadRows rows = w.part == Part::kQ ? p.q : p.k;
    const int64_t offset = static_cast<int64_t>(w.first) * p.head_dim;
    // Two neighbouring channels a lane: head_dim is even.
    float squares = 0.0f;
    for (int i = 2 * lane; i < p.head_dim; i += 64) {
        const auto two = *reinterpret_cast<const uint32_t*>(rows.x + offset + i);
        head[i] = low_bf16(two);
        head[i + 1] = high_bf16(two);
        squares = __fmaf_rn(head[i], head[i], squares);
        squares = __fmaf_rn(head[i + 1], head[i + 1], squares);
    }
    if (rows.norm_weight != nullptr) {
        const float scale = head_scale(p, warp_sum(squares));
        for (int i = 2 * lane; i < p.head_dim; i += 64) {
            const float2 w2 = *reinterpret_cast<const float2*>(rows.norm_weight + i);
            head[i] = __fmul_rn(__fmul_rn(head[i], scale), w2.x);
            head[i + 1] = __fmul_rn(__fmul_rn(head[i + 1], scale), w2.y);
        }
    }
    __syncwarp();
    const int32_t token = token_of(w.first, rows.heads);
    const int64_t table = static_cast<int64_t>(p.positions[token]) * (p.rope.rotary_dim / 2);
    bf16* page_row = nullptr;
    if constexpr (kAppends) {
        if (w.part == Part::kK) {
            page_row = append.k_pages + place_of(p, append, w.first, token);
        }
    }
    for (int i = 2 * lane; i < p.head_dim; i += 64) {
        const uint32_t two =
            pack_bf16(rotated_channel(p, head, table, i), rotated_channel(p, head, table, i + 1));
        *reinterpret_cast<uint32_t*>(rows.y + offset + i) = two;
        if (page_row != nullptr) {
            *reinterpret_cast<uint32_t*>(page_row + i) = two;
        }
    }
}

__global__ void __launch_bounds__(kWarps * 32)
    norm_rope_backward_kernel(RopeArgs p, const bf16* dy, bf16* dx) {
    __shared__ float shared[kWarps][kMaxHeadDim];
    release_successor();
    wait_for_predecessor();
    const int lane = threadIdx.x & 31;
    float* grad = shared[threadIdx.x >> 5];
    const WarpRows w = warp_rows<1>(p);
    if (w.part != Part::kQ) {
        return;
    }
    const int64_t offset = static_cast<int64_t>(w.first) * p.head_dim;
    for (int i = lane; i < p.head_dim; i += 32) {
        grad[i] = to_float(dy[offset + i]);
    }
    __syncwarp();
    const int32_t token = token_of(w.first, p.q.heads);
    const int64_t table = static_cast<int64_t>(p.positions[token]) * (p.rope.rotary_dim / 2);
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
            const float xi = to_float(p.q.x[offset + i]);
            turned[j] = p.q.norm_weight != nullptr ? __fmul_rn(value, p.q.norm_weight[i]) : value;
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
            if (p.q.norm_weight != nullptr) {
                value = __fsub_rn(
                    __fmul_rn(value, scale), __fmul_rn(to_float(p.q.x[offset + i]), factor)
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

// The lane's share of the sum of a times b.
__device__ __forceinline__ float dot_of(const LaneHead& a, const LaneHead& b) {
    float sum = __fmaf_rn(a.low.x, b.low.x, 0.0f);
    sum = __fmaf_rn(a.low.y, b.low.y, sum);
    sum = __fmaf_rn(a.high.x, b.high.x, sum);
    return __fmaf_rn(a.high.y, b.high.y, sum);
}

// warp_sum() of each of a warp's rows with the same additions, for the lanes of row
// lane / (32 / kRows) alone: on the way each half, then each quarter, keeps the rows that are its.
template <int kRows>
__device__ __forceinline__ float sum_of_own_row(const float (&shares)[kRows]) {
    static_assert(kRows == 1 || kRows == 4);
    if constexpr (kRows == 1) {
        return warp_sum(shares[0]);
    } else {
        const auto keep = [](float first, float second, int distance) {
            const bool is_second = (threadIdx.x & distance) != 0;
            const float given = is_second ? first : second;
            const float kept = is_second ? second : first;
            return __fadd_rn(kept, __shfl_xor_sync(kFullWarp, given, distance));
        };
        float sum = keep(keep(shares[0], shares[2], 16), keep(shares[1], shares[3], 16), 8);
#pragma unroll
        for (int distance = 4; distance > 0; distance >>= 1) {
            sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, distance));
        }
        return sum;
    }
}

// What the lanes of row r have, for all lanes.
template <int kRows>
__device__ __forceinline__ float of_row(float own, int r) {
    return kRows == 1 ? own : __shfl_sync(kFullWarp, own, r * (32 / kRows));
}

// The lane's two angles at the token's position.
struct LaneAngles {
    float2 c;
    float2 s;

    __device__ __forceinline__ LaneAngles(const RopeArgs& p, int32_t token) {
        const int64_t at =
            static_cast<int64_t>(p.positions[token]) * (kWideHead / 2) + 2 * (threadIdx.x & 31);
        c = *reinterpret_cast<const float2*>(p.rope.cosine + at);
        s = *reinterpret_cast<const float2*>(p.rope.sine + at);
    }
};

template <int kRows>
__device__ __forceinline__ void load_rows(
    LaneHead (&heads)[kRows], const bf16* x, int32_t first, int32_t count
) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        heads[r] = LaneHead::load(x + static_cast<int64_t>(min(first + r, count - 1)) * kWideHead);
    }
}

template <int kRows, bool kAppends>
__global__ void __launch_bounds__(kWarps * 32)
    norm_rope_wide_kernel(RopeArgs p, AppendArgs append) {
    release_successor();
    const WarpRows w = warp_rows<kRows>(p);
    if (w.part == Part::kV) {
        wait_for_predecessor();
        if constexpr (kAppends) {
            append_values<kRows>(p, append, w.first);
        }
        return;
    }
    const HeadRows rows = w.part == Part::kQ ? p.q : p.k;
    const bool norms = rows.norm_weight != nullptr;
    const LaneHead weight = norms ? LaneHead::load(rows.norm_weight) : LaneHead{};
    // The batch's positions are there before the forward's first kernel.
    const LaneAngles first_at(p, token_of(min(w.first, rows.count - 1), rows.heads));
    wait_for_predecessor();
    LaneHead heads[kRows];
    load_rows(heads, rows.x, w.first, rows.count);
    float own_scale = 1.0f;
    if (norms) {
        float squares[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            squares[r] = dot_of(heads[r], heads[r]);
        }
        own_scale = head_scale(p, sum_of_own_row(squares));
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int32_t row = w.first + r;
        if (row >= rows.count) {
            return;
        }
        const int32_t token = token_of(row, rows.heads);
        const LaneAngles at = r == 0 ? first_at : LaneAngles(p, token);
        LaneHead h = heads[r];
        if (norms) {
            h = times(scaled(h, of_row<kRows>(own_scale, r)), weight);
        }
        LaneHead out;
        out.low.x = __fsub_rn(__fmul_rn(h.low.x, at.c.x), __fmul_rn(h.high.x, at.s.x));
        out.low.y = __fsub_rn(__fmul_rn(h.low.y, at.c.y), __fmul_rn(h.high.y, at.s.y));
        out.high.x = __fadd_rn(__fmul_rn(h.low.x, at.s.x), __fmul_rn(h.high.x, at.c.x));
        out.high.y = __fadd_rn(__fmul_rn(h.low.y, at.s.y), __fmul_rn(h.high.y, at.c.y));
        out.store(rows.y + static_cast<int64_t>(row) * kWideHead);
        if constexpr (kAppends) {
            if (w.part == Part::kK) {
                out.store(append.k_pages + place_of(p, append, row, token));
            }
        }
    }
}

__global__ void __launch_bounds__(kWarps * 32)
    norm_rope_wide_backward_kernel(RopeArgs p, const bf16* dy, bf16* dx) {
    release_successor();
    wait_for_predecessor();
    const WarpRows w = warp_rows<kWideRows>(p);
    if (w.part != Part::kQ) {
        return;
    }
    LaneHead grads[kWideRows];
    LaneHead heads[kWideRows];
    load_rows(grads, dy, w.first, p.q.count);
    load_rows(heads, p.q.x, w.first, p.q.count);
    const bool norms = p.q.norm_weight != nullptr;
    const LaneHead weight = norms ? LaneHead::load(p.q.norm_weight) : LaneHead{};
    LaneHead turned[kWideRows];
    float squares[kWideRows];
    float dots[kWideRows];
#pragma unroll
    for (int r = 0; r < kWideRows; ++r) {
        const int32_t row = min(w.first + r, p.q.count - 1);
        const LaneAngles at(p, token_of(row, p.q.heads));
        const LaneHead& g = grads[r];
        LaneHead& out = turned[r];
        out.low.x = __fadd_rn(__fmul_rn(g.low.x, at.c.x), __fmul_rn(g.high.x, at.s.x));
        out.low.y = __fadd_rn(__fmul_rn(g.low.y, at.c.y), __fmul_rn(g.high.y, at.s.y));
        out.high.x = __fsub_rn(__fmul_rn(g.high.x, at.c.x), __fmul_rn(g.low.x, at.s.x));
        out.high.y = __fsub_rn(__fmul_rn(g.high.y, at.c.y), __fmul_rn(g.low.y, at.s.y));
        out = norms ? times(out, weight) : out;
        squares[r] = dot_of(heads[r], heads[r]);
        dots[r] = dot_of(out, heads[r]);
    }
    float own_scale = 1.0f;
    float own_factor = 0.0f;
    if (norms) {
        own_scale = head_scale(p, sum_of_own_row(squares));
        const float cube = __fmul_rn(__fmul_rn(own_scale, own_scale), own_scale);
        const float sum = sum_of_own_row(dots);
        own_factor = __fdiv_rn(__fmul_rn(cube, sum), static_cast<float>(kWideHead));
    }
#pragma unroll
    for (int r = 0; r < kWideRows; ++r) {
        const int32_t row = w.first + r;
        if (row >= p.q.count) {
            return;
        }
        LaneHead out = turned[r];
        if (norms) {
            const LaneHead straight = scaled(out, of_row<kWideRows>(own_scale, r));
            const LaneHead away = scaled(heads[r], of_row<kWideRows>(own_factor, r));
            out.low.x = __fsub_rn(straight.low.x, away.low.x);
            out.low.y = __fsub_rn(straight.low.y, away.low.y);
            out.high.x = __fsub_rn(straight.high.x, away.high.x);
            out.high.y = __fsub_rn(straight.high.y, away.high.y);
        }
        out.store(dx + static_cast<int64_t>(row) * kWideHead);
    }
}

// ---- host ---------------------------------------------------------------------------------------

bool is_wide(const RopeArgs& p) {
    return p.head_dim == kWideHead && p.rope.rotary_dim == kWideHead && !p.rope.interleaved;
}

HeadRows head_rows(const NormRopeParams& p, bf16* y) {
    const int64_t count = p.x.shape[0] * p.x.shape[1];
    CHECK_EQ(p.x.rank, 3);
    CHECK_LT(count, int64_t{1} << 31);
    const auto heads = static_cast<int32_t>(p.x.shape[1]);
    return HeadRows{activations(p.x), y, p.norm_weight, heads, static_cast<int32_t>(count)};
}

RopeArgs rope_args(const NormRopeParams& p, bf16* y) {
    CHECK_EQ(p.x.rank, 3);
    CHECK_LE(p.x.shape[2], kMaxHeadDim);
    CHECK_EQ(p.x.shape[2] % 2, 0);
    CHECK_LE(p.rope.rotary_dim, p.x.shape[2]);
    RopeArgs args{};
    args.eps = p.eps;
    args.rope = p.rope;
    args.positions = p.positions;
    args.head_dim = static_cast<int32_t>(p.x.shape[2]);
    args.q = head_rows(p, y);
    return args;
}

template <typename Kernel, typename... Arguments>
void launch_warps(Stream& stream, Kernel* kernel, int64_t warps, const Arguments&... arguments) {
    const dim3 grid(grid_dim(ceil_div(warps, kWarps)));
    launch_early(kernel, grid, kWarps * 32, 0, queue_of(stream), arguments...);
}

// Of q, and k and v if they are there. Warps take one row each up to so many, as measured.
template <bool kAppends>
void rotate(Stream& stream, const RopeArgs& p, const AppendArgs& append) {
    constexpr int64_t kFewRows = 16384;
    const auto warps = [&](int64_t rows) {
        return ceil_div(p.q.count, rows) + (kAppends ? 2 : 1) * ceil_div(p.k.count, rows);
    };
    if (!is_wide(p)) {
        launch_warps(stream, norm_rope_kernel<kAppends>, warps(1), p, append);
    } else if (warps(1) <= kFewRows) {
        launch_warps(stream, norm_rope_wide_kernel<1, kAppends>, warps(1), p, append);
    } else {
        const auto kernel = norm_rope_wide_kernel<kWideRows, kAppends>;
        launch_warps(stream, kernel, warps(kWideRows), p, append);
    }
}

}  // namespace

void norm_rope(Stream& stream, const NormRopeParams& p, Tensor y) {
    const RopeArgs args = rope_args(p, activations(y));
    if (args.q.count > 0) {
        rotate<false>(stream, args, AppendArgs{});
    }
}

void norm_rope_append(Stream& stream, const RopeAppendParams& p, Tensor q, Tensor k) {
    RopeArgs args = rope_args(p.q, activations(q));
    if (args.q.count == 0) {
        return;
    }
    args.k = head_rows(p.k, activations(k));
    AppendArgs append{};
    append.v = activations(p.v);
    append.k_pages = activations(p.kv.k_pages);
    append.v_pages = activations(p.kv.v_pages);
    append.sequence_of = p.batch.sequence_of;
    append.block_table = p.batch.block_table;
    append.max_blocks = p.batch.max_blocks;
    rotate<true>(stream, args, append);
}

void norm_rope_backward(Stream& stream, const NormRopeParams& p, Tensor dy, Tensor dx) {
    const RopeArgs args = rope_args(p, nullptr);
    if (args.q.count == 0) {
        return;
    }
    const bool wide = is_wide(args);
    launch_warps(
        stream,
        wide ? norm_rope_wide_backward_kernel : norm_rope_backward_kernel,
        ceil_div(args.q.count, wide ? kWideRows : 1),
        args,
        activations(dy),
        activations(dx)
    );
}

}  // namespace orbit::cuda
