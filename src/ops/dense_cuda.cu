// The linear op and its backward on the GPU: adapters around the matmul family.
#include <algorithm>
#include <vector>

#include "device/cuda/rows.cuh"
#include "ops/cuda_ops.h"
#include "ops/dense_cuda.cuh"
#include "ops/logprob_cuda.cuh"
#include "ops/matmul_narrow_int4_cuda.cuh"
#include "ops/matmul_one_row_cuda.cuh"
#include "ops/oft_cuda.cuh"

namespace orbit::cuda {
namespace {

int64_t padded_rank(int64_t rank) {
    return ceil_div(rank, 16) * 16;
}

QuantizedMatrix as_weight(const Tensor& t) {
    CHECK_EQ(t.rank, 2);
    QuantizedMatrix w;
    w.format = WeightFormat::kBF16;
    w.rows = t.shape[0];
    w.cols = t.shape[1];
    w.data = activations(t);
    return w;
}

// y[m, n] = x[m, k] w[n, k]^T; the caller adds to the epilogue before running it.
MatmulArgs forward_args(const Tensor& x, const QuantizedMatrix& w, const Tensor& y) {
    CHECK_EQ(x.cols(), w.cols);
    CHECK_EQ(x.rows(), y.rows());
    CHECK_LT(x.rows(), int64_t{1} << 31);
    MatmulArgs a;
    a.x = activations(x);
    a.ldx = x.cols();
    a.w = weight_view(w);
    a.m = static_cast<int32_t>(x.rows());
    a.n = static_cast<int32_t>(w.rows);
    a.k = static_cast<int32_t>(w.cols);
    a.segment = forward_segment(w.rows, w.cols);
    a.epilogue.y = y.data;
    a.epilogue.f32_out = y.dtype == DType::kF32;
    a.epilogue.ldy = y.cols();
    a.epilogue.columns = static_cast<int32_t>(y.cols());
    return a;
}

// y[m, n] = x[m, k] w[k, n].
MatmulArgs backward_args(const Tensor& x, const QuantizedMatrix& w, const Tensor& y) {
    CHECK_EQ(x.cols(), w.rows);
    CHECK_EQ(x.rows(), y.rows());
    MatmulArgs a;
    a.x = activations(x);
    a.ldx = x.cols();
    a.w = weight_view(w);
    a.m = static_cast<int32_t>(x.rows());
    a.n = static_cast<int32_t>(w.cols);
    a.k = static_cast<int32_t>(w.rows);
    a.segment = backward_segment(w.rows);
    a.epilogue.y = activations(y);
    a.epilogue.ldy = y.cols();
    a.epilogue.columns = static_cast<int32_t>(y.cols());
    return a;
}

// u = round(x A^T), [rows, padded rank], zero past the rank; the one that forward left, if it did.
Tensor shrunk(Stream& stream, const LinearParams& p) {
    if (p.lora_u.defined()) {
        return p.lora_u;
    }
    const Tensor u = take_lora_u(stream, p);
    matmul(
        queue_of(stream),
        WeightFormat::kBF16,
        Direction::kForward,
        forward_args(p.x, as_weight(p.adapter.lora_a), u)
    );
    return u;
}

// round(x + x D) or, in backward, of D^T, to y; [rows, width] all of them.
RotateArgs rotate_args(const Tensor& x, const Tensor& oft_d, const Tensor& y) {
    RotateArgs args;
    args.x = activations(x);
    args.d = activations(oft_d);
    args.y = activations(y);
    args.rows = static_cast<int32_t>(x.rows());
    args.width = static_cast<int32_t>(x.cols());
    args.block = static_cast<int32_t>(oft_d.shape[1]);
    CHECK_EQ(args.block * oft_d.shape[0], x.cols());
    return args;
}

// The inputs of products as their rotations give them, one launch where these are alike, which then
// norms the rows that are still to be normed.
void rotate_inputs(Stream& stream, std::span<const LinearParams> params, Tensor (&x)[kMaxGroup]) {
    std::vector<RotateArgs> all;
    std::vector<const bf16*> outputs;
    for (size_t i = 0; i < params.size(); ++i) {
        const LinearParams& p = params[i];
        x[i] = p.x;
        if (p.adapter.kind == AdapterKind::kOft) {
            x[i] = stream.scratch.take(DType::kBF16, {p.x.rows(), p.x.cols()});
            all.push_back(rotate_args(p.x, p.adapter.oft_d, x[i]));
            outputs.push_back(all.back().y);
        }
    }
    const bool alike = std::all_of(all.begin(), all.end(), [&](const RotateArgs& a) {
        return a.x == all[0].x && a.width == all[0].width && a.block == all[0].block;
    });
    if (!alike) {
        for (const RotateArgs& args : all) {
            rotate(queue_of(stream), {&args, 1}, false);
        }
    } else if (!all.empty()) {
        PendingNorm::Norm norm;
        if (rotation_norms(all[0].block)) {
            norm = PendingNorm::take(stream, all[0].x, outputs);
        }
        rotate(queue_of(stream), all, false, norm);
    }
}

// One product with a base's weight.
void multiply(Stream& stream, WeightFormat format, Direction direction, const MatmulArgs& args) {
    MatmulGroup group;
    group.args[0] = args;
    group.count = 1;
    weight_matmul(stream, format, direction, group);
}

__global__ void __launch_bounds__(256)
    add_parts_kernel(const float* parts, int32_t count, int64_t size, bf16* y) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (i >= size) {
        return;
    }
    float sum = parts[i];
    for (int32_t part = 1; part < count; ++part) {
        sum = __fadd_rn(sum, parts[part * size + i]);
    }
    y[i] = round_bf16(sum);
}

void check_supported(WeightFormat format) {
    USER_CHECK(
        format != WeightFormat::kF32 && format != WeightFormat::kF16,
        "F32 and F16 weights are rounded to BF16 at load on a GPU; this one was not."
    );
    USER_CHECK(
        format <= WeightFormat::kNvFp4,
        "{} weights are not supported on a GPU yet; use device = \"cpu\" (--device cpu).",
        format_name(format)
    );
}

// LoraOutputGradient for rows that are not 16-byte aligned.
void output_gradient_alone(
    Stream& stream,
    const LinearParams& p,
    const Tensor& dy,
    const Tensor& du,
    const LoraOutputGradient& a
) {
    MatmulArgs to_rank = backward_args(dy, as_weight(p.adapter.lora_b), du);
    to_rank.epilogue.scale = a.scale;
    matmul(queue_of(stream), WeightFormat::kBF16, Direction::kBackward, to_rank);
    if (a.grad_b == nullptr) {
        return;
    }
    LowRankGradient g;  // dB[o, j] = s sum_t dy[t, o] u[t, j]
    g.wide = a.dy;
    g.narrow = a.u;
    g.rows = static_cast<int32_t>(dy.rows());
    g.width = a.width;
    g.rank = a.rank;
    g.narrow_ld = a.ld;
    g.stride_wide = a.rank;
    g.stride_narrow = 1;
    g.scale = a.scale;
    g.grad = a.grad_b;
    low_rank_gradients(stream, {&g, 1});
}

// LoRA's du = round(scale dy B) of each layer, and its dB.
void output_gradients(
    Stream& stream,
    std::span<const LinearParams> params,
    std::span<const Tensor> dy,
    std::span<const AdapterGrad> grads,
    Tensor (&du)[kMaxGroup]
) {
    std::vector<LoraOutputGradient> together;
    for (size_t i = 0; i < params.size(); ++i) {
        const LinearParams& p = params[i];
        if (p.adapter.kind != AdapterKind::kLora) {
            continue;
        }
        const int64_t rank = p.adapter.lora_a.shape[0];
        du[i] = stream.scratch.take(DType::kBF16, {dy[i].rows(), padded_rank(rank)});
        LoraOutputGradient g;
        g.dy = activations(dy[i]);
        g.b = activations(p.adapter.lora_b);
        g.du = activations(du[i]);
        g.grad_b = grads[i].lora_b;
        g.u = g.grad_b == nullptr ? nullptr : activations(shrunk(stream, p));
        g.width = static_cast<int32_t>(dy[i].cols());
        g.rank = static_cast<int32_t>(rank);
        g.ld = static_cast<int32_t>(du[i].cols());
        g.scale = p.adapter.lora_scale;
        if (fits_output_gradient(g)) {
            together.push_back(g);
        } else {
            output_gradient_alone(stream, p, dy[i], du[i], g);
        }
    }
    if (!together.empty()) {
        lora_output_gradients(stream, together, static_cast<int32_t>(dy[0].rows()));
    }
}

// dA[j, i] = sum_t du[t, j] x[t, i] of each layer.
void input_gradients(
    Stream& stream,
    std::span<const LinearParams> params,
    std::span<const AdapterGrad> grads,
    const Tensor (&du)[kMaxGroup]
) {
    std::vector<LowRankGradient> together;
    for (size_t i = 0; i < params.size(); ++i) {
        const LinearParams& p = params[i];
        if (!du[i].defined() || grads[i].lora_a == nullptr) {
            continue;
        }
        LowRankGradient g;
        g.wide = activations(p.x);
        g.narrow = activations(du[i]);
        g.rows = static_cast<int32_t>(p.x.rows());
        g.width = static_cast<int32_t>(p.x.cols());
        g.rank = static_cast<int32_t>(p.adapter.lora_a.shape[0]);
        g.narrow_ld = static_cast<int32_t>(du[i].cols());
        g.stride_wide = 1;
        g.stride_narrow = p.x.cols();
        g.grad = grads[i].lora_a;
        together.push_back(g);
    }
    if (!together.empty()) {
        low_rank_gradients(stream, together);
    }
}

// dx (+)= the sum over layers of dy through base and LoRA, in one product where a member takes it.
void add_up_inputs(
    Stream& stream,
    std::span<const LinearParams> params,
    std::span<const Tensor> dy,
    const Tensor (&du)[kMaxGroup],
    const Tensor& dx,
    bool accumulate_dx
) {
    MatmulGroup sum;
    bool bf16 = true;
    for (size_t i = 0; i < params.size(); ++i) {
        const LinearParams& p = params[i];
        MatmulArgs a = backward_args(dy[i], p.w, dx);
        if (du[i].defined()) {
            const Tensor& lora_a = p.adapter.lora_a;
            a.epilogue.lora_u = activations(du[i]);
            a.epilogue.lora_b = activations(lora_a);
            a.epilogue.ldu = static_cast<int32_t>(du[i].cols());
            a.epilogue.rank = static_cast<int32_t>(lora_a.shape[0]);
            a.epilogue.ldb = static_cast<int32_t>(lora_a.shape[1]);
            a.epilogue.lora_scale = 1.0f;
        }
        a.epilogue.residual = accumulate_dx || i > 0 ? activations(dx) : nullptr;
        bf16 = bf16 && p.w.format == WeightFormat::kBF16;
        sum.args[sum.count++] = a;
    }
    if (sum.count > 1 && bf16 && matmul_sum(queue_of(stream), sum)) {
        return;
    }
    for (size_t i = 0; i < params.size(); ++i) {
        multiply(stream, params[i].w.format, Direction::kBackward, sum.args[i]);
    }
}

void oft_backward(
    Stream& stream,
    const LinearParams& p,
    const Tensor& dy,
    const Tensor& dx,
    bool accumulate_dx,
    const AdapterGrad& grad
) {
    const Tensor dxr = stream.scratch.take(DType::kBF16, {p.x.rows(), p.x.cols()});
    multiply(stream, p.w.format, Direction::kBackward, backward_args(dy, p.w, dxr));
    const auto rows = static_cast<int32_t>(p.x.rows());
    const auto width = static_cast<int32_t>(p.x.cols());
    const auto block = static_cast<int32_t>(p.adapter.oft_d.shape[1]);
    if (grad.oft_d != nullptr) {
        rotation_gradient(
            stream, activations(p.x), activations(dxr), rows, width, block, grad.oft_d
        );
    }
    if (dx.defined()) {
        RotateArgs args = rotate_args(dxr, p.adapter.oft_d, dx);
        args.accumulate = accumulate_dx;
        rotate(queue_of(stream), {&args, 1}, true);
    }
}

}  // namespace

