// Embedding rows and row gathers: one block a row.
#include "device/cuda/check.cuh"
#include "device/cuda/rows.cuh"
#include "ops/cuda_ops.h"
#include "ops/weight_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int kThreads = 128;

template <WeightFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    embed_kernel(WeightView table, const int32_t* ids, bf16* y) {
    const int64_t id = ids[blockIdx.x];
    bf16* row = y + static_cast<int64_t>(blockIdx.x) * table.cols;
    for (int col = threadIdx.x; col < table.cols; col += kThreads) {
        row[col] = weight_value<kFormat>(table, id, col);
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const T* x, const int32_t* index, T* y, int64_t cols) {
    const int64_t from = index[blockIdx.x] * cols;
    const int64_t to = blockIdx.x * cols;
    for (int64_t i = threadIdx.x; i < cols; i += kThreads) {
        y[to + i] = x[from + i];
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const T* y, const int32_t* index, T* x, int64_t cols) {
    const int64_t to = index[blockIdx.x] * cols;
    const int64_t from = blockIdx.x * cols;
    for (int64_t i = threadIdx.x; i < cols; i += kThreads) {
        store(&x[to + i], __fadd_rn(to_float(x[to + i]), to_float(y[from + i])));
    }
}

template <WeightFormat kFormat>
void launch_embed(Stream& stream, const WeightView& table, const int32_t* ids, Tensor y) {
    embed_kernel<kFormat>
        <<<grid_dim(y.rows()), kThreads, 0, queue_of(stream)>>>(table, ids, activations(y));
    LAUNCH_CHECK();
}

// Bytes of a row of scales.
int32_t scale_stride(const QuantizedMatrix& w) {
    switch (w.format) {
        case WeightFormat::kInt4:
            return static_cast<int32_t>(w.cols / w.group_size * 2);
        case WeightFormat::kFp8:
            return static_cast<int32_t>(ceil_div(w.cols, kFp8Block) * 4);
        case WeightFormat::kMxFp4:
            return static_cast<int32_t>(ceil_div(w.cols, kMxFp4Group));
        case WeightFormat::kNvFp4:
            return static_cast<int32_t>(ceil_div(w.cols, kNvFp4Group));
        default:
            return 0;
    }
}

}  // namespace

WeightView weight_view(const QuantizedMatrix& w) {
    CHECK_LT(w.rows, int64_t{1} << 31);
    CHECK_LT(w.cols, int64_t{1} << 31);
    const bool is_int4 = w.format == WeightFormat::kInt4;
    if (is_int4) {
        CHECK(w.scales != nullptr);
        USER_CHECK(
            w.group_size >= 32 && (w.group_size & (w.group_size - 1)) == 0,
            "INT4 groups of {} columns are not supported on a GPU; requantise to groups of 32, 64 "
            "or 128, or use device = \"cpu\".",
            w.group_size
        );
        CHECK_EQ(w.cols % w.group_size, 0);
    }
    const bool divides = w.format == WeightFormat::kNvFp4 && w.global_divides;
    return WeightView{
        static_cast<const uint8_t*>(w.data),
        is_int4 ? reinterpret_cast<const uint8_t*>(w.scales)
                : static_cast<const uint8_t*>(w.block_scales),
        row_bytes(w.format, w.cols),
        static_cast<int32_t>(w.rows),
        static_cast<int32_t>(w.cols),
        is_int4 ? __builtin_ctz(static_cast<unsigned>(w.group_size)) : 0,
        scale_stride(w),
        w.global_scale,
        divides ? 1.0f / w.global_scale : 0.0f,
        w.small_scales,
    };
}

void embed(Stream& stream, const QuantizedMatrix& table, const int32_t* ids, Tensor y) {
    if (y.rows() == 0) {
        return;
    }
    const WeightView view = weight_view(table);
    switch (table.format) {
        case WeightFormat::kBF16:
            return launch_embed<WeightFormat::kBF16>(stream, view, ids, y);
        case WeightFormat::kInt4:
            return launch_embed<WeightFormat::kInt4>(stream, view, ids, y);
        case WeightFormat::kQ8_0:
            return launch_embed<WeightFormat::kQ8_0>(stream, view, ids, y);
        case WeightFormat::kQ4_0:
            return launch_embed<WeightFormat::kQ4_0>(stream, view, ids, y);
        case WeightFormat::kQ4_1:
            return launch_embed<WeightFormat::kQ4_1>(stream, view, ids, y);
        case WeightFormat::kFp8:
            return launch_embed<WeightFormat::kFp8>(stream, view, ids, y);
        case WeightFormat::kMxFp4:
            return launch_embed<WeightFormat::kMxFp4>(stream, view, ids, y);
        case WeightFormat::kNvFp4:
            return launch_embed<WeightFormat::kNvFp4>(stream, view, ids, y);
        default:
            throw UserError(fmt::format(
                "an embedding in {} is not supported on a GPU; use device = \"cpu\".",
                format_name(table.format)
            ));
    }
}

void gather_rows(Stream& stream, Tensor x, const int32_t* index, Tensor y) {
    if (y.rows() == 0 || y.cols() == 0) {
        return;
    }
    const unsigned blocks = grid_dim(y.rows());
    if (x.dtype == DType::kF32) {
        gather_kernel<<<blocks, kThreads, 0, queue_of(stream)>>>(
            x.as<float>(), index, y.as<float>(), y.cols()
        );
    } else {
        gather_kernel<<<blocks, kThreads, 0, queue_of(stream)>>>(
            activations(x), index, activations(y), y.cols()
        );
    }
    LAUNCH_CHECK();
}

void scatter_rows(Stream& stream, Tensor y, const int32_t* index, Tensor x) {
    if (y.rows() == 0 || y.cols() == 0) {
        return;
    }
    const unsigned blocks = grid_dim(y.rows());
    if (x.dtype == DType::kF32) {
        scatter_kernel<<<blocks, kThreads, 0, queue_of(stream)>>>(
            y.as<float>(), index, x.as<float>(), y.cols()
        );
    } else {
        scatter_kernel<<<blocks, kThreads, 0, queue_of(stream)>>>(
            activations(y), index, activations(x), y.cols()
        );
    }
    LAUNCH_CHECK();
}

}  // namespace orbit::cuda
