// tokenizer.json of Hugging Face -> Tokenizer. Truncation, padding and the decoder's settings are
// ignored: they do not change ids, and byte-level decoding has only one form.
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "text/tokenizer.h"
#include "text/tokenizer_parts.h"

namespace orbit {

namespace {

using nlohmann::json;

constexpr int kMaxNesting = 8;
constexpr size_t kMaxSteps = 64;

const json& member(const json& object, const char* key) {
    static const json null_value;
    if (!object.is_object()) {
        return null_value;
    }
    const auto it = object.find(key);
    return it == object.end() ? null_value : *it;
}

bool flag(const json& object, const char* key, bool fallback) {
    const json& value = member(object, key);
    return value.is_boolean() ? value.get<bool>() : fallback;
}

std::string text_of(const json& object, const char* key) {
    const json& value = member(object, key);
    return value.is_string() ? value.get<std::string>() : std::string();
}

class Reader {
  public:
    Reader(const json& root, const std::string& file_name, TokenizerParts& parts)
        : root_(root), file_(file_name), parts_(parts) {}

    void run();

  private:
    void read_model();
    void read_vocab(const json& vocab);
    void read_merges(const json& merges);
    void read_added_tokens();
    void read_normalizer(const json& normalizer, int depth);
    void read_pre_tokenizer(const json& step, int depth);
    void read_split(const json& step);
    void read_byte_level(const json& step);
    void read_post_processor(const json& step, int depth);
    void read_template(const json& step);
    int32_t read_id(const json& value, std::string_view what) const;

    const json& root_;
    const std::string& file_;
    TokenizerParts& parts_;
    int32_t largest_id_ = 0;
    size_t num_steps_ = 0;
    bool byte_level_ = false;
};

void Reader::run() {
    USER_CHECK(
        root_.is_object(), "{}: a tokenizer.json holds one JSON object; download it again.", file_
    );
    read_model();
    read_added_tokens();
    read_normalizer(member(root_, "normalizer"), 0);
    read_pre_tokenizer(member(root_, "pre_tokenizer"), 0);
    USER_CHECK(
        byte_level_,
        "{}: the pre_tokenizer has no ByteLevel step, so this is not a byte-level BPE tokenizer "
        "(perhaps SentencePiece); only byte-level BPE is supported.",
        file_
    );
    read_post_processor(member(root_, "post_processor"), 0);
    parts_.finish(file_);
}

int32_t Reader::read_id(const json& value, std::string_view what) const {
    USER_CHECK(
        value.is_number_integer() && value.get<int64_t>() >= 0 &&
            value.get<int64_t>() <= largest_id_,
        "{}: the id of {} must be a whole number from 0 to {} in a file of this size.",
        file_,
        what,
        largest_id_
    );
    return value.get<int32_t>();
}

void Reader::read_model() {
    const json& model = member(root_, "model");
    const std::string type = text_of(model, "type");
    const json& vocab = member(model, "vocab");
    const json& merges = member(model, "merges");
    USER_CHECK(
        (type == "BPE" || type.empty()) && vocab.is_object() && merges.is_array(),
        "{}: the model is of type \"{}\"; only BPE with \"vocab\" and \"merges\" is supported.",
        file_,
        type
    );
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
        USER_CHECK(
            text_of(model, key).empty(),
            "{}: model.{} is set; only byte-level BPE without it is supported.",
            file_,
            key
        );
    }
    USER_CHECK(
        !flag(model, "byte_fallback", false),
        "{}: model.byte_fallback is on, as in SentencePiece tokenizers; only byte-level BPE is "
        "supported.",
        file_
    );
    const json& dropout = member(model, "dropout");
    USER_CHECK(
        dropout.is_null() || (dropout.is_number() && dropout.get<double>() == 0.0),
        "{}: model.dropout is set, which makes ids random; remove it.",
        file_
    );
    largest_id_ = largest_allowed_id(vocab.size() + member(root_, "added_tokens").size());
    read_vocab(vocab);
    read_merges(merges);
    parts_.bpe.set_ignore_merges(flag(model, "ignore_merges", false));
    const std::string unknown = text_of(model, "unk_token");
    if (!unknown.empty()) {
        parts_.bpe.set_unknown(parts_.bpe.id_of_mapped(unknown), flag(model, "fuse_unk", false));
    }
}

void Reader::read_vocab(const json& vocab) {
    for (const auto& [token, id] : vocab.items()) {
        USER_CHECK(!token.empty(), "{}: model.vocab has an empty token.", file_);
        const int32_t number = read_id(id, "a model.vocab entry");
        USER_CHECK(
            !parts_.bpe.is_defined(number),
            "{}: model.vocab has two tokens for id {}.",
            file_,
            number
        );
        parts_.bpe.add_token(number, token);
    }
}

void Reader::read_merges(const json& merges) {
    size_t index = 0;
    for (const json& merge : merges) {
        std::string left;
        std::string right;
        if (merge.is_string()) {
            const auto& text = merge.get_ref<const std::string&>();
            const size_t space = text.find(' ');
            if (space != std::string::npos && text.find(' ', space + 1) == std::string::npos) {
                left = text.substr(0, space);
                right = text.substr(space + 1);
            }
        } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
            left = merge[0].get<std::string>();
            right = merge[1].get<std::string>();
        }
        USER_CHECK(
            !left.empty() && !right.empty(),
            "{}: model.merges[{}] must be \"left right\" or [\"left\", \"right\"].",
            file_,
            index
        );
        USER_CHECK(
            parts_.bpe.add_merge(left, right),
            "{}: model.merges[{}] names a token that is not in model.vocab.",
            file_,
            index
        );
        ++index;
    }
}

