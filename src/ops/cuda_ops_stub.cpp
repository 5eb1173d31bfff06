// Linked instead of ops/*.cu when the build has no CUDA.
#include "base/error.h"
#include "ops/cuda_ops.h"
#include "ops/decoded_weights.h"
#include "ops/oft_transform.h"

namespace orbit::cuda {
namespace {

[[noreturn]] void no_cuda() {
    throw UserError("this build has no CUDA; use device = \"cpu\".");
}

}  // namespace

void embed(Stream&, const QuantizedMatrix&, const int32_t*, Tensor) {
    no_cuda();
}

void gather_rows(Stream&, Tensor, const int32_t*, Tensor) {
    no_cuda();
}

void scatter_rows(Stream&, Tensor, const int32_t*, Tensor) {
    no_cuda();
}

void rms_norm(Stream&, Tensor, const float*, float, Tensor) {
    no_cuda();
}

void rms_norm_backward(Stream&, Tensor, const float*, float, Tensor, Tensor, bool) {
    no_cuda();
}

void norm_rope(Stream&, const NormRopeParams&, Tensor) {
    no_cuda();
}

void norm_rope_backward(Stream&, const NormRopeParams&, Tensor, Tensor) {
    no_cuda();
}

void norm_rope_append(Stream&, const RopeAppendParams&, Tensor, Tensor) {
    no_cuda();
}

void append_kv(Stream&, const AttentionParams&) {
    no_cuda();
}

bool attention(Stream&, const AttentionParams&, Tensor, float*) {
    no_cuda();
}

void attention_backward(
    Stream&, const AttentionParams&, Tensor, const float*, Tensor, Tensor, Tensor, Tensor
) {
    no_cuda();
}

void swiglu(Stream&, Tensor, Tensor, Tensor) {
    no_cuda();
}

void swiglu_backward(Stream&, Tensor, Tensor, Tensor, Tensor, Tensor) {
    no_cuda();
}

void add(Stream&, Tensor, Tensor, Tensor) {
    no_cuda();
}

void oft_derive_rows(Stream&, std::span<const OftRow>, const float*, bf16*, std::span<OftRowBound>) {
    no_cuda();
}

void oft_gradient_rows(Stream&, std::span<const OftRow>, const float*, const float*, float*) {
    no_cuda();
}

void round_ranges(Stream&, std::span<const RoundRange>, const float*, bf16*) {
    no_cuda();
}

void linear_group(Stream&, std::span<const LinearParams>, std::span<const Tensor>) {
    no_cuda();
}

SwigluResult
linear_swiglu(Stream&, std::span<const LinearParams>, std::span<const Tensor>, const Tensor&) {
    no_cuda();
}

void linear_group_backward(Stream&, std::span<const LinearParams>, std::span<const Tensor>, Tensor, bool, std::span<const AdapterGrad>) {
    no_cuda();
}

void linear_f32_out(Stream&, Tensor, const QuantizedMatrix&, Tensor) {
    no_cuda();
}

void linear_f32_out_backward(Stream&, Tensor, const QuantizedMatrix&, Tensor) {
    no_cuda();
}

void token_logprobs(Stream&, const HeadParams&, const int32_t*, const SamplingFilter&, float*, float*) {
    no_cuda();
}

void token_logprobs_backward(
    Stream&,
    const HeadParams&,
    const int32_t*,
    const SamplingFilter&,
    const float*,
    const float*,
    Tensor
) {
    no_cuda();
}

void sample_tokens(Stream&, const HeadParams&, const SampleRow*, int32_t*, float*) {
    no_cuda();
}

void route(Stream&, const RouterParams&, const Routing&) {
    no_cuda();
}

void route_backward(Stream&, const RouterParams&, const Routing&, const float*, Tensor) {
    no_cuda();
}

void dispatch_rows(Stream&, const Routing&, Tensor, Tensor) {
    no_cuda();
}

void dispatch_rows_backward(Stream&, const Routing&, Tensor, Tensor, bool) {
    no_cuda();
}

void combine_rows(Stream&, const Routing&, Tensor, Tensor, Tensor) {
    no_cuda();
}

void combine_rows_backward(Stream&, const Routing&, Tensor, Tensor, Tensor, float*) {
    no_cuda();
}

void grouped_linear_group(Stream&, std::span<const GroupedLinearParams>, std::span<const Tensor>) {
    no_cuda();
}

void grouped_linear_backward(Stream&, const GroupedLinearParams&, Tensor, Tensor, bool, std::span<const AdapterGrad>) {
    no_cuda();
}

void stage_experts(Stream&, const int32_t*, int32_t, std::span<const ExpertArray>) {
    no_cuda();
}

void advance_decode(Stream&, const DecodeState&) {
    no_cuda();
}

void adamw(Stream&, const AdamWParams&, float*, float*, float*, const float*, int64_t) {
    no_cuda();
}

double global_norm(Stream&, const float*, int64_t) {
    no_cuda();
}

bool decodes_first(const Device&) {
    return false;
}

}  // namespace orbit::cuda
