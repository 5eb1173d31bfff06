#include "text/tokenizer.h"

#include <algorithm>

#include "base/error.h"
#include "base/hash.h"
#include "text/tokenizer_parts.h"
#include "text/utf8.h"

namespace orbit {

namespace {

constexpr size_t kMaxTextBytes = size_t{1} << 30;
constexpr size_t kMaxAddedTokenBytes = 4096;

}  // namespace

int32_t largest_allowed_id(size_t num_entries) {
    return static_cast<int32_t>(std::min<size_t>(2 * num_entries + 65536, size_t{1} << 24));
}

std::string TokenizerParts::normalize(std::string_view text) const {
    std::string out(text);
    for (const NormalForm form : normal_forms) {
        out = normalize_utf8(out, form);
    }
    return out;
}

const AddedToken* TokenizerParts::added_token(int32_t id) const {
    const auto it = added_by_id.find(id);
    return it == added_by_id.end() ? nullptr : &added[it->second];
}

void TokenizerParts::finish(const std::string& where) {
    for (size_t i = 0; i < added.size(); ++i) {
        const AddedToken& token = added[i];
        USER_CHECK(
            token.content.size() <= kMaxAddedTokenBytes && is_valid_utf8(token.content),
            "{}: the added token with id {} is not valid UTF-8 or longer than {} bytes.",
            where,
            token.id,
            kMaxAddedTokenBytes
        );
        added_by_id[token.id] = i;
        size = std::max(size, token.id + 1);
        if (token.content.empty()) {
            continue;
        }
        AddedToken needle = token;
        if (token.normalized) {
            needle.content = normalize(token.content);
        }
        (token.normalized ? normalized_added : raw_added).add(needle);
    }
    raw_added.finish();
    normalized_added.finish();
    bpe.finish();
    size = std::max(size, static_cast<int32_t>(bpe.bytes_of_ids().size()));
}

Tokenizer::Tokenizer(std::unique_ptr<State> state) : state_(std::move(state)) {}

Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
    USER_CHECK(
        text.size() <= kMaxTextBytes,
        "A text of {} bytes is too long for one document; the limit is {}.",
        text.size(),
        kMaxTextBytes
    );
    // The tokenizers library only ever sees text, so broken bytes are replaced as its callers do.
    std::string repaired;
    if (!is_valid_utf8(text)) {
        repaired = replace_invalid_utf8(text);
        text = repaired;
    }
    std::vector<int32_t> ids;
    if (add_special_tokens) {
        ids = state_->parts.prefix_ids;
    }
    for (const TokenSpan& span : state_->parts.raw_added.split(text)) {
        if (span.id >= 0) {
            ids.push_back(span.id);
            continue;
        }
        const std::string part =
            state_->parts.normalize(text.substr(span.begin, span.end - span.begin));
        for (const TokenSpan& inner : state_->parts.normalized_added.split(part)) {
            if (inner.id >= 0) {
                ids.push_back(inner.id);
                continue;
            }
            std::string plain = part.substr(inner.begin, inner.end - inner.begin);
            for (const TextRange& piece : state_->parts.pre_tokenizer.cut(plain)) {
                const std::string_view view = plain;
                state_->parts.bpe.encode(view.substr(piece.begin, piece.end - piece.begin), ids);
            }
        }
    }
    if (add_special_tokens) {
        ids.insert(ids.end(), state_->parts.suffix_ids.begin(), state_->parts.suffix_ids.end());
    }
    return ids;
}

std::string Tokenizer::decode(const std::vector<int32_t>& ids, bool skip_special) const {
    std::string bytes;
    for (const int32_t id : ids) {
        if (!skip_special || !is_special(id)) {
            bytes += token_bytes(id);
        }
    }
    return replace_invalid_utf8(bytes);
}

std::string Tokenizer::token_bytes(int32_t id) const {
    if (const AddedToken* token = state_->parts.added_token(id)) {
        return token->content;
    }
    return state_->parts.bpe.is_defined(id)
               ? state_->parts.bpe.bytes_of_ids()[static_cast<size_t>(id)]
               : "";
}

bool Tokenizer::is_special(int32_t id) const {
    const AddedToken* token = state_->parts.added_token(id);
    return token != nullptr && token->special;
}

int32_t Tokenizer::id_of(std::string_view token) const {
    for (const AddedToken& added : state_->parts.added) {
        if (added.content == token) {
            return added.id;
        }
    }
    return state_->parts.bpe.id_of_mapped(token);
}

int32_t Tokenizer::size() const {
    return state_->parts.size;
}

std::string Tokenizer::digest() const {
    uint64_t hash = state_->parts.bpe.hash(1);
    for (const AddedToken& token : state_->parts.added) {
        const std::string line = fmt::format(
            "{} {} {} {} {} {} {}",
            token.id,
            token.special,
            token.normalized,
            token.lstrip,
            token.rstrip,
            token.single_word,
            token.content
        );
        hash = hash64(line.data(), line.size(), hash);
    }
    const std::string& split = state_->parts.split_description;
    return hash_hex(hash64(split.data(), split.size(), hash));
}

std::string StreamDecoder::push(int32_t id) {
    if (skip_special_ && tokenizer_->is_special(id)) {
        return "";
    }
    held_ += tokenizer_->token_bytes(id);
    const size_t tail = incomplete_utf8_tail(held_);
    const std::string_view complete = std::string_view(held_).substr(0, held_.size() - tail);
    std::string text = replace_invalid_utf8(complete);
    held_.erase(0, complete.size());
    return text;
}

std::string StreamDecoder::finish() {
    std::string text = replace_invalid_utf8(held_);
    held_.clear();
    return text;
}

}  // namespace orbit
