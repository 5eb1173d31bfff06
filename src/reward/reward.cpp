#include "reward/reward.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <optional>

#include "base/error.h"
#include "reward/command.h"
#include "text/utf8.h"

namespace orbit {
namespace {

constexpr std::array<const char*, 5> kNames = {"exact", "number", "regex", "format", "length"};
constexpr const char* kThinkAnswer = R"(^<think>.*?</think>\s*<answer>.*?</answer>$)";
constexpr uint32_t kMatchLimit = 1000000;  // steps, so that no response can hang a run
constexpr size_t kNumberBytesMax = 500;

std::string_view stripped(std::string_view text) {
    constexpr const char* kSpace = " \t\r\n\v\f";
    const size_t first = text.find_first_not_of(kSpace);
    if (first == std::string_view::npos) {
        return {};
    }
    return text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

// What follows the last marker, stripped; everything when the marker is empty or `optional`.
std::optional<std::string_view> after_marker(
    std::string_view text, const std::string& marker, bool optional
) {
    const size_t at = marker.empty() ? std::string_view::npos : text.rfind(marker);
    if (at == std::string_view::npos) {
        return marker.empty() || optional ? std::optional(stripped(text)) : std::nullopt;
    }
    return stripped(text.substr(at + marker.size()));
}

// A decimal number in one written form: no sign +, no leading zeros, no zeros at the end of a
// fraction, no thousands commas, no leading $. Empty when the text is no such number.
std::string canonical_number(std::string_view text) {
    if (text.size() > kNumberBytesMax) {
        return "";
    }
    bool negative = false;
    if (text.starts_with('-') || text.starts_with('+')) {
        negative = text.front() == '-';
        text.remove_prefix(1);
    }
    if (text.starts_with('$')) {
        text.remove_prefix(1);
    }
    const size_t dot = std::min(text.find('.'), text.size());
    const std::string_view whole = text.substr(0, dot);
    const std::string_view fraction = dot < text.size() ? text.substr(dot + 1) : "";
    const auto is_digit = [](char c) { return c >= '0' && c <= '9'; };
    std::string digits;
    const bool grouped = whole.find(',') != std::string_view::npos;
    for (size_t i = 0; i < whole.size(); ++i) {
        const bool comma_place = (whole.size() - i) % 4 == 0;
        if (grouped && comma_place && i > 0 ? whole[i] != ',' : !is_digit(whole[i])) {
            return "";
        }
        if (whole[i] != ',') {
            digits += whole[i];
        }
    }
    if (!std::all_of(fraction.begin(), fraction.end(), is_digit) ||
        (digits.empty() && fraction.empty())) {
        return "";
    }
    digits.erase(0, std::min(digits.find_first_not_of('0'), digits.size()));
    const size_t last = fraction.find_last_not_of('0');
    std::string result = digits.empty() ? "0" : digits;
    if (last != std::string_view::npos) {
        result += "." + std::string(fraction.substr(0, last + 1));
    }
    return negative && result != "0" ? "-" + result : result;
}

// A compiled pattern. Strings that are not UTF-8 match nothing at their bad places, no error.
class Pattern {
  public:
    explicit Pattern(const std::string& text, uint32_t flags) {
        int error = 0;
        PCRE2_SIZE where = 0;
        code_ = pcre2_compile(
            reinterpret_cast<PCRE2_SPTR>(text.data()),
            text.size(),
            PCRE2_UTF | PCRE2_MATCH_INVALID_UTF | PCRE2_NEVER_BACKSLASH_C | flags,
            &error,
            &where,
            nullptr
        );
        std::array<PCRE2_UCHAR, 200> message{};
        if (code_ == nullptr) {
            pcre2_get_error_message(error, message.data(), message.size());
        }
        USER_CHECK(
            code_ != nullptr,
            "reward.pattern = \"{}\" is no valid regular expression: {} (at character {}).",
            text,
            reinterpret_cast<const char*>(message.data()),
            where
        );
        data_ = pcre2_match_data_create_from_pattern(code_, nullptr);
        context_ = pcre2_match_context_create(nullptr);
        CHECK(data_ != nullptr && context_ != nullptr);
        pcre2_set_match_limit(context_, kMatchLimit);
        uint32_t groups = 0;
        pcre2_pattern_info(code_, PCRE2_INFO_CAPTURECOUNT, &groups);
        has_group_ = groups > 0;
    }

    ~Pattern() {
        pcre2_match_context_free(context_);
        pcre2_match_data_free(data_);
        pcre2_code_free(code_);
    }

    Pattern(const Pattern&) = delete;
    Pattern& operator=(const Pattern&) = delete;

    bool has_group() const { return has_group_; }

    enum class Result : uint8_t { kMatch, kNoMatch, kTooSlow };

    // The last match; `group` is group 1, or the whole match when the pattern has no group.
    Result find_last(std::string_view text, std::string_view& group) {
        Result result = Result::kNoMatch;
        size_t at = 0;
        while (at <= text.size()) {
            const int rc = pcre2_match(
                code_,
                reinterpret_cast<PCRE2_SPTR>(text.data()),
                text.size(),
                at,
                0,
                data_,
                context_
            );
            if (rc == PCRE2_ERROR_NOMATCH) {
                break;
            }
            if (rc < 0) {
                return Result::kTooSlow;
            }
            const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(data_);
            const size_t first = has_group_ ? 2 : 0;
            const bool set = offsets[first] != PCRE2_UNSET && offsets[first] <= offsets[first + 1];
            group = set ? text.substr(offsets[first], offsets[first + 1] - offsets[first]) : "";
            result = Result::kMatch;
            at = offsets[1] > at ? offsets[1] : at + 1;
        }
        return result;
    }

  private:
    pcre2_code* code_ = nullptr;
    pcre2_match_data* data_ = nullptr;
    pcre2_match_context* context_ = nullptr;
    bool has_group_ = false;
};

std::string shown(std::string_view text) {
    constexpr size_t kShown = 60;
    const std::string start = replace_invalid_utf8(text.substr(0, kShown));
    return fmt::format("\"{}\"{}", start, text.size() > kShown ? "..." : "");
}

Score scored(double value, std::string reason) {
    Score score;
    score.value = value;
    score.reason = std::move(reason);
    return score;
}

Score score_exact(const RewardOptions& options, const RewardJob& job) {
    const auto found = after_marker(job.response, options.marker, false);
    if (!found) {
        return scored(0, fmt::format("no {} in the response", options.marker));
    }
    const std::string_view gold = *after_marker(job.example->answer, options.marker, true);
    const bool equal = *found == gold;
    return scored(
        equal ? 1 : 0,
        equal ? fmt::format("{} is right", shown(*found))
              : fmt::format("{} is not {}", shown(*found), shown(gold))
    );
}

Score score_number(const RewardOptions& options, const RewardJob& job) {
    const auto found = after_marker(job.response, options.marker, false);
    if (!found) {
        return scored(0, fmt::format("no {} in the response", options.marker));
    }
    const std::string_view gold_text = *after_marker(job.example->answer, options.marker, true);
    const std::string gold = canonical_number(gold_text);
    if (gold.empty()) {
        Score score = scored(0, fmt::format("the answer {} is no number", shown(gold_text)));
        score.status = ScoreStatus::kBadOutput;
        return score;
    }
    const std::string number = canonical_number(*found);
    if (number.empty()) {
        return scored(0, fmt::format("{} is no number", shown(*found)));
    }
    const bool equal = number == gold;
    return scored(
        equal ? 1 : 0, fmt::format("{} is {} {}", number, equal ? "the right" : "not", gold)
    );
}

Score too_slow() {
    Score score = scored(0, "reward.pattern takes too many steps on this response");
    score.status = ScoreStatus::kBadOutput;
    return score;
}

Score score_regex(Pattern& pattern, const RewardJob& job) {
    std::string_view group;
    const auto result = pattern.find_last(job.response, group);
    if (result == Pattern::Result::kTooSlow) {
        return too_slow();
    }
    if (result == Pattern::Result::kNoMatch) {
        return scored(0, "the pattern does not match");
    }
    if (!pattern.has_group()) {
        return scored(1, "the pattern matches");
    }
    const std::string_view gold = stripped(job.example->answer);
    const bool equal = stripped(group) == gold;
    return scored(
        equal ? 1 : 0,
        equal ? fmt::format("{} is right", shown(group))
              : fmt::format("{} is not {}", shown(group), shown(gold))
    );
}

int64_t count_of(std::string_view text, std::string_view part) {
    int64_t count = 0;
    for (size_t at = text.find(part); at != std::string_view::npos; at = text.find(part, at + 1)) {
        ++count;
    }
    return count;
}

Score score_format(Pattern& pattern, bool built_in, const RewardJob& job) {
    const std::string_view text = stripped(job.response);
    std::string_view group;
    const auto result = pattern.find_last(text, group);
    if (result == Pattern::Result::kTooSlow) {
        return too_slow();
    }
    bool good = result == Pattern::Result::kMatch;
    for (const char* tag : {"<think>", "</think>", "<answer>", "</answer>"}) {
        good = good && (!built_in || count_of(text, tag) == 1);
    }
    return scored(good ? 1 : 0, good ? "the format is right" : "the format is wrong");
}

void check_name(const RewardOptions& options) {
    const bool known = std::any_of(kNames.begin(), kNames.end(), [&](const char* name) {
        return options.name == name;
    });
    const std::string nearest = nearest_name(options.name, kNames);
    USER_CHECK(
        known,
        "reward.name = \"{}\" is unknown{}; it is one of exact, number, regex, format, length.",
        options.name,
        nearest.empty() ? "" : fmt::format(" (did you mean \"{}\"?)", nearest)
    );
    USER_CHECK(
        options.name != "regex" || !options.pattern.empty(),
        "reward.name = \"regex\" needs reward.pattern: group 1 of its last match is compared with "
        "the answer."
    );
    USER_CHECK(
        options.name != "length" || options.length_penalty > 0,
        "reward.name = \"length\" needs reward.length_penalty above 0."
    );
}

}  // namespace

struct Reward::State {
    RewardOptions options;
    std::unique_ptr<Pattern> pattern;
    std::unique_ptr<CommandReward> command;

