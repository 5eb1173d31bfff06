// Model: a frozen base in one arena, with its tokenizer and chat template. Const after load; shared
// by every stream of a device. Config, tensor names and the layer itself of a family are in
// families/.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "adapter/adapter.h"
#include "device/device.h"
#include "ops/moe.h"
#include "ops/rope.h"
#include "quant/quantized_matrix.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace orbit {

struct RopeScaling {               // models.md 1.3
    std::string type = "default";  // default, linear, llama3, yarn
    double factor = 1;
    double low_freq_factor = 1;
    double high_freq_factor = 4;
    double original_max_positions = 0;
    double beta_fast = 32;
    double beta_slow = 1;
    double attention_factor = 0;  // 0: derived
    bool truncate = true;
};

struct ModelConfig {
    std::string family;  // "llama", "qwen2", "qwen3", "qwen3_moe"
    int64_t width = 0;   // hidden size
    int64_t mlp_width = 0;
    int64_t num_layers = 0;
    int64_t num_heads = 0;
    int64_t num_kv_heads = 0;
    int64_t head_dim = 0;
    int64_t vocab_size = 0;  // rows of the embedding
    int64_t max_positions = 0;
    float norm_eps = 1e-6f;
    double rope_theta = 10000;
    RopeScaling rope_scaling;
    bool tied_embeddings = false;
    bool qkv_bias = false;  // qwen2
    bool qk_norm = false;   // qwen3
    // qwen3_moe (models.md 4); 0 experts: a dense model.
    int64_t num_experts = 0;
    int64_t experts_per_token = 0;
    int64_t expert_width = 0;              // MLP width of one expert
    bool normalize_router = true;          // the chosen experts' weights sum to 1
    int64_t sparse_step = 1;               // layer l has experts iff (l + 1) % step == 0 ...
    std::vector<int64_t> mlp_only_layers;  // ... and is not listed here

    bool layer_has_experts(int64_t layer) const;
    int64_t num_expert_layers() const;

    // Whether the experts of layer `index`, counted among those with experts, stay in host memory.
    bool on_host(int64_t index, int64_t host_layers) const {
        return index >= num_expert_layers() - host_layers;
    }
};

struct LinearWeights {
    std::string module;  // "model.layers.0.self_attn.q_proj"
    QuantizedMatrix w;
    const float* bias = nullptr;  // device, [out]
    int32_t site = -1;            // index into Model::sites
};

// One of the three matrices of every expert of a layer.
struct ExpertWeights {
    std::vector<QuantizedMatrix> w;  // [experts] of [out, in]
    std::vector<int32_t> sites;      // indices into Model::sites
};

struct MoeWeights {
    QuantizedMatrix router;  // [experts, width], never adapted
    ExpertWeights gate, up, down;
    int32_t index = 0;     // of this layer among those with experts
    bool on_host = false;  // gate, up and down lie in Model::host
};

struct LayerWeights {
    const float* input_norm = nullptr;  // device, [width]
    const float* post_attention_norm = nullptr;
    const float* q_norm = nullptr;  // qwen3, [head_dim]
    const float* k_norm = nullptr;
    LinearWeights q, k, v, o;
    LinearWeights gate, up, down;   // dense layers
    std::optional<MoeWeights> moe;  // layers with experts
};

struct Model {
    explicit Model(const Device& device) : arena(device), host(device, MemoryPlace::kHost) {}

    ModelConfig config;
    std::string path;
    std::string name;              // last path component, for people
    DType compute = DType::kBF16;  // activations; kF32 in the check mode
    Arena arena;
    Arena host;  // experts of the last layers that have some (LoadOptions::host_layers)
    int64_t staged_bytes = 0;   // what a pass takes on the device for one layer of those
    QuantizedMatrix embedding;  // [vocab, width]
    QuantizedMatrix head;       // the embedding itself when tied
    std::vector<LayerWeights> layers;
    const float* final_norm = nullptr;
    RopeTable rope;
    std::vector<AdapterSite> sites;  // every linear layer, in layer order
    std::optional<Tokenizer> tokenizer;
    std::optional<ChatTemplate> chat_template;
    std::vector<int32_t>
        stop_ids;  // every end-of-turn id of config, generation_config and template
    double largest_rounding_error = 0;  // F16/F32 files rounded to bf16 at load
    std::string weights_digest;         // hash of the weight bytes as loaded
    DequantOptions dequant;             // how experts are multiplied; changes no bit
};

struct LoadOptions {
    DType compute = DType::kBF16;
    std::string
        quantize;  // "" as stored, "int4": BF16 linears are quantised to INT4 group 32 at load
    bool weights = true;  // false: config, tokenizer and template only (inspect)
    DequantOptions dequant = {};
    int64_t host_layers = 0;  // layers whose experts stay in host memory, counted from the last
};

// MODEL: a Hugging Face folder or a .gguf file. UserError names the file, the tensor or field, and
// the fix.
std::unique_ptr<Model> load_model(
    Stream& stream, const std::string& path, const LoadOptions& options = {}
);

// Prompt ids of messages through the chat template (raw: the last message's content as it is).
std::vector<int32_t> encode_chat(
    const Model& model, const std::vector<ChatMessage>& messages, bool raw
);

}  // namespace orbit
