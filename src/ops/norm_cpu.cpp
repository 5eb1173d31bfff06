#include "ops/compute_type.h"
#include "ops/cuda_ops.h"
#include "ops/norm.h"
#include "ops/norm_kernels.h"

namespace orbit {
namespace {

constexpr int64_t kValuesPerRange = 8192;

}  // namespace

void rms_norm(Stream& stream, Tensor x, const float* weight, float eps, Tensor y) {
    if (!stream.is_cpu()) {
        return cuda::rms_norm(stream, x, weight, eps, y);
    }
    CHECK_EQ(x.numel(), y.numel());
    const int64_t width = x.cols();
    with_compute_type(x.dtype, [&](auto type) {
        using T = decltype(type);
        const T* from = x.as<T>();
        T* to = y.as<T>();
        stream.threads().parallel_for(
            x.rows(),
            kValuesPerRange / width + 1,
            [&](int64_t begin, int64_t end, int) {
                for (int64_t t = begin; t < end; ++t) {
                    ORBIT_CALL_KERNEL(
                        stream.device.isa,
                        rms_norm_row,
                        (from + t * width, weight, eps, width, to + t * width)
                    );
                }
            }
        );
    });
}

void rms_norm_backward(
    Stream& stream, Tensor x, const float* weight, float eps, Tensor dy, Tensor dx, bool accumulate
) {
    if (!stream.is_cpu()) {
        return cuda::rms_norm_backward(stream, x, weight, eps, dy, dx, accumulate);
    }
    CHECK_EQ(x.numel(), dy.numel());
    CHECK_EQ(x.numel(), dx.numel());
    const int64_t width = x.cols();
    with_compute_type(x.dtype, [&](auto type) {
        using T = decltype(type);
        const T* from = x.as<T>();
        const T* gradient = dy.as<T>();
        T* to = dx.as<T>();
        stream.threads().parallel_for(
            x.rows(),
            kValuesPerRange / width + 1,
            [&](int64_t begin, int64_t end, int) {
                for (int64_t t = begin; t < end; ++t) {
                    const int64_t at = t * width;
                    ORBIT_CALL_KERNEL(
                        stream.device.isa,
                        rms_norm_row_backward,
                        (from + at, weight, eps, width, gradient + at, to + at, accumulate)
                    );
                }
            }
        );
    });
}

}  // namespace orbit
