// The tokenizer fields of a GGUF file -> Tokenizer.
#include <array>

#include "base/error.h"
#include "text/tokenizer.h"
#include "text/tokenizer_parts.h"

namespace orbit {

namespace {

constexpr int32_t kControl = 3;
constexpr int32_t kUserDefined = 4;

// What tokenizer.ggml.pre stands for: up to three patterns in order, each applied inside the pieces
// of the one before.
struct PreSettings {
    std::string_view name;
    std::array<const char*, 3> patterns;
    bool ignore_merges = false;
    bool nfc = false;  // the GGUF does not say it; the tokenizer.json of these models does
};

const char* const kLlama3Pattern =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| "
    "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const char* const kQwen2Pattern =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| "
    "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const char* const kDeepseekLetters =
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?"
    "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const char* const kDeepseekHan = "[\\x{4e00}-\\x{9fa5}\\x{3040}-\\x{309f}\\x{30a0}-\\x{30ff}]+";
const char* const kO200kPattern =
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+"
    "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\p{N}{1,3}| "
    "?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

const std::array<PreSettings, 10>& all_settings() {
    static const std::array<PreSettings, 10> settings = {{
        {"smollm", {"\\p{N}", kGpt2Pattern, nullptr}, false, false},
        {"gpt-2", {kGpt2Pattern, nullptr, nullptr}, false, false},
        {"qwen2", {kQwen2Pattern, nullptr, nullptr}, false, true},
        {"llama-bpe", {kLlama3Pattern, nullptr, nullptr}, true, false},
        {"llama3", {kLlama3Pattern, nullptr, nullptr}, true, false},
        {"llama-v3", {kLlama3Pattern, nullptr, nullptr}, true, false},
        {"smaug-bpe", {kLlama3Pattern, nullptr, nullptr}, true, false},
        {"deepseek-v3", {"\\p{N}{1,3}", kDeepseekHan, kDeepseekLetters}, false, false},
        {"kimi-k2", {kKimiPattern, nullptr, nullptr}, true, false},
        {"gpt-4o", {kO200kPattern, nullptr, nullptr}, false, false},
    }};
    return settings;
}

const PreSettings& settings_of(const std::string& pre, const std::string& file_name) {
    std::string known;
    for (const PreSettings& settings : all_settings()) {
        if (settings.name == pre) {
            return settings;
        }
        known += known.empty() ? "" : ", ";
        known += settings.name;
    }
    throw UserError(fmt::format(
        "{}: tokenizer.ggml.pre is \"{}\", which names no known split pattern (known: {}); use a "
        "model folder with tokenizer.json instead.",
        file_name,
        pre,
        known
    ));
}

void read_tokens(
    const GgufTokenizerFields& fields, const std::string& file_name, TokenizerParts& parts
) {
    USER_CHECK(
        !fields.tokens.empty() && fields.tokens.size() <= (size_t{1} << 24),
        "{}: tokenizer.ggml.tokens has {} entries.",
        file_name,
        fields.tokens.size()
    );
    USER_CHECK(
        fields.token_type.empty() || fields.token_type.size() == fields.tokens.size(),
        "{}: tokenizer.ggml.token_type has {} entries for {} tokens.",
        file_name,
        fields.token_type.size(),
        fields.tokens.size()
    );
    for (size_t i = 0; i < fields.tokens.size(); ++i) {
        const auto id = static_cast<int32_t>(i);
        const int32_t type = fields.token_type.empty() ? 1 : fields.token_type[i];
        if (type == kControl || type == kUserDefined) {
            AddedToken token;
            token.content = fields.tokens[i];
            token.id = id;
            token.special = type == kControl;
            parts.added.push_back(std::move(token));
        } else if (!fields.tokens[i].empty()) {
            parts.bpe.add_token(id, fields.tokens[i]);
        }
    }
}

}  // namespace

Tokenizer Tokenizer::from_gguf(const GgufTokenizerFields& fields, const std::string& file_name) {
    USER_CHECK(
        fields.model == "gpt2",
        "{}: tokenizer.ggml.model is \"{}\"{}; only byte-level BPE (\"gpt2\") is supported.",
        file_name,
        fields.model,
        fields.model == "llama" ? ", a SentencePiece tokenizer" : ""
    );
    const PreSettings& settings = settings_of(fields.pre, file_name);
    auto state = std::make_unique<State>();
    TokenizerParts& parts = state->parts;
    read_tokens(fields, file_name, parts);
    for (size_t i = 0; i < fields.merges.size(); ++i) {
        const std::string& merge = fields.merges[i];
        const size_t space = merge.find(' ');
        USER_CHECK(
            space != std::string::npos &&
                parts.bpe.add_merge(merge.substr(0, space), merge.substr(space + 1)),
            "{}: tokenizer.ggml.merges[{}] is not \"left right\" of two tokens of the vocabulary.",
            file_name,
            i
        );
    }
    for (const char* pattern : settings.patterns) {
        if (pattern != nullptr) {
            parts.pre_tokenizer.add_split(
                SplitPattern(pattern, false, file_name), SplitBehavior::kIsolated, false
            );
        }
    }
    if (settings.nfc) {
        parts.normal_forms.push_back(NormalForm::kC);
    }
    parts.bpe.set_ignore_merges(settings.ignore_merges);
    parts.split_description = fields.pre;
    if (fields.add_bos) {
        USER_CHECK(
            fields.bos_id >= 0 && static_cast<size_t>(fields.bos_id) < fields.tokens.size(),
            "{}: tokenizer.ggml.add_bos_token is on but tokenizer.ggml.bos_token_id is {}.",
            file_name,
            fields.bos_id
        );
        parts.prefix_ids.push_back(fields.bos_id);
    }
    parts.finish(file_name);
    return Tokenizer(std::move(state));
}

}  // namespace orbit
