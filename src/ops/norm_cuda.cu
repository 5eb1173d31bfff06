// RMSNorm on the GPU: 128 threads a row, whose sums are a function of the width only
// (norm_cuda.cuh).
#include <utility>

#include "device/cuda/check.cuh"
#include "device/cuda/math.cuh"
#include "device/cuda/rows.cuh"
#include "ops/cuda_ops.h"
#include "ops/norm_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int kThreads = kNormThreads;
constexpr int kWarps = kThreads / 32;

constexpr int kKept = 4;  // groups of a thread that stay in registers between the two passes

__global__ void __launch_bounds__(kThreads) rms_norm_kernel(PendingNorm::Norm norm) {
    __shared__ float shared[kWarps];
    release_successor();
    const float* weight = norm.weight;
    const int64_t width = norm.width;
    const bool aligned = width % 8 == 0;
    const bf16* row = norm.x + blockIdx.x * width;
    bf16* y = norm.y + blockIdx.x * width;
    const int64_t groups = (width + 7) / 8;
    const int64_t first = threadIdx.x;
    Eight w[kKept];  // the weights are constant: their loads need not wait
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
        if (first + k * kThreads < groups) {
            w[k] = load_norm_weight(weight, first + k * kThreads, width);
        }
    }
    wait_for_predecessor();
    Eight kept[kKept] = {};
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
        if (first + k * kThreads < groups) {
            kept[k] = load_eight(row, first + k * kThreads, width, aligned);
        }
    }
    float sum = 0.0f;
    if (norm.squares != nullptr) {
        const auto pieces = static_cast<int32_t>(width / kSquaresPiece);
        sum = sum_of_pieces(norm.squares + blockIdx.x * static_cast<int64_t>(pieces), pieces);
    } else {
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
            sum = __fadd_rn(sum, sum_of_piece(add_squares(kept[k], 0.0f)));
        }
        for (int64_t begin = kKept * kThreads; begin < groups; begin += kThreads) {
            Eight e{};
            if (begin + first < groups) {
                e = load_eight(row, begin + first, width, aligned);
            }
            sum = __fadd_rn(sum, sum_of_piece(add_squares(e, 0.0f)));
        }
        sum = sum_of_row(sum, shared);
    }
    const float scale = inverse_rms(sum, static_cast<float>(width), norm.eps);
    const auto store = [&](const Eight& e, const Eight& of, int64_t i) {
        store_eight(y, i, width, aligned, normed(e, scale, of));
    };
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
        if (first + k * kThreads < groups) {
            store(kept[k], w[k], first + k * kThreads);
        }
    }
    for (int64_t i = first + kKept * kThreads; i < groups; i += kThreads) {
        store(load_eight(row, i, width, aligned), load_norm_weight(weight, i, width), i);
    }
}

// dx = s w dy - x s^3 / D sum(w dy x).
__global__ void __launch_bounds__(kThreads) rms_norm_backward_kernel(
    const bf16* x,
    const float* weight,
    float eps,
    int64_t width,
    const bf16* dy,
    bf16* dx,
    bool accumulate
) {
    release_successor();
    wait_for_predecessor();
    __shared__ float shared[kWarps];
    const bool aligned = width % 8 == 0;
    const int64_t offset = blockIdx.x * width;
    const int64_t groups = (width + 7) / 8;
    float squares = 0.0f;
    float dot = 0.0f;
    for (int64_t i = threadIdx.x; i < groups; i += kThreads) {
        const Eight e = load_eight(x + offset, i, width, aligned);
        const Eight d = load_eight(dy + offset, i, width, aligned);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float w = 8 * i + j < width ? weight[8 * i + j] : 0.0f;
            squares = __fmaf_rn(e.v[j], e.v[j], squares);
            dot = __fmaf_rn(__fmul_rn(d.v[j], w), e.v[j], dot);
        }
    }
    squares = block_sum<kWarps>(squares, shared);
    dot = block_sum<kWarps>(dot, shared);
    const float n = static_cast<float>(width);
    const float scale = inverse_rms(squares, n, eps);
    const float factor = __fdiv_rn(__fmul_rn(__fmul_rn(__fmul_rn(scale, scale), scale), dot), n);
    for (int64_t i = threadIdx.x; i < groups; i += kThreads) {
        const Eight e = load_eight(x + offset, i, width, aligned);
        Eight d = load_eight(dy + offset, i, width, aligned);
        Eight old{};
        if (accumulate) {
            old = load_eight(dx + offset, i, width, aligned);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float w = 8 * i + j < width ? weight[8 * i + j] : 0.0f;
            const float g = __fmul_rn(__fmul_rn(d.v[j], w), scale);
            d.v[j] = __fadd_rn(old.v[j], __fsub_rn(g, __fmul_rn(e.v[j], factor)));
        }
        store_eight(dx + offset, i, width, aligned, d);
    }
}

}  // namespace

PendingNorm& PendingNorm::of(Stream& stream) {
    if (stream.deferred == nullptr) {
        stream.deferred = std::make_unique<PendingNorm>();
    }
    return static_cast<PendingNorm&>(*stream.deferred);
}

void PendingNorm::squares_left(Stream& stream, const bf16* y, const float* squares) {
    PendingNorm& pending = of(stream);
    pending.left_y_ = y;
    pending.left_squares_ = squares;
}

void PendingNorm::norm(Stream& stream, Norm norm) {
    PendingNorm& pending = of(stream);
    norm.squares = pending.left_y_ == norm.x ? pending.left_squares_ : nullptr;
    pending.launch(stream);
    pending.norm_ = norm;
    if (norm.squares == nullptr && (norm.rows > 1 || norm.width % 8 != 0)) {
        pending.launch(stream);
    }
}

PendingNorm::Norm PendingNorm::take(
    Stream& stream, const bf16* x, std::span<const bf16* const> outputs
) {
    Norm& norm = of(stream).norm_;
    const int64_t size = norm.rows * norm.width;
    bool takes = norm.y != nullptr && norm.y == x;
    for (const bf16* y : outputs) {
        takes = takes && (y + size <= norm.x || norm.x + size <= y);
    }
    return takes ? std::exchange(norm, {}) : Norm{};
}

void PendingNorm::launch(const Stream& stream) {
    left_y_ = nullptr;
    const Norm n = std::exchange(norm_, {});
    if (n.y != nullptr) {
        launch_early(rms_norm_kernel, dim3(grid_dim(n.rows)), kThreads, 0, queue_of(stream), n);
    }
}

void rms_norm(Stream& stream, Tensor x, const float* weight, float eps, Tensor y) {
    if (x.rows() == 0) {
        return;
    }
    PendingNorm::norm(
        stream,
        {activations(x),
         weight,
         eps,
         static_cast<int32_t>(x.rows()),
         x.cols(),
         activations(y),
         nullptr}
    );
}

void rms_norm_backward(
    Stream& stream, Tensor x, const float* weight, float eps, Tensor dy, Tensor dx, bool accumulate
) {
    if (x.rows() == 0) {
        return;
    }
    launch_early(
        rms_norm_backward_kernel,
        dim3(grid_dim(x.rows())),
        kThreads,
        0,
        queue_of(stream),
        activations(x),
        weight,
        eps,
        x.cols(),
        activations(dy),
        activations(dx),
        accumulate
    );
}

}  // namespace orbit::cuda
