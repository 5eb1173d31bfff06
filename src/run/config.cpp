#include "run/config.h"

#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <type_traits>

#include "base/error.h"
#include "base/file.h"

namespace orbit {

// A damaged file can run toml++ into its own assertions; they become parse errors like any other.
[[noreturn]] static void broken_toml() {
    throw UserError("it breaks off inside a key or a value");
}

}  // namespace orbit

#define TOML_ASSERT(condition) ((condition) ? void() : ::orbit::broken_toml())
#include <toml++/toml.h>

namespace orbit {
namespace {

constexpr size_t kConfigBytesMax = 1 << 20;

template <typename T>
struct is_list : std::false_type {};

template <typename T>
struct is_list<std::vector<T>> : std::true_type {};

template <typename T>
std::string type_name() {
    if constexpr (std::is_same_v<T, bool>) {
        return "true or false";
    } else if constexpr (std::is_integral_v<T>) {
        return "an integer";
    } else if constexpr (std::is_floating_point_v<T>) {
        return "a number";
    } else if constexpr (std::is_same_v<T, std::string>) {
        return "a string";
    } else if constexpr (std::is_same_v<T, std::vector<std::string>>) {
        return "a list of strings";
    } else {
        return "a list of integers";
    }
}

// ---- Writing ----

std::string toml_string(std::string_view text) {
    std::string out = "\"";
    for (const char c : text) {
        const auto byte = static_cast<unsigned char>(c);
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (byte < 0x20 || byte == 0x7f) {
            out += fmt::format("\\u{:04x}", static_cast<unsigned>(byte));
        } else {
            out += c;
        }
    }
    return out + "\"";
}

// Shortest text that reads back to the same number, and that TOML takes for a float.
template <typename T>
std::string value_text(const T& value) {
    if constexpr (std::is_same_v<T, std::string>) {
        return toml_string(value);
    } else if constexpr (is_list<T>::value) {
        std::string out = "[";
        for (const auto& item : value) {
            out += (out.size() > 1 ? ", " : "") + value_text(item);
        }
        return out + "]";
    } else if constexpr (std::is_floating_point_v<T>) {
        const std::string text = fmt::format("{}", value);
        return text.find_first_of(".en") == std::string::npos ? text + ".0" : text;
    } else {
        return fmt::format("{}", value);
    }
}

// ---- Reading ----

// Where each key that was set came from, for messages: "run.toml:12" or "--set train.lr=x".
using Origins = std::map<std::string, std::string>;

class Reader {
  public:
    explicit Reader(std::string path) : path_(std::move(path)) {}

    void read_text(std::string_view text, Config& config);
    void read_override(const std::string& assignment, Config& config);

    const Origins& origins() const { return origins_; }

    bool overridden(const std::string& key) const { return overridden_.contains(key); }

  private:
    std::string where(const toml::node& node) const {
        return fmt::format("{}:{}", path_, node.source().begin.line);
    }

    void check_keys(const toml::table& root) const;
    [[noreturn]] void unknown_key(const std::string& key, const std::string& where) const;
    [[noreturn]] void unknown_section_or_key(const std::string& key, const toml::node& node) const;

