#include "model/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace orbit {
namespace {

using nlohmann::json;

struct Family {
    const char* name;
    bool qkv_bias;
    bool qk_norm;
};

constexpr std::array<Family, 4> kFamilies = {{
    {"llama", false, false},
    {"qwen2", true, false},
    {"qwen3", false, true},
    {"qwen3_moe", false, true},
}};

// One JSON object with sentences for what is missing or of another type. null counts as absent, as
// transformers writes it.
class Fields {
  public:
    Fields(const json& object, std::string where) : object_(&object), where_(std::move(where)) {}

    const json* find(const char* key) const {
        const auto found = object_->find(key);
        return found == object_->end() || found->is_null() ? nullptr : &*found;
    }

    int64_t integer(const char* key) const {
        const json* value = find(key);
        USER_CHECK(value != nullptr, "{}: the field \"{}\" is missing.", where_, key);
        return integer_of(key, *value);
    }

    int64_t integer(const char* key, int64_t fallback) const {
        const json* value = find(key);
        return value == nullptr ? fallback : integer_of(key, *value);
    }

    double number(const char* key, double fallback) const {
        const json* value = find(key);
        if (value == nullptr) {
            return fallback;
        }
        USER_CHECK(
            value->is_number() && std::isfinite(value->get<double>()),
            "{}: \"{}\" is {}; a number is needed.",
            where_,
            key,
            value->dump(-1, ' ', false, json::error_handler_t::replace)
        );
        return value->get<double>();
    }

    bool boolean(const char* key, bool fallback) const {
        const json* value = find(key);
        if (value == nullptr) {
            return fallback;
        }
        USER_CHECK(value->is_boolean(), "{}: \"{}\" must be true or false.", where_, key);
        return value->get<bool>();
    }

    std::string text(const char* key, const std::string& fallback) const {
        const json* value = find(key);
        if (value == nullptr) {
            return fallback;
        }
        USER_CHECK(value->is_string(), "{}: \"{}\" must be a string.", where_, key);
        return value->get<std::string>();
    }

    // An object, or nothing.
    std::optional<Fields> object(const char* key) const {
        const json* value = find(key);
        if (value == nullptr) {
            return std::nullopt;
        }
        USER_CHECK(value->is_object(), "{}: \"{}\" must be an object.", where_, key);
        return Fields(*value, where_ + ": " + key);
    }

    const json& value() const { return *object_; }

    const std::string& where() const { return where_; }

  private:
    int64_t integer_of(const char* key, const json& value) const {
        USER_CHECK(
            value.is_number_integer() &&
                (!value.is_number_unsigned() || value.get<uint64_t>() <= uint64_t{1} << 62),
            "{}: \"{}\" is {}; a whole number is needed.",
            where_,
            key,
            value.dump(-1, ' ', false, json::error_handler_t::replace)
        );
        return value.get<int64_t>();
    }

