#include "ops/activation.h"
#include "ops/activation_kernels.h"
#include "ops/compute_type.h"
#include "ops/cuda_ops.h"

namespace orbit {
namespace {

constexpr int64_t kValuesPerRange = 8192;

}  // namespace

void swiglu(Stream& stream, Tensor gate, Tensor up, Tensor y) {
    if (!stream.is_cpu()) {
        return cuda::swiglu(stream, gate, up, y);
    }
    CHECK_EQ(gate.numel(), up.numel());
    CHECK_EQ(gate.numel(), y.numel());
    with_compute_type(y.dtype, [&](auto type) {
        using T = decltype(type);
        const T* g = gate.as<T>();
        const T* u = up.as<T>();
        T* to = y.as<T>();
        stream.threads()
            .parallel_for(y.numel(), kValuesPerRange, [&](int64_t begin, int64_t end, int) {
                ORBIT_CALL_KERNEL(
                    stream.device.isa, swiglu_range, (g + begin, u + begin, to + begin, end - begin)
                );
            });
    });
}

void swiglu_backward(Stream& stream, Tensor gate, Tensor up, Tensor dy, Tensor dgate, Tensor dup) {
    if (!stream.is_cpu()) {
        return cuda::swiglu_backward(stream, gate, up, dy, dgate, dup);
    }
    CHECK_EQ(gate.numel(), up.numel());
    CHECK_EQ(gate.numel(), dy.numel());
    CHECK_EQ(gate.numel(), dgate.numel());
    CHECK_EQ(gate.numel(), dup.numel());
    with_compute_type(dy.dtype, [&](auto type) {
        using T = decltype(type);
        const T* g = gate.as<T>();
        const T* u = up.as<T>();
        const T* d = dy.as<T>();
        T* to_gate = dgate.as<T>();
        T* to_up = dup.as<T>();
        stream.threads()
            .parallel_for(dy.numel(), kValuesPerRange, [&](int64_t begin, int64_t end, int) {
                ORBIT_CALL_KERNEL(
                    stream.device.isa,
                    swiglu_backward_range,
                    (g + begin, u + begin, d + begin, to_gate + begin, to_up + begin, end - begin)
                );
            });
    });
}

void add(Stream& stream, Tensor a, Tensor b, Tensor y) {
    if (!stream.is_cpu()) {
        return cuda::add(stream, a, b, y);
    }
    CHECK_EQ(a.numel(), b.numel());
    CHECK_EQ(a.numel(), y.numel());
    with_compute_type(y.dtype, [&](auto type) {
        using T = decltype(type);
        const T* left = a.as<T>();
        const T* right = b.as<T>();
        T* to = y.as<T>();
        stream.threads()
            .parallel_for(y.numel(), kValuesPerRange, [&](int64_t begin, int64_t end, int) {
                ORBIT_CALL_KERNEL(
                    stream.device.isa,
                    add_range,
                    (left + begin, right + begin, to + begin, end - begin)
                );
            });
    });
}

}  // namespace orbit
