// Patterns of tokenizer.json on PCRE2: translation of the syntax, compilation, search.
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>

#include "base/error.h"
#include "text/pretokenizer.h"
#include "text/utf8.h"

namespace orbit {

const char* const kGpt2Pattern =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

const char* const kKimiPattern =
    "[\\p{Han}]+|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]*"
    "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]+"
    "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    "\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

namespace {

constexpr size_t kMaxPatternBytes = 16384;
constexpr int kMaxNesting = 50;
// Steps that one search may take. Patterns of published tokenizers need a few per character, and
// a run of that length is searched again in parts (see search()).
constexpr uint32_t kMatchLimit = 2'000'000;
constexpr size_t kJitStackBytes = size_t{4} << 20;
constexpr size_t kLongSearchBytes = 65536;

// White_Space; PCRE2's own \s also holds U+180E.
constexpr std::string_view kSpaceItems =
    "\\x09-\\x0d\\x20\\x85\\xa0\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}"
    "\\x{3000}";
constexpr std::string_view kWordItems = "\\p{L}\\p{M}\\p{N}\\p{Pc}";

// Scripts by name: without "sc:" PCRE2 would also match their script extensions.
constexpr std::array<std::string_view, 20> kScripts = {
    "Han",     "Hiragana", "Katakana",   "Hangul",  "Latin",   "Greek",   "Cyrillic",
    "Arabic",  "Hebrew",   "Thai",       "Lao",     "Khmer",   "Tamil",   "Telugu",
    "Bengali", "Common",   "Devanagari", "Tibetan", "Myanmar", "Bopomofo"};

class Translator {
  public:
    Translator(std::string_view pattern, const std::string& where)
        : pattern_(pattern), where_(where) {}

    std::string run() {
        std::string out;
        while (at_ < pattern_.size()) {
            if (pattern_[at_] == '\\') {
                out += escape(false);
            } else if (pattern_[at_] == '[') {
                out += char_class(0);
            } else {
                out += pattern_[at_++];
            }
        }
        return out;
    }

  private:
    [[noreturn]] void refuse(std::string_view why) const {
        throw UserError(fmt::format(
            "{}: the pattern has {} at byte {}, which is not supported; use a tokenizer whose "
            "pattern does without it.",
            where_,
            why,
            at_
        ));
    }

    // `inside`: within a character class, where a set is written as its items.
    std::string escape(bool inside) {
        if (at_ + 1 >= pattern_.size()) {
            refuse("a backslash at its end");
        }
        const char c = pattern_[at_ + 1];
        const auto set = [&](std::string_view items, bool negated) {
            at_ += 2;
            if (inside) {
                return negated ? fmt::format("\\{}", c) : std::string(items);
            }
            return fmt::format("[{}{}]", negated ? "^" : "", items);
        };
        switch (c) {
            case 's':
            case 'S':
                return set(kSpaceItems, c == 'S');
            case 'w':
            case 'W':
                return set(kWordItems, c == 'W');
            case 'h':
            case 'H':
                return set("0-9A-Fa-f", c == 'H');
            case 'p':
            case 'P':
                return property();
            case 'u':
                return code_point();
            case 'Q':
            case 'E':
            case 'C':
            case 'K':
            case 'X':
            case 'R':
                refuse(fmt::format("\\{}", c));
            default:
                at_ += 2;
                return fmt::format("\\{}", c);
        }
    }

    std::string property() {
        const std::string head(pattern_.substr(at_, 2));
        const size_t close = pattern_.find('}', at_);
        if (at_ + 2 >= pattern_.size() || pattern_[at_ + 2] != '{' ||
            close == std::string_view::npos) {
            refuse("\\p without {name}");
        }
        const std::string_view name = pattern_.substr(at_ + 3, close - at_ - 3);
        at_ = close + 1;
        const bool negated = name.starts_with('^');
        const std::string_view bare = negated ? name.substr(1) : name;
        const bool script = std::find(kScripts.begin(), kScripts.end(), bare) != kScripts.end();
        return fmt::format("{}{{{}{}{}}}", head, negated ? "^" : "", script ? "sc:" : "", bare);
    }