// Segments: long contractions of narrow weights are cut in four, one warp each at decode. Wide
// weights have rows enough. Multiples of 64; the last segment may be shorter.
int32_t forward_segment(int64_t n, int64_t k) {
    const int64_t segments = n >= 8192 || k < 2048 ? 1 : kSegments;
    return static_cast<int32_t>(ceil_div(ceil_div(k, segments), kTileK) * kTileK);
}

// The contraction runs over the weight's rows; long ones (the vocabulary) are cut so that a chain
// of truncating steps stays short.
int32_t backward_segment(int64_t k) {
    constexpr int64_t kLongest = 4096;
    return static_cast<int32_t>(std::min(kLongest, ceil_div(k, kTileK) * kTileK));
}

int32_t num_segments(int64_t k, int32_t segment) {
    return static_cast<int32_t>(ceil_div(k, segment));
}

bool has_wgmma() {
    return device_limits().major == 9;
}

int64_t shared_memory_limit() {
    return device_limits().shared_bytes;
}

void matmul_group(
    cudaStream_t queue, WeightFormat format, Direction direction, MatmulGroup& group
) {
    CHECK(group.count > 0 && group.count <= kMaxGroup);
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        CHECK_EQ(a.m, group.args[0].m);
        CHECK_GT(a.k, 0);
        CHECK_GT(a.epilogue.columns, 0);
    }
    if (group.args[0].m == 0) {
        return;
    }
    check_supported(format);
    switch (format) {
        case WeightFormat::kBF16:
            return matmul_format<WeightFormat::kBF16>(queue, direction, group);
        case WeightFormat::kInt4:
            return matmul_format<WeightFormat::kInt4>(queue, direction, group);
        case WeightFormat::kQ8_0:
            return matmul_format<WeightFormat::kQ8_0>(queue, direction, group);
        case WeightFormat::kQ4_0:
            return matmul_format<WeightFormat::kQ4_0>(queue, direction, group);
        case WeightFormat::kQ4_1:
            return matmul_format<WeightFormat::kQ4_1>(queue, direction, group);
        case WeightFormat::kFp8:
            return matmul_format<WeightFormat::kFp8>(queue, direction, group);
        case WeightFormat::kMxFp4:
            return matmul_format<WeightFormat::kMxFp4>(queue, direction, group);
        case WeightFormat::kNvFp4:
            return matmul_format<WeightFormat::kNvFp4>(queue, direction, group);
        default:
            break;  // check_supported has refused the rest
    }
}