void Reader::read_added_tokens() {
    const json& list = member(root_, "added_tokens");
    USER_CHECK(list.is_null() || list.is_array(), "{}: \"added_tokens\" must be a list.", file_);
    for (const json& entry : list) {
        AddedToken token;
        token.content = text_of(entry, "content");
        token.id = read_id(member(entry, "id"), "an added token");
        token.special = flag(entry, "special", false);
        token.normalized = flag(entry, "normalized", !token.special);
        token.lstrip = flag(entry, "lstrip", false);
        token.rstrip = flag(entry, "rstrip", false);
        token.single_word = flag(entry, "single_word", false);
        parts_.added.push_back(std::move(token));
    }
}

void Reader::read_normalizer(const json& normalizer, int depth) {
    if (normalizer.is_null()) {
        return;
    }
    const std::string type = text_of(normalizer, "type");
    if (type == "Sequence" && depth < kMaxNesting) {
        for (const json& step : member(normalizer, "normalizers")) {
            read_normalizer(step, depth + 1);
        }
        return;
    }
    USER_CHECK(++num_steps_ <= kMaxSteps, "{}: more than {} steps are listed.", file_, kMaxSteps);
    if (type == "NFC") {
        parts_.normal_forms.push_back(NormalForm::kC);
    } else if (type == "NFD") {
        parts_.normal_forms.push_back(NormalForm::kD);
    } else if (type == "NFKC") {
        parts_.normal_forms.push_back(NormalForm::kKC);
    } else if (type == "NFKD") {
        parts_.normal_forms.push_back(NormalForm::kKD);
    } else {
        throw UserError(fmt::format(
            "{}: the normalizer \"{}\" is not supported (NFC, NFD, NFKC, NFKD and Sequence are); "
            "SentencePiece tokenizers cannot be used.",
            file_,
            type
        ));
    }
    parts_.split_description += type + "\n";
}

void Reader::read_pre_tokenizer(const json& step, int depth) {
    if (step.is_null()) {
        return;
    }
    const std::string type = text_of(step, "type");
    if (type == "Sequence" && depth < kMaxNesting) {
        for (const json& inner : member(step, "pretokenizers")) {
            read_pre_tokenizer(inner, depth + 1);
        }
        return;
    }
    USER_CHECK(++num_steps_ <= kMaxSteps, "{}: more than {} steps are listed.", file_, kMaxSteps);
    USER_CHECK(
        !byte_level_,
        "{}: the pre_tokenizer \"{}\" comes after ByteLevel, which is not supported; ByteLevel "
        "must be the last step.",
        file_,
        type
    );
    if (type == "Split") {
        read_split(step);
    } else if (type == "Digits") {
        parts_.pre_tokenizer.add_digits(flag(step, "individual_digits", false));
    } else if (type == "ByteLevel") {
        read_byte_level(step);
    } else {
        throw UserError(fmt::format(
            "{}: the pre_tokenizer \"{}\" is not supported (Split, Digits, ByteLevel and Sequence "
            "are); only byte-level BPE tokenizers can be used.",
            file_,
            type
        ));
    }
    parts_.split_description += step.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
}

