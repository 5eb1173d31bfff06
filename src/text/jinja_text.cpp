#include "text/jinja_text.h"

#include <utf8proc.h>

#include "text/utf8.h"

namespace orbit::jinja {

namespace {

template <typename Drop>
std::string_view strip_where(std::string_view text, bool left, bool right, const Drop& drop) {
    while (left && !text.empty()) {
        const Utf8Step step = utf8_step(text, 0);
        if (!drop(step.code_point)) {
            break;
        }
        text.remove_prefix(step.bytes);
    }
    while (right && !text.empty()) {
        size_t at = text.size() - 1;
        while (at > 0 && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80) {
            --at;
        }
        if (!drop(utf8_step(text, at).code_point)) {
            break;
        }
        text = text.substr(0, at);
    }
    return text;
}

utf8proc_category_t category(uint32_t code_point) {
    return utf8proc_category(static_cast<utf8proc_int32_t>(code_point));
}

bool is_line_end(uint32_t c) {
    return (c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 ||
           c == 0x2029;
}

}  // namespace

std::string_view strip_space(std::string_view text, bool left, bool right) {
    return strip_where(text, left, right, is_python_space);
}

std::string_view strip_chars(std::string_view text, std::string_view chars, bool left, bool right) {
    return strip_where(text, left, right, [chars](uint32_t code_point) {
        for (size_t at = 0; at < chars.size();) {
            const Utf8Step step = utf8_step(chars, at);
            if (step.code_point == code_point) {
                return true;
            }
            at += step.bytes;
        }
        return false;
    });
}

std::vector<std::string_view> split_space(std::string_view text, int64_t limit) {
    std::vector<std::string_view> parts;
    text = strip_space(text, true, false);
    while (!text.empty()) {
        if (limit-- == 0) {
            parts.push_back(text);
            break;
        }
        size_t end = 0;
        while (end < text.size()) {
            const Utf8Step step = utf8_step(text, end);
            if (is_python_space(step.code_point)) {
                break;
            }
            end += step.bytes;
        }
        parts.push_back(text.substr(0, end));
        text = strip_space(text.substr(end), true, false);
    }
    return parts;
}

std::vector<std::string_view> split_text(
    std::string_view text, std::string_view separator, int64_t limit
) {
    std::vector<std::string_view> parts;
    size_t at = text.find(separator);
    while (at != std::string_view::npos && limit-- != 0) {
        parts.push_back(text.substr(0, at));
        text.remove_prefix(at + separator.size());
        at = text.find(separator);
    }
    parts.push_back(text);
    return parts;
}

std::vector<std::string_view> split_lines(std::string_view text, bool keep_ends) {
    std::vector<std::string_view> lines;
    size_t begin = 0;
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = utf8_step(text, at);
        if (!is_line_end(step.code_point)) {
            at += step.bytes;
            continue;
        }
        const size_t line_end = at;
        at += text.substr(at, 2) == "\r\n" ? 2 : step.bytes;
        lines.push_back(text.substr(begin, (keep_ends ? at : line_end) - begin));
        begin = at;
    }
    if (begin < text.size()) {
        lines.push_back(text.substr(begin));
    }
    return lines;
}

std::string capitalize_text(std::string_view text) {
    if (text.empty()) {
        return "";
    }
    const size_t first = utf8_step(text, 0).bytes;
    return to_upper_utf8(text.substr(0, first)) + to_lower_utf8(text.substr(first));
}

std::string title_text(std::string_view text) {
    std::string out;
    bool in_word = false;
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = utf8_step(text, at);
        const std::string_view letter = text.substr(at, step.bytes);
        out += in_word ? to_lower_utf8(letter) : to_upper_utf8(letter);
        in_word = is_letter(step.code_point);
        at += step.bytes;
    }
    return out;
}

std::string replace_text(
    Runtime& rt, std::string_view text, std::string_view from, std::string_view to, int64_t limit
) {
    std::string out;
    if (from.empty()) {  // Python puts the new text around every character
        for (size_t at = 0; at < text.size();) {
            const size_t bytes = utf8_step(text, at).bytes;
            if (limit-- != 0) {
                rt.charge_bytes(to.size());
                out += to;
            } else {
                limit = 0;
            }
            out += text.substr(at, bytes);
            at += bytes;
        }
        return limit != 0 ? out.append(to) : out;
    }
    rt.charge_bytes(text.size());
    for (size_t at = text.find(from); at != std::string_view::npos && limit-- != 0;
         at = text.find(from)) {
        rt.charge_bytes(at + to.size());
        out += text.substr(0, at);
        out += to;
        text.remove_prefix(at + from.size());
    }
    return out.append(text);
}

bool is_upper_text(Runtime& rt, std::string_view text) {
    rt.charge_bytes(text.size());
    return to_upper_utf8(text) == text && to_lower_utf8(text) != text;
}

bool is_lower_text(Runtime& rt, std::string_view text) {
    rt.charge_bytes(text.size());
    return to_lower_utf8(text) == text && to_upper_utf8(text) != text;
}

bool is_printable(uint32_t code_point) {
    switch (category(code_point)) {
        case UTF8PROC_CATEGORY_CC:
        case UTF8PROC_CATEGORY_CF:
        case UTF8PROC_CATEGORY_CS:
        case UTF8PROC_CATEGORY_CO:
        case UTF8PROC_CATEGORY_CN:
        case UTF8PROC_CATEGORY_ZL:
        case UTF8PROC_CATEGORY_ZP:
            return false;
        case UTF8PROC_CATEGORY_ZS:
            return code_point == ' ';
        default:
            return true;
    }
}

bool is_letter(uint32_t code_point) {
    const utf8proc_category_t c = category(code_point);
    return c == UTF8PROC_CATEGORY_LU || c == UTF8PROC_CATEGORY_LL || c == UTF8PROC_CATEGORY_LT ||
           c == UTF8PROC_CATEGORY_LM || c == UTF8PROC_CATEGORY_LO;
}

bool is_decimal(uint32_t code_point) {
    return category(code_point) == UTF8PROC_CATEGORY_ND;
}

bool is_letter_or_number(uint32_t code_point) {
    return is_letter(code_point) || is_unicode_numeric(code_point);
}

}  // namespace orbit::jinja
