// Pieces of the linear op that are not the matmul itself: rotations and adapter gradients.
#pragma once

#include <span>

#include "device/cuda/check.cuh"
#include "ops/gradient_ranges.h"
#include "ops/matmul_cuda.cuh"
#include "ops/norm_cuda.cuh"

namespace orbit::cuda {

// A block-diagonal rotation in delta form, D: [width / block, block, block].
struct RotateArgs {
    const bf16* x = nullptr;  // [rows, width]
    const bf16* d = nullptr;
    bf16* y = nullptr;  // [rows, width]
    int32_t rows = 0;
    int32_t width = 0;
    int32_t block = 0;
    bool accumulate = false;  // y = round(y + x + ...)
    // Rows sorted by expert: rows [offsets[e], offsets[e + 1]) use the rotation e * distance
    // elements behind d. Null: one rotation for all rows.
    const int32_t* offsets = nullptr;
    int32_t experts = 0;
    int64_t distance = 0;
};

// y = round(x + x D), or with transpose round(x + x D^T), for arguments that differ in x, d and y
// alone; up to kMaxGroup of them. D is read before the kernel waits for its predecessor, unless
// rows are sorted by expert. `norm`, if it has a y: x is that, and is made on the way; where
// rotation_norms(). oft_cuda.cu.
void rotate(
    cudaStream_t queue,
    std::span<const RotateArgs> args,
    bool transpose,
    const PendingNorm::Norm& norm = {}
);

// Whether rotations of blocks of this size can norm their input, what PendingNorm puts off.
bool rotation_norms(int32_t block);

// grad[n][i][j] += sum_t x[t, n b + i] dxr[t, n b + j].
void rotation_gradient(
    Stream& stream,
    const bf16* x,
    const bf16* dxr,
    int32_t rows,
    int32_t width,
    int32_t block,
    float* grad
);

// grad[i * stride_wide + j * stride_narrow] += scale sum_t wide[t, i] narrow[t, j], i < width,
// j < rank. adapter_grad_cuda.cu. narrow has `narrow_ld` columns, a multiple of 16, zero from rank
// on.
struct LowRankGradient {
    const bf16* wide = nullptr;    // [rows, width]
    const bf16* narrow = nullptr;  // [rows, narrow_ld]
    int32_t rows = 0;
    int32_t width = 0;
    int32_t rank = 0;
    int32_t narrow_ld = 0;
    int64_t stride_wide = 0;
    int64_t stride_narrow = 0;
    float scale = 1.0f;
    float* grad = nullptr;
};

// Up to kMaxGroup of them with one `wide`, which is read once for several.
void low_rank_gradients(Stream& stream, std::span<const LowRankGradient> gradients);

// Of a layer y += scale u B^T: du = round(scale dy B) and grad_b[i, j] += scale sum_t dy[t, i]
// u[t, j], for which dy is read once. adapter_grad_cuda.cu.
struct LoraOutputGradient {
    const bf16* dy = nullptr;  // [rows, width]
    const bf16* u = nullptr;   // [rows, ld], zero from column `rank` on; unread without grad_b
    const bf16* b = nullptr;   // [width, rank]
    bf16* du = nullptr;        // [rows, ld]
    float* grad_b = nullptr;   // [width, rank], or null
    int32_t width = 0;
    int32_t rank = 0;
    int32_t ld = 0;  // a multiple of 16
    float scale = 1.0f;
};

// Whether the kernel takes it: rows in granules of 16 bytes.
bool fits_output_gradient(const LoraOutputGradient& gradient);

// Up to kMaxGroup of them in one launch.
void lora_output_gradients(
    Stream& stream, std::span<const LoraOutputGradient> gradients, int32_t rows
);

// scale (partial[0][i] + partial[1][i] + ...), partials of `count` each (a multiple of 4), in
// ascending order: added to `grad`, or rounded to `rounded`.
struct PartialSums {
    const float* partial = nullptr;
    int64_t count = 0;
    int32_t num_partials = 0;
    float scale = 1.0f;
    float* grad = nullptr;
    bf16* rounded = nullptr;
};

// Up to 2 kMaxGroup of them in one launch.
void add_partials(cudaStream_t queue, std::span<const PartialSums> sums);

// Fragment of the transpose of a [k][m] tile in shared memory: 16 columns from `granule` on (8
// columns each), rows k..k+15; the M side of the instruction.
__device__ __forceinline__ void transposed_fragment(
    uint32_t (&a)[4], uint32_t tile, int row_bytes, int k, int granule
) {
    const int lane = threadIdx.x & 31;
    const int row = k + (lane & 7) + ((lane >> 4) << 3);
    const int at = granule + ((lane >> 3) & 1);
    ldmatrix_x4_trans(
        a[0],
        a[1],
        a[2],
        a[3],
        tile + static_cast<uint32_t>(row * row_bytes + ((at ^ (row & 7)) << 4))
    );
}

// Copies 64 rows x 128 columns into a swizzled tile of 256-byte rows; zeros outside.
template <int kThreads>
__device__ __forceinline__ void load_token_tile(
    uint32_t to, const bf16* from, int32_t row0, int32_t row_end, int32_t col0, int32_t width
) {
#pragma unroll
    for (int i = 0; i < 64 * 16 / kThreads; ++i) {
        const int index = static_cast<int>(threadIdx.x) + i * kThreads;
        const int row = index >> 4;
        const int granule = index & 15;
        const int32_t col = col0 + granule * 8;
        const bool valid = row0 + row < row_end && col < width;
        const bf16* at = valid ? from + static_cast<int64_t>(row0 + row) * width + col : from;
        copy_async_16(
            to + static_cast<uint32_t>(row * 256 + ((granule ^ (row & 7)) << 4)), at, valid
        );
    }
}

}  // namespace orbit::cuda
