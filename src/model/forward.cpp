#include "model/forward.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "model/families/families.h"
#include "ops/activation.h"
#include "ops/attention.h"
#include "ops/embed.h"
#include "ops/norm.h"

namespace orbit {
namespace {

Tensor scratch_like(Pass& pass, int64_t rows, int64_t cols) {
    return pass.stream.scratch.take(pass.model.compute, {rows, cols});
}

Tensor scratch_same(Pass& pass, Tensor x) {
    x.data = pass.stream.scratch.take_bytes(static_cast<size_t>(x.bytes()));
    return x;
}

NormRopeParams rope_params(const Pass& pass, Tensor x, const float* norm_weight) {
    NormRopeParams p;
    p.x = x;
    p.norm_weight = norm_weight;
    p.eps = pass.model.config.norm_eps;
    p.rope = pass.model.rope;
    p.positions = pass.batch.positions;
    return p;
}

AttentionOutput take_attention_output(Pass& pass, bool with_lse) {
    const ModelConfig& c = pass.model.config;
    Scratch& scratch = pass.stream.scratch;
    const int64_t T = pass.batch.num_tokens;
    AttentionOutput output;
    output.o = scratch.take(pass.model.compute, {T, c.num_heads, c.head_dim});
    if (with_lse) {
        output.lse = scratch.take(DType::kF32, {T, c.num_heads}).as<float>();
    }
    return output;
}

const AttentionOutput* kept_attention_of(const SavedActivations& saved, int64_t layer) {
    return saved.attention.empty() ? nullptr : &saved.attention[static_cast<size_t>(layer)];
}

// The router's weights of the chosen experts, as an activation with a gradient.
Tensor router_weights(const Routing& routing) {
    return make_tensor(routing.weight, DType::kF32, {routing.num_tokens, routing.num_selected});
}

}  // namespace

Tensor Pass::rms_norm(Tensor x, const float* weight) {
    const Tensor y = scratch_same(*this, x);
    const float eps = model.config.norm_eps;
    orbit::rms_norm(stream, x, weight, eps, y);
    if (tape != nullptr) {
        tape->record([this, x, weight, eps, y](Tape& t) {
            const Tensor dy = t.of_output(y);
            const auto dx = t.of_input(x);
            rms_norm_backward(stream, x, weight, eps, dy, dx.grad, dx.accumulate);
        });
    }
    return y;
}

AdapterView Pass::adapter_of(const LinearWeights& weights) const {
    return adapter != nullptr && slot != kNoAdapter ? adapter->view(slot, weights.site)
                                                    : AdapterView{};
}

LinearParams Pass::linear_params(Tensor x, const LinearWeights& weights) const {
    LinearParams p;
    p.x = x;
    p.w = weights.w;
    p.bias = weights.bias;
    p.adapter = adapter_of(weights);
    return p;
}

void Pass::keep_lora_u(LinearParams& p) const {
    if (tape != nullptr && p.adapter.kind == AdapterKind::kLora) {
        p.lora_u = take_lora_u(stream, p);
    }
}

// Where the gradient of this layer's adapter, if it has one, is added up.
AdapterGrad Pass::gradient_of(const LinearParams& p, int32_t site) const {
    return p.adapter.kind == AdapterKind::kNone ? AdapterGrad{} : adapter->gradient(site);
}

void Pass::record_linear(const LinearParams& p, int32_t site, Tensor y) {
    if (tape == nullptr) {
        return;
    }
    tape->record([this, p, y, site](Tape& t) {
        const Tensor dy = t.of_output(y);
        const auto dx = t.of_input(p.x);
        linear_backward(stream, p, dy, dx.grad, dx.accumulate, gradient_of(p, site));
        if (p.residual.defined()) {
            t.alias(p.residual, dy);  // d residual = dy, and dy is not needed any more
        }
    });
}

Tensor Pass::linear(
    const LinearInput& input, const LinearWeights& weights, Tensor residual, Tensor out
) {
    const Tensor y = out.defined() ? out : scratch_like(*this, input.x.rows(), weights.w.rows);
    LinearParams p = linear_params(input.x, weights);
    // What is added to a residual is what the next norm reads.
    p.before_rotations = residual.defined() && p.adapter.kind == AdapterKind::kOft;
    if (input.rotated) {
        CHECK(tape == nullptr, "(backward reads what is not rotated)");
        p.adapter = {};
    }
    p.residual = residual;
    if (computes(out)) {
        keep_lora_u(p);
        orbit::linear(stream, p, y);
    }
    record_linear(p, weights.site, y);
    return y;
}

LinearInput Pass::linear_swiglu(
    Tensor x, const LinearWeights& gate, const LinearWeights& up, const LinearWeights& reader
) {
    if (tape != nullptr) {
        const std::vector<Tensor> both = linears(x, {&gate, &up});
        return swiglu(both[0], both[1]);
    }
    const std::vector<LinearParams> params{linear_params(x, gate), linear_params(x, up)};
    const std::vector<Tensor> outputs{
        scratch_like(*this, x.rows(), gate.w.rows), scratch_like(*this, x.rows(), up.w.rows)};
    const SwigluResult result =
        orbit::linear_swiglu(stream, params, outputs, adapter_of(reader).oft_d);
    if (result == SwigluResult::kGateAndUp) {
        return swiglu(outputs[0], outputs[1]);
    }
    return {outputs[0], result == SwigluResult::kRotated};
}

std::vector<Tensor> Pass::linears(Tensor x, std::initializer_list<const LinearWeights*> weights) {
    std::vector<LinearParams> params;
    std::vector<Tensor> outputs;
    for (const LinearWeights* w : weights) {
        params.push_back(linear_params(x, *w));
        keep_lora_u(params.back());
        outputs.push_back(scratch_like(*this, x.rows(), w->w.rows));
    }
    linear_group(stream, params, outputs);
    if (tape != nullptr) {
        std::vector<int32_t> sites;
        for (const LinearWeights* w : weights) {
            sites.push_back(w->site);
        }
        tape->record([this, params, outputs, sites](Tape& t) {
            std::vector<Tensor> dy;
            std::vector<AdapterGrad> grads;
            for (size_t i = 0; i < params.size(); ++i) {
                dy.push_back(t.of_output(outputs[i]));
                grads.push_back(gradient_of(params[i], sites[i]));
            }
            const auto dx = t.of_input(params[0].x);
            linear_group_backward(stream, params, dy, dx.grad, dx.accumulate, grads);
        });
    }
    return outputs;
}

RotatedHeads Pass::norm_rope(Tensor q, Tensor k, Tensor v, const LayerWeights& w, KvView pages) {
    const RotatedHeads y{scratch_same(*this, q), scratch_same(*this, k)};
    RopeAppendParams p;
    p.q = rope_params(*this, q, w.q_norm);
    p.k = rope_params(*this, k, w.k_norm);
    p.v = v;
    p.kv = pages;
    p.batch = batch;
    norm_rope_append(stream, p, y.q, y.k);
    if (tape != nullptr) {
        tape->record([this, p, y](Tape& t) {
            for (const auto& [rope, out] : {std::pair{p.k, y.k}, std::pair{p.q, y.q}}) {
                const Tensor dy = t.of_output(out);
                const auto dx = t.of_input(rope.x);
                CHECK(!dx.accumulate, "(q and k have one use)");
                norm_rope_backward(stream, rope, dy, dx.grad);
            }
        });
    }
    return y;
}

LinearInput Pass::attention(
    const RotatedHeads& heads, Tensor v, KvView pages, const LinearWeights& reader
) {
    const Tensor q = heads.q;
    AttentionParams p;
    p.q = q;
    p.k = heads.k;
    p.v = v;
    p.kv = pages;
    p.batch = batch;
    p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(model.config.head_dim)));
    const auto [o, lse] =
        kept_attention != nullptr ? *kept_attention : take_attention_output(*this, tape != nullptr);
    const bool for_backward = tape != nullptr || kept_attention != nullptr;
    if (!for_backward) {
        p.oft_d = adapter_of(reader).oft_d;
    }
    bool rotated = false;
    if (kept_attention == nullptr || tape == nullptr) {
        rotated = orbit::attention(stream, p, o, lse);
    }
    if (tape != nullptr) {
        tape->record([this, p, o = o, lse = lse](Tape& t) {
            const Tensor d_o = t.of_output(o);
            const auto dq = t.of_input(p.q);
            const auto dk = t.of_input(p.k);
            const auto dv = t.of_input(p.v);
            CHECK(!dq.accumulate && !dk.accumulate && !dv.accumulate, "(q, k and v have one use)");
            attention_backward(stream, p, o, lse, d_o, dq.grad, dk.grad, dv.grad);
        });
    }
    return {o.reshaped({o.shape[0], o.shape[1] * o.shape[2]}), rotated};
}

