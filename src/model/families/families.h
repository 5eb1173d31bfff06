// One layer function per family, written with the recorded ops of Pass. Adding a family: one file
// here, one line in forward.cpp's table, its config keys and tensor names in config.cpp and the
// loader.
#pragma once

#include "model/forward.h"

namespace orbit {

// llama, qwen2 (bias on q, k, v) and qwen3 (per-head norm of q and k).
Tensor llama_layer(Pass& pass, const LayerWeights& w, KvView pages, Tensor x, Tensor out);
// Its first half, x + Attn(norm(x)).
Tensor llama_attention(Pass& pass, const LayerWeights& w, KvView pages, Tensor x);

// qwen3_moe's layers with experts; its dense ones are llama's.
Tensor qwen3_moe_layer(Pass& pass, const LayerWeights& w, KvView pages, Tensor x, Tensor out);

}  // namespace orbit
