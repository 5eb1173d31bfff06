#include "model/checkpoint.h"

#include <set>

#include "base/error.h"

namespace orbit {
namespace {

// Left over from training; no part of the forward pass.
bool is_ignorable(const std::string& name) {
    return name.ends_with("rotary_emb.inv_freq");
}

}  // namespace

int64_t StoredWeight::numel() const {
    int64_t n = 1;
    for (const int64_t dim : shape) {
        n *= dim;
    }
    return n;
}

std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (const int64_t dim : shape) {
        text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
    }
    return text + "]";
}

namespace {

void expect_experts(
    const ModelConfig& c, const std::string& layer, int64_t index, std::vector<ExpectedWeight>& list
) {
    list.push_back({layer + "mlp.gate.weight", {c.num_experts, c.width}});
    for (int64_t e = 0; e < c.num_experts; ++e) {
        const std::string expert = fmt::format("{}mlp.experts.{}.", layer, e);
        list.push_back({expert + "gate_proj.weight", {c.expert_width, c.width}, true, index});
        list.push_back({expert + "up_proj.weight", {c.expert_width, c.width}, true, index});
        list.push_back({expert + "down_proj.weight", {c.width, c.expert_width}, true, index});
    }
}

}  // namespace

std::vector<ExpectedWeight> expected_weights(const ModelConfig& c) {
    std::vector<ExpectedWeight> list;
    int64_t expert_layers = 0;
    const int64_t q_width = c.num_heads * c.head_dim;
    const int64_t kv_width = c.num_kv_heads * c.head_dim;
    list.push_back({"model.embed_tokens.weight", {c.vocab_size, c.width}});
    for (int64_t l = 0; l < c.num_layers; ++l) {
        const std::string layer = fmt::format("model.layers.{}.", l);
        const std::string attention = layer + "self_attn.";
        list.push_back({layer + "input_layernorm.weight", {c.width}});
        list.push_back({attention + "q_proj.weight", {q_width, c.width}, true});
        list.push_back({attention + "k_proj.weight", {kv_width, c.width}, true});
        list.push_back({attention + "v_proj.weight", {kv_width, c.width}, true});
        if (c.qkv_bias) {
            list.push_back({attention + "q_proj.bias", {q_width}});
            list.push_back({attention + "k_proj.bias", {kv_width}});
            list.push_back({attention + "v_proj.bias", {kv_width}});
        }
        if (c.qk_norm) {
            list.push_back({attention + "q_norm.weight", {c.head_dim}});
            list.push_back({attention + "k_norm.weight", {c.head_dim}});
        }
        list.push_back({attention + "o_proj.weight", {c.width, q_width}, true});
        list.push_back({layer + "post_attention_layernorm.weight", {c.width}});
        if (c.layer_has_experts(l)) {
            expect_experts(c, layer, expert_layers++, list);
            continue;
        }
        list.push_back({layer + "mlp.gate_proj.weight", {c.mlp_width, c.width}, true});
        list.push_back({layer + "mlp.up_proj.weight", {c.mlp_width, c.width}, true});
        list.push_back({layer + "mlp.down_proj.weight", {c.width, c.mlp_width}, true});
    }
    list.push_back({"model.norm.weight", {c.width}});
    if (!c.tied_embeddings) {
        list.push_back({"lm_head.weight", {c.vocab_size, c.width}});
    }
    return list;
}

void check_weights(const Checkpoint& checkpoint) {
    std::set<std::string> expected_names;
    for (const ExpectedWeight& expected : expected_weights(checkpoint.config)) {
        const auto found = checkpoint.weights.find(expected.name);
        USER_CHECK(
            found != checkpoint.weights.end(),
            "{}: the tensor \"{}\" is missing; the download is incomplete, or the config is of "
            "another model.",
            checkpoint.path,
            expected.name
        );
        USER_CHECK(
            found->second.shape == expected.shape,
            "{}: the tensor \"{}\" has the shape {}, but the config asks for {}.",
            found->second.file,
            found->second.name,
            shape_text(found->second.shape),
            shape_text(expected.shape)
        );
        expected_names.insert(expected.name);
    }
    for (const auto& [name, weight] : checkpoint.weights) {
        USER_CHECK(
            expected_names.contains(name) || is_ignorable(name) || name == "lm_head.weight",
            "{}: the tensor \"{}\" has no place in a {} model of {} layers; without it the results "
            "would be wrong, so the model is refused.",
            weight.file,
            weight.name,
            checkpoint.config.family,
            checkpoint.config.num_layers
        );
    }
}

Checkpoint open_checkpoint(const std::string& path, const OpenOptions& options) {
    if (is_directory(path)) {
        return open_hf_folder(path, options);
    }
    USER_CHECK(
        file_exists(path),
        "there is no model at {}; give a Hugging Face folder or a .gguf file.",
        path
    );
    return open_gguf(path, options);
}

}  // namespace orbit
