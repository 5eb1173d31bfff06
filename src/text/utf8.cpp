#include "text/utf8.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>

#include "base/error.h"

namespace orbit {

namespace {

constexpr uint32_t kReplacement = 0xFFFD;

uint8_t byte_at(std::string_view text, size_t at) {
    return static_cast<uint8_t>(text[at]);
}

struct LeadByte {
    uint32_t length = 0;  // 0: not a lead byte
    uint32_t bits = 0;
    uint8_t second_low = 0x80;  // allowed range of the second byte (Unicode table 3-7)
    uint8_t second_high = 0xBF;
};

LeadByte classify(uint8_t byte) {
    if (byte < 0x80) {
        return {1, byte, 0x80, 0xBF};
    }
    if (byte >= 0xC2 && byte <= 0xDF) {
        return {2, byte & 0x1Fu, 0x80, 0xBF};
    }
    if (byte >= 0xE0 && byte <= 0xEF) {
        const uint8_t low = byte == 0xE0 ? 0xA0 : 0x80;
        const uint8_t high = byte == 0xED ? 0x9F : 0xBF;
        return {3, byte & 0x0Fu, low, high};
    }
    if (byte >= 0xF0 && byte <= 0xF4) {
        const uint8_t low = byte == 0xF0 ? 0x90 : 0x80;
        const uint8_t high = byte == 0xF4 ? 0x8F : 0xBF;
        return {4, byte & 0x07u, low, high};
    }
    return {};
}

utf8proc_category_t category(uint32_t code_point) {
    return utf8proc_category(static_cast<utf8proc_int32_t>(code_point));
}

std::string map_code_points(std::string_view text, utf8proc_int32_t (*map)(utf8proc_int32_t)) {
    std::string out;
    out.reserve(text.size());
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = utf8_step(text, at);
        const auto mapped = map(static_cast<utf8proc_int32_t>(step.code_point));
        append_utf8(out, static_cast<uint32_t>(mapped));
        at += step.bytes;
    }
    return out;
}

}  // namespace

Utf8Step utf8_step(std::string_view text, size_t at) {
    const LeadByte lead = classify(byte_at(text, at));
    if (lead.length == 1) {
        return {lead.bits, 1, true, false};
    }
    if (lead.length == 0) {
        return {kReplacement, 1, false, false};
    }
    uint32_t code_point = lead.bits;
    for (uint32_t k = 1; k < lead.length; ++k) {
        if (at + k == text.size()) {
            return {kReplacement, k, false, true};
        }
        const uint8_t byte = byte_at(text, at + k);
        const uint8_t low = k == 1 ? lead.second_low : uint8_t{0x80};
        const uint8_t high = k == 1 ? lead.second_high : uint8_t{0xBF};
        if (byte < low || byte > high) {
            return {kReplacement, k, false, false};
        }
        code_point = (code_point << 6) | (byte & 0x3Fu);
    }
    return {code_point, lead.length, true, false};
}

void append_utf8(std::string& out, uint32_t code_point) {
    const auto put = [&out](uint32_t byte) { out.push_back(static_cast<char>(byte)); };
    if (code_point < 0x80) {
        put(code_point);
    } else if (code_point < 0x800) {
        put(0xC0 | (code_point >> 6));
        put(0x80 | (code_point & 0x3F));
    } else if (code_point < 0x10000) {
        put(0xE0 | (code_point >> 12));
        put(0x80 | ((code_point >> 6) & 0x3F));
        put(0x80 | (code_point & 0x3F));
    } else {
        put(0xF0 | (code_point >> 18));
        put(0x80 | ((code_point >> 12) & 0x3F));
        put(0x80 | ((code_point >> 6) & 0x3F));
        put(0x80 | (code_point & 0x3F));
    }
}

bool is_valid_utf8(std::string_view text) {
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = utf8_step(text, at);
        if (!step.valid) {
            return false;
        }
        at += step.bytes;
    }
    return true;
}

std::string replace_invalid_utf8(std::string_view text) {
    std::string out;
    out.reserve(text.size());
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = utf8_step(text, at);
        if (step.valid) {
            out.append(text.substr(at, step.bytes));
        } else {
            append_utf8(out, kReplacement);
        }
        at += step.bytes;
    }
    return out;
}