    std::string code_point() {
        const std::string_view digits = pattern_.substr(at_ + 2, 4);
        const auto is_hex = [](char c) {
            return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
        };
        if (digits.size() != 4 || !std::all_of(digits.begin(), digits.end(), is_hex)) {
            refuse("\\u without four hex digits");
        }
        at_ += 6;
        return fmt::format("\\x{{{}}}", digits);
    }

    // One operand of && (or a whole class): items to be put in brackets, or one negated class.
    struct Operand {
        std::string items;
        std::string negated_class;
    };

    // A class at '['. The result matches one character: "[...]", or a group for an intersection.
    std::string char_class(int depth) {
        if (depth > kMaxNesting) {
            refuse("classes nested too deeply");
        }
        ++at_;
        const bool negated = at_ < pattern_.size() && pattern_[at_] == '^';
        at_ += negated ? 1 : 0;
        std::vector<std::string> parts;
        Operand operand;
        for (const size_t first = at_;;) {
            if (at_ >= pattern_.size()) {
                refuse("a class without its closing bracket");
            }
            if (pattern_[at_] == ']' && at_ > first) {
                break;
            }
            if (pattern_.substr(at_, 2) == "&&") {
                parts.push_back(closed(operand));
                operand = {};
                at_ += 2;
            } else {
                class_item(operand, depth);
            }
        }
        if (parts.empty() && operand.negated_class.empty()) {
            ++at_;
            return fmt::format("[{}{}]", negated ? "^" : "", operand.items);
        }
        parts.push_back(closed(operand));
        ++at_;
        return intersection(parts, negated);
    }

    void class_item(Operand& operand, int depth) {
        const char c = pattern_[at_];
        if (c == '[' && pattern_.substr(at_, 2) != "[:") {
            const std::string inner = char_class(depth + 1);
            if (inner.starts_with("[^")) {
                operand.negated_class = inner;
            } else if (inner.starts_with('[')) {
                operand.items += inner.substr(1, inner.size() - 2);
            } else {
                refuse("an intersection inside a class");
            }
        } else if (c == '[') {  // a POSIX name such as [:alpha:]
            const size_t close = pattern_.find(":]", at_);
            if (close == std::string_view::npos) {
                refuse("[: without :]");
            }
            operand.items += pattern_.substr(at_, close + 2 - at_);
            at_ = close + 2;
        } else if (c == '\\') {
            operand.items += escape(true);
        } else {
            operand.items += c;
            ++at_;
        }
        if (!operand.negated_class.empty() && !operand.items.empty()) {
            refuse("a negated class joined with other characters");
        }
    }

    std::string closed(const Operand& operand) const {
        if (!operand.negated_class.empty()) {
            return operand.negated_class;
        }
        if (operand.items.empty()) {
            refuse("an empty operand of &&");
        }
        return fmt::format("[{}]", operand.items);
    }

    static std::string intersection(const std::vector<std::string>& parts, bool negated) {
        std::string body;
        for (size_t i = 1; i < parts.size(); ++i) {
            body += fmt::format("(?={})", parts[i]);
        }
        body += parts[0];
        return negated ? fmt::format("(?:(?!{})(?s:.))", body) : fmt::format("(?:{})", body);
    }

    std::string_view pattern_;
    const std::string& where_;
    size_t at_ = 0;
};

struct FreeCode {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
};

struct FreeData {
    void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};

struct FreeContext {
    void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};

struct FreeCompileContext {
    void operator()(pcre2_compile_context* context) const { pcre2_compile_context_free(context); }
};

struct FreeStack {
    void operator()(pcre2_jit_stack* stack) const { pcre2_jit_stack_free(stack); }
};

PCRE2_SPTR subject(std::string_view text) {
    return reinterpret_cast<PCRE2_SPTR>(text.data());
}

}  // namespace

std::string translate_pattern(std::string_view pattern, const std::string& where) {
    return Translator(pattern, where).run();
}

struct SplitPattern::State {
    std::unique_ptr<pcre2_code, FreeCode> code;
    std::string where;

