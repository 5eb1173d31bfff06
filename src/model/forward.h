// The one forward. Rollout, scoring and training call these functions; with a tape the ops record
// themselves, without one they record nothing. The arithmetic is the same either way, so the bits
// are; with a tape the output of a layer, which backward does not read, is left out.
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

struct RotatedHeads {
    Tensor q;  // [T, H, head_dim]
    Tensor k;  // [T, Hkv, head_dim]
};

// What a linear layer reads. The op that made it may have rotated it already, as the layer's OFT
// adapter does.
struct LinearInput {
    LinearInput(Tensor input, bool is_rotated = false) : x(input), rotated(is_rotated) {}

    Tensor x;  // [T, in]
    bool rotated;
};

// What attention leaves of one layer.
struct AttentionOutput {
    Tensor o;              // [T, H, d]
    float* lse = nullptr;  // [T, H], for backward
};

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
    // Of the layer at hand, with train.recompute = "selective": forward writes it, and the layer
    // that is run again for backward takes it instead of running attention again.
    const AttentionOutput* kept_attention = nullptr;

    // Recorded ops. `out`: where to write; undefined: new scratch memory. What has an `out` is the
    // output of its layer: with a tape it is not computed, since backward asks for its gradient
    // alone.
    Tensor rms_norm(Tensor x, const float* weight);
    Tensor linear(
        const LinearInput& input,
        const LinearWeights& weights,
        Tensor residual = {},
        Tensor out = {}
    );
    // Several layers of one input.
    std::vector<Tensor> linears(Tensor x, std::initializer_list<const LinearWeights*> weights);
    // q and k ([T, heads, head_dim]) normed and rotated; that k, and v, are in the pages then,
    // where attention reads them.
    RotatedHeads norm_rope(Tensor q, Tensor k, Tensor v, const LayerWeights& w, KvView pages);
    // For the layer `reader`.
    LinearInput attention(
        const RotatedHeads& heads, Tensor v, KvView pages, const LinearWeights& reader
    );
    Tensor swiglu(Tensor gate, Tensor up);
    // silu(gate) up, for the layer `reader`.
    LinearInput linear_swiglu(
        Tensor x, const LinearWeights& gate, const LinearWeights& up, const LinearWeights& reader
    );
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

    AdapterView adapter_of(const LinearWeights& weights) const;
    LinearParams linear_params(Tensor x, const LinearWeights& weights) const;
    void keep_lora_u(LinearParams& p) const;  // for backward, with a tape
    AdapterGrad gradient_of(const LinearParams& p, int32_t site) const;
    void record_linear(const LinearParams& p, int32_t site, Tensor y);
    // `adapters`: empty, lives as long as what is returned.
    GroupedLinearParams grouped_params(
        const Routing& routing,
        Tensor x,
        const ExpertWeights& weights,
        std::vector<AdapterView>& adapters
    ) const;

    bool computes(Tensor out) const { return tape == nullptr || !out.defined(); }
};

// x after layer `index`; written to `out` ([T, width]). With a tape nothing is written there.
Tensor forward_layer(Pass& pass, int64_t index, Tensor x, Tensor out);

// What forward keeps for backward, in scratch: the input of every layer, [T, width], and if asked
// to what its attention leaves. Each has memory of its own; with `offload` two buffers take the
// inputs in turn, and all but the last are on the host.
struct SavedActivations {
    ActivationOffload* offload = nullptr;  // the caller's
    bool keep_attention = false;
    std::vector<Tensor> x = {};                   // filled by forward_hidden
    std::vector<AttentionOutput> attention = {};  // likewise; empty: computed again
};

// Embedding and all layers: the hidden states before the final norm, [T, width]. `saved`, when
// given, receives what backward_layers needs.
Tensor forward_hidden(Pass& pass, SavedActivations* saved = nullptr);

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
void backward_layers(Pass& pass, const SavedActivations& saved, Tensor d_hidden);

}  // namespace orbit