    std::string path_;
    Origins origins_;
    std::set<std::string> overridden_;
};

std::vector<std::string> section_names() {
    std::vector<std::string> names;
    Config().visit([&](const char* name) { names.emplace_back(name); }, [](auto&&...) {});
    return names;
}

[[noreturn]] void wrong_type(
    const std::string& where, const std::string& key, const std::string& wanted
) {
    throw UserError(fmt::format("{}: {} must be {}.", where, key, wanted));
}

template <typename T>
T number_from(const toml::node& node, const std::string& key, const std::string& where) {
    if constexpr (std::is_same_v<T, bool>) {
        if (!node.is_boolean()) {
            wrong_type(where, key, type_name<T>());
        }
        return node.as_boolean()->get();
    } else if constexpr (std::is_integral_v<T>) {
        if (!node.is_integer()) {
            wrong_type(where, key, type_name<T>());
        }
        const int64_t value = node.as_integer()->get();
        USER_CHECK(
            std::in_range<T>(value), "{}: {} = {} is out of the type's range.", where, key, value
        );
        return static_cast<T>(value);
    } else {
        if (!node.is_number()) {
            wrong_type(where, key, type_name<T>());
        }
        const double value = node.is_integer() ? static_cast<double>(node.as_integer()->get())
                                               : node.as_floating_point()->get();
        USER_CHECK(
            std::abs(value) <= static_cast<double>(std::numeric_limits<T>::max()),
            "{}: {} must be a finite number.",
            where,
            key
        );
        return static_cast<T>(value);
    }
}

template <typename T>
void assign(T& to, const toml::node& node, const std::string& key, const std::string& where) {
    if constexpr (std::is_same_v<T, std::string>) {
        if (!node.is_string()) {
            wrong_type(where, key, type_name<T>());
        }
        to = node.as_string()->get();
        USER_CHECK(
            to.find('\0') == std::string::npos, "{}: {} holds a null character.", where, key
        );
    } else if constexpr (is_list<T>::value) {
        if (!node.is_array()) {
            wrong_type(where, key, type_name<T>());
        }
        T list;
        for (const toml::node& item : *node.as_array()) {
            const bool fits = std::is_same_v<typename T::value_type, std::string>
                                  ? item.is_string()
                                  : item.is_integer();
            if (!fits) {
                wrong_type(where, key, type_name<T>());
            }
            assign(list.emplace_back(), item, key, where);
        }
        to = std::move(list);
    } else {
        to = number_from<T>(node, key, where);
    }
}

// The value of `text` as TOML, or nothing when it is no single TOML value.
std::optional<toml::table> parse_value(const std::string& text) {
    if (text.find('\n') != std::string::npos) {
        return std::nullopt;
    }
    try {
        toml::table table = toml::parse("value = " + text);
        if (table.size() == 1 && table.contains("value")) {
            return table;
        }
    } catch (const toml::parse_error&) {
        // Not TOML: the caller takes the text as it stands.
    } catch (const UserError&) {
        // The same, from an assertion of the parser.
    }
    return std::nullopt;
}

// --set takes plain words for strings and a,b,c for lists, so that a shell needs no quotes.
template <typename T>
void assign_text(T& to, const std::string& text, const std::string& key, const std::string& where) {
    const auto table = parse_value(text);
    const toml::node* node = table ? table->get("value") : nullptr;
    if constexpr (std::is_same_v<T, std::string>) {
        if (node == nullptr || !node->is_string()) {
            to = text;
            return;
        }
    } else if constexpr (is_list<T>::value) {
        if (node == nullptr || !node->is_array()) {
            T list;
            size_t begin = 0;
            while (!text.empty() && begin <= text.size()) {
                const size_t end = std::min(text.find(',', begin), text.size());
                assign_text(list.emplace_back(), text.substr(begin, end - begin), key, where);
                begin = end + 1;
            }
            to = std::move(list);
            return;
        }
    }
    if (node == nullptr) {
        wrong_type(where, key, type_name<T>());
    }
    assign(to, *node, key, where);
}

void Reader::unknown_key(const std::string& key, const std::string& where) const {
    const std::string nearest = nearest_name(key, config_keys());
    throw UserError(fmt::format(
        "{}: unknown key \"{}\"; {}",
        where,
        key,
        nearest.empty() ? "docs/CONFIG.md lists all keys."
                        : fmt::format("did you mean \"{}\"?", nearest)
    ));
}

// A misspelt section is one mistake, not one for each key in it.
void Reader::unknown_section_or_key(const std::string& key, const toml::node& node) const {
    const std::string nearest = node.is_table() ? nearest_name(key, section_names()) : "";
    USER_CHECK(
        nearest.empty(), "{}: unknown section [{}]; did you mean [{}]?", where(node), key, nearest
    );
    unknown_key(key, where(node));
}

void Reader::check_keys(const toml::table& root) const {
    const auto keys = config_keys();
    const auto sections = section_names();
    const std::set<std::string> known(keys.begin(), keys.end());
    for (const auto& [name, node] : root) {
        const std::string key(name.str());
        const bool is_section = std::find(sections.begin(), sections.end(), key) != sections.end();
        if (is_section && !node.is_table()) {
            wrong_type(where(node), key, fmt::format("a section: [{}]", key));
        }
        if (!is_section) {
            if (!known.contains(key)) {
                unknown_section_or_key(key, node);
            }
            continue;
        }
        for (const auto& [child_name, child] : *node.as_table()) {
            const std::string child_key = key + "." + std::string(child_name.str());
            if (!known.contains(child_key)) {
                unknown_key(child_key, where(child));
            }
        }
    }
}

void Reader::read_text(std::string_view text, Config& config) {
    USER_CHECK(
        text.size() <= kConfigBytesMax,
        "{} has {} bytes; a config has at most {}: is it another file?",
        path_,
        text.size(),
        kConfigBytesMax
    );
    toml::table root;
    try {
        root = toml::parse(text, path_);
    } catch (const toml::parse_error& error) {
        throw UserError(fmt::format(
            "{}:{}: this is not valid TOML: {}.",
            path_,
            error.source().begin.line,
            error.description()
        ));
    } catch (const UserError& error) {
        throw UserError(fmt::format("{}:1: this is not valid TOML: {}.", path_, error.what()));
    }
    check_keys(root);
    std::string prefix;
    const toml::table* table = &root;
    config.visit(
        [&](const char* section) {
            prefix = std::string(section) + ".";
            table = root[section].as_table();
        },
        [&](const char* name, auto& value, const char*) {
            const toml::node* node = table == nullptr ? nullptr : table->get(name);
            if (node != nullptr) {
                assign(value, *node, prefix + name, where(*node));
                origins_[prefix + name] = where(*node);
            }
        }
    );
}

void Reader::read_override(const std::string& assignment, Config& config) {
    const std::string origin = "--set " + assignment;
    const size_t equals = assignment.find('=');
    USER_CHECK(
        equals != std::string::npos && equals > 0,
        "{}: write it as key=value, for example --set train.lr=1e-3.",
        origin
    );
    const std::string wanted = assignment.substr(0, equals);
    const std::string text = assignment.substr(equals + 1);
    bool found = false;
    std::string prefix;
    config.visit(
        [&](const char* section) { prefix = std::string(section) + "."; },
        [&](const char* name, auto& value, const char*) {
            if (prefix + name == wanted) {
                assign_text(value, text, wanted, origin);
                found = true;
            }
        }
    );
    if (!found) {
        unknown_key(wanted, origin);
    }
    origins_[wanted] = origin;
    overridden_.insert(wanted);
}

// ---- Checking ----

class RangeCheck {
  public:
    explicit RangeCheck(const Origins& origins) : origins_(&origins) {}

