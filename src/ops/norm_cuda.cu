// RMSNorm on the GPU: 128 threads a row, whose sums are a function of the width only
// (norm_cuda.cuh).
#include <algorithm>
#include <type_traits>
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

// A row a block.
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(PendingNorm::Norm norm) {
    constexpr int kKept = 4;  // groups of a thread that stay in registers between the passes
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

// Of a row, and of the weight, a thread keeps `kKept` groups of eight columns in registers.
template <int kKept>
struct KeptRow {
    uint4 v[kKept];

    __device__ __forceinline__ void load(const bf16* row, int64_t width) {
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
            const int64_t i = static_cast<int64_t>(threadIdx.x) + k * kThreads;
            v[k] = 8 * i < width ? reinterpret_cast<const uint4*>(row)[i] : uint4{};
        }
    }

    __device__ __forceinline__ Eight group(int k) const { return unpack_eight(v[k]); }
};

template <int kKept>
struct KeptWeight {
    Eight v[kKept];

    // The weights are constant: their loads need not wait.
    __device__ __forceinline__ KeptWeight(const float* weight, int64_t width) {
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
            const int64_t i = static_cast<int64_t>(threadIdx.x) + k * kThreads;
            v[k] = load_norm_weight(weight, i, width);
        }
    }
};

// Many rows of a multiple of eight values, all of them kept: a block takes every gridDim.x-th row,
// and loads the next one while it works on one.
template <int kKept>
__global__ void __launch_bounds__(kThreads) rms_norm_rows_kernel(PendingNorm::Norm norm) {
    __shared__ float shared[2][kWarps];  // in turn, so that a row's sums outlive the next row's
    release_successor();
    const int64_t width = norm.width;
    const KeptWeight<kKept> weight(norm.weight, width);
    wait_for_predecessor();
    KeptRow<kKept> next;
    next.load(norm.x + blockIdx.x * width, width);
    int turn = 0;
    for (int64_t r = blockIdx.x; r < norm.rows; r += gridDim.x) {
        const KeptRow<kKept> row = next;
        if (r + gridDim.x < norm.rows) {
            next.load(norm.x + (r + gridDim.x) * width, width);
        }
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
            sum = __fadd_rn(sum, sum_of_piece(add_squares(row.group(k), 0.0f)));
        }
        sum = sum_of_row(sum, shared[turn]);
        turn ^= 1;
        const float scale = inverse_rms(sum, static_cast<float>(width), norm.eps);
        auto* y = reinterpret_cast<uint4*>(norm.y + r * width);
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
            const int64_t i = static_cast<int64_t>(threadIdx.x) + k * kThreads;
            if (8 * i < width) {
                y[i] = pack_eight(normed(row.group(k), scale, weight.v[k]));
            }
        }
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

// The same of many rows, as in rms_norm_rows_kernel().
template <int kKept>
__global__ void __launch_bounds__(kThreads) rms_norm_rows_backward_kernel(
    const bf16* x,
    const float* weight,
    float eps,
    int64_t rows,
    int64_t width,
    const bf16* dy,
    bf16* dx,
    bool accumulate
) {
    __shared__ float shared[kWarps];
    release_successor();
    const KeptWeight<kKept> w(weight, width);
    wait_for_predecessor();
    for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
        KeptRow<kKept> kept_x;
        KeptRow<kKept> kept_dy;
        KeptRow<kKept> old{};
        kept_x.load(x + r * width, width);
        kept_dy.load(dy + r * width, width);
        if (accumulate) {
            old.load(dx + r * width, width);
        }
        float squares = 0.0f;
        float dot = 0.0f;
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
            const Eight e = kept_x.group(k);
            const Eight d = kept_dy.group(k);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                squares = __fmaf_rn(e.v[j], e.v[j], squares);
                dot = __fmaf_rn(__fmul_rn(d.v[j], w.v[k].v[j]), e.v[j], dot);
            }
        }
        squares = block_sum<kWarps>(squares, shared);
        dot = block_sum<kWarps>(dot, shared);
        const float n = static_cast<float>(width);
        const float scale = inverse_rms(squares, n, eps);
        const float cube = __fmul_rn(__fmul_rn(scale, scale), scale);
        const float factor = __fdiv_rn(__fmul_rn(cube, dot), n);
        auto* to = reinterpret_cast<uint4*>(dx + r * width);
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
            const int64_t i = static_cast<int64_t>(threadIdx.x) + k * kThreads;
            const Eight e = kept_x.group(k);
            const Eight before = old.group(k);
            Eight d = kept_dy.group(k);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float g = __fmul_rn(__fmul_rn(d.v[j], w.v[k].v[j]), scale);
                d.v[j] = __fadd_rn(before.v[j], __fsub_rn(g, __fmul_rn(e.v[j], factor)));
            }
            if (8 * i < width) {
                to[i] = pack_eight(d);
            }
        }
    }
}

// Rows of a width by the kernels for many: calls run(groups kept, blocks). False: not for these.
template <typename Run>
bool launch_many_rows(int64_t rows, int64_t width, const Run& run) {
    constexpr int64_t kBlocks = 8;              // on a multiprocessor
    constexpr int64_t kOfGroup = 8 * kThreads;  // columns
    const int64_t blocks = kBlocks * device_limits().multiprocessors;
    if (rows <= blocks || width % 8 != 0 || width > 4 * kOfGroup) {
        return false;
    }
    if (width <= kOfGroup) {
        run(std::integral_constant<int, 1>{}, grid_dim(blocks));
    } else if (width <= 2 * kOfGroup) {
        run(std::integral_constant<int, 2>{}, grid_dim(blocks));
    } else {
        run(std::integral_constant<int, 4>{}, grid_dim(blocks));
    }
    return true;
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
        const cudaStream_t queue = queue_of(stream);
        const auto launch = [&](auto kept, unsigned blocks) {
            launch_early(rms_norm_rows_kernel<kept()>, dim3(blocks), kThreads, 0, queue, n);
        };
        if (n.squares != nullptr || !launch_many_rows(n.rows, n.width, launch)) {
            launch_early(rms_norm_kernel, dim3(grid_dim(n.rows)), kThreads, 0, queue, n);
        }
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
    const auto launch = [&](auto kernel, unsigned blocks, const auto&... arguments) {
        launch_early(kernel, dim3(blocks), kThreads, 0, queue_of(stream), arguments...);
    };
    const bf16* in = activations(x);
    const bf16* grad = activations(dy);
    bf16* out = activations(dx);
    const int64_t rows = x.rows();
    const int64_t width = x.cols();
    const bool many = launch_many_rows(rows, width, [&](auto kept, unsigned blocks) {
        const auto kernel = rms_norm_rows_backward_kernel<kept()>;
        launch(kernel, blocks, in, weight, eps, rows, width, grad, out, accumulate);
    });
    if (!many) {
        const unsigned blocks = grid_dim(rows);
        launch(rms_norm_backward_kernel, blocks, in, weight, eps, width, grad, out, accumulate);
    }
}

}  // namespace orbit::cuda
