#include "text/jinja_lexer.h"

#include <algorithm>
#include <array>
#include <charconv>

#include "base/error.h"
#include "text/jinja_text.h"
#include "text/utf8.h"

namespace orbit::jinja {

namespace {

bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

bool is_hex(char c) {
    return is_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

bool is_name_start(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' ||
           static_cast<uint8_t>(c) >= 0x80;
}

bool is_name_part(char c) {
    return is_name_start(c) || is_digit(c);
}

// One kind of newline, no newline at the very end, valid UTF-8.
std::string clean_source(std::string_view source) {
    const std::string valid = replace_invalid_utf8(source);
    std::string out;
    out.reserve(valid.size());
    for (size_t i = 0; i < valid.size(); ++i) {
        if (valid[i] != '\r') {
            out += valid[i];
        } else if (i + 1 == valid.size() || valid[i + 1] != '\n') {
            out += '\n';
        }
    }
    if (out.ends_with('\n')) {
        out.pop_back();
    }
    return out;
}

class Lexer {
  public:
    explicit Lexer(std::string_view source) : source_(source) {}

    std::vector<Token> run();

  private:
    [[noreturn]] void fail(std::string_view message) const {
        throw UserError(fmt::format("Chat template, line {}: {}.", line_, message));
    }

    bool at_text(std::string_view text) const { return source_.substr(at_).starts_with(text); }

    char peek(size_t ahead = 0) const {
        return at_ + ahead < source_.size() ? source_[at_ + ahead] : '\0';
    }

    void push(TokenKind kind, std::string text = "") {
        Token token;
        token.kind = kind;
        token.text = std::move(text);
        token.line = line_;
        tokens_.push_back(std::move(token));
    }

    void advance_to(size_t at);
    size_t skip_space(size_t at) const;
    size_t end_of_tag(size_t at, size_t bytes, char sign) const;
    std::string_view stripped_data(size_t begin, size_t end, char sign, bool output) const;
    void data(size_t end, char sign, bool output);
    void comment();
    bool raw();
    bool tag_end(bool output);
    void tag(bool output);
    void tag_token();
    void number();
    void string();
    void escape(std::string& out);
    void octal_escape(std::string& out);
    void hex_escape(std::string& out, size_t digits);
    void op();

    std::string_view source_;
    size_t at_ = 0;
    int line_ = 1;
    bool line_start_ = true;  // the last tag ended with a newline, or there was none yet
    std::vector<char> open_;  // brackets
    std::vector<Token> tokens_;
};

void Lexer::advance_to(size_t at) {
    const auto from = source_.begin() + static_cast<std::ptrdiff_t>(at_);
    const auto to = source_.begin() + static_cast<std::ptrdiff_t>(at);
    line_ += static_cast<int>(std::count(from, to, '\n'));
    at_ = at;
}

size_t Lexer::skip_space(size_t at) const {
    return source_.size() - strip_space(source_.substr(at), true, false).size();
}

// Where the text after a closing tag of `bytes` bytes at `at` begins; '-' before the tag takes all
// white space with it, '+' nothing, and otherwise trim_blocks takes one newline.
size_t Lexer::end_of_tag(size_t at, size_t bytes, char sign) const {
    const size_t end = at + bytes;
    if (sign == '-') {
        return skip_space(end);
    }
    return sign != '+' && end < source_.size() && source_[end] == '\n' ? end + 1 : end;
}

std::string_view Lexer::stripped_data(size_t begin, size_t end, char sign, bool output) const {
    const std::string_view text = source_.substr(begin, end - begin);
    if (sign == '-') {
        return strip_space(text, false, true);
    }
    if (sign == '+' || output) {
        return text;
    }
    const size_t newline = text.rfind('\n');
    const size_t line = newline == std::string_view::npos ? 0 : newline + 1;
    const bool blank = strip_space(text.substr(line), true, false).empty();
    return blank && (line > 0 || line_start_) ? text.substr(0, line) : text;
}

void Lexer::data(size_t end, char sign, bool output) {
    const std::string_view text = stripped_data(at_, end, sign, output);
    if (!text.empty()) {
        push(TokenKind::kData, std::string(text));
    }
    advance_to(end);
}

std::vector<Token> Lexer::run() {
    while (at_ < source_.size()) {
        size_t tag_at = at_;
        do {
            tag_at = source_.find('{', tag_at);
            if (tag_at == std::string_view::npos || tag_at + 1 >= source_.size()) {
                tag_at = source_.size();
                break;
            }
            const char next = source_[tag_at + 1];
            if (next == '{' || next == '%' || next == '#') {
                break;
            }
            ++tag_at;
        } while (true);
        if (tag_at == source_.size()) {
            push(TokenKind::kData, std::string(source_.substr(at_)));
            break;
        }
        const char kind = source_[tag_at + 1];
        const char after = tag_at + 2 < source_.size() ? source_[tag_at + 2] : '\0';
        const char sign = after == '-' || after == '+' ? after : '\0';
        data(tag_at, sign, kind == '{');
        if (kind == '#') {
            comment();
        } else if (kind == '{' || !raw()) {
            advance_to(at_ + (sign != '\0' ? 3 : 2));
            tag(kind == '{');
        }
    }
    push(TokenKind::kEnd);
    return std::move(tokens_);
}

void Lexer::comment() {
    const size_t body = at_ + (peek(2) == '-' || peek(2) == '+' ? 3 : 2);
    const size_t close = source_.find("#}", body);
    if (close == std::string_view::npos) {
        fail("a comment is not closed with #}");
    }
    const char before = close > body ? source_[close - 1] : '\0';
    advance_to(end_of_tag(close, 2, before));
    line_start_ = source_[at_ - 1] == '\n';
}

// {% raw %} ... {% endraw %}; false when the tag at hand is another one.
bool Lexer::raw() {
    size_t at = at_ + (peek(2) == '-' || peek(2) == '+' ? 3 : 2);
    at = skip_space(at);
    if (!source_.substr(at).starts_with("raw")) {
        return false;
    }
    at = skip_space(at + 3);
    if (source_.substr(at).starts_with("-%}")) {
        at = skip_space(at + 3);
    } else if (source_.substr(at).starts_with("%}")) {
        at += 2;
    } else {
        return false;
    }
    advance_to(at);
    line_start_ = source_[at_ - 1] == '\n';
    for (size_t tag_at = source_.find("{%", at); tag_at != std::string_view::npos;
         tag_at = source_.find("{%", tag_at + 2)) {
        const char after = tag_at + 2 < source_.size() ? source_[tag_at + 2] : '\0';
        const char sign = after == '-' || after == '+' ? after : '\0';
        size_t end = skip_space(tag_at + (sign != '\0' ? 3 : 2));
        if (!source_.substr(end).starts_with("endraw")) {
            continue;
        }
        end = skip_space(end + 6);
        const char before = end < source_.size() ? source_[end] : '\0';
        const size_t close = before == '-' || before == '+' ? end + 1 : end;
        if (source_.substr(close).starts_with("%}")) {
            data(tag_at, sign, false);
            advance_to(end_of_tag(close, 2, before));
            line_start_ = source_[at_ - 1] == '\n';
            return true;
        }
    }
    fail("a raw block is not closed with {% endraw %}");
}

bool Lexer::tag_end(bool output) {
    const std::string_view close = output ? "}}" : "%}";
    const char sign = peek();
    const bool signed_end = sign == '-' || (sign == '+' && !output);
    const size_t at = at_ + (signed_end ? 1 : 0);
    if (!source_.substr(at).starts_with(close)) {
        return false;
    }
    push(output ? TokenKind::kOutputEnd : TokenKind::kBlockEnd);
    if (output) {
        advance_to(signed_end ? skip_space(at + 2) : at + 2);
    } else {
        advance_to(end_of_tag(at, 2, signed_end ? sign : '\0'));
    }
    line_start_ = source_[at_ - 1] == '\n';
    return true;
}

void Lexer::tag(bool output) {
    push(output ? TokenKind::kOutputBegin : TokenKind::kBlockBegin);
    while (true) {
        advance_to(skip_space(at_));
        if (at_ >= source_.size()) {
            fail(output ? "{{ is not closed with }}" : "{% is not closed with %}");
        }
        if (open_.empty() && tag_end(output)) {
            return;
        }
        tag_token();
    }
}

void Lexer::tag_token() {
    const char c = peek();
    if (is_digit(c)) {
        number();
    } else if (is_name_start(c)) {
        size_t end = at_;
        while (end < source_.size() && is_name_part(source_[end])) {
            ++end;
        }
        push(TokenKind::kName, std::string(source_.substr(at_, end - at_)));
        at_ = end;
    } else if (c == '"' || c == '\'') {
        string();
    } else {
        op();
    }
}

void Lexer::number() {
    int base = 10;
    if (peek() == '0' && (peek(1) == 'x' || peek(1) == 'X')) {
        base = 16;
    } else if (peek() == '0' && (peek(1) == 'o' || peek(1) == 'O')) {
        base = 8;
    } else if (peek() == '0' && (peek(1) == 'b' || peek(1) == 'B')) {
        base = 2;
    }
    at_ += base == 10 ? 0 : 2;
    std::string digits;
    const auto take = [&] {
        while (is_digit(peek()) || peek() == '_' || (base == 16 && is_hex(peek()))) {
            if (peek() != '_') {
                digits += peek();
            }
            ++at_;
        }
    };
    take();
    bool real = false;
    if (base == 10 && peek() == '.' && is_digit(peek(1))) {
        real = true;
        digits += '.';
        ++at_;
        take();
    }
    const size_t sign = peek(1) == '+' || peek(1) == '-' ? 1 : 0;
    if (base == 10 && (peek() == 'e' || peek() == 'E') && is_digit(peek(1 + sign))) {
        real = true;
        digits += "e";
        digits += sign == 1 && peek(1) == '-' ? "-" : "";
        at_ += 1 + sign;
        take();
    }
    push(real ? TokenKind::kReal : TokenKind::kInteger);
    Token& token = tokens_.back();
    const char* end = digits.data() + digits.size();
    const auto result = real ? std::from_chars(digits.data(), end, token.real)
                             : std::from_chars(digits.data(), end, token.integer, base);
    if (result.ec != std::errc() || result.ptr != end || digits.empty()) {
        fail("a number is malformed or too large");
    }
}

void Lexer::string() {
    const char quote = peek();
    const int first_line = line_;
    advance_to(at_ + 1);
    std::string out;
    while (true) {
        if (at_ >= source_.size()) {
            line_ = first_line;
            fail("a string is not closed");
        }
        const char c = peek();
        if (c == quote) {
            break;
        }
        if (c == '\\') {
            escape(out);
        } else {
            out += c;
            advance_to(at_ + 1);
        }
    }
    ++at_;
    push(TokenKind::kString, std::move(out));
}

// Python's escapes; an unknown one stays as it is written.
void Lexer::escape(std::string& out) {
    const char c = peek(1);
    if (c >= '0' && c <= '7') {
        ++at_;
        octal_escape(out);
        return;
    }
    if (c == 'x' || c == 'u' || c == 'U') {
        at_ += 2;
        hex_escape(out, c == 'x' ? 2 : (c == 'u' ? 4 : 8));
        return;
    }
    constexpr std::string_view kLetters = "\\'\"abfnrtv";
    constexpr std::string_view kMeanings = "\\'\"\a\b\f\n\r\t\v";
    const size_t index = c == '\0' ? std::string_view::npos : kLetters.find(c);
    if (index != std::string_view::npos) {
        out += kMeanings[index];
    } else if (c != '\n') {
        out += '\\';
        if (c != '\0') {
            out += c;
        }
    }
    advance_to(std::min(at_ + 2, source_.size()));
}

void Lexer::octal_escape(std::string& out) {
    uint32_t value = 0;
    for (int i = 0; i < 3 && peek() >= '0' && peek() <= '7'; ++i, ++at_) {
        value = value * 8 + static_cast<uint32_t>(peek() - '0');
    }
    append_utf8(out, value);
}

void Lexer::hex_escape(std::string& out, size_t digits) {
    const std::string_view text = source_.substr(at_, digits);
    uint32_t value = 0;
    const auto result = std::from_chars(text.data(), text.data() + text.size(), value, 16);
    const bool surrogate = value >= 0xD800 && value <= 0xDFFF;
    if (text.size() != digits || result.ptr != text.data() + text.size() || value > 0x10FFFF ||
        surrogate) {
        fail("an escape in a string needs hex digits of a character");
    }
    append_utf8(out, value);
    at_ += digits;
}

void Lexer::op() {
    constexpr std::array<std::string_view, 6> kTwo = {"//", "**", "==", "!=", ">=", "<="};
    constexpr std::string_view kOne = "+-*/%~[](){}<>=.:|,;";
    for (const std::string_view two : kTwo) {
        if (at_text(two)) {
            push(TokenKind::kOperator, std::string(two));
            at_ += 2;
            return;
        }
    }
    const char c = peek();
    if (c == '\0' || kOne.find(c) == std::string_view::npos) {
        fail(fmt::format("the character code {} is not expected here", static_cast<uint8_t>(c)));
    }
    if (c == '(' || c == '[' || c == '{') {
        open_.push_back(c == '(' ? ')' : (c == '[' ? ']' : '}'));
    } else if (c == ')' || c == ']' || c == '}') {
        if (open_.empty() || open_.back() != c) {
            fail(fmt::format("'{}' closes nothing", c));
        }
        open_.pop_back();
    }
    push(TokenKind::kOperator, std::string(1, c));
    ++at_;
}

}  // namespace

std::vector<Token> tokenize_template(std::string_view source) {
    const std::string clean = clean_source(source);
    return Lexer(clean).run();
}

}  // namespace orbit::jinja