    Score score_built_in(const RewardJob& job) {
        if (options.name == "exact") {
            return score_exact(options, job);
        }
        if (options.name == "number") {
            return score_number(options, job);
        }
        if (options.name == "regex") {
            return score_regex(*pattern, job);
        }
        if (options.name == "format") {
            return score_format(*pattern, options.pattern.empty(), job);
        }
        return scored(0, "length only");
    }

    // Takes the length penalty off and names the parts when there is more than one.
    void finish(const RewardJob& job, Score& score) const {
        if (score.status != ScoreStatus::kScored || options.length_penalty == 0) {
            return;
        }
        const int64_t over =
            std::max<int64_t>(0, job.response_tokens - std::max<int64_t>(0, options.length_target));
        const double penalty = -options.length_penalty * static_cast<double>(over);
        if (command != nullptr || options.name != "length") {
            score.parts.push_back({command != nullptr ? "command" : options.name, score.value});
        }
        score.parts.push_back({"length", penalty});
        score.value += penalty;
        if (over > 0) {
            score.reason += fmt::format("; {} tokens over {}", over, options.length_target);
        }
    }
};

Reward::Reward(const RewardOptions& options) : state_(std::make_unique<State>()) {
    state_->options = options;
    if (!options.command.empty()) {
        state_->command = std::make_unique<CommandReward>(
            options.command, std::max<int64_t>(1, options.workers), options.timeout_s
        );
        return;
    }
    check_name(options);
    if (options.name == "regex") {
        state_->pattern = std::make_unique<Pattern>(options.pattern, 0);
    } else if (options.name == "format") {
        state_->pattern = options.pattern.empty()
                              ? std::make_unique<Pattern>(kThinkAnswer, PCRE2_DOTALL)
                              : std::make_unique<Pattern>(options.pattern, 0);
    }
}

Reward::~Reward() = default;

Reward::Reward(Reward&&) noexcept = default;

std::vector<Score> Reward::score(std::span<const RewardJob> jobs) {
    std::vector<Score> scores;
    if (state_->command != nullptr) {
        scores = state_->command->score(jobs);
    } else {
        for (const RewardJob& job : jobs) {
            scores.push_back(state_->score_built_in(job));
        }
    }
    for (size_t i = 0; i < jobs.size(); ++i) {
        state_->finish(jobs[i], scores[i]);
    }
    return scores;
}

}  // namespace orbit
