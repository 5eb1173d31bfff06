// No fused multiply-add: the same bits on every instruction set. The sums run in 16 lanes and a
// fixed tree, as in rms_norm.
#include "ops/rope_kernels.h"

namespace orbit::ORBIT_ISA {
namespace {

constexpr int kSumLanes = 16;

[[gnu::always_inline]] inline float product_sum(const float* a, const float* b, int32_t count) {
    float sum[kSumLanes] = {};
    int32_t i = 0;
    for (; i + kSumLanes <= count; i += kSumLanes) {
        for (int lane = 0; lane < kSumLanes; ++lane) {
            sum[lane] += a[i + lane] * b[i + lane];
        }
    }
    for (int lane = 0; i < count; ++i, ++lane) {
        sum[lane] += a[i] * b[i];
    }
    for (int distance = kSumLanes / 2; distance > 0; distance /= 2) {
        for (int lane = 0; lane < distance; ++lane) {
            sum[lane] += sum[lane + distance];
        }
    }
    return sum[0];
}

[[gnu::always_inline]] inline float inverse_rms(const float* x, int32_t count, float eps) {
    return 1.0f / __builtin_sqrtf(product_sum(x, x, count) / static_cast<float>(count) + eps);
}

// sign 1: forward; -1: the inverse rotation, which is the adjoint.
[[gnu::always_inline]] inline void rotate(const NormRopeHead& p, float sign, float* x) {
    const int32_t half = p.rotary_dim / 2;
    const int32_t step = p.interleaved ? 2 : 1;
    const int32_t distance = p.interleaved ? 1 : half;
    float first[kMaxHeadDim / 2];
    float second[kMaxHeadDim / 2];
    for (int32_t i = 0; i < half; ++i) {
        first[i] = x[i * step];
        second[i] = x[i * step + distance];
    }
    for (int32_t i = 0; i < half; ++i) {
        const float sine = sign * p.sine[i];
        const float a = first[i];
        const float b = second[i];
        first[i] = a * p.cosine[i] - b * sine;
        second[i] = a * sine + b * p.cosine[i];
    }
    for (int32_t i = 0; i < half; ++i) {
        x[i * step] = first[i];
        x[i * step + distance] = second[i];
    }
}

template <typename T>
void forward_head(const NormRopeHead& p, const T* x, T* y) {
    float value[kMaxHeadDim];
    for (int32_t i = 0; i < p.head_dim; ++i) {
        value[i] = to_float(x[i]);
    }
    if (p.norm_weight != nullptr) {
        const float scale = inverse_rms(value, p.head_dim, p.eps);
        for (int32_t i = 0; i < p.head_dim; ++i) {
            value[i] = p.norm_weight[i] * (value[i] * scale);
        }
    }
    rotate(p, 1.0f, value);
    for (int32_t i = 0; i < p.head_dim; ++i) {
        store(y + i, value[i]);
    }
}

template <typename T>
void backward_head(const NormRopeHead& p, const T* x, const T* dy, T* dx) {
    float gradient[kMaxHeadDim];
    for (int32_t i = 0; i < p.head_dim; ++i) {
        gradient[i] = to_float(dy[i]);
    }
    rotate(p, -1.0f, gradient);
    if (p.norm_weight != nullptr) {
        float value[kMaxHeadDim];
        for (int32_t i = 0; i < p.head_dim; ++i) {
            value[i] = to_float(x[i]);
            gradient[i] *= p.norm_weight[i];
        }
        const float scale = inverse_rms(value, p.head_dim, p.eps);
        const float slope = scale * scale * scale / static_cast<float>(p.head_dim) *
                            product_sum(gradient, value, p.head_dim);
        for (int32_t i = 0; i < p.head_dim; ++i) {
            gradient[i] = scale * gradient[i] - value[i] * slope;
        }
    }
    for (int32_t i = 0; i < p.head_dim; ++i) {
        store(dx + i, gradient[i]);
    }
}

}  // namespace

void norm_rope_head(const NormRopeHead& p, const float* x, float* y) {
    forward_head(p, x, y);
}

void norm_rope_head(const NormRopeHead& p, const bf16* x, bf16* y) {
    forward_head(p, x, y);
}

void norm_rope_head_backward(const NormRopeHead& p, const float* x, const float* dy, float* dx) {
    backward_head(p, x, dy, dx);
}

void norm_rope_head_backward(const NormRopeHead& p, const bf16* x, const bf16* dy, bf16* dx) {
    backward_head(p, x, dy, dx);
}

}  // namespace orbit::ORBIT_ISA
