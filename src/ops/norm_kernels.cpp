// No fused multiply-add here: the sums give the same bits on every instruction set.
#include "ops/norm_kernels.h"

#include "ops/lanes.h"

namespace orbit::ORBIT_ISA {
namespace {

// The last, partial group of lanes is padded with zeros.
template <typename T>
Lanes load_tail(const T* from, int64_t count) {
    float padded[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
        padded[i] = to_float(from[i]);
    }
    return load(padded);
}

template <typename T>
float inverse_rms(const T* x, int64_t width, float eps) {
    Lanes sum = splat(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        const Lanes value = load(x + i);
        sum = sum + value * value;
    }
    if (i < width) {
        const Lanes value = load_tail(x + i, width - i);
        sum = sum + value * value;
    }
    return 1.0f / __builtin_sqrtf(sum_lanes(sum) / static_cast<float>(width) + eps);
}

template <typename T>
void norm_row(const T* x, const float* weight, float eps, int64_t width, T* y) {
    const float scale = inverse_rms(x, width, eps);
    const Lanes r = splat(scale);
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        store(y + i, load(weight + i) * (load(x + i) * r));
    }
    for (; i < width; ++i) {
        orbit::store(y + i, weight[i] * (to_float(x[i]) * scale));
    }
}

// dx = r g - x r^3 / N sum(g x) with g = dy w.
template <typename T>
void norm_row_backward(
    const T* x, const float* weight, float eps, int64_t width, const T* dy, T* dx, bool accumulate
) {
    const float scale = inverse_rms(x, width, eps);
    Lanes sum = splat(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        sum = sum + load(dy + i) * load(weight + i) * load(x + i);
    }
    if (i < width) {
        const int64_t rest = width - i;
        sum = sum + load_tail(dy + i, rest) * load_tail(weight + i, rest) * load_tail(x + i, rest);
    }
    const float k = scale * scale * scale / static_cast<float>(width) * sum_lanes(sum);
    const Lanes r = splat(scale);
    const Lanes slope = splat(k);
    for (i = 0; i + kLanes <= width; i += kLanes) {
        const Lanes d = r * (load(dy + i) * load(weight + i)) - load(x + i) * slope;
        store(dx + i, accumulate ? load(dx + i) + d : d);
    }
    for (; i < width; ++i) {
        const float d = scale * (to_float(dy[i]) * weight[i]) - to_float(x[i]) * k;
        orbit::store(dx + i, accumulate ? to_float(dx[i]) + d : d);
    }
}

}  // namespace

void rms_norm_row(const float* x, const float* weight, float eps, int64_t width, float* y) {
    norm_row(x, weight, eps, width, y);
}

void rms_norm_row(const bf16* x, const float* weight, float eps, int64_t width, bf16* y) {
    norm_row(x, weight, eps, width, y);
}

void rms_norm_row_backward(
    const float* x,
    const float* weight,
    float eps,
    int64_t width,
    const float* dy,
    float* dx,
    bool accumulate
) {
    norm_row_backward(x, weight, eps, width, dy, dx, accumulate);
}

void rms_norm_row_backward(
    const bf16* x,
    const float* weight,
    float eps,
    int64_t width,
    const bf16* dy,
    bf16* dx,
    bool accumulate
) {
    norm_row_backward(x, weight, eps, width, dy, dx, accumulate);
}

}  // namespace orbit::ORBIT_ISA
