#include "text/pretokenizer.h"

#include <utility>

#include "base/error.h"
#include "text/utf8.h"

namespace orbit {

namespace {

struct Part {
    TextRange range;
    bool match = false;
};

// Matches and the gaps between them, in order; `offset` is where `text` begins.
std::vector<Part> parts_of(const std::vector<TextRange>& matches, size_t size) {
    std::vector<Part> parts;
    size_t at = 0;
    for (const TextRange& match : matches) {
        if (at < match.begin) {
            parts.push_back({{at, match.begin}, false});
        }
        parts.push_back({match, true});
        at = match.end;
    }
    if (at < size) {
        parts.push_back({{at, size}, false});
    }
    return parts;
}

void push_range(std::vector<TextRange>& out, TextRange range) {
    if (range.begin < range.end) {
        out.push_back(range);
    }
}

std::vector<TextRange> merge_with_previous(const std::vector<Part>& parts) {
    std::vector<TextRange> out;
    bool previous_match = false;
    for (const Part& part : parts) {
        if (part.match && !previous_match && !out.empty()) {
            out.back().end = part.range.end;
        } else {
            out.push_back(part.range);
        }
        previous_match = part.match;
    }
    return out;
}

std::vector<TextRange> merge_with_next(const std::vector<Part>& parts) {
    std::vector<TextRange> out;
    bool next_match = false;
    for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
        if (part->match && !next_match && !out.empty()) {
            out.back().begin = part->range.begin;
        } else {
            out.push_back(part->range);
        }
        next_match = part->match;
    }
    return {out.rbegin(), out.rend()};
}

std::vector<TextRange> apply_behavior(const std::vector<Part>& parts, SplitBehavior behavior) {
    std::vector<TextRange> out;
    switch (behavior) {
        case SplitBehavior::kIsolated:
            for (const Part& part : parts) {
                push_range(out, part.range);
            }
            return out;
        case SplitBehavior::kRemoved:
            for (const Part& part : parts) {
                if (!part.match) {
                    push_range(out, part.range);
                }
            }
            return out;
        case SplitBehavior::kContiguous:
            for (size_t i = 0; i < parts.size(); ++i) {
                if (i > 0 && parts[i].match == parts[i - 1].match) {
                    out.back().end = parts[i].range.end;
                } else {
                    out.push_back(parts[i].range);
                }
            }
            break;
        case SplitBehavior::kMergedWithPrevious:
            out = merge_with_previous(parts);
            break;
        case SplitBehavior::kMergedWithNext:
            out = merge_with_next(parts);
            break;
    }
    std::erase_if(out, [](const TextRange& range) { return range.begin >= range.end; });
    return out;
}

std::vector<TextRange> digit_matches(std::string_view text) {
    std::vector<TextRange> matches;
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = utf8_step(text, at);
        if (is_unicode_numeric(step.code_point)) {
            matches.push_back({at, at + step.bytes});
        }
        at += step.bytes;
    }
    return matches;
}

// Puts a space before each piece that does not begin with one.
std::vector<TextRange> prefix_spaces(std::string& text, const std::vector<TextRange>& pieces) {
    std::string spaced;
    spaced.reserve(text.size() + pieces.size());
    std::vector<TextRange> out;
    out.reserve(pieces.size());
    for (const TextRange& piece : pieces) {
        const size_t begin = spaced.size();
        if (text[piece.begin] != ' ') {
            spaced += ' ';
        }
        spaced.append(text, piece.begin, piece.end - piece.begin);
        out.push_back({begin, spaced.size()});
    }
    text = std::move(spaced);
    return out;
}

}  // namespace

void PreTokenizer::add_split(SplitPattern pattern, SplitBehavior behavior, bool invert) {
    steps_.push_back(
        {Kind::kSplit, std::make_unique<SplitPattern>(std::move(pattern)), behavior, invert}
    );
}

void PreTokenizer::add_digits(bool individual) {
    steps_.push_back({Kind::kDigits, nullptr, SplitBehavior::kIsolated, individual});
}

void PreTokenizer::add_prefix_space() {
    steps_.push_back({Kind::kPrefixSpace, nullptr, SplitBehavior::kIsolated, false});
}

std::vector<TextRange> PreTokenizer::cut(std::string& text) const {
    std::vector<TextRange> pieces;
    push_range(pieces, {0, text.size()});
    for (const Step& step : steps_) {
        if (step.kind == Kind::kPrefixSpace) {
            pieces = prefix_spaces(text, pieces);
            continue;
        }
        std::vector<TextRange> next;
        next.reserve(pieces.size());
        for (const TextRange& piece : pieces) {
            const auto part = std::string_view(text).substr(piece.begin, piece.end - piece.begin);
            const bool digits = step.kind == Kind::kDigits;
            const std::vector<TextRange> matches =
                digits ? digit_matches(part) : step.pattern->find_all(part);
            std::vector<Part> parts = parts_of(matches, part.size());
            if (!digits && step.invert) {
                for (Part& each : parts) {
                    each.match = !each.match;
                }
            }
            const bool runs = digits && !step.invert;
            for (const TextRange& range :
                 apply_behavior(parts, runs ? SplitBehavior::kContiguous : step.behavior)) {
                next.push_back({piece.begin + range.begin, piece.begin + range.end});
            }
        }
        pieces = std::move(next);
    }
    return pieces;
}

}  // namespace orbit