void matmul(cudaStream_t queue, WeightFormat format, Direction direction, const MatmulArgs& args) {
    MatmulGroup group;
    group.args[0] = args;
    group.count = 1;
    matmul_group(queue, format, direction, group);
}

namespace {

bool takes_swiglu(WeightFormat format, const MatmulGroup& group) {
    switch (format) {
        case WeightFormat::kBF16:
            return fits_swiglu<WeightFormat::kBF16>(group);
        case WeightFormat::kInt4:
            return fits_swiglu<WeightFormat::kInt4>(group) || fits_narrow_int4_swiglu(group);
        case WeightFormat::kMxFp4:
            return fits_swiglu<WeightFormat::kMxFp4>(group);
        case WeightFormat::kNvFp4:
            return fits_swiglu<WeightFormat::kNvFp4>(group);
        default:
            return false;
    }
}

// For what a product leaves to the norm that comes next; null where no product does.
float* room_for_squares(Stream& stream, const MatmulArgs& a) {
    const int64_t pieces = a.n / kSquaresPiece;
    const bool fits = a.m > 1 && a.m <= kNarrowMaxRows && a.n % (4 * kSquaresPiece) == 0 &&
                      a.epilogue.ldy == a.n && a.m * pieces <= Stream::kSquares;
    return fits ? stream.squares() : nullptr;
}

// The product of a layer whose rotated input is x. LoRA's narrow one is added to `shrinks`.
MatmulArgs product_of(
    Stream& stream, const LinearParams& p, const Tensor& x, const Tensor& y, MatmulGroup& shrinks
) {
    MatmulArgs a = forward_args(x, p.w, y);
    CHECK_EQ(static_cast<int64_t>(a.n), y.cols());
    a.epilogue.bias = p.bias;
    if (p.residual.defined()) {
        a.epilogue.residual = activations(p.residual);
    }
    if (p.before_rotations) {
        a.epilogue.squares = room_for_squares(stream, a);
    }
    if (p.adapter.kind == AdapterKind::kLora) {
        const Tensor u = p.lora_u.defined() ? p.lora_u : take_lora_u(stream, p);
        shrinks.args[shrinks.count++] = forward_args(p.x, as_weight(p.adapter.lora_a), u);
        a.epilogue.lora_u = activations(u);
        a.epilogue.lora_b = activations(p.adapter.lora_b);
        a.epilogue.ldu = static_cast<int32_t>(u.cols());
        a.epilogue.rank = static_cast<int32_t>(p.adapter.lora_a.shape[0]);
        a.epilogue.ldb = static_cast<int32_t>(p.adapter.lora_b.shape[1]);
        a.epilogue.lora_scale = p.adapter.lora_scale;
    }
    return a;
}

// MatmulGroup::spreads, as measured. Up to 64 rows a product beside them that is not cut in
// segments has a block on nearly every multiprocessor, and would wait for more than a few others.
bool spreads(const MatmulGroup& narrow, const MatmulGroup& beside) {
    const auto segments = [](const MatmulArgs& a) { return num_segments(a.k, a.segment); };
    const int32_t rows = beside.args[0].m;
    const int32_t count = segments(narrow.args[0]);
    const bool leaves_room =
        count == 1 || rows > kNarrowMaxRows || segments(beside.args[0]) == kSegments;
    return has_wgmma() && rows > 1 && leaves_room &&
           std::all_of(narrow.args, narrow.args + narrow.count, [&](const MatmulArgs& a) {
               return segments(a) == count && a.epilogue.columns <= SpreadTile::kN;
           });
}

// LoRA's narrow products, and those that are launched next: of few rows they need not wait for the
// narrow ones, only for the x of both.
void run_beside(Stream& stream, MatmulGroup& narrow, WeightFormat format, MatmulGroup& beside) {
    if (beside.args[0].m > kBesideMaxRows) {
        return;
    }
    // Not of bf16: weights that load so early take the memory from the narrow products.
    const bool asks =
        format == WeightFormat::kInt4 &&
        (asks_for_x(narrow, beside) || (has_wgmma() && fit_one_row<WeightFormat::kInt4>(beside) &&
                                        fit_one_row<WeightFormat::kBF16>(narrow)));
    uint32_t* flag = asks ? stream.take_flag() : nullptr;
    narrow.spreads = spreads(narrow, beside);
    for (int32_t i = 0; i < narrow.count; ++i) {
        narrow.args[i].releases_late = !asks;
        narrow.args[i].x_flag = flag;
    }
    for (int32_t i = 0; i < beside.count; ++i) {
        beside.args[i].x_is_ready = true;
        beside.args[i].x_flag = flag;
    }
}

// LoRA's narrow products as a part of the wide ones, where they can be and nobody else reads u.
bool take_narrow(
    std::span<const LinearParams> params, const MatmulGroup& narrow, MatmulGroup& wide
) {
    const bool takes = std::all_of(params.begin(), params.end(), [](const LinearParams& p) {
        return p.w.format == WeightFormat::kBF16 && !p.lora_u.defined();
    });
    if (!takes || (!one_row_makes_u(narrow, wide) && !clusters_make_u(narrow, wide))) {
        return false;
    }
    wide.makes_u = true;
    std::copy_n(narrow.args, narrow.count, wide.args + wide.count);
    return true;
}

// Gate and up as one product; what it has left in y.
SwigluResult multiply_swiglu(
    Stream& stream, WeightFormat format, MatmulGroup& group, const Tensor& y, const Tensor& oft_d
) {
    group.swiglu = activations(y);
    if (oft_d.defined() && oft_d.shape[1] == kFusedRotation && rotates_swiglu(group)) {
        CHECK_EQ(oft_d.shape[0] * kFusedRotation, int64_t{group.args[0].n});
        group.swiglu_d = activations(oft_d);
    }
    weight_matmul(stream, format, Direction::kForward, group);
    return group.swiglu_d != nullptr ? SwigluResult::kRotated : SwigluResult::kSwiglu;
}

// linear_group(), or with `swiglu` linear_swiglu().
SwigluResult run_linears(
    Stream& stream,
    std::span<const LinearParams> params,
    std::span<const Tensor> y,
    bool swiglu,
    const Tensor& oft_d
) {
    CHECK_LE(params.size(), size_t{kMaxGroup});
    if (y[0].rows() == 0) {
        return SwigluResult::kGateAndUp;
    }
    const ScratchScope scope(stream.scratch);
    MatmulGroup shrinks;
    MatmulArgs products[kMaxGroup];
    Tensor x[kMaxGroup];
    rotate_inputs(stream, params, x);
    for (size_t i = 0; i < params.size(); ++i) {
        products[i] = product_of(stream, params[i], x[i], y[i], shrinks);
    }
    bool done[kMaxGroup] = {};
    // The products from i on that go into one launch.
    const auto take_alike = [&](size_t i) {
        MatmulGroup alike;
        const int32_t segments = num_segments(products[i].k, products[i].segment);
        for (size_t j = i; j < params.size(); ++j) {
            const MatmulArgs& a = products[j];
            if (!done[j] && params[j].w.format == params[i].w.format &&
                num_segments(a.k, a.segment) == segments) {
                done[j] = true;
                alike.args[alike.count++] = a;
            }
        }
        return alike;
    };
    for (size_t i = 0; i < params.size(); ++i) {
        MatmulGroup alike = take_alike(i);
        if (i == 0 && shrinks.count > 0 && !take_narrow(params, shrinks, alike)) {
            run_beside(stream, shrinks, params[0].w.format, alike);
            matmul_group(queue_of(stream), WeightFormat::kBF16, Direction::kForward, shrinks);
        }
        if (swiglu && takes_swiglu(params[i].w.format, alike)) {
            return multiply_swiglu(stream, params[i].w.format, alike, y[0], oft_d);
        }
        if (alike.count > 0) {
            weight_matmul(stream, params[i].w.format, Direction::kForward, alike);
        }
        if (alike.count == 1 && alike.squares_left) {
            const Epilogue& e = alike.args[0].epilogue;
            PendingNorm::squares_left(stream, static_cast<const bf16*>(e.y), e.squares);
        }
    }
    return SwigluResult::kGateAndUp;
}

}  // namespace

