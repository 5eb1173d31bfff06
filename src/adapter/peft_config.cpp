#include "adapter/peft_config.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/log.h"

namespace orbit {
namespace {

using Json = nlohmann::ordered_json;  // patterns: the first match in file order wins

constexpr uint32_t kMatchLimit = 100000;  // steps, so that no pattern can hang a load

// Null, false, 0, "" and empty lists or objects are how PEFT writes "not used".
bool is_active(const Json& value) {
    if (value.is_boolean()) {
        return value.get<bool>();
    }
    if (value.is_number()) {
        return value.get<double>() != 0;
    }
    if (value.is_string()) {
        return !value.get_ref<const std::string&>().empty();
    }
    return !value.is_null() && !value.empty();
}

// Typed access to one config with messages that name the file and the field.
class Fields {
  public:
    Fields(const std::string& path, const Json& json) : path_(path), json_(json) {}

    bool has(const char* key) const { return json_.contains(key) && !json_[key].is_null(); }

    bool flag(const char* key, bool otherwise) const {
        if (!has(key)) {
            return otherwise;
        }
        USER_CHECK(json_[key].is_boolean(), "{}: \"{}\" must be true or false.", path_, key);
        return json_[key].get<bool>();
    }

    double number(const char* key, double otherwise) const {
        if (!has(key)) {
            return otherwise;
        }
        return number_of(json_[key], key);
    }

    int64_t whole(const char* key, int64_t otherwise, int64_t most) const {
        const double value = number(key, static_cast<double>(otherwise));
        USER_CHECK(
            value >= 0 && value <= static_cast<double>(most) && value == std::floor(value),
            "{}: \"{}\" must be a whole number from 0 to {}.",
            path_,
            key,
            most
        );
        return static_cast<int64_t>(value);
    }

    std::string text(const char* key) const {
        if (!has(key)) {
            return "";
        }
        USER_CHECK(json_[key].is_string(), "{}: \"{}\" must be a string.", path_, key);
        return json_[key].get<std::string>();
    }

    // A string or a list of strings.
    void names(const char* key, std::vector<std::string>& list, std::string& one) const {
        if (!has(key)) {
            return;
        }
        if (json_[key].is_string()) {
            one = json_[key].get<std::string>();
            return;
        }
        USER_CHECK(
            json_[key].is_array(), "{}: \"{}\" must be a string or a list of strings.", path_, key
        );
        for (const Json& name : json_[key]) {
            USER_CHECK(name.is_string(), "{}: \"{}\" must hold strings only.", path_, key);
            list.push_back(name.get<std::string>());
        }
    }

    std::vector<std::pair<std::string, double>> patterns(const char* key) const {
        std::vector<std::pair<std::string, double>> result;
        if (has(key)) {
            USER_CHECK(
                json_[key].is_object(), "{}: \"{}\" must map patterns to numbers.", path_, key
            );
            for (const auto& [pattern, value] : json_[key].items()) {
                result.emplace_back(pattern, number_of(value, key));
            }
        }
        return result;
    }

    void refuse(const char* key, const char* why) const {
        USER_CHECK(
            !has(key) || !is_active(json_[key]),
            "{}: \"{}\" is set, and {}; train the adapter without it.",
            path_,
            key,
            why
        );
    }

    // Fields of newer PEFT versions that switch a variant on.
    void refuse_unknown_variants() const {
        static const std::vector<std::string> harmless = {
            "use_rslora",
            "use_cayley_neumann",
            "corda_config",
            "eva_config",
            "lora_ga_config",
            "runtime_config"};
        for (const auto& [key, value] : json_.items()) {
            const bool variant = key.starts_with("use_") || key.ends_with("_config");
            const bool known = std::find(harmless.begin(), harmless.end(), key) != harmless.end();
            USER_CHECK(
                !variant || known || !is_active(value),
                "{}: \"{}\" is set, and Orbit does not know what it changes; train the adapter "
                "without it.",
                path_,
                key
            );
        }
    }

  private:
    double number_of(const Json& value, const char* key) const {
        USER_CHECK(
            value.is_number() && std::isfinite(value.get<double>()),
            "{}: \"{}\" must hold a number.",
            path_,
            key
        );
        return value.get<double>();
    }