    template <typename T>
    void in(const std::string& key, T value, double low, double high) const {
        const auto number = static_cast<double>(value);
        USER_CHECK(
            number >= low && number <= high,
            "{}{} must be {}, but is {}.",
            where(key),
            key,
            high < 1e15 ? fmt::format("from {} to {}", low, high) : fmt::format("at least {}", low),
            value
        );
    }

    template <typename T>
    void at_least(const std::string& key, T value, double low) const {
        in(key, value, low, 1e300);
    }

    void above_zero(const std::string& key, double value) const {
        USER_CHECK(value > 0, "{}{} must be above 0, but is {}.", where(key), key, value);
    }

    void one_of(
        const std::string& key, const std::string& value, const std::vector<std::string>& names
    ) const {
        if (std::find(names.begin(), names.end(), value) != names.end()) {
            return;
        }
        std::string list;
        for (const auto& name : names) {
            list += (list.empty() ? "" : ", ") + (name.empty() ? "\"\"" : name);
        }
        throw UserError(
            fmt::format("{}{} must be one of {}, but is \"{}\".", where(key), key, list, value)
        );
    }

    std::string where(const std::string& key) const {
        const auto found = origins_->find(key);
        return found == origins_->end() ? "" : found->second + ": ";
    }

  private:
    const Origins* origins_;
};

void check_device(const RangeCheck& check, const Config& c) {
    const bool cuda = c.device.starts_with("cuda:") && c.device.size() > 5 && c.device.size() < 9 &&
                      c.device.find_first_not_of("0123456789", 5) == std::string::npos;
    USER_CHECK(
        cuda || c.device == "auto" || c.device == "cpu",
        "{}device must be auto, cpu or cuda:N, but is \"{}\".",
        check.where("device"),
        c.device
    );
    check.one_of("cpu.isa", c.cpu.isa, {"auto", "reference", "avx2", "avx512", "amx"});
    check.in("cpu.threads", c.cpu.threads, 0, 1024);
    check.one_of("quantize", c.quantize, {"", "int4"});
}

void check_rollout(const RangeCheck& check, const RolloutOptions& o) {
    check.in("rollout.prompts_per_step", o.prompts_per_step, 1, 1 << 20);
    check.in("rollout.samples_per_prompt", o.samples_per_prompt, 1, 1 << 16);
    check.in("rollout.temperature", o.temperature, 0, 100);
    check.above_zero("rollout.top_p", static_cast<double>(o.top_p));
    check.in("rollout.top_p", o.top_p, 0, 1);
    check.at_least("rollout.top_k", o.top_k, 0);
    check.in("rollout.min_p", o.min_p, 0, 1);
    check.in("rollout.max_tokens", o.max_tokens, 1, 1 << 24);
    check.in("rollout.max_batch", o.max_batch, 1, 1 << 20);
    check.in("rollout.prefill_chunk", o.prefill_chunk, 1, 1 << 20);
    for (const auto& stop : o.stop) {
        USER_CHECK(
            !stop.empty(), "{}rollout.stop holds an empty text.", check.where("rollout.stop")
        );
    }
}

void check_train(const RangeCheck& check, const TrainOptions& o) {
    check.in("train.steps", o.steps, 0, 1e9);
    check.above_zero("train.lr", o.lr);
    check.in("train.lr", o.lr, 0, 100);
    check.one_of("train.schedule", o.schedule, {"constant", "linear", "cosine"});
    check.in("train.warmup_steps", o.warmup_steps, 0, 1e9);
    check.in("train.beta1", o.beta1, 0, 0.999999);
    check.in("train.beta2", o.beta2, 0, 0.9999999);
    check.above_zero("train.eps", o.eps);
    check.in("train.weight_decay", o.weight_decay, 0, 10);
    check.at_least("train.clip_norm", o.clip_norm, 0);
    check.in("train.tokens_per_batch", o.tokens_per_batch, 1, 1 << 28);
    check.one_of("train.recompute", o.recompute, {"selective", "full"});
    USER_CHECK(
        o.max_staleness == 0,
        "{}train.max_staleness must be 0, but is {}: rollout and training alternate in this "
        "version.",
        check.where("train.max_staleness"),
        o.max_staleness
    );
    check.in("train.clip_low", o.clip_low, 0, 1);
    check.at_least("train.clip_high", o.clip_high, 0);
    check.at_least("train.kl_coef", o.kl_coef, 0);
    check.one_of("train.on_parity_mismatch", o.on_parity_mismatch, {"stop", "warn"});
}

void check_adapter(const RangeCheck& check, const AdapterOptions& o) {
    check.one_of("adapter.kind", o.kind, {"oft", "lora"});
    check.in("adapter.block_size", o.block_size, 2, 4096);
    check.in("adapter.neumann_terms", o.neumann_terms, 1, 64);
    check.in("adapter.rank", o.rank, 1, 4096);
    check.one_of("adapter.expert_sharing", o.expert_sharing, {"none", "shared"});
    check.above_zero("adapter.alpha", static_cast<double>(o.alpha));
}

void check_rest(const RangeCheck& check, const Config& c) {
    for (const auto& [key, value] :
         {std::pair<std::string, std::string>{"data.prompt_field", c.data.prompt_field},
          {"data.answer_field", c.data.answer_field}}) {
        USER_CHECK(!value.empty(), "{}{} must name a field of the rows.", check.where(key), key);
    }
    check.at_least("reward.length_penalty", c.reward.length_penalty, 0);
    check.at_least("reward.length_target", c.reward.length_target, 0);
    check.in("reward.workers", c.reward.workers, 1, 256);
    check.above_zero("reward.timeout_s", c.reward.timeout_s);
    check.in("reward.timeout_s", c.reward.timeout_s, 0, 86400);
    check.in("moe.dequant_bytes", c.moe.dequant_bytes, 1 << 20, 1e15);
    check.in("moe.dequant_rows", c.moe.dequant_rows, 0, 1e9);
    check.in("moe.host_layers", c.moe.host_layers, kHostLayersAuto, 1 << 16);
    check.in("checkpoint.every", c.checkpoint.every, 0, 1e9);
    check.in("checkpoint.keep", c.checkpoint.keep, 1, 1e6);
    check.in("eval.every", c.eval.every, 0, 1e9);
    check.at_least("eval.max_questions", c.eval.max_questions, 0);
    check.in("eval.samples", c.eval.samples, 0, 1 << 16);
    check.in("eval.temperature", c.eval.temperature, 0, 100);
    for (const int64_t k : c.eval.k) {
        check.in("eval.k", k, 1, 1 << 16);
    }
}

void check_all(const Config& config, const Origins& origins) {
    const RangeCheck check(origins);
    check.one_of("algorithm", config.algorithm, {"grpo"});
    check_device(check, config);
    check_rollout(check, config.rollout);
    check_train(check, config.train);
    check_adapter(check, config.adapter);
    check_rest(check, config);
}

// A path of the config is meant from the config's folder, one typed behind --set from the working
// directory; either is tried second.
std::string resolve(const std::string& path, const std::string& config_path, bool typed) {
    namespace fs = std::filesystem;
    if (path.empty() || fs::path(path).is_absolute()) {
        return path;
    }
    std::error_code error;
    const fs::path here = fs::absolute(path, error);
    const fs::path beside =
        fs::absolute(fs::path(config_path).parent_path() / path, error).lexically_normal();
    const fs::path& first = typed ? here : beside;
    const fs::path& second = typed ? beside : here;
    const bool take_second = !fs::exists(first, error) && fs::exists(second, error);
    return (take_second ? second : first).lexically_normal().string();
}

}  // namespace

Config parse_config(
    std::string_view text, const std::string& path, const std::vector<std::string>& overrides
) {
    Config config;
    Reader reader(path);
    reader.read_text(text, config);
    for (const auto& assignment : overrides) {
        reader.read_override(assignment, config);
    }
    check_all(config, reader.origins());
    config.model = resolve(config.model, path, reader.overridden("model"));
    config.data.train = resolve(config.data.train, path, reader.overridden("data.train"));
    config.data.eval = resolve(config.data.eval, path, reader.overridden("data.eval"));
    return config;
}

Config load_config(const std::string& path, const std::vector<std::string>& overrides) {
    USER_CHECK(!is_directory(path), "{} is a folder; name the config file in it.", path);
    return parse_config(read_file(path), path, overrides);
}

void check_config(const Config& config) {
    check_all(config, {});
}

std::string to_toml(const Config& config) {
    Config copy = config;
    std::string out;
    copy.visit(
        [&](const char* section) { out += fmt::format("\n[{}]\n", section); },
        [&](const char* name, const auto& value, const char*) {
            out += fmt::format("{} = {}\n", name, value_text(value));
        }
    );
    return out;
}

std::vector<std::string> config_keys() {
    std::vector<std::string> keys;
    std::string prefix;
    Config().visit(
        [&](const char* section) { prefix = std::string(section) + "."; },
        [&](const char* name, const auto&, const char*) { keys.push_back(prefix + name); }
    );
    return keys;
}

std::string config_reference() {
    std::string out =
        "# Config keys\n\n"
        "Written by `./run docs` from the options themselves. A config is a TOML file; "
        "`--set section.key=value` on the command line goes before it.\n"
        "Relative paths are looked for beside the config file, then in the working directory.\n";
    const std::string header = "\n| key | type | default | meaning |\n|---|---|---|---|\n";
    out += header;
    std::string prefix;
    Config().visit(
        [&](const char* section) {
            prefix = std::string(section) + ".";
            out += fmt::format("\n## [{}]\n{}", section, header);
        },
        [&](const char* name, const auto& value, const char* meaning) {
            using T = std::remove_cvref_t<decltype(value)>;
            out += fmt::format(
                "| `{}{}` | {} | `{}` | {} |\n",
                prefix,
                name,
                type_name<T>(),
                value_text(value),
                meaning
            );
        }
    );
    return out;
}

}  // namespace orbit
