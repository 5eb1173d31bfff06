// Element-wise kernels, eight values a thread.
#include "device/cuda/check.cuh"
#include "device/cuda/math.cuh"
#include "device/cuda/rows.cuh"
#include "ops/cuda_ops.h"

namespace orbit::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t group_index() {
    return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const bf16* gate, const bf16* up, bf16* y, int64_t count) {
    release_successor();
    wait_for_predecessor();
    const int64_t i = group_index();
    if (8 * i >= count) {
        return;
    }
    const bool aligned = 8 * i + 8 <= count;
    Eight g = load_eight(gate, i, count, aligned);
    const Eight u = load_eight(up, i, count, aligned);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        g.v[j] = swiglu_of(g.v[j], u.v[j]);
    }
    store_eight(y, i, count, aligned, g);
}

// dup = dy silu(g); dgate = dy u s (1 + g (1 - s)), s = sigmoid(g).
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(
    const bf16* gate, const bf16* up, const bf16* dy, bf16* dgate, bf16* dup, int64_t count
) {
    release_successor();
    wait_for_predecessor();
    const int64_t i = group_index();
    if (8 * i >= count) {
        return;
    }
    const bool aligned = 8 * i + 8 <= count;
    Eight g = load_eight(gate, i, count, aligned);
    Eight u = load_eight(up, i, count, aligned);
    const Eight d = load_eight(dy, i, count, aligned);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float s = sigmoid_f32(g.v[j]);
        const float slope = __fmul_rn(s, __fadd_rn(1.0f, __fmul_rn(g.v[j], __fsub_rn(1.0f, s))));
        const float dgate_j = __fmul_rn(__fmul_rn(d.v[j], u.v[j]), slope);
        u.v[j] = __fmul_rn(d.v[j], __fmul_rn(g.v[j], s));
        g.v[j] = dgate_j;
    }
    store_eight(dgate, i, count, aligned, g);
    store_eight(dup, i, count, aligned, u);
}

__global__ void __launch_bounds__(kThreads)
    add_kernel(const bf16* a, const bf16* b, bf16* y, int64_t count) {
    release_successor();
    wait_for_predecessor();
    const int64_t i = group_index();
    if (8 * i >= count) {
        return;
    }
    const bool aligned = 8 * i + 8 <= count;
    Eight sum = load_eight(a, i, count, aligned);
    const Eight other = load_eight(b, i, count, aligned);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        sum.v[j] = __fadd_rn(sum.v[j], other.v[j]);
    }
    store_eight(y, i, count, aligned, sum);
}

unsigned blocks_for(int64_t count) {
    return grid_dim(ceil_div(count, int64_t{kThreads} * 8));
}

}  // namespace

void swiglu(Stream& stream, Tensor gate, Tensor up, Tensor y) {
    const int64_t count = gate.numel();
    if (count == 0) {
        return;
    }
    launch_early(
        swiglu_kernel,
        dim3(blocks_for(count)),
        kThreads,
        0,
        queue_of(stream),
        activations(gate),
        activations(up),
        activations(y),
        count
    );
}

void swiglu_backward(Stream& stream, Tensor gate, Tensor up, Tensor dy, Tensor dgate, Tensor dup) {
    const int64_t count = gate.numel();
    if (count == 0) {
        return;
    }
    launch_early(
        swiglu_backward_kernel,
        dim3(blocks_for(count)),
        kThreads,
        0,
        queue_of(stream),
        activations(gate),
        activations(up),
        activations(dy),
        activations(dgate),
        activations(dup),
        count
    );
}

void add(Stream& stream, Tensor a, Tensor b, Tensor y) {
    const int64_t count = a.numel();
    if (count == 0) {
        return;
    }
    launch_early(
        add_kernel,
        dim3(blocks_for(count)),
        kThreads,
        0,
        queue_of(stream),
        activations(a),
        activations(b),
        activations(y),
        count
    );
}

}  // namespace orbit::cuda
