// Added tokens: literal texts that are cut out of the input before it is normalised and split.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace orbit {

struct AddedToken {
    std::string content;
    int32_t id = -1;
    bool special = false;
    bool normalized = false;   // matches the normalised text
    bool lstrip = false;       // swallows white space on its left
    bool rstrip = false;       // and on its right
    bool single_word = false;  // only where no word character touches it
};

// A stretch of the input: an added token, or text (id -1).
struct TokenSpan {
    size_t begin = 0;
    size_t end = 0;
    int32_t id = -1;
};

// Leftmost-longest search over a set of added tokens. Immutable; thread safe.
class AddedTokenSet {
  public:
    void add(const AddedToken& token);
    void finish();  // after the last add()

    bool empty() const { return tokens_.empty(); }

    std::vector<TokenSpan> split(std::string_view text) const;

  private:
    const AddedToken* longest_at(std::string_view text, size_t at) const;

    std::vector<AddedToken> tokens_;  // sorted by content
    std::vector<bool> first_byte_ = std::vector<bool>(256, false);
};

}  // namespace orbit