void linear_group(Stream& stream, std::span<const LinearParams> params, std::span<const Tensor> y) {
    run_linears(stream, params, y, false, {});
}

SwigluResult linear_swiglu(
    Stream& stream,
    std::span<const LinearParams> params,
    std::span<const Tensor> y,
    const Tensor& oft_d
) {
    return run_linears(stream, params, y, true, oft_d);
}

void linear_group_backward(
    Stream& stream,
    std::span<const LinearParams> params,
    std::span<const Tensor> dy,
    Tensor dx,
    bool accumulate_dx,
    std::span<const AdapterGrad> grads
) {
    CHECK(!params.empty() && params.size() <= size_t{kMaxGroup});
    if (dy[0].rows() == 0) {
        return;
    }
    const auto is_oft = [](const LinearParams& p) { return p.adapter.kind == AdapterKind::kOft; };
    const bool rotates = std::any_of(params.begin(), params.end(), is_oft);
    if (rotates && params.size() > 1) {  // Each has an input of its own.
        for (size_t i = 0; i < params.size(); ++i) {
            const bool accumulate = accumulate_dx || i > 0;
            cuda::linear_group_backward(
                stream, params.subspan(i, 1), dy.subspan(i, 1), dx, accumulate, grads.subspan(i, 1)
            );
        }
        return;
    }
    const ScratchScope scope(stream.scratch);
    if (rotates) {
        oft_backward(stream, params[0], dy[0], dx, accumulate_dx, grads[0]);
        return;
    }
    Tensor du[kMaxGroup];
    output_gradients(stream, params, dy, grads, du);
    if (dx.defined()) {
        add_up_inputs(stream, params, dy, du, dx, accumulate_dx);
    }
    input_gradients(stream, params, grads, du);
}