    const json* object_;
    std::string where_;
};

json parse_object(std::string_view text, const std::string& file) {
    json parsed = json::parse(text, nullptr, false);
    USER_CHECK(parsed.is_object(), "{} is not a JSON object; fetch the file again.", file);
    return parsed;
}

std::vector<int32_t> eos_ids_of(const Fields& fields) {
    std::vector<int32_t> ids;
    const json* value = fields.find("eos_token_id");
    if (value == nullptr) {
        return ids;
    }
    const json list = value->is_array() ? *value : json::array({*value});
    for (const json& id : list) {
        USER_CHECK(
            id.is_number_integer() && id.get<int64_t>() >= 0 && id.get<int64_t>() < (1 << 30),
            "{}: \"eos_token_id\" must be a token id or a list of them.",
            fields.where()
        );
        ids.push_back(id.get<int32_t>());
    }
    return ids;
}

// transformers: attention_factor as given, else from mscale and mscale_all_dim, else m(factor, 1).
double yarn_attention_factor(const Fields& fields, double factor) {
    const double given = fields.number("attention_factor", 0);
    const double mscale = fields.number("mscale", 0);
    const double mscale_all_dim = fields.number("mscale_all_dim", 0);
    if (given > 0 || mscale == 0 || mscale_all_dim == 0 || factor <= 1) {
        return given;
    }
    const auto m = [&](double k) { return 0.1 * k * std::log(factor) + 1; };
    return m(mscale) / m(mscale_all_dim);
}

RopeScaling parse_rope_scaling(const Fields& fields, const Fields& config) {
    RopeScaling scaling;
    scaling.type = fields.text("rope_type", fields.text("type", "default"));
    USER_CHECK(
        scaling.type == "default" || scaling.type == "linear" || scaling.type == "llama3" ||
            scaling.type == "yarn",
        "{}: the rope type \"{}\" is not supported; default, linear, llama3 and yarn are.",
        fields.where(),
        scaling.type
    );
    if (scaling.type == "default") {
        return scaling;
    }
    scaling.factor = fields.number("factor", 0);
    USER_CHECK(scaling.factor > 0, "{}: \"factor\" must be a number above 0.", fields.where());
    scaling.low_freq_factor = fields.number("low_freq_factor", scaling.low_freq_factor);
    scaling.high_freq_factor = fields.number("high_freq_factor", scaling.high_freq_factor);
    scaling.original_max_positions = fields.number(
        "original_max_position_embeddings",
        config.number(
            "original_max_position_embeddings", config.number("max_position_embeddings", 0)
        )
    );
    scaling.beta_fast = fields.number("beta_fast", scaling.beta_fast);
    scaling.beta_slow = fields.number("beta_slow", scaling.beta_slow);
    scaling.truncate = fields.boolean("truncate", true);
    if (scaling.type == "yarn") {
        scaling.attention_factor = yarn_attention_factor(fields, scaling.factor);
    }
    return scaling;
}

void parse_rope(const Fields& config, ModelConfig& model) {
    model.rope_theta = config.number("rope_theta", 10000);
    auto fields = config.object("rope_parameters");
    if (!fields) {
        fields = config.object("rope_scaling");
    }
    if (!fields) {
        return;
    }
    for (const auto& [key, value] : fields->value().items()) {
        USER_CHECK(
            !value.is_object(),
            "{}: rope settings per kind of layer (\"{}\") are not supported.",
            fields->where(),
            key
        );
    }
    model.rope_theta = fields->number("rope_theta", model.rope_theta);
    USER_CHECK(
        fields->number("partial_rotary_factor", 1) == 1,
        "{}: a partial_rotary_factor other than 1 is not supported.",
        fields->where()
    );
    model.rope_scaling = parse_rope_scaling(*fields, config);
}

void refuse_true(const Fields& config, const char* key) {
    USER_CHECK(
        !config.boolean(key, false),
        "{}: \"{}\": true is not supported for the family {}.",
        config.where(),
        key,
        config.text("model_type", "")
    );
}

// Options that change the forward pass and that we do not compute.
void refuse_unsupported(const Fields& config, const ModelConfig& model) {
    if (!model.qkv_bias) {
        refuse_true(config, "attention_bias");
    }
    for (const char* key : {"mlp_bias", "use_sliding_window", "rope_interleaved"}) {
        refuse_true(config, key);
    }
    const std::string activation = config.text("hidden_act", "silu");
    USER_CHECK(
        activation == "silu",
        "{}: \"hidden_act\" is \"{}\"; only \"silu\" is supported.",
        config.where(),
        activation
    );
    USER_CHECK(
        config.number("partial_rotary_factor", 1) == 1,
        "{}: a partial_rotary_factor other than 1 is not supported.",
        config.where()
    );
    if (const json* types = config.find("layer_types")) {
        USER_CHECK(types->is_array(), "{}: \"layer_types\" must be a list.", config.where());
        for (const json& type : *types) {
            USER_CHECK(
                type.is_string() && type.get<std::string>() == "full_attention",
                "{}: \"layer_types\" holds {}; only \"full_attention\" is supported.",
                config.where(),
                type.dump(-1, ' ', false, json::error_handler_t::replace)
            );
        }
    }
}

// FP8 in blocks of 128 x 128; other blocks have another meaning.
void check_fp8(const Fields& quantization) {
    const json* block = quantization.find("weight_block_size");
    USER_CHECK(
        block != nullptr && *block == json::array({kFp8Block, kFp8Block}),
        "{}: \"weight_block_size\" must be [128, 128]; FP8 weights with other blocks are not "
        "supported.",
        quantization.where()
    );
}

// The number format of compressed-tensors' groups; the tensors themselves say the rest.
void check_group(const Fields& weights, const std::string& format) {
    const bool is_int = format == "pack-quantized";
    const std::string strategy = format == "nvfp4-pack-quantized" ? "tensor_group" : "group";
    USER_CHECK(
        weights.integer("num_bits", 4) == 4 &&
            weights.text("type", is_int ? "int" : "float") == (is_int ? "int" : "float") &&
            weights.boolean("symmetric", true) && weights.text("strategy", strategy) == strategy &&
            weights.text("actorder", "").empty(),
        "{}: of {}, only symmetric 4-bit weights in groups, without actorder, are supported.",
        weights.where(),
        format
    );
}

void check_quantization(const Fields& config) {
    const auto quantization = config.object("quantization_config");
    if (!quantization) {
        return;
    }
    const std::string method = quantization->text("quant_method", "");
    const std::string format = quantization->text("format", "");
    if (method == "fp8") {
        return check_fp8(*quantization);
    }
    if (method == "modelopt" && quantization->text("quant_algo", "") == "NVFP4") {
        return;
    }
    USER_CHECK(
        method == "compressed-tensors" &&
            (format == "pack-quantized" || format == "mxfp4-pack-quantized" ||
             format == "nvfp4-pack-quantized"),
        "{}: quant_method \"{}\" with format \"{}\" is not supported; plain BF16, F16 and F32 "
        "weights, fp8 in 128 x 128 blocks, ModelOpt NVFP4 and compressed-tensors' pack-quantized "
        "(INT4), mxfp4-pack-quantized and nvfp4-pack-quantized are.",
        quantization->where(),
        method,
        format
    );
    const auto groups = quantization->object("config_groups");
    if (!groups) {
        return;
    }
    for (const auto& [name, group] : groups->value().items()) {
        USER_CHECK(group.is_object(), "{}: \"{}\" must be an object.", groups->where(), name);
        const Fields group_fields(group, groups->where() + ": " + name);
        const auto weights = group_fields.object("weights");
        if (weights) {
            check_group(*weights, format);
        }
    }
}

// num_experts in older files, num_local_experts in those of transformers 5.
void parse_experts(const Fields& config, ModelConfig& model) {
    model.num_experts = config.find("num_experts") != nullptr ? config.integer("num_experts")
                                                              : config.integer("num_local_experts");
    model.experts_per_token = config.integer("num_experts_per_tok");
    model.expert_width = config.integer("moe_intermediate_size");
    model.normalize_router = config.boolean("norm_topk_prob", false);
    model.sparse_step = config.integer("decoder_sparse_step", 1);
    if (const json* layers = config.find("mlp_only_layers")) {
        USER_CHECK(layers->is_array(), "{}: \"mlp_only_layers\" must be a list.", config.where());
        for (const json& layer : *layers) {
            USER_CHECK(
                layer.is_number_integer(),
                "{}: \"mlp_only_layers\" must hold layer numbers.",
                config.where()
            );
            model.mlp_only_layers.push_back(layer.get<int64_t>());
        }
    }
}

}  // namespace

