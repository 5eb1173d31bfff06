// load_model: from checked files to a Model in one arena. Every weight goes from the mapped file
// straight to its final place; only what is rounded, reordered or quantised passes through a buffer
// of one tensor.
#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "base/hash.h"
#include "base/log.h"
#include "model/base_bytes.h"
#include "model/checkpoint.h"
#include "model/model.h"
#include "model/rope_table.h"
#include "model/weight_staging.h"
#include "quant/place.h"

namespace orbit {
namespace {

constexpr int64_t kProgressBytesMin = int64_t{256} << 20;  // smaller models load at once

class WeightLoader {
  public:
    WeightLoader(
        Stream& stream, Model& model, const Checkpoint& checkpoint, const LoadOptions& options
    )
        : stream_(stream), model_(model), checkpoint_(checkpoint), options_(options) {
        int64_t total = 0;
        for (const auto& [name, weight] : checkpoint.weights) {
            total += static_cast<int64_t>(weight.bytes());
        }
        if (total >= kProgressBytesMin) {
            progress_.emplace("loading " + model.name, total >> 20, "MiB");
        }
    }

    void load_all() {
        model_.embedding = matrix("model.embed_tokens", false);
        for (int64_t l = 0; l < model_.config.num_layers; ++l) {
            model_.layers.push_back(layer(fmt::format("model.layers.{}.", l)));
        }
        model_.final_norm = vector("model.norm.weight");
        model_.head = model_.config.tied_embeddings ? model_.embedding : matrix("lm_head", false);
        model_.weights_digest = hash_hex(digest_);
    }

  private:
    LayerWeights layer(const std::string& prefix) {
        const ModelConfig& config = model_.config;
        const std::string attention = prefix + "self_attn.";
        LayerWeights w;
        w.input_norm = vector(prefix + "input_layernorm.weight");
        w.post_attention_norm = vector(prefix + "post_attention_layernorm.weight");
        if (config.qk_norm) {
            w.q_norm = vector(attention + "q_norm.weight");
            w.k_norm = vector(attention + "k_norm.weight");
        }
        w.q = linear(attention + "q_proj", config.qkv_bias);
        w.k = linear(attention + "k_proj", config.qkv_bias);
        w.v = linear(attention + "v_proj", config.qkv_bias);
        w.o = linear(attention + "o_proj", false);
        if (config.layer_has_experts(static_cast<int64_t>(model_.layers.size()))) {
            w.moe = experts(prefix + "mlp.");
            return w;
        }
        w.gate = linear(prefix + "mlp.gate_proj", false);
        w.up = linear(prefix + "mlp.up_proj", false);
        w.down = linear(prefix + "mlp.down_proj", false);
        return w;
    }

    MoeWeights experts(const std::string& prefix) {
        MoeWeights moe;
        moe.router = matrix(prefix + "gate", false);
        moe.index = num_expert_layers_++;
        moe.on_host = model_.config.on_host(moe.index, options_.host_layers);
        Arena& arena = moe.on_host ? model_.host : model_.arena;
        const int64_t count = model_.config.num_experts;
        MatrixStack gate(arena, "base.gate_proj", count);
        MatrixStack up(arena, "base.up_proj", count);
        MatrixStack down(arena, "base.down_proj", count);
        const auto add = [&](const std::string& module, MatrixStack& stack, ExpertWeights& to) {
            to.w.push_back(stack.add(stream_, staged(module, true).matrix));
            to.sites.push_back(add_site(module, to.w.back()));
        };
        for (int64_t e = 0; e < count; ++e) {
            const std::string expert = fmt::format("{}experts.{}.", prefix, e);
            add(expert + "gate_proj", gate, moe.gate);
            add(expert + "up_proj", up, moe.up);
            add(expert + "down_proj", down, moe.down);
        }
        return moe;
    }

    LinearWeights linear(const std::string& module, bool has_bias) {
        LinearWeights w;
        w.module = module;
        w.w = matrix(module, true);
        if (has_bias) {
            w.bias = vector(module + ".bias");
        }
        w.site = add_site(module, w.w);
        return w;
    }

    int32_t add_site(const std::string& module, const QuantizedMatrix& w) {
        model_.sites.push_back({module, w.cols, w.rows});
        return static_cast<int32_t>(model_.sites.size()) - 1;
    }

    QuantizedMatrix matrix(const std::string& module, bool is_linear) {
        const std::string leaf = module.substr(module.rfind('.') + 1);
        return place_weight(
            stream_, model_.arena, "base." + leaf, staged(module, is_linear).matrix
        );
    }

    StagedWeight staged(const std::string& module, bool is_linear) {
        const StoredWeight& stored = take(module + ".weight");
        StagingOptions staging;
        staging.quantize_int4 = is_linear && options_.quantize == "int4";
        // The check mode rounds no value of a GGUF file (contract.md, Precision).
        staging.keep_f32 = checkpoint_.is_gguf && options_.compute == DType::kF32;
        StagedWeight weight = stage_matrix(stream_.threads(), stored, staging);
        model_.largest_rounding_error =
            std::max(model_.largest_rounding_error, weight.largest_rounding_error);
        return weight;
    }

    const float* vector(const std::string& name) {
        const std::vector<float> values = stage_vector(take(name));
        const Tensor placed = model_.arena.take(
            "base.norms_and_biases", DType::kF32, {static_cast<int64_t>(values.size())}
        );
        copy_to_device(stream_, placed.data, values.data(), values.size() * sizeof(float));
        synchronize(stream_);
        return placed.as<float>();
    }

