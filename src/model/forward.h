// The one forward. Rollout, scoring and training call these functions; with a tape the ops record
// themselves, without one they record nothing. The arithmetic is the same either way, so the bits
// are.
#pragma once

#include <cstdint>
#include <vector>

#include "adapter/adapter.h"
#include "model/activation_offload.h"
#include "model/expert_staging.h"
#include "model/kv_cache.h"
#include "model/model.h"
#include "model/tape.h"
#include "ops/logprob.h"
#include "ops/moe.h"

namespace orbit {

constexpr int kNoAdapter = -1;  // slot: the base itself

// One call of the model on one batch. Activations live in stream.scratch; the caller owns the
// scope.
struct Pass {
    Stream& stream;
    const Model& model;
    BatchView batch;
    const KvCache& kv;
    AdapterStore* adapter = nullptr;
    int slot = kNoAdapter;
    Tape* tape = nullptr;
    DequantBuffer* dequant = nullptr;
    ExpertStaging* staging = nullptr;  // where Model::staged_bytes > 0
    RoutingPages replay = {};          // experts to take instead of the router's choice

    // Recorded ops. `out`: where to write; undefined: new scratch memory.
    Tensor rms_norm(Tensor x, const float* weight);
    Tensor linear(Tensor x, const LinearWeights& weights, Tensor residual = {}, Tensor out = {});
    // Several layers of one input.
    std::vector<Tensor> linears(Tensor x, std::initializer_list<const LinearWeights*> weights);
    Tensor norm_rope(Tensor x, const float* norm_weight);  // x: [T, heads, head_dim]
    Tensor attention(Tensor q, Tensor k, Tensor v, KvView pages);
    Tensor swiglu(Tensor gate, Tensor up);
    // Mixture of experts: T tokens become T K rows sorted by expert, and T tokens again.
    Routing route(Tensor x, const MoeWeights& moe);
    // The layer's experts on the device: `moe` itself, or what was copied for these rows.
    const MoeWeights& experts_on_device(const Routing& routing, const MoeWeights& moe);
    Tensor dispatch(const Routing& routing, Tensor x);
    // Several layers of the same rows.
    std::vector<Tensor> grouped_linears(
        const Routing& routing, Tensor x, std::initializer_list<const ExpertWeights*> weights
    );
    Tensor combine(const Routing& routing, Tensor x, Tensor residual, Tensor out);

    LinearParams linear_params(Tensor x, const LinearWeights& weights) const;
    void record_linear(const LinearParams& p, int32_t site, Tensor y);
    // `adapters`: empty, lives as long as what is returned.
    GroupedLinearParams grouped_params(
        const Routing& routing,
        Tensor x,
        const ExpertWeights& weights,
        std::vector<AdapterView>& adapters
    ) const;
};

// x after layer `index`; written to `out` ([T, width]).
Tensor forward_layer(Pass& pass, int64_t index, Tensor x, Tensor out);

// What forward keeps for backward: the input of every layer, [T, width] in scratch. Each has memory
// of its own; with `offload` two buffers take them in turn, and all but the last are on the host.
struct LayerInputs {
    ActivationOffload* offload = nullptr;  // the caller's
    std::vector<Tensor> x;                 // filled by forward_hidden
};

// Embedding and all layers: the hidden states before the final norm, [T, width]. `inputs`, when
// given, receives the input of every layer for recomputation.
Tensor forward_hidden(Pass& pass, LayerInputs* inputs = nullptr);

// The head's input for chosen rows: gather, then final norm. rows: device int32 [num_rows].
// `gathered` receives the rows before the norm when given (backward needs them).
Tensor head_hidden(
    Pass& pass, Tensor hidden, const int32_t* rows, int64_t num_rows, Tensor* gathered = nullptr
);

HeadParams head_params(const Model& model, Tensor h);

// Bytes that the passes over `tokens` tokens take for decoded experts: model.dequant.bytes, or all
// experts of a layer if that is less; 0 when they decode inside the products.
int64_t dequant_bytes(const Model& model, int64_t tokens);
int64_t dequant_bytes(const ModelConfig& config, const DequantOptions& options, int64_t tokens);

// Walks all layers back from d_hidden = dL/d(hidden before the final norm) [T, width], re-running
// each layer with a tape, and adds the adapter's gradients to its accumulators. Destroys d_hidden,
// and with offloaded inputs what forward_hidden returned.
void backward_layers(Pass& pass, const LayerInputs& inputs, Tensor d_hidden);

}  // namespace orbit
