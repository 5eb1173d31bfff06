// The grouped linear op on the GPU: adapters of every expert around the grouped matmul.
#include "device/cuda/check.cuh"
#include "device/cuda/rows.cuh"
#include "ops/cuda_ops.h"
#include "ops/dense_cuda.cuh"
#include "ops/grouped_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kOuterRows = 64;    // columns of `a` in one block
constexpr int kOuterTokens = 32;  // staged at a time

int64_t padded_rank(int64_t rank) {
    return ceil_div(rank, 16) * 16;
}

// Bytes from one pointer to the next, which must be the same for all: the loader and the adapter
// store place experts that way.
template <typename At>
int64_t distance_of(size_t count, const char* what, const At& at) {
    if (count < 2) {
        return 0;
    }
    const auto address = [&](size_t i) { return reinterpret_cast<intptr_t>(at(i)); };
    const intptr_t distance = address(1) - address(0);
    for (size_t i = 2; i < count; ++i) {
        USER_CHECK(
            address(i) - address(i - 1) == distance,
            "the {} of a layer's experts differ in layout, which a GPU cannot use yet; adapt all "
            "experts alike, or use device = \"cpu\".",
            what
        );
    }
    return distance;
}

// Weights and, if there are any, adapters of all experts as one strided view.
struct Experts {
    std::span<const QuantizedMatrix> weights;
    std::span<const AdapterView> adapters;

    AdapterKind kind() const { return adapters.empty() ? AdapterKind::kNone : adapters[0].kind; }

    void check() const {
        for (const QuantizedMatrix& w : weights) {
            CHECK(w.format == weights[0].format, "(experts of one format)");
            CHECK(w.rows == weights[0].rows && w.cols == weights[0].cols);
            CHECK(w.global_divides == weights[0].global_divides);
        }
        CHECK_LE(weights.size(), size_t{kExpertsMax});
        for (const AdapterView& view : adapters) {
            const bool alike = view.kind == adapters[0].kind &&
                               view.lora_scale == adapters[0].lora_scale &&
                               view.lora_a.shape[0] == adapters[0].lora_a.shape[0] &&
                               view.oft_d.shape[1] == adapters[0].oft_d.shape[1];
            USER_CHECK(
                alike,
                "some experts of a layer are adapted in another way than others, which a GPU "
                "cannot do yet; use device = \"cpu\"."
            );
        }
    }

    int64_t weight_distance() const {
        return distance_of(weights.size(), "weights", [&](size_t e) { return weights[e].data; });
    }

    int64_t scale_distance() const {
        return distance_of(weights.size(), "scales", [&](size_t e) {
            const void* block_scales = weights[e].block_scales;
            return weights[e].scales != nullptr ? weights[e].scales : block_scales;
        });
    }

    // Elements between the tensors that `member` gives.
    int64_t adapter_distance(Tensor AdapterView::*member) const {
        return distance_of(
                   adapters.size(), "adapters", [&](size_t e) { return (adapters[e].*member).data; }
               ) /
               static_cast<int64_t>(sizeof(bf16));
    }
};

QuantizedMatrix as_weight(const Tensor& t) {
    QuantizedMatrix w;
    w.rows = t.shape[0];
    w.cols = t.shape[1];
    w.data = activations(t);
    return w;
}

// y = x w^T of every expert, or x w backward; the caller completes the epilogue.
GroupedArgs grouped_args(
    const GroupedLinearParams& p,
    const Tensor& x,
    const QuantizedMatrix& w,
    const Tensor& y,
    Direction direction
) {
    const bool forward = direction == Direction::kForward;
    CHECK_EQ(x.cols(), forward ? w.cols : w.rows);
    CHECK_EQ(x.rows(), y.rows());
    CHECK_LT(x.rows(), int64_t{1} << 31);
    GroupedArgs g;
    g.offsets = p.offsets;
    g.experts = static_cast<int32_t>(p.experts.size());
    g.rows = static_cast<int32_t>(x.rows());
    MatmulArgs& a = g.one;
    a.x = activations(x);
    a.ldx = x.cols();
    a.w = weight_view(w);
    a.n = static_cast<int32_t>(forward ? w.rows : w.cols);
    a.k = static_cast<int32_t>(forward ? w.cols : w.rows);
    a.segment = static_cast<int32_t>(ceil_div(a.k, kTileK) * kTileK);  // experts are many: one
    a.epilogue.y = activations(y);
    a.epilogue.ldy = y.cols();
    a.epilogue.columns = static_cast<int32_t>(y.cols());
    return g;
}

