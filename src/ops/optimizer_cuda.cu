// AdamW and the global norm.
#include <cmath>
#include <vector>

#include "device/cuda/check.cuh"
#include "device/cuda/math.cuh"
#include "device/cuda/mma.cuh"
#include "ops/cuda_ops.h"

namespace orbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kNormTile = 4096;

struct AdamWScalars {
    float decay;  // 1 - lr * weight_decay
    float beta1, beta2;
    float one_minus_beta1, one_minus_beta2;
    float step_size;        // lr / (1 - beta1^n)
    float root_correction;  // sqrt(1 - beta2^n)
    float eps;
    float grad_scale;
};

__global__ void __launch_bounds__(kThreads)
    adamw_kernel(AdamWScalars a, float* p, float* m, float* v, const float* g, int64_t count) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= count) {
        return;
    }
    const float grad = __fmul_rn(g[i], a.grad_scale);
    const float moment = __fadd_rn(__fmul_rn(a.beta1, m[i]), __fmul_rn(a.one_minus_beta1, grad));
    const float square =
        __fadd_rn(__fmul_rn(a.beta2, v[i]), __fmul_rn(a.one_minus_beta2, __fmul_rn(grad, grad)));
    const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(square), a.root_correction), a.eps);
    m[i] = moment;
    v[i] = square;
    p[i] =
        __fsub_rn(__fmul_rn(p[i], a.decay), __fmul_rn(a.step_size, __fdiv_rn(moment, denominator)));
}

// One block a tile of 4096: 16 squares a thread in ascending order, then the fixed tree.
__global__ void __launch_bounds__(kThreads)
    norm_tiles_kernel(const float* g, int64_t count, double* partial) {
    __shared__ double shared[kThreads / 32];
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kNormTile;
    double sum = 0.0;
    for (int64_t i = begin + threadIdx.x; i < begin + kNormTile && i < count; i += kThreads) {
        const double value = static_cast<double>(g[i]);
        sum = __fma_rn(value, value, sum);
    }
    sum = block_sum<kThreads / 32>(sum, shared);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

__global__ void __launch_bounds__(kThreads)
    round_ranges_kernel(const RoundRange* ranges, const float* values, bf16* copies) {
    const RoundRange range = ranges[blockIdx.x];
    const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < range.count;
         i += stride) {
        copies[range.to + i] = round_bf16(values[range.from + i]);
    }
}

}  // namespace

void round_ranges(
    Stream& stream, std::span<const RoundRange> ranges, const float* values, bf16* copies
) {
    if (ranges.empty()) {
        return;
    }
    const ScratchScope scope(stream.scratch);
    auto* table = static_cast<RoundRange*>(stream.scratch.take_bytes(ranges.size_bytes()));
    copy_to_device(stream, table, ranges.data(), ranges.size_bytes());
    constexpr unsigned kBlocks = 16;  // of one range
    round_ranges_kernel<<<
        dim3(grid_dim(static_cast<int64_t>(ranges.size())), kBlocks),
        kThreads,
        0,
        queue_of(stream)>>>(table, values, copies);
    LAUNCH_CHECK();
    synchronize(stream);  // the ranges may go
}

void adamw(
    Stream& stream,
    const AdamWParams& params,
    float* p,
    float* m,
    float* v,
    const float* g,
    int64_t count
) {
    if (count == 0) {
        return;
    }
    const double n = static_cast<double>(params.step);
    const double correction1 = 1.0 - std::pow(params.beta1, n);
    const double correction2 = 1.0 - std::pow(params.beta2, n);
    const AdamWScalars scalars{
        static_cast<float>(1.0 - params.lr * params.weight_decay),
        static_cast<float>(params.beta1),
        static_cast<float>(params.beta2),
        static_cast<float>(1.0 - params.beta1),
        static_cast<float>(1.0 - params.beta2),
        static_cast<float>(params.lr / correction1),
        static_cast<float>(std::sqrt(correction2)),
        static_cast<float>(params.eps),
        static_cast<float>(params.grad_scale),
    };
    adamw_kernel<<<grid_dim(ceil_div(count, kThreads)), kThreads, 0, queue_of(stream)>>>(
        scalars, p, m, v, g, count
    );
    LAUNCH_CHECK();
}

double global_norm(Stream& stream, const float* g, int64_t count) {
    if (count == 0) {
        return 0.0;
    }
    const ScratchScope scope(stream.scratch);
    const int64_t num_tiles = ceil_div(count, kNormTile);
    const size_t bytes = static_cast<size_t>(num_tiles) * sizeof(double);
    auto* partial = static_cast<double*>(stream.scratch.take_bytes(bytes));
    norm_tiles_kernel<<<grid_dim(num_tiles), kThreads, 0, queue_of(stream)>>>(g, count, partial);
    LAUNCH_CHECK();
    std::vector<double> host(static_cast<size_t>(num_tiles));
    orbit::copy_to_host(stream, host.data(), partial, bytes);
    double sum = 0.0;
    for (const double value : host) {
        sum += value;
    }
    return std::sqrt(sum);
}

}  // namespace orbit::cuda
