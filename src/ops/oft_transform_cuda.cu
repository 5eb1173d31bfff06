// OFT's transforms between the packed skew values and the rotations, one thread block a row of
// values. The order of operations is that of adapter/oft_math.h, so the bits are those of the host.
#include "device/cuda/check.cuh"
#include "device/cuda/mma.cuh"
#include "ops/oft_transform.h"

namespace orbit::cuda {
namespace {

constexpr int kThreads = 256;

// Runs body(i) for the elements of a [b, b] matrix, then waits for all threads.
template <typename Body>
__device__ __forceinline__ void for_elements(int32_t b, const Body& body) {
    for (int32_t i = threadIdx.x; i < b * b; i += kThreads) {
        body(i);
    }
    __syncthreads();
}

__device__ __forceinline__ void unpack(const float* v, int32_t b, float* q) {
    for_elements(b, [&](int32_t at) {
        const int32_t i = at / b;
        const int32_t j = at % b;
        const auto packed = [&](int32_t row, int32_t col) {
            return v[row * b - row * (row + 1) / 2 + col - row - 1];
        };
        q[at] = i == j ? 0.0f : (i < j ? packed(i, j) : __fsub_rn(0.0f, packed(j, i)));
    });
}

// Element `at` of x y, k ascending, products rounded apart.
__device__ __forceinline__ float product_at(const float* x, const float* y, int32_t b, int32_t at) {
    const float* row = x + at / b * b;
    const float* col = y + at % b;
    float sum = 0.0f;
    for (int32_t k = 0; k < b; ++k) {
        sum = __fadd_rn(sum, __fmul_rn(row[k], col[k * b]));
    }
    return sum;
}

__device__ __forceinline__ void product(const float* x, const float* y, int32_t b, float* z) {
    for_elements(b, [&](int32_t at) { z[at] = product_at(x, y, b, at); });
}

// One thread a column, then the columns in ascending order.
__device__ __forceinline__ double sum_of_squares(const float* matrix, int32_t b, float* sums) {
    if (threadIdx.x < static_cast<unsigned>(b)) {
        float sum = 0.0f;
        for (int32_t i = 0; i < b; ++i) {
            const float value = matrix[i * b + static_cast<int32_t>(threadIdx.x)];
            sum = __fadd_rn(sum, __fmul_rn(value, value));
        }
        sums[threadIdx.x] = sum;
    }
    __syncthreads();
    double total = 0;
    for (int32_t j = 0; j < b; ++j) {
        total = __dadd_rn(total, static_cast<double>(sums[j]));
    }
    __syncthreads();
    return total;
}

__global__ void __launch_bounds__(kThreads)
    derive_kernel(const OftRow* rows, const float* masters, bf16* copies, OftRowBound* bounds) {
    extern __shared__ float shared[];
    const OftRow row = rows[blockIdx.x];
    const int32_t b = row.block;
    float* q = shared;
    float* s = q + b * b;
    float* p = s + b * b;
    float* sums = p + b * b;
    unpack(masters + row.v, b, q);
    product(q, q, b, s);
    const double squares = sum_of_squares(q, b, sums);
    const double squares_of_square = sum_of_squares(s, b, sums);
    if (threadIdx.x == 0) {
        bounds[blockIdx.x] = OftRowBound{squares, squares_of_square};
    }
    for_elements(b, [&](int32_t i) { p[i] = __fadd_rn(__fmul_rn(2.0f, q[i]), s[i]); });
    bf16* d = copies + row.copy;
    for_elements(b, [&](int32_t i) {
        const float low = __fadd_rn(__fmul_rn(2.0f, q[i]), __fmul_rn(2.0f, s[i]));
        const bf16 value = round_bf16(__fadd_rn(low, product_at(s, p, b, i)));
        for (int32_t n = 0; n < row.copies; ++n) {
            d[static_cast<int64_t>(n) * b * b + i] = value;
        }
    });
}

__global__ void __launch_bounds__(kThreads
) gradient_kernel(const OftRow* rows, const float* masters, const float* deltas, float* gradients) {
    extern __shared__ float shared[];
    const OftRow row = rows[blockIdx.x];
    const int32_t b = row.block;
    const int32_t size = b * b;
    float* q = shared;
    float* g = q + size;
    float* s = g + size;
    float* pt = s + size;
    float* gp = pt + size;
    float* gs = gp + size;
    float* gq = gs + size;
    for_elements(b, [&](int32_t i) {
        float sum = deltas[row.copy + i];
        for (int32_t n = 1; n < row.copies; ++n) {
            sum = __fadd_rn(sum, deltas[row.copy + static_cast<int64_t>(n) * size + i]);
        }
        g[i] = sum;
    });
    unpack(masters + row.v, b, q);
    product(q, q, b, s);
    for_elements(b, [&](int32_t i) { pt[i] = __fsub_rn(s[i], __fmul_rn(2.0f, q[i])); });
    product(s, g, b, gp);
    for_elements(b, [&](int32_t i) {
        const float right = product_at(g, pt, b, i);
        gs[i] = __fadd_rn(__fadd_rn(__fmul_rn(2.0f, g[i]), right), gp[i]);
    });
    for_elements(b, [&](int32_t i) {
        const float direct = __fadd_rn(__fmul_rn(2.0f, g[i]), __fmul_rn(2.0f, gp[i]));
        gq[i] = __fsub_rn(direct, __fadd_rn(product_at(gs, q, b, i), product_at(q, gs, b, i)));
    });
    float* dv = gradients + row.v;
    for_elements(b, [&](int32_t at) {
        const int32_t i = at / b;
        const int32_t j = at % b;
        if (i < j) {
            float* to = dv + i * b - i * (i + 1) / 2 + j - i - 1;
            *to = __fadd_rn(*to, __fsub_rn(gq[at], gq[j * b + i]));
        }
    });
}

size_t shared_bytes(std::span<const OftRow> rows, size_t matrices) {
    int32_t block = 0;
    for (const OftRow& row : rows) {
        block = std::max(block, row.block);
    }
    CHECK_LE(block, kOftDeviceBlockMax);
    const auto b = static_cast<size_t>(block);
    return (matrices * b * b + b) * sizeof(float);
}

OftRow* upload(Stream& stream, std::span<const OftRow> rows) {
    auto* table = static_cast<OftRow*>(stream.scratch.take_bytes(rows.size_bytes()));
    copy_to_device(stream, table, rows.data(), rows.size_bytes());
    return table;
}

}  // namespace

void oft_derive_rows(
    Stream& stream,
    std::span<const OftRow> rows,
    const float* masters,
    bf16* copies,
    std::span<OftRowBound> bounds
) {
    const ScratchScope scope(stream.scratch);
    const OftRow* table = upload(stream, rows);
    auto* found = static_cast<OftRowBound*>(stream.scratch.take_bytes(bounds.size_bytes()));
    const size_t bytes = shared_bytes(rows, 3);
    allow_shared_memory(derive_kernel, bytes);
    derive_kernel<<<
        grid_dim(static_cast<int64_t>(rows.size())),
        kThreads,
        bytes,
        queue_of(stream)>>>(table, masters, copies, found);
    LAUNCH_CHECK();
    copy_to_host(stream, bounds.data(), found, bounds.size_bytes());
}

void oft_gradient_rows(
    Stream& stream,
    std::span<const OftRow> rows,
    const float* masters,
    const float* deltas,
    float* gradients
) {
    const ScratchScope scope(stream.scratch);
    const OftRow* table = upload(stream, rows);
    const size_t bytes = shared_bytes(rows, 7);
    allow_shared_memory(gradient_kernel, bytes);
    gradient_kernel<<<
        grid_dim(static_cast<int64_t>(rows.size())),
        kThreads,
        bytes,
        queue_of(stream)>>>(table, masters, deltas, gradients);
    LAUNCH_CHECK();
    synchronize(stream);  // the table may go
}

}  // namespace orbit::cuda
