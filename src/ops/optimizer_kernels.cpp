// No fused multiply-add: the same bits on every instruction set.
#include "ops/optimizer_kernels.h"

namespace orbit::ORBIT_ISA {

void adamw_range(
    const AdamWConstants& constants, float* p, float* m, float* v, const float* g, int64_t count
) {
    const AdamWConstants k = constants;
    for (int64_t i = 0; i < count; ++i) {
        const float gradient = g[i] * k.grad_scale;
        const float first = m[i] * k.beta1 + gradient * k.one_minus_beta1;
        const float second = v[i] * k.beta2 + gradient * gradient * k.one_minus_beta2;
        m[i] = first;
        v[i] = second;
        const float denominator = __builtin_sqrtf(second) / k.denominator + k.eps;
        p[i] = p[i] * k.decay - k.step_size * (first / denominator);
    }
}

double square_sum(const float* g, int64_t count) {
    constexpr int kSumLanes = 8;
    double sum[kSumLanes] = {};
    int64_t i = 0;
    for (; i + kSumLanes <= count; i += kSumLanes) {
        for (int lane = 0; lane < kSumLanes; ++lane) {
            const double value = static_cast<double>(g[i + lane]);
            sum[lane] += value * value;
        }
    }
    for (int lane = 0; i < count; ++i, ++lane) {
        const double value = static_cast<double>(g[i]);
        sum[lane] += value * value;
    }
    for (int distance = kSumLanes / 2; distance > 0; distance /= 2) {
        for (int lane = 0; lane < distance; ++lane) {
            sum[lane] += sum[lane + distance];
        }
    }
    return sum[0];
}

}  // namespace orbit::ORBIT_ISA
