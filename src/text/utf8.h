// UTF-8 helpers shared by the tokenizer and the chat-template interpreter.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace orbit {

// One step of decoding. For a broken sequence `code_point` is U+FFFD, `valid` is false and `bytes`
// is the length of its maximal well-formed prefix (at least 1), so that each broken sequence gives
// one U+FFFD: the replacement rule of Unicode, of Python's errors="replace" and of Rust.
struct Utf8Step {
    uint32_t code_point = 0;
    uint32_t bytes = 0;
    bool valid = false;
    bool truncated = false;  // well formed so far, but the text ends inside the sequence
};

Utf8Step utf8_step(std::string_view text, size_t at);

void append_utf8(std::string& out, uint32_t code_point);

bool is_valid_utf8(std::string_view text);

// The text with every broken sequence replaced by U+FFFD.
std::string replace_invalid_utf8(std::string_view text);

// Bytes at the end of `text` that are the beginning of a sequence which later bytes may complete.
size_t incomplete_utf8_tail(std::string_view text);

size_t count_code_points(std::string_view text);

bool is_unicode_space(uint32_t code_point);    // the White_Space property
bool is_unicode_numeric(uint32_t code_point);  // categories Nd, Nl, No
bool is_unicode_word(uint32_t code_point);     // letters, marks, numbers, connector punctuation

// Python's str.strip() and friends: white space plus the separators U+001C to U+001F.
bool is_python_space(uint32_t code_point);

// Code point by code point; for the few letters whose case mapping is longer (such as U+00DF) the
// single-letter mapping is used.
std::string to_upper_utf8(std::string_view text);
std::string to_lower_utf8(std::string_view text);

enum class NormalForm { kC, kD, kKC, kKD };

// `text` must be valid UTF-8.
std::string normalize_utf8(std::string_view text, NormalForm form);

}  // namespace orbit
