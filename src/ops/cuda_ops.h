// The CUDA version of every op, same signatures and contract as the op's header. ops/*/X.cu
// implement them; a build without CUDA links ops/cuda_ops_stub.cpp. The public op calls these when
// the stream's device is a GPU.
#pragma once

#include "ops/activation.h"
#include "ops/attention.h"
#include "ops/decode_state.h"
#include "ops/dense.h"
#include "ops/embed.h"
#include "ops/logprob.h"
#include "ops/moe.h"
#include "ops/norm.h"
#include "ops/optimizer.h"
#include "ops/rope.h"

namespace orbit::cuda {

void embed(Stream& stream, const QuantizedMatrix& table, const int32_t* ids, Tensor y);
void gather_rows(Stream& stream, Tensor x, const int32_t* index, Tensor y);
void scatter_rows(Stream& stream, Tensor y, const int32_t* index, Tensor x);
void rms_norm(Stream& stream, Tensor x, const float* weight, float eps, Tensor y);
void rms_norm_backward(
    Stream& stream, Tensor x, const float* weight, float eps, Tensor dy, Tensor dx, bool accumulate
);
void norm_rope(Stream& stream, const NormRopeParams& p, Tensor y);
void norm_rope_backward(Stream& stream, const NormRopeParams& p, Tensor dy, Tensor dx);
void norm_rope_append(Stream& stream, const RopeAppendParams& p, Tensor q, Tensor k);

void append_kv(Stream& stream, const AttentionParams& p);
bool attention(Stream& stream, const AttentionParams& p, Tensor o, float* lse);
void attention_backward(
    Stream& stream,
    const AttentionParams& p,
    Tensor o,
    const float* lse,
    Tensor d_o,
    Tensor dq,
    Tensor dk,
    Tensor dv
);
void swiglu(Stream& stream, Tensor gate, Tensor up, Tensor y);
void swiglu_backward(Stream& stream, Tensor gate, Tensor up, Tensor dy, Tensor dgate, Tensor dup);
void add(Stream& stream, Tensor a, Tensor b, Tensor y);
void linear_group(Stream& stream, std::span<const LinearParams> params, std::span<const Tensor> y);
SwigluResult linear_swiglu(
    Stream& stream,
    std::span<const LinearParams> params,
    std::span<const Tensor> y,
    const Tensor& oft_d
);
void linear_group_backward(
    Stream& stream,
    std::span<const LinearParams> params,
    std::span<const Tensor> dy,
    Tensor dx,
    bool accumulate_dx,
    std::span<const AdapterGrad> grads
);
void linear_f32_out(Stream& stream, Tensor h, const QuantizedMatrix& w, Tensor logits);
void linear_f32_out_backward(Stream& stream, Tensor dlogits, const QuantizedMatrix& w, Tensor dh);
void token_logprobs(
    Stream& stream,
    const HeadParams& p,
    const int32_t* targets,
    const SamplingFilter& filter,
    float* logprob,
    float* entropy
);
void token_logprobs_backward(
    Stream& stream,
    const HeadParams& p,
    const int32_t* targets,
    const SamplingFilter& filter,
    const float* d_logprob,
    const float* d_entropy,
    Tensor dh
);
void sample_tokens(
    Stream& stream, const HeadParams& p, const SampleRow* rows, int32_t* tokens, float* logprob
);
void route(Stream& stream, const RouterParams& p, const Routing& routing);
void route_backward(
    Stream& stream, const RouterParams& p, const Routing& routing, const float* d_weight, Tensor dx
);
void dispatch_rows(Stream& stream, const Routing& routing, Tensor x, Tensor y);
void dispatch_rows_backward(
    Stream& stream, const Routing& routing, Tensor dy, Tensor dx, bool accumulate
);
void combine_rows(Stream& stream, const Routing& routing, Tensor x, Tensor residual, Tensor y);
void combine_rows_backward(
    Stream& stream, const Routing& routing, Tensor x, Tensor dy, Tensor dx, float* d_weight
);
void grouped_linear_group(
    Stream& stream, std::span<const GroupedLinearParams> params, std::span<const Tensor> y
);
void grouped_linear_backward(
    Stream& stream,
    const GroupedLinearParams& p,
    Tensor dy,
    Tensor dx,
    bool accumulate_dx,
    std::span<const AdapterGrad> grads
);
void stage_experts(
    Stream& stream, const int32_t* offsets, int32_t num_experts, std::span<const ExpertArray> arrays
);
void advance_decode(Stream& stream, const DecodeState& state);
void adamw(
    Stream& stream,
    const AdamWParams& params,
    float* p,
    float* m,
    float* v,
    const float* g,
    int64_t count
);
double global_norm(Stream& stream, const float* g, int64_t count);

}  // namespace orbit::cuda
