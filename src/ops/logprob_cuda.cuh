// What a sampling filter keeps of a row of logits: a cut that one comparison per id applies.
#pragma once

#include "device/cuda/check.cuh"
#include "device/cuda/math.cuh"
#include "ops/logprob.h"

namespace orbit::cuda {

struct RowCut {
    float factor;      // 1 / temperature
    int32_t end;       // ids from here on are dropped
    uint32_t key;      // order_key of the lowest logit kept
    int32_t tie_end;   // of the ids that tie with it, those below this one are kept
    float largest;     // of the kept tempered logits
    float min_weight;  // kept: e^(z - largest) >= min_weight
};

__device__ __forceinline__ float dropped() {
    return __uint_as_float(0xff800000u);
}

// Sorts as the float does; -0 counts as 0.
__device__ __forceinline__ uint32_t order_key(float z) {
    const uint32_t bits = __float_as_uint(__fadd_rn(z, 0.0f));
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ bool keeps(const RowCut& cut, float z, int32_t id) {
    if (cut.key == 0 && cut.min_weight <= 0.0f) {
        return id < cut.end;
    }
    const uint32_t key = order_key(z);
    const bool ranked = key > cut.key || (key == cut.key && id < cut.tie_end);
    return id < cut.end && ranked &&
           (cut.min_weight <= 0.0f || exp_f32(__fsub_rn(z, cut.largest)) >= cut.min_weight);
}

// Fills cuts[0, rows) from each sample's filter, or from the one `filter` when samples is null.
// sample_filter_cuda.cu.
void cut_rows(
    cudaStream_t queue,
    const float* logits,
    int64_t rows,
    int32_t vocabulary,
    int32_t num_tokens,
    const SampleRow* samples,
    const SamplingFilter& filter,
    RowCut* cuts
);

// dh = dlogits W with dlogits already rounded to bf16. dense_cuda.cu.
void head_backward(Stream& stream, Tensor dlogits, const QuantizedMatrix& w, Tensor dh);

}  // namespace orbit::cuda