GroupedArgs base_args(
    const GroupedLinearParams& p, const Tensor& x, const Tensor& y, Direction direction
) {
    const Experts experts{p.experts, p.adapters};
    GroupedArgs g = grouped_args(p, x, p.experts[0], y, direction);
    g.weight_distance = experts.weight_distance();
    g.scale_distance = p.experts[0].scale_bytes() == 0 ? 0 : experts.scale_distance();
    for (size_t e = 0; e < p.experts.size(); ++e) {
        g.global_scales[e] = p.experts[e].global_scale;
    }
    return g;
}

// The product with the experts' own weights: decoded inside the kernel, or, where the caller gives
// memory for it, before it and as many experts at a time as fit. The bits are the same.
void multiply_base(
    const Stream& stream, const GroupedLinearParams& p, Direction direction, const GroupedArgs& g
) {
    const QuantizedMatrix& w = p.experts[0];
    const cudaStream_t queue = queue_of(stream);
    const int64_t expert_bytes = w.rows * w.cols * static_cast<int64_t>(sizeof(bf16));
    const int64_t fit = p.dequant == nullptr ? 0 : p.dequant->bytes() / expert_bytes;
    const int64_t chunk = std::min<int64_t>(g.experts, fit);
    if (w.format == WeightFormat::kBF16 || chunk == 0 || w.cols % 32 != 0) {
        grouped_matmul(queue, w.format, direction, g);
        return;
    }
    QuantizedMatrix decoded;
    decoded.rows = w.rows;
    decoded.cols = w.cols;
    decoded.data = p.dequant->memory();
    for (int64_t first = 0; first < g.experts; first += chunk) {
        GroupedArgs part = g;
        part.experts = static_cast<int32_t>(std::min(chunk, g.experts - first));
        decode_experts(
            queue, w.format, g, static_cast<int32_t>(first), part.experts, p.dequant->memory()
        );
        part.offsets += first;
        part.one.w = weight_view(decoded);
        part.weight_distance = expert_bytes;
        part.scale_distance = 0;
        part.one.epilogue.lora_b += first * g.lora_b_distance;
        grouped_matmul(queue, WeightFormat::kBF16, direction, part);
    }
}

GroupedArgs adapter_args(
    const GroupedLinearParams& p,
    const Tensor& x,
    Tensor AdapterView::*member,
    const Tensor& y,
    Direction direction
) {
    const Experts experts{p.experts, p.adapters};
    GroupedArgs g = grouped_args(p, x, as_weight(p.adapters[0].*member), y, direction);
    g.weight_distance = experts.adapter_distance(member) * static_cast<int64_t>(sizeof(bf16));
    return g;
}

// u = round(x A^T), [rows, padded rank], zero past the rank.
Tensor shrink(Stream& stream, const GroupedLinearParams& p) {
    const int64_t rank = p.adapters[0].lora_a.shape[0];
    const Tensor u = stream.scratch.take(DType::kBF16, {p.x.rows(), padded_rank(rank)});
    grouped_matmul(
        queue_of(stream),
        WeightFormat::kBF16,
        Direction::kForward,
        adapter_args(p, p.x, &AdapterView::lora_a, u, Direction::kForward)
    );
    return u;
}

void add_low_rank(
    GroupedArgs& g,
    const GroupedLinearParams& p,
    const Tensor& u,
    Tensor AdapterView::*member,
    float scale
) {
    const Experts experts{p.experts, p.adapters};
    Epilogue& e = g.one.epilogue;
    e.lora_u = activations(u);
    e.lora_b = activations(p.adapters[0].*member);
    e.ldu = static_cast<int32_t>(u.cols());
    e.rank = static_cast<int32_t>(p.adapters[0].lora_a.shape[0]);
    e.ldb = static_cast<int32_t>((p.adapters[0].*member).shape[1]);
    e.lora_scale = scale;
    g.lora_b_distance = experts.adapter_distance(member);
}

void rotate_rows(
    Stream& stream,
    const GroupedLinearParams& p,
    const Tensor& x,
    const Tensor& y,
    bool transpose,
    bool accumulate
) {
    const Experts experts{p.experts, p.adapters};
    RotateArgs a;
    a.x = activations(x);
    a.d = activations(p.adapters[0].oft_d);
    a.y = activations(y);
    a.offsets = p.offsets;
    a.distance = experts.adapter_distance(&AdapterView::oft_d);
    a.experts = static_cast<int32_t>(p.experts.size());
    a.width = static_cast<int32_t>(x.cols());
    a.block = static_cast<int32_t>(p.adapters[0].oft_d.shape[1]);
    a.accumulate = accumulate;
    a.rows = static_cast<int32_t>(x.rows());
    rotate(queue_of(stream), a, transpose);
}

