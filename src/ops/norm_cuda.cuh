// The arithmetic of RMSNorm's forward, for its kernel and for others that norm a row on their way,
// and the norm of one row that is put off for them.
#pragma once

#include <span>

#include "device/cuda/math.cuh"
#include "device/cuda/rows.cuh"

namespace orbit::cuda {

// Of a row: thread t sums the squares of its groups of eight (t, t + 128...) in ascending order,
// then lanes by butterfly, then the four warps in order.
constexpr int kNormThreads = 128;

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
// in block_sum().
__device__ __forceinline__ float inverse_rms_of_row(
    const bf16* row, int64_t width, float eps, float* shared
) {
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < width / 8; i += kNormThreads) {
        sum = add_squares(unpack_eight(reinterpret_cast<const uint4*>(row)[i]), sum);
    }
    sum = block_sum<kNormThreads / 32>(sum, shared);
    return inverse_rms(sum, static_cast<float>(width), eps);
}

// The norm of one row, put off until the next op: the rotations of an OFT adapter norm the row
// themselves, with the same bits, and store it too, which spares a kernel. Anything else launches
// it first (Stream::handle()). norm_cuda.cu.
class PendingNorm final : public DeferredWork {
  public:
    // y = x / rms(x) weight; [width] all of them, a multiple of 8.
    struct Norm {
        const bf16* x = nullptr;
        const float* weight = nullptr;
        float eps = 0.0f;
        int64_t width = 0;
        bf16* y = nullptr;
    };

    static void put_off(Stream& stream, const Norm& norm);

    // The norm that makes x, now the caller's to do; y null: x is there. `outputs`, [width] each,
    // are what the caller writes while he reads the norm's x: they may not overlap it.
    static Norm take(Stream& stream, const bf16* x, std::span<const bf16* const> outputs);

    void launch(const Stream& stream) override;

  private:
    Norm norm_;
};

}  // namespace orbit::cuda