void Reader::read_split(const json& step) {
    const json& pattern = member(step, "pattern");
    const bool literal = member(pattern, "String").is_string();
    const std::string text = text_of(pattern, literal ? "String" : "Regex");
    const std::string behavior = text_of(step, "behavior");
    SplitBehavior how = SplitBehavior::kIsolated;
    if (behavior == "Removed") {
        how = SplitBehavior::kRemoved;
    } else if (behavior == "MergedWithPrevious") {
        how = SplitBehavior::kMergedWithPrevious;
    } else if (behavior == "MergedWithNext") {
        how = SplitBehavior::kMergedWithNext;
    } else if (behavior == "Contiguous") {
        how = SplitBehavior::kContiguous;
    } else {
        USER_CHECK(
            behavior == "Isolated",
            "{}: the behavior \"{}\" of a Split pre_tokenizer is not known.",
            file_,
            behavior
        );
    }
    parts_.pre_tokenizer.add_split(
        SplitPattern(text, literal, file_), how, flag(step, "invert", false)
    );
}

void Reader::read_byte_level(const json& step) {
    byte_level_ = true;
    if (flag(step, "add_prefix_space", true)) {
        parts_.pre_tokenizer.add_prefix_space();
    }
    if (flag(step, "use_regex", true)) {
        parts_.pre_tokenizer.add_split(
            SplitPattern(kGpt2Pattern, false, file_), SplitBehavior::kIsolated, false
        );
    }
}

void Reader::read_post_processor(const json& step, int depth) {
    if (step.is_null()) {
        return;
    }
    const std::string type = text_of(step, "type");
    if (type == "Sequence" && depth < kMaxNesting) {
        for (const json& inner : member(step, "processors")) {
            read_post_processor(inner, depth + 1);
        }
    } else if (type == "TemplateProcessing") {
        read_template(step);
    } else {
        // ByteLevel only moves offsets.
        USER_CHECK(
            type == "ByteLevel",
            "{}: the post_processor \"{}\" is not supported (ByteLevel, TemplateProcessing and "
            "Sequence are).",
            file_,
            type
        );
    }
}

void Reader::read_template(const json& step) {
    std::vector<int32_t> before;
    std::vector<int32_t> after;
    bool seen_text = false;
    for (const json& item : member(step, "single")) {
        if (!member(item, "Sequence").is_null()) {
            USER_CHECK(!seen_text, "{}: the post_processor writes its text twice.", file_);
            seen_text = true;
            continue;
        }
        const std::string name = text_of(member(item, "SpecialToken"), "id");
        const json& ids = member(member(member(step, "special_tokens"), name.c_str()), "ids");
        USER_CHECK(
            ids.is_array(), "{}: the post_processor does not list the ids of \"{}\".", file_, name
        );
        for (const json& id : ids) {
            (seen_text ? after : before).push_back(read_id(id, "a post_processor token"));
        }
    }
    USER_CHECK(seen_text, "{}: the post_processor leaves out the text itself.", file_);
    // A later processor of a sequence writes around what an earlier one wrote.
    parts_.prefix_ids.insert(parts_.prefix_ids.begin(), before.begin(), before.end());
    parts_.suffix_ids.insert(parts_.suffix_ids.end(), after.begin(), after.end());
}

}  // namespace

Tokenizer Tokenizer::from_json_text(std::string_view json_text, const std::string& file_name) {
    const json root = json::parse(json_text, nullptr, false);
    USER_CHECK(
        !root.is_discarded(), "{}: this is not valid JSON; download the file again.", file_name
    );
    auto state = std::make_unique<State>();
    Reader(root, file_name, state->parts).run();
    return Tokenizer(std::move(state));
}

}  // namespace orbit