// grad[e][n][i * stride_a + j * stride_b] += scale sum over the expert's rows t, ascending, of
// a[t][n a_width + i] b[t][n b_step + j], i < a_width, j < b_width.
struct OuterRows {
    const bf16* a;
    const bf16* b;
    float* grad;
    const int32_t* offsets;
    int64_t lda;
    int64_t ldb;
    int64_t distance;    // floats between the experts' gradients
    int64_t block_step;  // floats between the gradients of n and n + 1
    int64_t stride_a;
    int64_t stride_b;
    int32_t a_width;
    int32_t b_width;
    int32_t b_step;
    float scale;
};

// Block (tile of i, tile of j and n, expert); a thread owns kOuterRows * kWidthB / kThreads sums.
template <int kWidthB>
__global__ void __launch_bounds__(kThreads) outer_rows_kernel(OuterRows o, int32_t tiles_b) {
    constexpr int kSums = kOuterRows * kWidthB / kThreads;
    __shared__ float a_tile[kOuterTokens][kOuterRows];
    __shared__ float b_tile[kOuterTokens][kWidthB];
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const int64_t n = blockIdx.y / tiles_b;
    const int32_t i0 = static_cast<int32_t>(blockIdx.x) * kOuterRows;
    const int32_t j0 = static_cast<int32_t>(blockIdx.y) % tiles_b * kWidthB;
    const int32_t begin = o.offsets[blockIdx.z];
    const int32_t end = o.offsets[blockIdx.z + 1];
    if (begin == end) {
        return;
    }
    const int32_t j = thread % kWidthB;
    const int32_t i_first = thread / kWidthB * kSums;
    float sum[kSums] = {};
    for (int32_t first = begin; first < end; first += kOuterTokens) {
        const int32_t count = min(kOuterTokens, end - first);
        for (int32_t at = thread; at < count * kOuterRows; at += kThreads) {
            const int32_t t = at / kOuterRows;
            const int32_t i = at % kOuterRows;
            a_tile[t][i] = i0 + i < o.a_width
                               ? to_float(o.a[(first + t) * o.lda + n * o.a_width + i0 + i])
                               : 0.0f;
        }
        for (int32_t at = thread; at < count * kWidthB; at += kThreads) {
            const int32_t t = at / kWidthB;
            const int32_t k = at % kWidthB;
            b_tile[t][k] = j0 + k < o.b_width
                               ? to_float(o.b[(first + t) * o.ldb + n * o.b_step + j0 + k])
                               : 0.0f;
        }
        __syncthreads();
        for (int32_t t = 0; t < count; ++t) {
            const float b = b_tile[t][j];
#pragma unroll
            for (int r = 0; r < kSums; ++r) {
                sum[r] = __fmaf_rn(a_tile[t][i_first + r], b, sum[r]);
            }
        }
        __syncthreads();
    }
    float* grad = o.grad + blockIdx.z * o.distance + n * o.block_step;
#pragma unroll
    for (int r = 0; r < kSums; ++r) {
        const int32_t i = i0 + i_first + r;
        if (i < o.a_width && j0 + j < o.b_width) {
            float* at = grad + i * o.stride_a + (j0 + j) * o.stride_b;
            *at = __fadd_rn(*at, __fmul_rn(o.scale, sum[r]));
        }
    }
}

template <int kWidthB>
void launch_outer(cudaStream_t queue, const OuterRows& o, int64_t blocks, size_t experts) {
    const int64_t tiles_b = ceil_div(o.b_width, kWidthB);
    const dim3 grid(
        grid_dim(ceil_div(o.a_width, kOuterRows)),
        grid_dim_yz(blocks * tiles_b),
        grid_dim_yz(static_cast<int64_t>(experts))
    );
    outer_rows_kernel<kWidthB><<<grid, kThreads, 0, queue>>>(o, static_cast<int32_t>(tiles_b));
    LAUNCH_CHECK();
}

