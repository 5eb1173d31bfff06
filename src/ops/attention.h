// Causal attention over paged keys and values, with grouped query heads (GQA: query head h reads KV
// head h / (H / Hkv)).
//
// append_kv, or norm_rope_append, writes the batch's k and v rows into their pages; then each query
// row reads positions 0..p from the pages, in training too, so prefill, decode and training run the
// same arithmetic on the same bits. Order, per (token, head): scores s_j = scale * (q . k_j) in
// fp32; m = max; weights exp(s_j - m) in fp32, their sum l in ascending j; P_j rounded to the
// compute type (in bf16 mode) before P V; o = (sum_j P_j v_j) / l in ascending j; one rounding.
// Nothing depends on how many rows the batch holds or where a chunk was cut.
#pragma once

#include "device/device.h"
#include "ops/batch.h"

namespace orbit {

struct AttentionParams {
    Tensor q;  // [T, H, d]
    Tensor k;  // [T, Hkv, d]
    Tensor v;  // [T, Hkv, d]
    KvView kv;
    BatchView batch;
    float scale = 0;
    Tensor oft_d;  // AdapterView::oft_d of the linear layer that reads o, or undefined
};

// Writes k and v into their pages.
void append_kv(Stream& stream, const AttentionParams& p);

// The batch's own rows lie in the pages already. o: [T, H, d]. lse: float32 [T, H] (log-sum-exp of
// the scaled scores), or null when no backward follows. True where a kernel of a GPU has rotated o
// as p.oft_d says, with the bits of linear(): then o is round(o + o D).
bool attention(Stream& stream, const AttentionParams& p, Tensor o, float* lse);

// For batches of whole sequences (sequence_position all 0): reads q, k, v of the batch, not the
// pages. Overwrites dq, dk, dv; deterministic (fixed order, no atomics).
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

}  // namespace orbit