    const std::string& path_;
    const Json& json_;
};

// True for versions below 0.18.0, and when there is none.
bool is_before_0_18(const std::string& version) {
    int major = 0;
    int minor = 0;
    if (std::sscanf(version.c_str(), "%d.%d", &major, &minor) != 2) {
        return true;
    }
    return major == 0 && minor < 18;
}

void refuse_common(const Fields& fields, const std::string& path) {
    fields.refuse("modules_to_save", "Orbit trains adapters only, no whole modules");
    fields.refuse("fan_in_fan_out", "Orbit stores every weight as [out, in]");
    fields.refuse("target_parameters", "adapters on fused expert tensors cannot be read");
    fields.refuse("trainable_token_indices", "Orbit trains no embedding rows");
    fields.refuse("layer_replication", "Orbit runs every layer once");
    fields.refuse("megatron_config", "Megatron's sharded layout cannot be read");
    const std::string bias = fields.has("bias") ? fields.text("bias") : "none";
    USER_CHECK(
        bias == "none",
        "{}: \"bias\" is \"{}\", and Orbit trains no biases; train the adapter with bias none.",
        path,
        bias
    );
}

void parse_lora(const Fields& fields, const Json& json, PeftConfig& config) {
    fields.refuse("use_dora", "DoRA is not computed here");
    fields.refuse("lora_bias", "a bias on lora_B is not computed here");
    fields.refuse("loftq_config", "LoftQ changes the base weights");
    fields.refuse("use_qalora", "QA-LoRA pools its input");
    fields.refuse("alora_invocation_tokens", "activated LoRA switches on within a text");
    fields.refuse("use_bdlora", "a block-diagonal LoRA is not computed here");
    fields.refuse("arrow_config", "a router over adapters is not computed here");
    fields.refuse("kasa_config", "KaSA changes the base weights");
    fields.refuse("velora_config", "VeLoRA is not computed here");
    fields.refuse("monteclora_config", "MonteCLoRA is not computed here");
    const bool named_init =
        json.contains("init_lora_weights") && json["init_lora_weights"].is_string();
    const std::string init = named_init ? fields.text("init_lora_weights") : "";
    for (const char* changed : {"pissa", "corda", "olora", "loftq", "lora_ga"}) {
        USER_CHECK(
            !init.starts_with(changed),
            "{}: \"init_lora_weights\" is \"{}\", so the adapter belongs to changed base weights; "
            "let PEFT convert it on saving.",
            config.path,
            init
        );
    }
    if (fields.number("lora_dropout", 0) != 0) {
        warn_line(
            fmt::format("{}: lora_dropout is ignored, Orbit runs without dropout.", config.path)
        );
    }
    config.rank = fields.whole("r", 8, 1 << 24);
    config.alpha = fields.number("lora_alpha", 8);
    config.rslora = fields.flag("use_rslora", false);
    config.rank_pattern = fields.patterns("rank_pattern");
    config.alpha_pattern = fields.patterns("alpha_pattern");
}

void parse_oft(const Fields& fields, PeftConfig& config) {
    USER_CHECK(
        fields.has("oft_block_size"),
        "{} has no \"oft_block_size\": it is an older OFT format that current PEFT refuses too; "
        "train the adapter again.",
        config.path
    );
    fields.refuse("module_dropout", "the sampler has no dropout");
    config.num_blocks = fields.whole("r", 0, 1 << 24);
    config.block_size = fields.whole("oft_block_size", 0, 1 << 24);
    USER_CHECK(
        (config.num_blocks == 0) != (config.block_size == 0),
        "{}: exactly one of \"r\" ({}) and \"oft_block_size\" ({}) must be other than 0.",
        config.path,
        config.num_blocks,
        config.block_size
    );
    config.exact_cayley = !fields.flag("use_cayley_neumann", true);
    config.neumann_terms = static_cast<int32_t>(fields.whole("num_cayley_neumann_terms", 5, 64));
    USER_CHECK(
        config.exact_cayley || config.neumann_terms >= 1,
        "{}: \"num_cayley_neumann_terms\" must be at least 1.",
        config.path
    );
    config.old_neumann_rule = !config.exact_cayley && is_before_0_18(fields.text("peft_version"));
    config.block_share = fields.flag("block_share", false);
    config.coft = fields.flag("coft", false);
    config.coft_eps = fields.number("eps", 6e-5);
    USER_CHECK(config.coft_eps > 0, "{}: \"eps\" must be above 0.", config.path);
}

bool ends_at_dot(const std::string& name, const std::string& module) {
    return module == name || (module.size() > name.size() && module.ends_with(name) &&
                              module[module.size() - name.size() - 1] == '.');
}

bool matches_whole(const std::string& path, const std::string& regex, const std::string& text) {
    int error = 0;
    PCRE2_SIZE where = 0;
    const std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)> code(
        pcre2_compile(
            reinterpret_cast<PCRE2_SPTR>(regex.data()),
            regex.size(),
            PCRE2_ANCHORED | PCRE2_ENDANCHORED | PCRE2_NEVER_BACKSLASH_C,
            &error,
            &where,
            nullptr
        ),
        pcre2_code_free
    );
    USER_CHECK(
        code != nullptr,
        "{}: the pattern \"{}\" is no valid regular expression (at character {}).",
        path,
        regex,
        where
    );
    const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data(
        pcre2_match_data_create_from_pattern(code.get(), nullptr), pcre2_match_data_free
    );
    const std::unique_ptr<pcre2_match_context, decltype(&pcre2_match_context_free)> context(
        pcre2_match_context_create(nullptr), pcre2_match_context_free
    );
    CHECK(data != nullptr && context != nullptr);
    pcre2_set_match_limit(context.get(), kMatchLimit);
    const int rc = pcre2_match(
        code.get(),
        reinterpret_cast<PCRE2_SPTR>(text.data()),
        text.size(),
        0,
        0,
        data.get(),
        context.get()
    );
    USER_CHECK(
        rc >= 0 || rc == PCRE2_ERROR_NOMATCH,
        "{}: the pattern \"{}\" takes too many steps on \"{}\"; write a simpler one.",
        path,
        regex,
        text
    );
    return rc >= 0;
}

bool named_by(
    const PeftConfig& config,
    const std::vector<std::string>& list,
    const std::string& regex,
    const std::string& module
) {
    if (!regex.empty()) {
        return matches_whole(config.path, regex, module);
    }
    return std::any_of(list.begin(), list.end(), [&](const std::string& name) {
        return ends_at_dot(name, module);
    });
}

}  // namespace