void outer_rows(cudaStream_t queue, const OuterRows& o, int64_t blocks, size_t experts) {
    if (o.b_width <= 16) {
        launch_outer<16>(queue, o, blocks, experts);
    } else if (o.b_width <= 32) {
        launch_outer<32>(queue, o, blocks, experts);
    } else {
        launch_outer<64>(queue, o, blocks, experts);
    }
}

// Floats between the experts' gradients that `member` points at.
int64_t grad_distance(std::span<const AdapterGrad> grads, float* AdapterGrad::*member) {
    return distance_of(grads.size(), "gradients", [&](size_t e) { return grads[e].*member; }) /
           static_cast<int64_t>(sizeof(float));
}

// One of LoRA's factors. At distance 0 all experts share it: a sum over all rows.
void factor_gradient(
    Stream& stream, const GroupedLinearParams& p, const LowRankGradient& g, int64_t distance
) {
    if (distance == 0) {
        low_rank_gradient(stream, g);
        return;
    }
    OuterRows o{};
    o.a = g.wide;
    o.b = g.narrow;
    o.grad = g.grad;
    o.offsets = p.offsets;
    o.lda = g.width;
    o.ldb = g.narrow_ld;
    o.distance = distance;
    o.stride_a = g.stride_wide;
    o.stride_b = g.stride_narrow;
    o.a_width = g.width;
    o.b_width = g.rank;
    o.scale = g.scale;
    outer_rows(queue_of(stream), o, 1, p.experts.size());
}

void lora_backward(
    Stream& stream,
    const GroupedLinearParams& p,
    const Tensor& dy,
    const Tensor& dx,
    bool accumulate_dx,
    std::span<const AdapterGrad> grads
) {
    const int64_t rank = p.adapters[0].lora_a.shape[0];
    const float scale = p.adapters[0].lora_scale;
    const cudaStream_t queue = queue_of(stream);
    const Tensor du = stream.scratch.take(DType::kBF16, {dy.rows(), padded_rank(rank)});
    GroupedArgs to_rank = adapter_args(p, dy, &AdapterView::lora_b, du, Direction::kBackward);
    to_rank.one.epilogue.scale = scale;
    grouped_matmul(queue, WeightFormat::kBF16, Direction::kBackward, to_rank);
    if (dx.defined()) {
        GroupedArgs g = base_args(p, dy, dx, Direction::kBackward);
        add_low_rank(g, p, du, &AdapterView::lora_a, 1.0f);
        g.one.epilogue.residual = accumulate_dx ? activations(dx) : nullptr;
        multiply_base(stream, p, Direction::kBackward, g);
    }
    if (grads.empty()) {
        return;
    }
    // dA[j, i] = sum_t du[t, j] x[t, i]
    LowRankGradient g;
    g.rows = static_cast<int32_t>(dy.rows());
    g.rank = static_cast<int32_t>(rank);
    g.narrow_ld = static_cast<int32_t>(du.cols());
    g.wide = activations(p.x);
    g.narrow = activations(du);
    g.width = static_cast<int32_t>(p.x.cols());
    g.stride_wide = 1;
    g.stride_narrow = p.x.cols();
    g.grad = grads[0].lora_a;
    factor_gradient(stream, p, g, grad_distance(grads, &AdapterGrad::lora_a));
    // dB[i, j] = s sum_t dy[t, i] u[t, j]
    g.wide = activations(dy);
    g.narrow = activations(shrink(stream, p));
    g.width = static_cast<int32_t>(dy.cols());
    g.stride_wide = rank;
    g.stride_narrow = 1;
    g.scale = scale;
    g.grad = grads[0].lora_b;
    factor_gradient(stream, p, g, grad_distance(grads, &AdapterGrad::lora_b));
}

void oft_backward(
    Stream& stream,
    const GroupedLinearParams& p,
    const Tensor& dy,
    const Tensor& dx,
    bool accumulate_dx,
    std::span<const AdapterGrad> grads
) {
    const Tensor dxr = stream.scratch.take(DType::kBF16, {p.x.rows(), p.x.cols()});
    multiply_base(stream, p, Direction::kBackward, base_args(p, dy, dxr, Direction::kBackward));
    const auto block = static_cast<int32_t>(p.adapters[0].oft_d.shape[1]);
    const int64_t distance = grad_distance(grads, &AdapterGrad::oft_d);
    if (!grads.empty() && distance == 0) {  // one rotation for all experts
        rotation_gradient(
            stream,
            activations(p.x),
            activations(dxr),
            static_cast<int32_t>(dy.rows()),
            static_cast<int32_t>(p.x.cols()),
            block,
            grads[0].oft_d
        );
    } else if (!grads.empty()) {
        OuterRows o{};
        o.a = activations(p.x);
        o.b = activations(dxr);
        o.grad = grads[0].oft_d;
        o.offsets = p.offsets;
        o.lda = p.x.cols();
        o.ldb = p.x.cols();
        o.distance = distance;
        o.block_step = static_cast<int64_t>(block) * block;
        o.stride_a = block;
        o.stride_b = 1;
        o.a_width = block;
        o.b_width = block;
        o.b_step = block;
        o.scale = 1.0f;
        outer_rows(queue_of(stream), o, p.x.cols() / block, p.experts.size());
    }
    if (dx.defined()) {
        rotate_rows(stream, p, dxr, dx, true, accumulate_dx);
    }
}

}  // namespace

