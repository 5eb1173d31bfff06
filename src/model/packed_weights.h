// The layouts in which a Hugging Face folder stores one matrix: plain, or several tensors that
// together are one packed matrix (models.md 10). Recognised by the tensors that are there and by
// their types; the config only has to agree.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>

#include "model/checkpoint.h"

namespace orbit {

using TensorMap = std::map<std::string, const StoredTensor*>;

// BF16, F16 or F32.
StoredWeight read_plain_weight(const StoredTensor& tensor);

// The packed matrix whose data is `tensor`, or nothing when `tensor` is plain or belongs to another
// one. Adds the names of all its tensors to `consumed`. UserError when they do not fit together.
//   INT4    X.weight_packed I32, X.weight_scale, X.weight_shape      compressed-tensors
//   MXFP4   X.weight_packed U8, X.weight_scale U8                    compressed-tensors
//   NVFP4   X.weight_packed U8, X.weight_scale F8_E4M3, X.weight_global_scale (divides)
//   NVFP4   X.weight U8, X.weight_scale F8_E4M3, X.weight_scale_2 (multiplies)   ModelOpt
//   MXFP4   X.weight I8, X.scale F8_E8M0                             DeepSeek-V4's experts
//   MXFP4   X_blocks U8 [E, out, in / 32, 16], X_scales U8 [E, out, in / 32]    gpt-oss's experts
//   FP8     X.weight F8_E4M3, X.weight_scale_inv or X.scale          blocks of 128 x 128
// The last is a weight of three axes, for split_fused_experts.
std::optional<StoredWeight> read_packed_weight(
    const TensorMap& tensors, const StoredTensor& tensor, std::set<std::string>& consumed
);

// The name of that matrix: "X.weight", or "X" where X is fused experts.
std::string packed_weight_name(const std::string& tensor);

// Tensors of other programs that say nothing about the weights.
bool is_left_over(const std::string& name);

// transformers' fused experts, X.experts.gate_up_proj [E, 2 I, D] (gate rows first) and
// X.experts.down_proj [E, D, I], become one weight per expert and projection; gpt-oss's too, where
// gate and up rows alternate.
void split_fused_experts(Checkpoint& checkpoint);

}  // namespace orbit
