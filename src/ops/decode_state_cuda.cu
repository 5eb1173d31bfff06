#include "device/cuda/check.cuh"
#include "ops/cuda_ops.h"

namespace orbit::cuda {
namespace {

__global__ void advance_kernel(DecodeState s) {
    const int32_t step = s.step[0];
    for (int32_t b = static_cast<int32_t>(threadIdx.x); b < s.batch;
         b += static_cast<int32_t>(blockDim.x)) {
        s.tokens[step * s.batch + b] = s.sampled[b];
        s.logprobs[step * s.batch + b] = s.sampled_logprob[b];
        s.ids[b] = s.sampled[b];
        const int32_t next = s.positions[b] + 1;
        s.positions[b] = next < s.limits[b] ? next : s.limits[b];
        s.samples[b].position += 1;
        s.samples[b].forced = s.forced[(step + 1) * s.batch + b];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        s.step[0] = step + 1;
    }
}

}  // namespace

void advance_decode(Stream& stream, const DecodeState& state) {
    advance_kernel<<<1, 256, 0, queue_of(stream)>>>(state);
    LAUNCH_CHECK();
}

}  // namespace orbit::cuda
