#include <algorithm>
#include <bit>
#include <cmath>

#include "ops/cuda_ops.h"
#include "ops/optimizer.h"
#include "ops/optimizer_kernels.h"

namespace orbit {
namespace {

constexpr int64_t kNormTile = 4096;
constexpr int64_t kValuesPerRange = 16384;

AdamWConstants constants_of(const AdamWParams& params) {
    const double step = static_cast<double>(params.step);
    const double correction1 = 1.0 - std::pow(params.beta1, step);
    const double correction2 = 1.0 - std::pow(params.beta2, step);
    AdamWConstants k{};
    k.grad_scale = static_cast<float>(params.grad_scale);
    k.decay = static_cast<float>(1.0 - params.lr * params.weight_decay);
    k.beta1 = static_cast<float>(params.beta1);
    k.one_minus_beta1 = static_cast<float>(1.0 - params.beta1);
    k.beta2 = static_cast<float>(params.beta2);
    k.one_minus_beta2 = static_cast<float>(1.0 - params.beta2);
    k.step_size = static_cast<float>(params.lr / correction1);
    k.denominator = static_cast<float>(std::sqrt(correction2));
    k.eps = static_cast<float>(params.eps);
    return k;
}

}  // namespace

void adamw(
    Stream& stream,
    const AdamWParams& params,
    float* p,
    float* m,
    float* v,
    const float* g,
    int64_t count
) {
    if (!stream.is_cpu()) {
        return cuda::adamw(stream, params, p, m, v, g, count);
    }
    CHECK_GE(params.step, 1);
    const AdamWConstants k = constants_of(params);
    stream.threads().parallel_for(count, kValuesPerRange, [&](int64_t begin, int64_t end, int) {
        ORBIT_CALL_KERNEL(
            stream.device.isa,
            adamw_range,
            (k, p + begin, m + begin, v + begin, g + begin, end - begin)
        );
    });
}

bool all_zero(const float* values, int64_t count) {
    constexpr int64_t kStride = 256;  // between looks, so that the loop inside has no branch
    for (int64_t begin = 0; begin < count; begin += kStride) {
        const int64_t end = std::min(count, begin + kStride);
        uint32_t bits = 0;
        for (int64_t i = begin; i < end; ++i) {
            bits |= std::bit_cast<uint32_t>(values[i]) << 1;
        }
        if (bits != 0) {
            return false;
        }
    }
    return true;
}

double global_norm(Stream& stream, const float* g, int64_t count) {
    if (!stream.is_cpu()) {
        return cuda::global_norm(stream, g, count);
    }
    const ScratchScope scope(stream.scratch);
    const int64_t tiles = (count + kNormTile - 1) / kNormTile;
    double* partial =
        static_cast<double*>(stream.scratch.take_bytes(static_cast<size_t>(tiles) * sizeof(double))
        );
    stream.threads().parallel_for(tiles, 4, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t size = i + 1 < tiles ? kNormTile : count - i * kNormTile;
            partial[i] =
                ORBIT_CALL_KERNEL(stream.device.isa, square_sum, (g + i * kNormTile, size));
        }
    });
    double sum = 0;
    for (int64_t i = 0; i < tiles; ++i) {
        sum += partial[i];
    }
    return std::sqrt(sum);
}

}  // namespace orbit
