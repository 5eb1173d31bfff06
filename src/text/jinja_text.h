// String functions of Python that filters and methods share.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/jinja_value.h"

namespace orbit::jinja {

std::string_view strip_space(std::string_view text, bool left, bool right);
// `chars`: the code points that go.
std::string_view strip_chars(std::string_view text, std::string_view chars, bool left, bool right);
// At most `limit` cuts; no limit when negative.
std::vector<std::string_view> split_space(std::string_view text, int64_t limit);
std::vector<std::string_view> split_text(
    std::string_view text, std::string_view separator, int64_t limit
);
std::vector<std::string_view> split_lines(std::string_view text, bool keep_ends);
std::string capitalize_text(std::string_view text);
std::string title_text(std::string_view text);  // str.title()
std::string replace_text(
    Runtime& rt, std::string_view text, std::string_view from, std::string_view to, int64_t limit
);
bool is_upper_text(Runtime& rt, std::string_view text);
bool is_lower_text(Runtime& rt, std::string_view text);
bool is_printable(uint32_t code_point);  // str.isprintable()
bool is_letter(uint32_t code_point);
bool is_decimal(uint32_t code_point);
bool is_letter_or_number(uint32_t code_point);

}  // namespace orbit::jinja
