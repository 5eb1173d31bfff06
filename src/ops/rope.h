// Per-head RMSNorm (qwen3's q_norm / k_norm, optional) followed by rotary embedding, one rounding
// at the end. Pairs: half-split (i, i + d/2), or interleaved (2i, 2i + 1). cos/sin: float32
// [max_positions, rotary_dim / 2]. (a, b) -> (a cos - b sin, a sin + b cos). Channels from
// rotary_dim on pass through.
#pragma once

#include "device/device.h"
#include "ops/batch.h"

namespace orbit {

struct RopeTable {
    const float* cosine = nullptr;  // [max_positions, rotary_dim / 2]
    const float* sine = nullptr;
    int32_t rotary_dim = 0;
    int32_t max_positions = 0;
    bool interleaved = false;
};

struct NormRopeParams {
    Tensor x;                            // [T, heads, head_dim]
    const float* norm_weight = nullptr;  // [head_dim], or null for no norm
    float eps = 0;
    RopeTable rope;
    const int32_t* positions = nullptr;  // [T] on the device
};

void norm_rope(Stream& stream, const NormRopeParams& p, Tensor y);
void norm_rope_backward(
    Stream& stream, const NormRopeParams& p, Tensor dy, Tensor dx
);  // overwrites dx

// What attention needs of a batch: norm_rope of q and of k, and append_kv of that k and of v, in
// one launch on a GPU. The bits are those of the ops one by one.
struct RopeAppendParams {
    NormRopeParams q;
    NormRopeParams k;  // eps, rope and positions are q's
    Tensor v;          // [T, Hkv, head_dim]
    KvView kv;
    BatchView batch;
};

void norm_rope_append(Stream& stream, const RopeAppendParams& p, Tensor q, Tensor k);

}  // namespace orbit
