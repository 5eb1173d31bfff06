#include <cstring>

#include "ops/compute_type.h"
#include "ops/cuda_ops.h"
#include "ops/embed.h"

namespace orbit {
namespace {

constexpr int64_t kValuesPerRange = 8192;

void decode_row(const QuantizedMatrix& table, int64_t row, bf16* out) {
    decode_bf16(table, row, 0, table.cols, out);
}

void decode_row(const QuantizedMatrix& table, int64_t row, float* out) {
    decode_f32(table, row, 0, table.cols, out);
}

int64_t bytes_per_row(const Tensor& x) {
    return x.cols() * dtype_bytes(x.dtype);
}

}  // namespace

void embed(Stream& stream, const QuantizedMatrix& table, const int32_t* ids, Tensor y) {
    if (!stream.is_cpu()) {
        return cuda::embed(stream, table, ids, y);
    }
    CHECK_EQ(y.cols(), table.cols);
    with_compute_type(y.dtype, [&](auto type) {
        using T = decltype(type);
        T* out = y.as<T>();
        const int64_t grain = kValuesPerRange / table.cols + 1;
        stream.threads().parallel_for(y.rows(), grain, [&](int64_t begin, int64_t end, int) {
            for (int64_t t = begin; t < end; ++t) {
                CHECK(ids[t] >= 0 && ids[t] < table.rows, "(token id outside the embedding)");
                decode_row(table, ids[t], out + t * table.cols);
            }
        });
    });
}

void gather_rows(Stream& stream, Tensor x, const int32_t* index, Tensor y) {
    if (!stream.is_cpu()) {
        return cuda::gather_rows(stream, x, index, y);
    }
    CHECK_EQ(x.cols(), y.cols());
    CHECK(x.dtype == y.dtype);
    const int64_t bytes = bytes_per_row(x);
    const int64_t rows = x.rows();
    const char* from = static_cast<const char*>(x.data);
    char* to = static_cast<char*>(y.data);
    const int64_t grain = kValuesPerRange / y.cols() + 1;
    stream.threads().parallel_for(y.rows(), grain, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            CHECK(index[i] >= 0 && index[i] < rows, "(row index outside the source)");
            std::memcpy(to + i * bytes, from + index[i] * bytes, static_cast<size_t>(bytes));
        }
    });
}

void scatter_rows(Stream& stream, Tensor y, const int32_t* index, Tensor x) {
    if (!stream.is_cpu()) {
        return cuda::scatter_rows(stream, y, index, x);
    }
    CHECK_EQ(x.cols(), y.cols());
    const int64_t width = y.cols();
    const int64_t rows = x.rows();
    with_compute_type(y.dtype, [&](auto type) {
        using T = decltype(type);
        const T* from = y.as<T>();
        T* to = x.as<T>();
        const int64_t grain = kValuesPerRange / width + 1;
        stream.threads().parallel_for(y.rows(), grain, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) {
                CHECK(index[i] >= 0 && index[i] < rows, "(row index outside the target)");
                T* row = to + index[i] * width;
                for (int64_t c = 0; c < width; ++c) {
                    store(row + c, to_float(row[c]) + to_float(from[i * width + c]));
                }
            }
        });
    });
}

}  // namespace orbit
