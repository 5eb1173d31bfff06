// Plain loops that the compiler vectorises; no fused multiply-add, so every set gives the same
// bits.
#include "ops/activation_kernels.h"

#include "base/exact_math.h"

namespace orbit::ORBIT_ISA {
namespace {

[[gnu::always_inline]] inline float sigmoid(float x) {
    return 1.0f / (1.0f + exact_exp(-x));
}

template <typename T>
void swiglu_all(const T* gate, const T* up, T* y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const float g = to_float(gate[i]);
        store(y + i, g * sigmoid(g) * to_float(up[i]));
    }
}

template <typename T>
void swiglu_backward_all(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const float g = to_float(gate[i]);
        const float d = to_float(dy[i]);
        const float s = sigmoid(g);
        const float slope = s * (1.0f + g * (1.0f - s));
        const float into_gate = d * to_float(up[i]) * slope;
        const float into_up = d * (g * s);
        store(dgate + i, into_gate);
        store(dup + i, into_up);
    }
}

template <typename T>
void add_all(const T* a, const T* b, T* y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        store(y + i, to_float(a[i]) + to_float(b[i]));
    }
}

}  // namespace

void swiglu_range(const float* gate, const float* up, float* y, int64_t count) {
    swiglu_all(gate, up, y, count);
}

void swiglu_range(const bf16* gate, const bf16* up, bf16* y, int64_t count) {
    swiglu_all(gate, up, y, count);
}

void swiglu_backward_range(
    const float* gate, const float* up, const float* dy, float* dgate, float* dup, int64_t count
) {
    swiglu_backward_all(gate, up, dy, dgate, dup, count);
}

void swiglu_backward_range(
    const bf16* gate, const bf16* up, const bf16* dy, bf16* dgate, bf16* dup, int64_t count
) {
    swiglu_backward_all(gate, up, dy, dgate, dup, count);
}

void add_range(const float* a, const float* b, float* y, int64_t count) {
    add_all(a, b, y, count);
}

void add_range(const bf16* a, const bf16* b, bf16* y, int64_t count) {
    add_all(a, b, y, count);
}

}  // namespace orbit::ORBIT_ISA
