// Cuts a chat template into tokens, with the white-space rules that transformers switches on:
// trim_blocks (no newline after a block tag) and lstrip_blocks (no indentation before one).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace orbit::jinja {

enum class TokenKind {
    kData,
    kOutputBegin,
    kOutputEnd,
    kBlockBegin,
    kBlockEnd,
    kName,
    kString,
    kInteger,
    kReal,
    kOperator,
    kEnd,
};

struct Token {
    TokenKind kind = TokenKind::kEnd;
    std::string text;
    int line = 1;
    int64_t integer = 0;
    double real = 0.0;
};

// Ends with one kEnd token. UserError with the line of the mistake.
std::vector<Token> tokenize_template(std::string_view source);

}  // namespace orbit::jinja
