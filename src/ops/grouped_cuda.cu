// The grouped linear op on the GPU: adapters of every expert around the grouped matmul.
#include "device/cuda/check.cuh"
#include "device/cuda/rows.cuh"
#include "ops/cuda_ops.h"
#include "ops/dense_cuda.cuh"
#include "ops/grouped_decode_cuda.cuh"

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
    MatmulArgs& a = g.products[0].one;
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
    g.products[0].weight_distance = experts.weight_distance();
    g.products[0].scale_distance = p.experts[0].scale_bytes() == 0 ? 0 : experts.scale_distance();
    for (size_t e = 0; e < p.experts.size(); ++e) {
        g.global_scales[e] = p.experts[e].global_scale;
    }
    return g;
}

bool decodes_first(const GroupedLinearParams& p) {
    const QuantizedMatrix& w = p.experts[0];
    const int64_t expert_bytes = w.rows * w.cols * static_cast<int64_t>(sizeof(bf16));
    return w.format != WeightFormat::kBF16 && w.cols % 32 == 0 && p.dequant != nullptr &&
           p.dequant->bytes() >= expert_bytes;
}

// The product with the experts' own weights: decoded inside the kernel, or, where the caller gives
// memory for it, before it and as many experts at a time as fit. The bits are the same.
void multiply_base(
    const Stream& stream, const GroupedLinearParams& p, Direction direction, const GroupedArgs& g
) {
    const QuantizedMatrix& w = p.experts[0];
    const cudaStream_t queue = queue_of(stream);
    const int64_t expert_bytes = w.rows * w.cols * static_cast<int64_t>(sizeof(bf16));
    if (!decodes_first(p)) {
        grouped_matmul(queue, w.format, direction, g);
        return;
    }
    const int64_t chunk = std::min<int64_t>(g.experts, p.dequant->bytes() / expert_bytes);
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
        GroupedProduct& product = part.products[0];
        product.one.w = weight_view(decoded);
        product.one.x_is_ready = false;
        product.weight_distance = expert_bytes;
        product.scale_distance = 0;
        product.one.epilogue.lora_b += first * product.lora_b_distance;
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
    g.products[0].weight_distance =
        experts.adapter_distance(member) * static_cast<int64_t>(sizeof(bf16));
    return g;
}

// For u = round(x A^T), [rows, padded rank], zero past the rank.
Tensor take_shrunk(Stream& stream, const GroupedLinearParams& p) {
    const int64_t rank = p.adapters[0].lora_a.shape[0];
    return stream.scratch.take(DType::kBF16, {p.x.rows(), padded_rank(rank)});
}

GroupedArgs shrink_args(const GroupedLinearParams& p, const Tensor& u) {
    return adapter_args(p, p.x, &AdapterView::lora_a, u, Direction::kForward);
}

Tensor shrink(Stream& stream, const GroupedLinearParams& p) {
    const Tensor u = take_shrunk(stream, p);
    grouped_matmul(queue_of(stream), WeightFormat::kBF16, Direction::kForward, shrink_args(p, u));
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
    Epilogue& e = g.products[0].one.epilogue;
    e.lora_u = activations(u);
    e.lora_b = activations(p.adapters[0].*member);
    e.ldu = static_cast<int32_t>(u.cols());
    e.rank = static_cast<int32_t>(p.adapters[0].lora_a.shape[0]);
    e.ldb = static_cast<int32_t>((p.adapters[0].*member).shape[1]);
    e.lora_scale = scale;
    g.products[0].lora_b_distance = experts.adapter_distance(member);
}