PeftConfig parse_peft_config(const std::string& path, const std::string& text) {
    const Json json = Json::parse(text, nullptr, false);
    USER_CHECK(json.is_object(), "{} is not valid JSON; the file is damaged.", path);
    const Fields fields(path, json);
    PeftConfig config;
    config.path = path;
    const std::string type = fields.text("peft_type");
    USER_CHECK(
        type == "LORA" || type == "OFT",
        "{}: \"peft_type\" is \"{}\"; Orbit reads LORA and OFT adapters.",
        path,
        type
    );
    config.kind = type == "LORA" ? AdapterKind::kLora : AdapterKind::kOft;
    refuse_common(fields, path);
    if (config.kind == AdapterKind::kLora) {
        parse_lora(fields, json, config);
    } else {
        parse_oft(fields, config);
    }
    fields.refuse_unknown_variants();
    fields.names("target_modules", config.target_list, config.target_regex);
    if (config.target_regex == "all-linear") {
        config.all_linear = true;
        config.target_regex.clear();
    }
    fields.names("exclude_modules", config.exclude_list, config.exclude_regex);
    for (const std::string* regex : {&config.target_regex, &config.exclude_regex}) {
        if (!regex->empty()) {
            matches_whole(path, *regex, "");  // a bad pattern is an error even if nothing asks it
        }
    }
    for (const char* key : {"layers_to_transform", "layers_pattern"}) {
        config.layers_restricted |= fields.has(key) && is_active(json[key]);
        config.layers_restricted |= fields.has(key) && json[key].is_number();
    }
    return config;
}

bool selects_module(const PeftConfig& config, const std::string& module) {
    if (named_by(config, config.exclude_list, config.exclude_regex, module)) {
        return false;
    }
    return config.all_linear || named_by(config, config.target_list, config.target_regex, module);
}

double pattern_value(
    const PeftConfig& config,
    const std::vector<std::pair<std::string, double>>& patterns,
    const std::string& module,
    double otherwise
) {
    for (const auto& [pattern, value] : patterns) {
        if (matches_whole(config.path, "(.*\\.)?(" + pattern + ")", module)) {
            return value;
        }
    }
    return otherwise;
}

int64_t peft_block_size(int64_t in, int64_t wanted) {
    if (wanted >= in) {
        return in;
    }
    int64_t above = wanted;
    while (above <= in && in % above != 0) {
        ++above;
    }
    int64_t below = wanted;
    while (below > 1 && in % below != 0) {
        --below;
    }
    return wanted - below <= above - wanted ? below : above;
}

}  // namespace orbit
