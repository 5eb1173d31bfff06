#include "text/added_tokens.h"

#include <algorithm>

#include "base/error.h"
#include "text/utf8.h"

namespace orbit {

namespace {

size_t previous_code_point(std::string_view text, size_t at) {
    do {
        --at;
    } while (at > 0 && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80);
    return at;
}

size_t space_begin(std::string_view text, size_t end) {
    while (end > 0) {
        const size_t at = previous_code_point(text, end);
        if (!is_unicode_space(utf8_step(text, at).code_point)) {
            break;
        }
        end = at;
    }
    return end;
}

size_t space_end(std::string_view text, size_t begin) {
    while (begin < text.size()) {
        const Utf8Step step = utf8_step(text, begin);
        if (!is_unicode_space(step.code_point)) {
            break;
        }
        begin += step.bytes;
    }
    return begin;
}

bool touches_word(std::string_view text, size_t begin, size_t end) {
    const bool left =
        begin > 0 && is_unicode_word(utf8_step(text, previous_code_point(text, begin)).code_point);
    const bool right = end < text.size() && is_unicode_word(utf8_step(text, end).code_point);
    return left || right;
}

}  // namespace

void AddedTokenSet::add(const AddedToken& token) {
    CHECK(!token.content.empty());
    tokens_.push_back(token);
    first_byte_[static_cast<uint8_t>(token.content[0])] = true;
}

void AddedTokenSet::finish() {
    const auto by_content = [](const AddedToken& a, const AddedToken& b) {
        return a.content < b.content;
    };
    std::stable_sort(tokens_.begin(), tokens_.end(), by_content);
}

// The sorted list is a trie: each further byte of the text narrows the range of tokens that begin
// with what was read so far.
const AddedToken* AddedTokenSet::longest_at(std::string_view text, size_t at) const {
    auto low = tokens_.begin();
    auto high = tokens_.end();
    const AddedToken* best = nullptr;
    for (size_t depth = 0; low != high; ++depth) {
        while (low != high && low->content.size() == depth) {
            best = &*low;
            ++low;
        }
        if (at + depth == text.size()) {
            break;
        }
        const auto byte = static_cast<uint8_t>(text[at + depth]);
        const auto byte_of = [depth](const AddedToken& token) {
            return static_cast<uint8_t>(token.content[depth]);
        };
        low = std::lower_bound(low, high, byte, [&](const AddedToken& token, uint8_t value) {
            return byte_of(token) < value;
        });
        high = std::upper_bound(low, high, byte, [&](uint8_t value, const AddedToken& token) {
            return value < byte_of(token);
        });
    }
    return best;
}

std::vector<TokenSpan> AddedTokenSet::split(std::string_view text) const {
    std::vector<TokenSpan> spans;
    size_t done = 0;  // everything before it is in `spans`
    for (size_t at = 0; at < text.size();) {
        const AddedToken* token =
            first_byte_[static_cast<uint8_t>(text[at])] ? longest_at(text, at) : nullptr;
        if (token == nullptr) {
            ++at;
            continue;
        }
        size_t begin = at;
        size_t end = at + token->content.size();
        at = end;  // a match that does not count is passed over all the same, as in tokenizers
        if (begin < done || (token->single_word && touches_word(text, begin, end))) {
            continue;
        }
        if (token->lstrip) {
            begin = std::max(done, space_begin(text, begin));
        }
        if (token->rstrip) {
            end = space_end(text, end);
        }
        if (done < begin) {
            spans.push_back({done, begin, -1});
        }
        spans.push_back({begin, end, token->id});
        done = end;
    }
    if (done < text.size()) {
        spans.push_back({done, text.size(), -1});
    }
    return spans;
}

}  // namespace orbit