Tensor Pass::swiglu(Tensor gate, Tensor up) {
    const Tensor y = scratch_same(*this, gate);
    orbit::swiglu(stream, gate, up, y);
    if (tape != nullptr) {
        tape->record([this, gate, up, y](Tape& t) {
            const Tensor dy = t.of_output(y);
            const auto dgate = t.of_input(gate);
            const auto dup = t.of_input(up);
            CHECK(!dgate.accumulate && !dup.accumulate, "(gate and up have one use)");
            swiglu_backward(stream, gate, up, dy, dgate.grad, dup.grad);
        });
    }
    return y;
}

Routing Pass::route(Tensor x, const MoeWeights& moe) {
    const ModelConfig& c = model.config;
    const Routing routing = make_routing(stream, x.rows(), moe.router.rows, c.experts_per_token);
    RouterParams p;
    p.x = x;
    p.weight = moe.router;
    p.num_selected = routing.num_selected;
    p.normalize = c.normalize_router;
    p.batch = batch;
    p.layer = moe.index;
    p.replay = replay;
    if (tape == nullptr) {  // a layer that is run again for backward was recorded before
        p.record = kv.routing();
    }
    orbit::route(stream, p, routing);
    if (tape != nullptr) {
        tape->record([this, p, routing](Tape& t) {
            const Tensor d_weight = t.of_output(router_weights(routing));
            const auto dx = t.of_input(p.x);
            if (!dx.accumulate) {
                zero_fill(stream, dx.grad.data, static_cast<size_t>(dx.grad.bytes()));
            }
            route_backward(stream, p, routing, d_weight.as<float>(), dx.grad);
        });
    }
    return routing;
}

