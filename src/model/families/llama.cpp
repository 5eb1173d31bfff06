// The llama block: x + Attn(norm(x)), then x + MLP(norm(x)). T tokens, D width, H heads, K kv
// heads, d head width, A = H d, I MLP.
#include "model/families/families.h"

namespace orbit {

Tensor llama_attention(Pass& pass, const LayerWeights& w, KvView pages, Tensor x_TD) {
    const ModelConfig& c = pass.model.config;
    const int64_t T = x_TD.rows();
    const Tensor n_TD = pass.rms_norm(x_TD, w.input_norm);
    const std::vector<Tensor> qkv = pass.linears(n_TD, {&w.q, &w.k, &w.v});
    const Tensor q_THd = qkv[0].reshaped({T, c.num_heads, c.head_dim});
    const Tensor k_TKd = qkv[1].reshaped({T, c.num_kv_heads, c.head_dim});
    const Tensor v_TKd = qkv[2].reshaped({T, c.num_kv_heads, c.head_dim});
    const RotatedHeads rotated = pass.norm_rope(q_THd, k_TKd, v_TKd, w, pages);
    const LinearInput a_TA = pass.attention(rotated, v_TKd, pages, w.o);
    return pass.linear(a_TA, w.o, x_TD);
}

Tensor llama_layer(Pass& pass, const LayerWeights& w, KvView pages, Tensor x_TD, Tensor out_TD) {
    const Tensor h_TD = llama_attention(pass, w, pages, x_TD);
    const Tensor m_TD = pass.rms_norm(h_TD, w.post_attention_norm);
    const LinearInput y_TI = pass.linear_swiglu(m_TD, w.gate, w.up, w.down);
    return pass.linear(y_TI, w.down, h_TD, out_TD);
}

}  // namespace orbit
