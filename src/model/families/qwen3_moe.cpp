// The Qwen3-MoE block (models.md 4): attention as in llama, then x + sum over the chosen experts of
// weight * MLP(norm(x)). T tokens, D width, R = T K rows sorted by expert, I MLP of an expert.
#include "model/families/families.h"

namespace orbit {

Tensor qwen3_moe_layer(
    Pass& pass, const LayerWeights& w, KvView pages, Tensor x_TD, Tensor out_TD
) {
    const Tensor h_TD = llama_attention(pass, w, pages, x_TD);
    const Tensor m_TD = pass.rms_norm(h_TD, w.post_attention_norm);
    const Routing routing = pass.route(m_TD, *w.moe);
    const MoeWeights& moe = pass.experts_on_device(routing, *w.moe);
    const Tensor m_RD = pass.dispatch(routing, m_TD);
    const Tensor gate_RI = pass.grouped_linear(routing, m_RD, moe.gate);
    const Tensor up_RI = pass.grouped_linear(routing, m_RD, moe.up);
    const Tensor y_RD = pass.grouped_linear(routing, pass.swiglu(gate_RI, up_RI), moe.down);
    return pass.combine(routing, y_RD, h_TD, out_TD);
}

}  // namespace orbit