size_t incomplete_utf8_tail(std::string_view text) {
    const size_t longest = std::min<size_t>(3, text.size());
    for (size_t length = 1; length <= longest; ++length) {
        const size_t at = text.size() - length;
        if (classify(byte_at(text, at)).length > 0) {
            const Utf8Step step = utf8_step(text, at);
            return step.truncated && step.bytes == length ? length : 0;
        }
    }
    return 0;
}

size_t count_code_points(std::string_view text) {
    size_t count = 0;
    for (size_t at = 0; at < text.size(); ++count) {
        at += utf8_step(text, at).bytes;
    }
    return count;
}

bool is_unicode_space(uint32_t code_point) {
    if (code_point <= 0x20) {
        return code_point == 0x20 || (code_point >= 0x09 && code_point <= 0x0D);
    }
    return code_point == 0x85 || code_point == 0xA0 || code_point == 0x1680 ||
           (code_point >= 0x2000 && code_point <= 0x200A) || code_point == 0x2028 ||
           code_point == 0x2029 || code_point == 0x202F || code_point == 0x205F ||
           code_point == 0x3000;
}

bool is_python_space(uint32_t code_point) {
    return is_unicode_space(code_point) || (code_point >= 0x1C && code_point <= 0x1F);
}

bool is_unicode_numeric(uint32_t code_point) {
    const utf8proc_category_t c = category(code_point);
    return c == UTF8PROC_CATEGORY_ND || c == UTF8PROC_CATEGORY_NL || c == UTF8PROC_CATEGORY_NO;
}

bool is_unicode_word(uint32_t code_point) {
    switch (category(code_point)) {
        case UTF8PROC_CATEGORY_LU:
        case UTF8PROC_CATEGORY_LL:
        case UTF8PROC_CATEGORY_LT:
        case UTF8PROC_CATEGORY_LM:
        case UTF8PROC_CATEGORY_LO:
        case UTF8PROC_CATEGORY_MN:
        case UTF8PROC_CATEGORY_MC:
        case UTF8PROC_CATEGORY_ME:
        case UTF8PROC_CATEGORY_ND:
        case UTF8PROC_CATEGORY_NL:
        case UTF8PROC_CATEGORY_PC:
            return true;
        default:
            // The joiners, and the circled and squared letters that Unicode calls alphabetic.
            return code_point == 0x200C || code_point == 0x200D ||
                   (code_point >= 0x24B6 && code_point <= 0x24E9) ||
                   (code_point >= 0x1F130 && code_point <= 0x1F149) ||
                   (code_point >= 0x1F150 && code_point <= 0x1F169) ||
                   (code_point >= 0x1F170 && code_point <= 0x1F189);
    }
}

std::string to_upper_utf8(std::string_view text) {
    return map_code_points(text, utf8proc_toupper);
}

std::string to_lower_utf8(std::string_view text) {
    return map_code_points(text, utf8proc_tolower);
}

std::string normalize_utf8(std::string_view text, NormalForm form) {
    const auto is_ascii = [](char c) { return static_cast<uint8_t>(c) < 0x80; };
    if (std::all_of(text.begin(), text.end(), is_ascii)) {
        return std::string(text);
    }
    int options = UTF8PROC_STABLE;
    const bool compose = form == NormalForm::kC || form == NormalForm::kKC;
    options |= compose ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
    if (form == NormalForm::kKC || form == NormalForm::kKD) {
        options |= UTF8PROC_COMPAT;
    }
    utf8proc_uint8_t* mapped = nullptr;
    const utf8proc_ssize_t length = utf8proc_map(
        reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
        static_cast<utf8proc_ssize_t>(text.size()),
        &mapped,
        static_cast<utf8proc_option_t>(options)
    );
    CHECK(length >= 0, "valid UTF-8 can always be normalised");
    std::string out(reinterpret_cast<const char*>(mapped), static_cast<size_t>(length));
    std::free(mapped);  // utf8proc allocates with malloc
    return out;
}

}  // namespace orbit