const MoeWeights& Pass::experts_on_device(const Routing& routing, const MoeWeights& moe) {
    if (!moe.on_host) {
        return moe;
    }
    CHECK(staging != nullptr, "(a model with experts in host memory)");
    if (dequant != nullptr) {
        dequant->clear();  // it knows a matrix by its address, where another one lies now
    }
    return staging->stage(stream, routing, moe);
}

Tensor Pass::dispatch(const Routing& routing, Tensor x) {
    const Tensor y = scratch_like(*this, x.rows() * routing.num_selected, x.cols());
    dispatch_rows(stream, routing, x, y);
    if (tape != nullptr) {
        tape->record([this, routing, x, y](Tape& t) {
            const Tensor dy = t.of_output(y);
            const auto dx = t.of_input(x);
            dispatch_rows_backward(stream, routing, dy, dx.grad, dx.accumulate);
        });
    }
    return y;
}

GroupedLinearParams Pass::grouped_params(
    const Routing& routing,
    Tensor x,
    const ExpertWeights& weights,
    std::vector<AdapterView>& adapters
) const {
    if (adapter != nullptr && slot != kNoAdapter) {
        bool any = false;
        for (const int32_t site : weights.sites) {
            adapters.push_back(adapter->view(slot, site));
            any = any || adapters.back().kind != AdapterKind::kNone;
        }
        if (!any) {
            adapters.clear();
        }
    }
    return {x, weights.w, adapters, routing.offsets, dequant};
}

