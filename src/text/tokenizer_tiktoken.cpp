// tiktoken.model of Kimi-K2 -> Tokenizer.
#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"
#include "text/tokenizer.h"
#include "text/tokenizer_parts.h"

namespace orbit {

namespace {

constexpr int32_t kNumReserved = 256;    // special ids after the last rank
constexpr size_t kMaxTokenBytes = 1024;  // each cut of a token is tried as a merge
constexpr size_t kMaxFileBytes = size_t{64} << 20;

std::optional<std::string> decode_base64(std::string_view text) {
    constexpr std::string_view kDigits =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    while (text.ends_with('=')) {
        text.remove_suffix(1);
    }
    std::string out;
    uint32_t bits = 0;
    int num_bits = 0;
    for (const char c : text) {
        const size_t digit = kDigits.find(c);
        if (digit == std::string_view::npos) {
            return std::nullopt;
        }
        bits = ((bits << 6) | static_cast<uint32_t>(digit)) & 0xFFFFFu;
        num_bits += 6;
        if (num_bits >= 8) {
            num_bits -= 8;
            out.push_back(static_cast<char>((bits >> num_bits) & 0xFFu));
        }
    }
    return out;
}

struct RankLine {
    std::string bytes;
    int32_t rank = -1;
};

std::optional<RankLine> parse_line(std::string_view line) {
    const size_t space = line.find(' ');
    if (space == std::string_view::npos) {
        return std::nullopt;
    }
    std::optional<std::string> bytes = decode_base64(line.substr(0, space));
    const std::string_view number = line.substr(space + 1);
    RankLine out;
    const auto result = std::from_chars(number.data(), number.data() + number.size(), out.rank);
    if (!bytes || bytes->empty() || bytes->size() > kMaxTokenBytes || result.ec != std::errc() ||
        result.ptr != number.data() + number.size() || out.rank < 0) {
        return std::nullopt;
    }
    out.bytes = std::move(*bytes);
    return out;
}

// Returns the first id after the ranks.
int32_t read_ranks(std::string_view ranks, const std::string& file_name, Bpe& bpe) {
    const auto num_lines = static_cast<size_t>(std::count(ranks.begin(), ranks.end(), '\n')) + 1;
    const int32_t largest = largest_allowed_id(num_lines);
    int32_t next = 0;
    for (size_t line = 1; !ranks.empty(); ++line) {
        const size_t end = std::min(ranks.find('\n'), ranks.size());
        std::string_view text = ranks.substr(0, end);
        ranks.remove_prefix(std::min(end + 1, ranks.size()));
        if (text.ends_with('\r')) {
            text.remove_suffix(1);
        }
        if (text.empty()) {
            continue;
        }
        std::optional<RankLine> parsed = parse_line(text);
        USER_CHECK(
            parsed && parsed->rank <= largest && !bpe.is_defined(parsed->rank),
            "{}: line {} is not \"base64 rank\" with a rank of its own; download the file again.",
            file_name,
            line
        );
        next = std::max(next, parsed->rank + 1);
        bpe.add_raw_token(parsed->rank, std::move(parsed->bytes));
    }
    USER_CHECK(next > 0, "{}: the file has no tokens; download it again.", file_name);
    return next;
}

// Content of the special token `id` in added_tokens_decoder; unnamed ones are reserved.
AddedToken special_token(const nlohmann::json& decoder, int32_t id) {
    AddedToken token;
    token.id = id;
    token.special = true;
    token.content = fmt::format("<|reserved_token_{}|>", id);
    const auto entry = decoder.find(std::to_string(id));
    if (entry != decoder.end() && entry->is_object()) {
        const auto content = entry->find("content");
        if (content != entry->end() && content->is_string()) {
            token.content = content->get<std::string>();
        }
        const auto special = entry->find("special");
        token.special = special == entry->end() || *special != nlohmann::json(false);
    }
    return token;
}

}  // namespace

Tokenizer Tokenizer::from_tiktoken(
    std::string_view ranks, std::string_view config_json, const std::string& file_name
) {
    USER_CHECK(
        ranks.size() <= kMaxFileBytes,
        "{}: {} bytes are too many for a tiktoken file.",
        file_name,
        ranks.size()
    );
    const auto config = nlohmann::json::parse(config_json, nullptr, false);
    USER_CHECK(
        config.is_object() && config.contains("added_tokens_decoder") &&
            config["added_tokens_decoder"].is_object(),
        "{}: the tokenizer_config.json beside it has no \"added_tokens_decoder\"; download it too.",
        file_name
    );
    auto state = std::make_unique<State>();
    TokenizerParts& parts = state->parts;
    const int32_t first_special = read_ranks(ranks, file_name, parts.bpe);
    for (int32_t id = first_special; id < first_special + kNumReserved; ++id) {
        parts.added.push_back(special_token(config["added_tokens_decoder"], id));
    }
    parts.bpe.merge_by_rank();
    parts.bpe.set_ignore_merges(true);
    parts.pre_tokenizer.add_split(
        SplitPattern(kKimiPattern, false, file_name), SplitBehavior::kIsolated, false
    );
    parts.split_description = "tiktoken kimi-k2";
    parts.finish(file_name);
    return Tokenizer(std::move(state));
}

}  // namespace orbit
