// Arguments of the attention backward kernels.
#pragma once

#include "ops/attention_cuda.cuh"

namespace orbit::cuda {

struct BackwardArgs {
    const bf16* q;
    const bf16* k;
    const bf16* v;
    const bf16* o;
    const bf16* d_o;
    const float* lse;
    float* delta;  // [T, heads]: sum of do * o
    bf16* dq;
    bf16* dk;
    bf16* dv;
    const int32_t* sequence_begin;
    int32_t num_tokens;
    int32_t num_sequences;
    int32_t heads;
    int32_t kv_heads;
    float scale;
    float scale_log2;
};

// Two neighbouring values of one row of a fragment, to a row of a [T, heads, head_dim] tensor.
template <int kHeadDim>
__device__ __forceinline__ void store_fragments(
    bf16* to, const float (&acc)[kHeadDim / 8][4], int half
) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<uint32_t*>(to + 8 * j) =
            pack_bf16(acc[j][2 * half], acc[j][2 * half + 1]);
    }
}

// dq, dk and dv on Hopper, with delta there; head_dim is 64 or 128.
void launch_backward_wgmma(Stream& stream, const BackwardArgs& a, int64_t head_dim);

}  // namespace orbit::cuda
