// Cuts text into the pieces that BPE works in: the pre_tokenizer part of tokenizer.json.
// Immutable after construction; thread safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace orbit {

// GPT-2's pattern, which ByteLevel applies when use_regex is true.
extern const char* const kGpt2Pattern;

extern const char* const kKimiPattern;

struct TextRange {
    size_t begin = 0;
    size_t end = 0;
};

// Pattern syntax of tokenizer.json (Oniguruma, Ruby flavour) rewritten for PCRE2: `\s` and `\w` as
// tokenizers knows them, scripts without their extensions, `&&` inside classes, nested classes.
// UserError when a construct has no counterpart.
std::string translate_pattern(std::string_view pattern, const std::string& where);

// A compiled pattern. `where` (file and field) stands in messages.
class SplitPattern {
  public:
    SplitPattern(std::string_view pattern, bool literal, const std::string& where);
    ~SplitPattern();
    SplitPattern(SplitPattern&&) noexcept;
    SplitPattern& operator=(SplitPattern&&) noexcept;

    // All matches from left to right; `text` is valid UTF-8.
    std::vector<TextRange> find_all(std::string_view text) const;

  private:
    struct State;
    std::unique_ptr<State> state_;
};

enum class SplitBehavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };

class PreTokenizer {
  public:
    void add_split(SplitPattern pattern, SplitBehavior behavior, bool invert);
    void add_digits(bool individual);
    void add_prefix_space();

    // The pieces of `text` (valid UTF-8), in order and never empty; they point into `text`, which
    // changes when a prefix space is added.
    std::vector<TextRange> cut(std::string& text) const;

  private:
    enum class Kind { kSplit, kDigits, kPrefixSpace };

    struct Step {
        Kind kind = Kind::kSplit;
        std::unique_ptr<SplitPattern> pattern;
        SplitBehavior behavior = SplitBehavior::kIsolated;
        bool invert = false;  // of kSplit: swap matches and gaps; of kDigits: each digit alone
    };

    std::vector<Step> steps_;
};

}  // namespace orbit