std::vector<Tensor> Pass::grouped_linears(
    const Routing& routing, Tensor x, std::initializer_list<const ExpertWeights*> weights
) {
    std::vector<std::vector<AdapterView>> adapters(weights.size());
    std::vector<GroupedLinearParams> params;
    std::vector<Tensor> outputs;
    for (const ExpertWeights* w : weights) {
        params.push_back(grouped_params(routing, x, *w, adapters[params.size()]));
        outputs.push_back(scratch_like(*this, x.rows(), w->w[0].rows));
    }
    grouped_linear_group(stream, params, outputs);
    if (tape == nullptr) {
        return outputs;
    }
    size_t i = 0;
    for (const ExpertWeights* w : weights) {
        tape->record(
            [this, p = params[i], y = outputs[i], w, views = std::move(adapters[i])](Tape& t) {
                GroupedLinearParams again = p;
                again.adapters = views;
                std::vector<AdapterGrad> grads;
                for (size_t e = 0; e < views.size(); ++e) {
                    grads.push_back(adapter->gradient(w->sites[e]));
                }
                const Tensor dy = t.of_output(y);
                const auto dx = t.of_input(p.x);
                grouped_linear_backward(stream, again, dy, dx.grad, dx.accumulate, grads);
            }
        );
        ++i;
    }
    return outputs;
}

Tensor Pass::combine(const Routing& routing, Tensor x, Tensor residual, Tensor out) {
    if (computes(out)) {
        combine_rows(stream, routing, x, residual, out);
    }
    if (tape != nullptr) {
        tape->record([this, routing, x, residual, out](Tape& t) {
            const Tensor dy = t.of_output(out);
            const auto dx = t.of_input(x);
            const auto d_weight = t.of_input(router_weights(routing));
            CHECK(!dx.accumulate && !d_weight.accumulate, "(expert outputs have one use)");
            combine_rows_backward(stream, routing, x, dy, dx.grad, d_weight.grad.as<float>());
            t.alias(residual, dy);
        });
    }
    return out;
}

Tensor forward_layer(Pass& pass, int64_t index, Tensor x, Tensor out) {
    const LayerWeights& weights = pass.model.layers[static_cast<size_t>(index)];
    const KvView pages = pass.kv.layer(index);
    return weights.moe ? qwen3_moe_layer(pass, weights, pages, x, out)
                       : llama_layer(pass, weights, pages, x, out);
}

int64_t dequant_bytes(const ModelConfig& c, const DequantOptions& options, int64_t tokens) {
    const bool many = c.num_experts > 0 && options.rows > 0 &&
                      tokens * c.experts_per_token >= options.rows * c.num_experts;
    const int64_t layer = 3 * c.num_experts * c.expert_width * c.width * 2;
    return many ? std::min(options.bytes, layer) : 0;
}

int64_t dequant_bytes(const Model& model, int64_t tokens) {
    return dequant_bytes(model.config, model.dequant, tokens);
}

