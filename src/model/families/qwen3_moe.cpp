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
    const std::vector<Tensor> gate_up = pass.grouped_linears(routing, m_RD, {&moe.gate, &moe.up});
    const Tensor hidden_RI = pass.swiglu(gate_up[0], gate_up[1]);
    const Tensor y_RD = pass.grouped_linears(routing, hidden_RI, {&moe.down})[0];
    return pass.combine(routing, y_RD, h_TD, out_TD);
}

}  // namespace orbit