bool ModelConfig::layer_has_experts(int64_t layer) const {
    return num_experts > 0 && (layer + 1) % sparse_step == 0 &&
           std::find(mlp_only_layers.begin(), mlp_only_layers.end(), layer) ==
               mlp_only_layers.end();
}

int64_t ModelConfig::num_expert_layers() const {
    int64_t count = 0;
    for (int64_t layer = 0; layer < num_layers; ++layer) {
        count += layer_has_experts(layer) ? 1 : 0;
    }
    return count;
}

void apply_family(ModelConfig& config, const std::string& family, const std::string& where) {
    std::string known;
    for (const Family& candidate : kFamilies) {
        if (family == candidate.name) {
            config.family = family;
            config.qkv_bias = candidate.qkv_bias;
            config.qk_norm = candidate.qk_norm;
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(candidate.name);
    }
    throw UserError(fmt::format(
        "{}: the model family \"{}\" is not supported; supported are {}.", where, family, known
    ));
}

void check_config(const ModelConfig& config, const std::string& where) {
    const auto between = [&](const char* what, int64_t value, int64_t low, int64_t high) {
        USER_CHECK(
            value >= low && value <= high,
            "{}: the {} is {}; {} to {} is supported.",
            where,
            what,
            value,
            low,
            high
        );
    };
    between("hidden size", config.width, 1, 1 << 20);
    between("MLP width", config.mlp_width, 1, 1 << 22);
    between("number of layers", config.num_layers, 1, 4096);
    between("number of attention heads", config.num_heads, 1, 1 << 16);
    between("number of key/value heads", config.num_kv_heads, 1, config.num_heads);
    between("head dimension", config.head_dim, 2, 1024);
    between("vocabulary size", config.vocab_size, 1, 1 << 24);
    between("largest number of positions", config.max_positions, 1, int64_t{1} << 31);
    USER_CHECK(
        config.num_heads % config.num_kv_heads == 0 && config.head_dim % 2 == 0,
        "{}: {} heads of {} channels with {} key/value heads do not fit together.",
        where,
        config.num_heads,
        config.head_dim,
        config.num_kv_heads
    );
    if (config.family == "qwen3_moe") {
        between("number of experts", config.num_experts, 1, 1 << 16);
        between("number of experts per token", config.experts_per_token, 1, config.num_experts);
        between("MLP width of an expert", config.expert_width, 1, 1 << 22);
        between("step between layers with experts", config.sparse_step, 1, 4096);
    }
    USER_CHECK(
        config.norm_eps >= 0 && config.norm_eps < 1,
        "{}: the RMSNorm epsilon {} is not between 0 and 1.",
        where,
        config.norm_eps
    );
    USER_CHECK(
        config.rope_theta > 1 && std::isfinite(config.rope_theta),
        "{}: the rope base {} is not above 1.",
        where,
        config.rope_theta
    );
    const RopeScaling& rope = config.rope_scaling;
    USER_CHECK(
        rope.factor >= 1e-3 && rope.factor <= 1e6 && rope.attention_factor >= 0 &&
            rope.attention_factor <= 1e3,
        "{}: the rope scaling factor {} (attention factor {}) does not make sense.",
        where,
        rope.factor,
        rope.attention_factor
    );
    if (rope.type == "llama3" || rope.type == "yarn") {
        USER_CHECK(
            rope.original_max_positions >= 1 && rope.low_freq_factor > 0 &&
                rope.high_freq_factor > rope.low_freq_factor && rope.beta_fast > 0 &&
                rope.beta_slow > 0,
            "{}: the numbers of the rope scaling \"{}\" do not make sense (original length {}).",
            where,
            rope.type,
            rope.original_max_positions
        );
    }
}

HfConfig parse_hf_config(std::string_view json_text, const std::string& file) {
    const json parsed = parse_object(json_text, file);
    const Fields config(parsed, file);
    HfConfig result;
    ModelConfig& model = result.model;
    apply_family(model, config.text("model_type", ""), file);
    refuse_unsupported(config, model);
    check_quantization(config);
    model.width = config.integer("hidden_size");
    model.mlp_width = config.integer("intermediate_size");
    model.num_layers = config.integer("num_hidden_layers");
    model.num_heads = config.integer("num_attention_heads");
    model.num_kv_heads = config.integer("num_key_value_heads", model.num_heads);
    USER_CHECK(model.num_heads > 0, "{}: \"num_attention_heads\" must be above 0.", file);
    model.head_dim =
        config.integer("head_dim", model.qk_norm ? 128 : model.width / model.num_heads);
    model.vocab_size = config.integer("vocab_size");
    model.max_positions = config.integer("max_position_embeddings", 2048);
    model.norm_eps = static_cast<float>(config.number("rms_norm_eps", 1e-6));
    model.tied_embeddings = config.boolean("tie_word_embeddings", false);
    if (model.family == "qwen3_moe") {
        parse_experts(config, model);
    }
    parse_rope(config, model);
    check_config(model, file);
    result.eos_ids = eos_ids_of(config);
    return result;
}

std::vector<int32_t> parse_eos_ids(std::string_view json_text, const std::string& file) {
    const json parsed = parse_object(json_text, file);
    return eos_ids_of(Fields(parsed, file));
}

}  // namespace orbit