Tensor forward_hidden(Pass& pass, SavedActivations* saved) {
    const int64_t T = pass.batch.num_tokens;
    const int64_t D = pass.model.config.width;
    const int64_t num_layers = pass.model.config.num_layers;
    ActivationOffload* offload = saved != nullptr ? saved->offload : nullptr;
    // Two buffers in turn; when every layer's input stays, each output has memory of its own.
    const bool keep = saved != nullptr && offload == nullptr;
    std::vector<Tensor> buffers;
    for (int64_t i = 0; i < (keep ? num_layers + 1 : 2); ++i) {
        buffers.push_back(scratch_like(pass, T, D));
    }
    for (int64_t i = 0; saved != nullptr && saved->keep_attention && i < num_layers; ++i) {
        saved->attention.push_back(take_attention_output(pass, true));
    }
    Tensor x = buffers[0];
    embed(pass.stream, pass.model.embedding, pass.batch.ids, x);
    const ScratchScope decoded(pass.stream.scratch);
    std::optional<DequantBuffer> dequant;
    if (const int64_t bytes = dequant_bytes(pass.model, T); bytes > 0) {
        pass.dequant = &dequant.emplace(pass.stream, bytes);
    }
    std::optional<ExpertStaging> staging;
    if (pass.model.staged_bytes > 0) {
        pass.staging = &staging.emplace(pass.stream, pass.model);
    }
    for (int64_t layer = 0; layer < num_layers; ++layer) {
        const ScratchScope temporaries(pass.stream.scratch);
        if (saved != nullptr) {
            saved->x.push_back(x);
            pass.kept_attention = kept_attention_of(*saved, layer);
        }
        if (offload != nullptr) {
            offload->wait(pass.stream);  // this layer writes over the input of the one before
            if (layer + 1 < num_layers) {
                offload->store(pass.stream, layer, x);
            }
        }
        x = forward_layer(pass, layer, x, buffers[static_cast<size_t>(layer + 1) % buffers.size()]);
    }
    pass.dequant = nullptr;
    pass.staging = nullptr;
    pass.kept_attention = nullptr;
    return x;
}

Tensor head_hidden(
    Pass& pass, Tensor hidden, const int32_t* rows, int64_t num_rows, Tensor* gathered
) {
    const Tensor chosen = scratch_like(pass, num_rows, hidden.cols());
    gather_rows(pass.stream, hidden, rows, chosen);
    const Tensor h = scratch_same(pass, chosen);
    rms_norm(pass.stream, chosen, pass.model.final_norm, pass.model.config.norm_eps, h);
    if (gathered != nullptr) {
        *gathered = chosen;
    }
    return h;
}

HeadParams head_params(const Model& model, Tensor h) {
    HeadParams p;
    p.h = h;
    p.w = model.head;
    p.num_tokens = static_cast<int32_t>(model.config.vocab_size);
    if (model.tokenizer) {
        p.num_tokens = std::min(p.num_tokens, model.tokenizer->size());
    }
    return p;
}

void backward_layers(Pass& pass, const SavedActivations& saved, Tensor d_hidden) {
    CHECK(pass.tape == nullptr, "(the tape is made here)");
    const ScratchScope decoded(pass.stream.scratch);
    std::optional<DequantBuffer> dequant;
    if (const int64_t bytes = dequant_bytes(pass.model, pass.batch.num_tokens); bytes > 0) {
        dequant.emplace(pass.stream, bytes);
    }
    std::optional<ExpertStaging> staging;
    if (pass.model.staged_bytes > 0) {
        staging.emplace(pass.stream, pass.model);
    }
    for (int64_t layer = pass.model.config.num_layers - 1; layer >= 0; --layer) {
        const ScratchScope temporaries(pass.stream.scratch);
        Tape tape(pass.stream);
        Pass recompute{
            pass.stream,
            pass.model,
            pass.batch,
            pass.kv,
            pass.adapter,
            pass.slot,
            &tape,
            dequant ? &*dequant : nullptr,
            staging ? &*staging : nullptr,
            pass.replay,
            kept_attention_of(saved, layer)};
        const Tensor x = saved.x[static_cast<size_t>(layer)];
        if (saved.offload != nullptr) {
            saved.offload->wait(pass.stream);
            if (layer > 0) {
                const Tensor below = saved.x[static_cast<size_t>(layer - 1)];
                saved.offload->fetch(pass.stream, layer - 1, below);
            }
        }
        // The output is not computed, and goes by its gradient's memory.
        tape.alias(forward_layer(recompute, layer, x, d_hidden), d_hidden);
        tape.run_backward();
        const Tensor dx = tape.of_output(x);
        if (dx.data != d_hidden.data) {
            copy_on_device(pass.stream, d_hidden.data, dx.data, static_cast<size_t>(dx.bytes()));
        }
    }
}

}  // namespace orbit
