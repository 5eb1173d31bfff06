// The arithmetic of RMSNorm's forward, for its kernel and for others that norm a row on their way,
// and the norm of few rows that is put off for them.
#pragma once

#include <span>

#include "device/cuda/math.cuh"
#include "device/cuda/rows.cuh"

namespace orbit::cuda {

// The sum of a row's squares, a function of its width alone: of each piece of 64 columns eight
// lanes sum eight columns in ascending order, then the lanes by butterfly. Pieces p, p + 16, ... in
// ascending order make 16 sums, four neighbours of those (0 + 1) + (2 + 3), and these four are
// added in order. A product whose last op is to store the row leaves the sums of the pieces behind
// (Epilogue::squares); otherwise the norm makes them, thread t from groups t, t + 128...
constexpr int kNormThreads = 128;
constexpr int kSquaresPiece = 64;
static_assert(kNormThreads * 8 == 16 * kSquaresPiece);

__device__ __forceinline__ float inverse_rms(float sum_of_squares, float width, float eps) {
    const float mean = __fdiv_rn(sum_of_squares, width);
    return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
}

__device__ __forceinline__ float add_squares(const Eight& e, float sum) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        sum = __fmaf_rn(e.v[j], e.v[j], sum);
    }
    return sum;
}

// Of a piece, whose eight lanes are in `lanes`.
__device__ __forceinline__ float sum_of_piece(float of_lane, uint32_t lanes = 0xffffffffu) {
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) {
        of_lane = __fadd_rn(of_lane, __shfl_xor_sync(lanes, of_lane, distance));
    }
    return of_lane;
}

// The row's sum from the sums of the pieces of each eight lanes. `shared`: a float for each warp.
__device__ __forceinline__ float sum_of_row(float of_pieces, float* shared) {
    const float two = __fadd_rn(of_pieces, __shfl_xor_sync(0xffffffffu, of_pieces, 8));
    const float four = __fadd_rn(two, __shfl_xor_sync(0xffffffffu, two, 16));
    if ((threadIdx.x & 31) == 0) {
        shared[threadIdx.x >> 5] = four;
    }
    __syncthreads();
    return __fadd_rn(__fadd_rn(__fadd_rn(shared[0], shared[1]), shared[2]), shared[3]);
}

// The same from sums of pieces in memory, a multiple of four of them; in all lanes of a quad.
__device__ __forceinline__ float sum_of_pieces(const float* pieces, int32_t count) {
    const int lane = threadIdx.x & 31;
    float4 of_sum{};
#pragma unroll 4
    for (int32_t i = 4 * (lane & 3); i < count; i += 16) {
        const auto of_piece = *reinterpret_cast<const float4*>(pieces + i);
        of_sum.x = __fadd_rn(of_sum.x, of_piece.x);
        of_sum.y = __fadd_rn(of_sum.y, of_piece.y);
        of_sum.z = __fadd_rn(of_sum.z, of_piece.z);
        of_sum.w = __fadd_rn(of_sum.w, of_piece.w);
    }
    const float four = __fadd_rn(__fadd_rn(of_sum.x, of_sum.y), __fadd_rn(of_sum.z, of_sum.w));
    float sum = __shfl_sync(0xffffffffu, four, lane & ~3);
#pragma unroll
    for (int i = 1; i < 4; ++i) {
        sum = __fadd_rn(sum, __shfl_sync(0xffffffffu, four, (lane & ~3) + i));
    }
    return sum;
}

__device__ __forceinline__ Eight normed(Eight e, float scale, const Eight& weight) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        e.v[j] = __fmul_rn(__fmul_rn(e.v[j], scale), weight.v[j]);
    }
    return e;
}

__device__ __forceinline__ Eight load_norm_weight(const float* weight, int64_t i, int64_t width) {
    Eight w;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        w.v[j] = 8 * i + j < width ? weight[8 * i + j] : 0.0f;
    }
    return w;
}

// 1 / rms of a row of a multiple of eight values, by a block of kNormThreads threads. `shared`: as
// in sum_of_row().
__device__ __forceinline__ float inverse_rms_of_row(
    const bf16* row, int64_t width, float eps, float* shared
) {
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t first = 0; first < width / 8; first += kNormThreads) {
        const int64_t i = first + static_cast<int64_t>(threadIdx.x);
        float of_lane = 0.0f;
        if (i < width / 8) {
            of_lane = add_squares(unpack_eight(reinterpret_cast<const uint4*>(row)[i]), 0.0f);
        }
        sum = __fadd_rn(sum, sum_of_piece(of_lane));
    }
    return inverse_rms(sum_of_row(sum, shared), static_cast<float>(width), eps);
}

// The norm of few rows, put off until the next op: the rotations of an OFT adapter norm the rows
// themselves, with the same bits, and store them too, which spares a kernel. Anything else launches
// it first (Stream::handle()). norm_cuda.cu.
class PendingNorm final : public DeferredWork {
  public:
    // y = x / rms(x) weight; [rows, width] but for the weight, width a multiple of 8.
    struct Norm {
        const bf16* x = nullptr;
        const float* weight = nullptr;
        float eps = 0.0f;
        int32_t rows = 0;
        int64_t width = 0;
        bf16* y = nullptr;
        const float* squares = nullptr;  // as in Epilogue, or null
    };

    // The product that made y, the last op, has left the squares of its rows, of a multiple of 256
    // columns. What is launched next may write to y, so only a norm that is next knows them.
    static void squares_left(Stream& stream, const bf16* y, const float* squares);

    // Puts it off, if that may pay, or launches it.
    static void norm(Stream& stream, Norm norm);

    // The norm that makes x, now the caller's to do; y null: x is there. `outputs`, as large as x,
    // are what the caller writes while he reads the norm's x: they may not overlap it.
    static Norm take(Stream& stream, const bf16* x, std::span<const bf16* const> outputs);

    void launch(const Stream& stream) override;

  private:
    static PendingNorm& of(Stream& stream);

    Norm norm_;
    const bf16* left_y_ = nullptr;
    const float* left_squares_ = nullptr;
};

}  // namespace orbit::cuda