void linear_f32_out(Stream& stream, Tensor h, const QuantizedMatrix& w, Tensor logits) {
    CHECK(logits.dtype == DType::kF32);
    if (h.rows() > 0) {
        multiply(stream, w.format, Direction::kForward, forward_args(h, w, logits));
    }
}

// The contraction runs over the vocabulary and a chunk has few rows, so there are few tiles: parts
// of the contraction are multiplied side by side and then added in ascending order.
void head_backward(Stream& stream, Tensor dlogits, const QuantizedMatrix& w, Tensor dh) {
    const MatmulArgs whole = backward_args(dlogits, w, dh);
    const int64_t part = ceil_div(ceil_div(whole.k, kMaxGroup), whole.segment) * whole.segment;
    const int64_t count = ceil_div(whole.k, part);
    if (count == 1) {
        return multiply(stream, w.format, Direction::kBackward, whole);
    }
    const ScratchScope scope(stream.scratch);
    const Tensor sums = stream.scratch.take(DType::kF32, {count, dh.rows(), dh.cols()});
    MatmulGroup group;
    for (int64_t i = 0; i < count; ++i) {
        MatmulArgs a = whole;
        const int64_t begin = i * part;
        a.x += begin;
        a.w = rows_of_weight(whole.w, w.format, begin, std::min(part, whole.k - begin));
        a.k = a.w.rows;
        a.epilogue.y = sums.as<float>() + i * dh.numel();
        a.epilogue.f32_out = true;
        group.args[group.count++] = a;
    }
    weight_matmul(stream, w.format, Direction::kBackward, group);
    add_parts_kernel<<<grid_dim(ceil_div(dh.numel(), 256)), 256, 0, queue_of(stream)>>>(
        sums.as<float>(), static_cast<int32_t>(count), dh.numel(), activations(dh)
    );
    LAUNCH_CHECK();
}

}  // namespace orbit::cuda