    const StoredWeight& take(const std::string& name) {
        const StoredWeight& weight = checkpoint_.weights.at(name);
        digest_ = hash64(name.data(), name.size(), digest_);
        if (weight.first_row == 0) {  // else the bytes were counted with the rows between
            digest_ = hash64(weight.data.data(), weight.data.size(), digest_);
            digest_ = hash64(weight.scales.data(), weight.scales.size(), digest_);
        }
        loaded_bytes_ += static_cast<int64_t>(weight.bytes());
        if (progress_) {
            progress_->set(loaded_bytes_ >> 20);
        }
        return weight;
    }

    Stream& stream_;
    Model& model_;
    const Checkpoint& checkpoint_;
    const LoadOptions& options_;
    std::optional<ProgressBar> progress_;
    int64_t loaded_bytes_ = 0;
    int32_t num_expert_layers_ = 0;
    uint64_t digest_ = 0;
};

void load_text(Model& model, const Checkpoint& checkpoint) {
    const std::string& file = checkpoint.tokenizer_file;
    model.tokenizer = checkpoint.is_gguf
                          ? Tokenizer::from_gguf(checkpoint.tokenizer_gguf, file)
                          : Tokenizer::from_json_text(checkpoint.tokenizer_json, file);
    USER_CHECK(
        model.tokenizer->size() <= model.config.vocab_size,
        "{}: the tokenizer has ids up to {}, but the model's vocabulary has {} rows; the two are "
        "not of the same model.",
        file,
        model.tokenizer->size() - 1,
        model.config.vocab_size
    );
    if (checkpoint.chat_template) {
        model.chat_template.emplace(
            *checkpoint.chat_template, checkpoint.bos_token, checkpoint.eos_token
        );
    }
}

// Every id that ends a turn: what the files name, and what the template writes after one.
std::vector<int32_t> collect_stop_ids(const Model& model, const Checkpoint& checkpoint) {
    std::vector<int32_t> ids = checkpoint.eos_ids;
    for (const int32_t id : ids) {
        USER_CHECK(
            id < model.config.vocab_size,
            "{}: the eos_token_id {} lies outside the vocabulary of {}.",
            checkpoint.path,
            id,
            model.config.vocab_size
        );
    }
    if (model.tokenizer && !checkpoint.eos_token.empty()) {
        const int32_t id = model.tokenizer->id_of(checkpoint.eos_token);
        if (id >= 0) {
            ids.push_back(id);
        }
    }
    if (model.tokenizer && model.chat_template) {
        const std::string after = model.chat_template->text_after_assistant_turn();
        for (const int32_t id : model.tokenizer->encode(after, false)) {
            if (model.tokenizer->is_special(id)) {
                ids.push_back(id);
            }
        }
    }
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    return ids;
}

std::string name_of(const std::string& path) {
    const auto whole = std::filesystem::absolute(path).lexically_normal();
    return (whole.has_filename() ? whole : whole.parent_path()).filename().string();
}

}  // namespace

std::unique_ptr<Model> load_model(
    Stream& stream, const std::string& path, const LoadOptions& options
) {
    const Checkpoint checkpoint = open_checkpoint(path, {.weights = options.weights});
    auto model = make_model(stream.device, checkpoint);
    if (options.weights) {
        load_weights(stream, checkpoint, options, *model);
    }
    return model;
}

std::unique_ptr<Model> make_model(const Device& device, const Checkpoint& checkpoint) {
    auto model = std::make_unique<Model>(device);
    model->config = checkpoint.config;
    model->path = checkpoint.path;
    model->name = name_of(checkpoint.path);
    load_text(*model, checkpoint);
    model->stop_ids = collect_stop_ids(*model, checkpoint);
    return model;
}

void load_weights(
    Stream& stream, const Checkpoint& checkpoint, const LoadOptions& options, Model& model
) {
    USER_CHECK(
        options.quantize.empty() || options.quantize == "int4",
        "the weights cannot be quantised to \"{}\" at load; \"int4\" is supported.",
        options.quantize
    );
    model.compute = options.compute;
    model.dequant = options.dequant;
    reserve_base(model, placed_formats(checkpoint, options), options.host_layers);
    WeightLoader(stream, model, checkpoint, options).load_all();
    model.rope = make_rope_table(stream, model.arena, model.config, checkpoint.rope_factors);
    if (model.largest_rounding_error > 0) {
        log_line(fmt::format(
            "{}: weights rounded to BF16, the largest change is {:.2e}",
            model.name,
            model.largest_rounding_error
        ));
    }
}

std::vector<int32_t> encode_chat(
    const Model& model, const std::vector<ChatMessage>& messages, bool raw
) {
    CHECK(model.tokenizer.has_value());
    USER_CHECK(!messages.empty(), "a prompt without any message cannot be encoded.");
    if (raw) {
        return model.tokenizer->encode(messages.back().content, true);
    }
    USER_CHECK(
        model.chat_template.has_value(),
        "{} has no chat template (chat_template.jinja, or \"chat_template\" in "
        "tokenizer_config.json); add one, or use --raw.",
        model.path
    );
    return model.tokenizer->encode(model.chat_template->render(messages, true), false);
}

}  // namespace orbit