void grouped_matmul(
    cudaStream_t queue, WeightFormat format, Direction direction, const GroupedArgs& args
) {
    switch (format) {
        case WeightFormat::kBF16:
            return grouped_matmul_format<WeightFormat::kBF16>(queue, direction, args);
        case WeightFormat::kInt4:
            return grouped_matmul_format<WeightFormat::kInt4>(queue, direction, args);
        case WeightFormat::kFp8:
            return grouped_matmul_format<WeightFormat::kFp8>(queue, direction, args);
        case WeightFormat::kMxFp4:
            return grouped_matmul_format<WeightFormat::kMxFp4>(queue, direction, args);
        case WeightFormat::kNvFp4:
            return grouped_matmul_format<WeightFormat::kNvFp4>(queue, direction, args);
        default:
            throw UserError(fmt::format(
                "experts in {} do not run on the GPU yet; use device = \"cpu\".",
                format_name(format)
            ));
    }
}

void decode_experts(
    cudaStream_t queue,
    WeightFormat format,
    const GroupedArgs& args,
    int32_t first,
    int32_t count,
    bf16* to
) {
    switch (format) {
        case WeightFormat::kInt4:
            return decode_experts<WeightFormat::kInt4>(queue, args, first, count, to);
        case WeightFormat::kFp8:
            return decode_experts<WeightFormat::kFp8>(queue, args, first, count, to);
        case WeightFormat::kMxFp4:
            return decode_experts<WeightFormat::kMxFp4>(queue, args, first, count, to);
        case WeightFormat::kNvFp4:
            return decode_experts<WeightFormat::kNvFp4>(queue, args, first, count, to);
        default:
            CHECK(false, "(a format that grouped_matmul lets through)");
    }
}

void grouped_linear(Stream& stream, const GroupedLinearParams& p, Tensor y) {
    if (y.rows() == 0) {
        return;
    }
    const ScratchScope scope(stream.scratch);
    const Experts experts{p.experts, p.adapters};
    experts.check();
    Tensor x = p.x;
    if (experts.kind() == AdapterKind::kOft) {
        x = stream.scratch.take(DType::kBF16, {p.x.rows(), p.x.cols()});
        rotate_rows(stream, p, p.x, x, false, false);
    }
    GroupedArgs g = base_args(p, x, y, Direction::kForward);
    CHECK_EQ(static_cast<int64_t>(g.one.n), y.cols());
    if (experts.kind() == AdapterKind::kLora) {
        add_low_rank(g, p, shrink(stream, p), &AdapterView::lora_b, p.adapters[0].lora_scale);
    }
    multiply_base(stream, p, Direction::kForward, g);
}

void grouped_linear_backward(
    Stream& stream,
    const GroupedLinearParams& p,
    Tensor dy,
    Tensor dx,
    bool accumulate_dx,
    std::span<const AdapterGrad> grads
) {
    if (dy.rows() == 0) {
        return;
    }
    const ScratchScope scope(stream.scratch);
    const Experts experts{p.experts, p.adapters};
    experts.check();
    switch (experts.kind()) {
        case AdapterKind::kLora:
            return lora_backward(stream, p, dy, dx, accumulate_dx, grads);
        case AdapterKind::kOft:
            return oft_backward(stream, p, dy, dx, accumulate_dx, grads);
        case AdapterKind::kNone:
            break;
    }
    if (dx.defined()) {
        GroupedArgs g = base_args(p, dy, dx, Direction::kBackward);
        g.one.epilogue.residual = accumulate_dx ? activations(dx) : nullptr;
        multiply_base(stream, p, Direction::kBackward, g);
    }
}

}  // namespace orbit::cuda
