// A GGUF file as a Checkpoint: its metadata as our config, its tensors under their Hugging Face
// names (models.md 10.8).
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/error.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/gguf.h"

namespace orbit {
namespace {

struct TypeRow {
    uint32_t id;
    const char* name;
    bool supported;
    WeightFormat format;
};

constexpr std::array<TypeRow, 17> kTypes = {{
    {0, "F32", true, WeightFormat::kF32},
    {1, "F16", true, WeightFormat::kF16},
    {2, "Q4_0", true, WeightFormat::kQ4_0},
    {3, "Q4_1", true, WeightFormat::kQ4_1},
    {6, "Q5_0", false, WeightFormat::kF32},
    {7, "Q5_1", false, WeightFormat::kF32},
    {8, "Q8_0", true, WeightFormat::kQ8_0},
    {10, "Q2_K", false, WeightFormat::kF32},
    {11, "Q3_K", false, WeightFormat::kF32},
    {12, "Q4_K", false, WeightFormat::kF32},
    {13, "Q5_K", false, WeightFormat::kF32},
    {14, "Q6_K", false, WeightFormat::kF32},
    {15, "Q8_K", false, WeightFormat::kF32},
    {20, "IQ4_NL", false, WeightFormat::kF32},
    {23, "IQ4_XS", false, WeightFormat::kF32},
    {30, "BF16", true, WeightFormat::kBF16},
    {39, "MXFP4", false, WeightFormat::kF32},
}};

struct NameRow {
    const char* gguf;
    const char* hugging_face;
};

constexpr std::array<NameRow, 15> kLayerNames = {{
    {"attn_norm.weight", "input_layernorm.weight"},
    {"ffn_norm.weight", "post_attention_layernorm.weight"},
    {"attn_q.weight", "self_attn.q_proj.weight"},
    {"attn_k.weight", "self_attn.k_proj.weight"},
    {"attn_v.weight", "self_attn.v_proj.weight"},
    {"attn_output.weight", "self_attn.o_proj.weight"},
    {"attn_q.bias", "self_attn.q_proj.bias"},
    {"attn_k.bias", "self_attn.k_proj.bias"},
    {"attn_v.bias", "self_attn.v_proj.bias"},
    {"attn_output.bias", "self_attn.o_proj.bias"},
    {"attn_q_norm.weight", "self_attn.q_norm.weight"},
    {"attn_k_norm.weight", "self_attn.k_norm.weight"},
    {"ffn_gate.weight", "mlp.gate_proj.weight"},
    {"ffn_up.weight", "mlp.up_proj.weight"},
    {"ffn_down.weight", "mlp.down_proj.weight"},
}};

constexpr std::array<NameRow, 3> kTopNames = {{
    {"token_embd.weight", "model.embed_tokens.weight"},
    {"output_norm.weight", "model.norm.weight"},
    {"output.weight", "lm_head.weight"},
}};

// A name that is not ours stays as it is, and check_weights refuses it.
std::string hugging_face_name(const std::string& name) {
    for (const NameRow& row : kTopNames) {
        if (name == row.gguf) {
            return row.hugging_face;
        }
    }
    if (name.starts_with("blk.")) {
        const size_t dot = name.find('.', 4);
        for (const NameRow& row : kLayerNames) {
            if (dot != std::string::npos &&
                name.compare(dot + 1, std::string::npos, row.gguf) == 0) {
                return "model.layers." + name.substr(4, dot - 4) + "." + row.hugging_face;
            }
        }
    }
    return name;
}

WeightFormat format_of(const GgufFile& file, const GgufTensor& tensor) {
    std::string name = fmt::format("the unknown type {}", tensor.type);
    for (const TypeRow& row : kTypes) {
        if (row.id == tensor.type) {
            if (row.supported) {
                return row.format;
            }
            name = row.name;
        }
    }
    throw UserError(fmt::format(
        "{}: the tensor \"{}\" is {}; F32, F16, BF16, Q8_0, Q4_0 and Q4_1 are supported, so choose "
        "a file in one of these.",
        file.path(),
        tensor.name,
        name
    ));
}

StoredWeight read_tensor(const GgufFile& file, const GgufTensor& tensor) {
    StoredWeight weight;
    weight.name = tensor.name;
    weight.file = file.path();
    weight.shape = tensor.shape;
    weight.format = format_of(file, tensor);
    const bool blocks = weight.format != WeightFormat::kF32 &&
                        weight.format != WeightFormat::kF16 && weight.format != WeightFormat::kBF16;
    USER_CHECK(
        weight.shape.size() <= 2 && (!blocks || weight.shape.back() % 32 == 0),
        "{}: the tensor \"{}\" {} in {} is no matrix of whole blocks; the file is damaged.",
        file.path(),
        tensor.name,
        shape_text(weight.shape),
        format_name(weight.format)
    );
    const int64_t rows = weight.shape.size() == 2 ? weight.shape[0] : 1;
    const auto bytes = static_cast<uint64_t>(rows * row_bytes(weight.format, weight.shape.back()));
    weight.data = file.tensor_bytes(tensor, bytes);
    return weight;
}

int64_t needed(const GgufFile& file, const std::string& key) {
    const auto value = file.integer(key);
    USER_CHECK(value.has_value(), "{}: the key \"{}\" is missing.", file.path(), key);
    return *value;
}

RopeScaling read_rope_scaling(const GgufFile& file, const std::string& architecture) {
    const std::string prefix = architecture + ".rope.scaling.";
    RopeScaling scaling;
    const std::string type = file.text(prefix + "type").value_or("none");
    const double factor = file.number(prefix + "factor").value_or(0);
    USER_CHECK(
        type == "none" || type == "linear" || type == "yarn",
        "{}: the rope scaling \"{}\" is not supported; none, linear and yarn are.",
        file.path(),
        type
    );
    if (type == "none" || factor == 0 || factor == 1) {
        return scaling;
    }
    USER_CHECK(factor > 0, "{}: \"{}factor\" must be above 0.", file.path(), prefix);
    scaling.type = type;
    scaling.factor = factor;
    scaling.original_max_positions =
        file.number(prefix + "original_context_length")
            .value_or(static_cast<double>(needed(file, architecture + ".context_length")));
    scaling.beta_fast = file.number(prefix + "yarn_beta_fast").value_or(scaling.beta_fast);
    scaling.beta_slow = file.number(prefix + "yarn_beta_slow").value_or(scaling.beta_slow);
    // llama.cpp multiplies its own factor on top of the one that YaRN derives.
    const double given = file.number(prefix + "attn_factor").value_or(1);
    if (type == "yarn" && given > 0 && factor > 1) {
        scaling.attention_factor = given * (0.1 * std::log(factor) + 1);
    }
    return scaling;
}

ModelConfig read_config(const GgufFile& file) {
    const std::string a = file.text("general.architecture").value_or("");
    ModelConfig config;
    apply_family(config, a, file.path() + ": general.architecture");
    USER_CHECK(
        file.integer("split.count").value_or(1) <= 1,
        "{} is one part of a split GGUF file; join the parts first (llama-gguf-split --merge).",
        file.path()
    );
    USER_CHECK(
        file.integer(a + ".expert_count").value_or(0) == 0,
        "{} is a mixture of experts; GGUF files of dense models are supported.",
        file.path()
    );
    config.width = needed(file, a + ".embedding_length");
    config.mlp_width = needed(file, a + ".feed_forward_length");
    config.num_layers = needed(file, a + ".block_count");
    config.num_heads = needed(file, a + ".attention.head_count");
    USER_CHECK(
        config.num_heads > 0, "{}: {}.attention.head_count must be above 0.", file.path(), a
    );
    config.num_kv_heads = file.integer(a + ".attention.head_count_kv").value_or(config.num_heads);
    config.head_dim =
        file.integer(a + ".attention.key_length").value_or(config.width / config.num_heads);
    config.max_positions = needed(file, a + ".context_length");
    config.norm_eps =
        static_cast<float>(file.number(a + ".attention.layer_norm_rms_epsilon").value_or(1e-6));
    config.rope_theta = file.number(a + ".rope.freq_base").value_or(10000);
    config.rope_scaling = read_rope_scaling(file, a);
    USER_CHECK(
        file.integer(a + ".rope.dimension_count").value_or(config.head_dim) == config.head_dim &&
            file.integer(a + ".attention.value_length").value_or(config.head_dim) ==
                config.head_dim,
        "{}: rotary or value widths other than the head's {} are not supported.",
        file.path(),
        config.head_dim
    );
    config.tied_embeddings = !file.tensors().contains("output.weight");
    const auto embedding = file.tensors().find("token_embd.weight");
    USER_CHECK(
        embedding != file.tensors().end() && embedding->second.shape.size() == 2,
        "{}: the tensor \"token_embd.weight\" is missing or no matrix.",
        file.path()
    );
    config.vocab_size = embedding->second.shape[0];
    check_config(config, file.path());
    return config;
}

void read_weights(const GgufFile& file, Checkpoint& checkpoint) {
    const ModelConfig& config = checkpoint.config;
    for (const auto& [name, tensor] : file.tensors()) {
        if (name == "rope_freqs.weight") {
            const StoredWeight factors = read_tensor(file, tensor);
            USER_CHECK(
                factors.format == WeightFormat::kF32 &&
                    factors.shape == std::vector<int64_t>{config.head_dim / 2},
                "{}: \"rope_freqs.weight\" must be {} F32 numbers.",
                file.path(),
                config.head_dim / 2
            );
            checkpoint.rope_factors.resize(static_cast<size_t>(config.head_dim / 2));
            std::memcpy(checkpoint.rope_factors.data(), factors.data.data(), factors.data.size());
            for (const float factor : checkpoint.rope_factors) {
                USER_CHECK(
                    std::isfinite(factor) && factor > 0,
                    "{}: \"rope_freqs.weight\" holds {}; its numbers must be above 0.",
                    file.path(),
                    factor
                );
            }
            continue;
        }
        StoredWeight weight = read_tensor(file, tensor);
        const std::string mapped = hugging_face_name(name);
        if (config.family == "llama" && mapped.ends_with(".q_proj.weight")) {
            weight.interleaved_heads = config.num_heads;
        } else if (config.family == "llama" && mapped.ends_with(".k_proj.weight")) {
            weight.interleaved_heads = config.num_kv_heads;
        }
        checkpoint.weights.emplace(mapped, std::move(weight));
    }
}

int32_t token_id(const GgufFile& file, const char* key) {
    const int64_t id = file.integer(key).value_or(-1);
    // 0xffffffff is written for "none".
    return id >= 0 && id <= std::numeric_limits<int32_t>::max() ? static_cast<int32_t>(id) : -1;
}

void read_tokenizer(const GgufFile& file, Checkpoint& checkpoint) {
    GgufTokenizerFields& fields = checkpoint.tokenizer_gguf;
    const auto model = file.text("tokenizer.ggml.model");
    USER_CHECK(
        model.has_value(),
        "{} holds no tokenizer (tokenizer.ggml.model); choose a file that does.",
        file.path()
    );
    fields.model = *model;
    fields.pre = file.text("tokenizer.ggml.pre").value_or("");
    fields.tokens = file.texts("tokenizer.ggml.tokens");
    fields.token_type = file.integers("tokenizer.ggml.token_type");
    fields.merges = file.texts("tokenizer.ggml.merges");
    fields.bos_id = token_id(file, "tokenizer.ggml.bos_token_id");
    fields.eos_id = token_id(file, "tokenizer.ggml.eos_token_id");
    fields.add_bos = file.boolean("tokenizer.ggml.add_bos_token").value_or(false);
    checkpoint.tokenizer_file = file.path();
    checkpoint.chat_template = file.text("tokenizer.chat_template");
    const auto text_of = [&](int32_t id) {
        const bool known = id >= 0 && static_cast<size_t>(id) < fields.tokens.size();
        return known ? fields.tokens[static_cast<size_t>(id)] : std::string();
    };
    checkpoint.bos_token = text_of(fields.bos_id);
    checkpoint.eos_token = text_of(fields.eos_id);
    for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
        if (token_id(file, key) >= 0) {
            checkpoint.eos_ids.push_back(token_id(file, key));
        }
    }
}

}  // namespace

Checkpoint open_gguf(const std::string& path, const OpenOptions& options) {
    GgufFile file(path);
    Checkpoint checkpoint;
    checkpoint.path = path;
    checkpoint.is_gguf = true;
    checkpoint.config = read_config(file);
    if (options.tokenizer) {
        read_tokenizer(file, checkpoint);
    }
    if (options.weights) {
        read_weights(file, checkpoint);
        check_weights(checkpoint);
    }
    checkpoint.gguf = file.release_mapping();
    return checkpoint;
}

}  // namespace orbit