// Puts the products of `more` into the launch of `g`, if they are alike.
bool join(GroupedArgs& g, const GroupedArgs& more) {
    const MatmulArgs& a = g.products[0].one;
    const MatmulArgs& b = more.products[0].one;
    const bool alike = a.x == b.x && a.ldx == b.ldx && a.n == b.n && a.k == b.k &&
                       a.w.row_bytes == b.w.row_bytes && a.w.scale_stride == b.w.scale_stride &&
                       a.w.group_shift == b.w.group_shift &&
                       a.epilogue.columns == b.epilogue.columns && g.offsets == more.offsets &&
                       g.experts == more.experts;
    if (!alike || g.count + more.count > kMaxGrouped ||
        (g.count + more.count) * g.experts > kExpertsMax) {
        return false;
    }
    for (int32_t i = 0; i < more.count; ++i) {
        for (int32_t e = 0; e < g.experts; ++e) {
            g.global_scales[g.count * g.experts + e] = more.global_scales[i * g.experts + e];
        }
        g.products[g.count] = more.products[i];
        ++g.count;
    }
    return true;
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
    rotate(queue_of(stream), {&a, 1}, transpose);
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
        low_rank_gradients(stream, {&g, 1});
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
    to_rank.products[0].one.epilogue.scale = scale;
    grouped_matmul(queue, WeightFormat::kBF16, Direction::kBackward, to_rank);
    if (dx.defined()) {
        GroupedArgs g = base_args(p, dy, dx, Direction::kBackward);
        add_low_rank(g, p, du, &AdapterView::lora_a, 1.0f);
        g.products[0].one.epilogue.residual = accumulate_dx ? activations(dx) : nullptr;
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

// Forward of one layer: its product, and LoRA's narrow one before it.
void add_product(
    Stream& stream,
    const GroupedLinearParams& p,
    const Tensor& y,
    std::vector<GroupedArgs>& shrinks,
    std::vector<GroupedArgs>& products
) {
    const Experts experts{p.experts, p.adapters};
    experts.check();
    Tensor x = p.x;
    if (experts.kind() == AdapterKind::kOft) {
        x = stream.scratch.take(DType::kBF16, {p.x.rows(), p.x.cols()});
        rotate_rows(stream, p, p.x, x, false, false);
    }
    GroupedArgs& product = products.emplace_back(base_args(p, x, y, Direction::kForward));
    CHECK_EQ(static_cast<int64_t>(product.products[0].one.n), y.cols());
    if (experts.kind() == AdapterKind::kLora) {
        const Tensor u = take_shrunk(stream, p);
        GroupedArgs& narrow = shrinks.emplace_back(shrink_args(p, u));
        narrow.products[0].one.releases_late = true;
        add_low_rank(product, p, u, &AdapterView::lora_b, p.adapters[0].lora_scale);
    }
}

}  // namespace

// The most warps that a multiprocessor can hold, in the smallest thread blocks that give them.
DecodePlan plan_grouped_decode(
    const GroupedArgs& g, int64_t tile_rows, int64_t ring_bytes, int most_warps
) {
    const int64_t multiprocessors = device_limits().multiprocessors;
    constexpr int64_t kColumns = 4096;   // of the contraction, that a warp's items may add up to
    constexpr int64_t kReserved = 1024;  // bytes of shared memory that a block takes besides
    const MatmulArgs& a = g.products[0].one;
    const int64_t limit = shared_memory_limit();
    const int64_t tiles = tiles_bound(g, tile_rows);
    DecodePlan plan;
    DecodeItems& items = plan.items;
    items.of_product = static_cast<int32_t>(ceil_div(a.epilogue.columns, kDecodeRows));
    items.count = items.of_product * g.count;
    const int64_t waves = items.count * tiles / (2 * kGroupedWarpsMax * multiprocessors);
    int64_t run = 1;  // a power of two
    while (2 * run <= std::min(kColumns / a.k, waves)) {
        run *= 2;
    }
    items.per_warp = static_cast<int32_t>(run);
    const int64_t stride = (ceil_div(a.k, 64) * 64 + 8) * static_cast<int64_t>(sizeof(bf16));
    const int64_t x_bytes = ceil_div(tile_rows * stride, 128) * 128;
    CHECK_LT(x_bytes, int64_t{1} << 31);
    items.x_stride = static_cast<int32_t>(stride);
    items.x_bytes = static_cast<int32_t>(x_bytes);
    // Few warps are spread over more multiprocessors; four share more of x.
    const int64_t all_warps = ceil_div(items.count, run) * tiles;
    const int64_t fewest = all_warps < kGroupedWarpsMax * multiprocessors ? 2 : 4;
    int64_t most_resident = 0;
    for (int64_t warps = 1; warps <= most_warps; warps *= 2) {
        const int64_t bytes = x_bytes + warps * ring_bytes;
        const int64_t blocks =
            std::min<int64_t>((limit + kReserved) / (bytes + kReserved), kGroupedWarpsMax / warps);
        const bool useful = warps <= ceil_div(items.count, run);
        const bool larger = blocks * warps > most_resident || warps <= fewest;
        if (bytes <= limit && useful && larger) {
            most_resident = blocks * warps;
            plan.warps = static_cast<int>(warps);
            plan.shared_bytes = bytes;
        }
    }
    items.blocks =
        static_cast<int32_t>(ceil_div(ceil_div(items.count, run), std::max(plan.warps, 1)));
    plan.grid = items.blocks * tiles;
    return plan;
}

bool grouped_matmul(
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

void grouped_linear_group(
    Stream& stream, std::span<const GroupedLinearParams> params, std::span<const Tensor> y
) {
    if (y[0].rows() == 0) {
        return;
    }
    for (size_t i = 0; params.size() > 1 && i < params.size(); ++i) {
        if (Experts{params[i].experts, params[i].adapters}.kind() == AdapterKind::kOft) {
            // Rotated rows are of one product: no launch to share, and much memory.
            for (size_t j = 0; j < params.size(); ++j) {
                cuda::grouped_linear_group(stream, params.subspan(j, 1), y.subspan(j, 1));
            }
            return;
        }
    }
    const ScratchScope scope(stream.scratch);
    std::vector<GroupedArgs> shrinks;
    std::vector<GroupedArgs> products;
    for (size_t i = 0; i < params.size(); ++i) {
        add_product(stream, params[i], y[i], shrinks, products);
    }
    bool x_is_ready = false;  // for the launch that follows the last shrinking one
    for (size_t i = 0; i < shrinks.size(); ++i) {
        GroupedArgs& g = shrinks[i];
        while (i + 1 < shrinks.size() && join(g, shrinks[i + 1])) {
            ++i;
        }
        x_is_ready = grouped_matmul(queue_of(stream), WeightFormat::kBF16, Direction::kForward, g);
    }
    for (size_t i = 0; i < params.size(); ++i) {
        const GroupedLinearParams& first = params[i];
        GroupedArgs& g = products[i];
        while (i + 1 < params.size() && !decodes_first(first) &&
               first.experts[0].format == params[i + 1].experts[0].format &&
               join(g, products[i + 1])) {
            ++i;
        }
        g.products[0].one.x_is_ready = x_is_ready;
        x_is_ready = false;
        multiply_base(stream, first, Direction::kForward, g);
    }
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
        g.products[0].one.epilogue.residual = accumulate_dx ? activations(dx) : nullptr;
        multiply_base(stream, p, Direction::kBackward, g);
    }
}

}  // namespace orbit::cuda