    // Match offset range from `from` on, or nullopt-like begin == npos.
    TextRange search(
        std::string_view text, size_t from, pcre2_match_data* data, pcre2_match_context* context
    ) const;
};

SplitPattern::SplitPattern(std::string_view pattern, bool literal, const std::string& where)
    : state_(std::make_unique<State>()) {
    USER_CHECK(
        pattern.size() <= kMaxPatternBytes && !pattern.empty(),
        "{}: the split pattern has {} bytes; 1 to {} are supported.",
        where,
        pattern.size(),
        kMaxPatternBytes
    );
    USER_CHECK(is_valid_utf8(pattern), "{}: the split pattern is not valid UTF-8.", where);
    const std::string source = literal ? std::string(pattern) : translate_pattern(pattern, where);
    // Ruby's ^ and $ match at every line.
    const uint32_t options = PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP | PCRE2_MULTILINE);
    std::unique_ptr<pcre2_compile_context, FreeCompileContext> context(
        pcre2_compile_context_create(nullptr)
    );
    CHECK(context != nullptr);
    pcre2_set_parens_nest_limit(context.get(), kMaxNesting);
    int error = 0;
    PCRE2_SIZE offset = 0;
    state_->code.reset(
        pcre2_compile(subject(source), source.size(), options, &error, &offset, context.get())
    );
    if (state_->code == nullptr) {
        std::array<PCRE2_UCHAR, 256> message{};
        pcre2_get_error_message(error, message.data(), message.size());
        throw UserError(fmt::format(
            "{}: the split pattern cannot be compiled ({}).",
            where,
            reinterpret_cast<const char*>(message.data())
        ));
    }
    pcre2_jit_compile(state_->code.get(), PCRE2_JIT_COMPLETE);  // without JIT it is only slower
    state_->where = where;
}

SplitPattern::~SplitPattern() = default;
SplitPattern::SplitPattern(SplitPattern&&) noexcept = default;
SplitPattern& SplitPattern::operator=(SplitPattern&&) noexcept = default;

TextRange SplitPattern::State::search(
    std::string_view text, size_t from, pcre2_match_data* data, pcre2_match_context* context
) const {
    const auto run = [&](size_t length, uint32_t options) {
        return pcre2_match(
            code.get(), subject(text), length, from, PCRE2_NO_UTF_CHECK | options, data, context
        );
    };
    int rc = run(text.size(), 0);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
        rc = run(text.size(), PCRE2_NO_JIT);
    }
    if (rc < 0 && rc != PCRE2_ERROR_NOMATCH && text.size() - from > kLongSearchBytes) {
        // A very long run of one class: look at its beginning only, so that it is cut in parts.
        size_t end = from + kLongSearchBytes;
        while ((static_cast<uint8_t>(text[end]) & 0xC0) == 0x80) {
            --end;
        }
        rc = run(end, PCRE2_NO_JIT);
    }
    if (rc == PCRE2_ERROR_NOMATCH) {
        return {std::string_view::npos, std::string_view::npos};
    }
    USER_CHECK(
        rc >= 0,
        "{}: the split pattern takes too many steps on this text (PCRE2 error {}); use a simpler "
        "pattern.",
        where,
        rc
    );
    const PCRE2_SIZE* found = pcre2_get_ovector_pointer(data);
    // \K is refused above, so a match never begins before `from`.
    return {found[0], std::max(found[0], found[1])};
}

std::vector<TextRange> SplitPattern::find_all(std::string_view text) const {
    std::unique_ptr<pcre2_match_data, FreeData> data(
        pcre2_match_data_create_from_pattern(state_->code.get(), nullptr)
    );
    std::unique_ptr<pcre2_match_context, FreeContext> context(pcre2_match_context_create(nullptr));
    CHECK(data != nullptr && context != nullptr);
    pcre2_set_match_limit(context.get(), kMatchLimit);
    std::unique_ptr<pcre2_jit_stack, FreeStack> stack;
    if (text.size() > 1024) {  // short texts get by with the 32 KiB that JIT code has anyway
        stack.reset(pcre2_jit_stack_create(32768, kJitStackBytes, nullptr));
        pcre2_jit_stack_assign(context.get(), nullptr, stack.get());
    }
    std::vector<TextRange> matches;
    for (size_t from = 0; from <= text.size();) {
        const TextRange match = state_->search(text, from, data.get(), context.get());
        if (match.begin == std::string_view::npos) {
            break;
        }
        matches.push_back(match);
        from = match.end;
        if (match.begin == match.end) {
            from += from < text.size() ? utf8_step(text, from).bytes : 1;
        }
    }
    return matches;
}

}  // namespace orbit
