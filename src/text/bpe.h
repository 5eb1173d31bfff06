// Byte-level BPE: the printable form of bytes, the vocabulary and the merges.
// Immutable once built, except for one relaxed atomic note per token (see encode); thread safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace orbit {

// Byte-level vocabularies are stored in a printable form: each byte is written as one code point.
// nullopt when `mapped` holds a code point that stands for no byte.
std::optional<std::string> unmap_bytes(std::string_view mapped);

// (left id, right id) -> (rank, merged id); open addressing.
class MergeTable {
  public:
    struct Entry {
        uint64_t key = kEmpty;
        int32_t rank = 0;
        int32_t merged = 0;
    };

    void reserve(size_t count);
    // A pair that is listed twice keeps its last rank, as in the tokenizers library.
    void put(int32_t left, int32_t right, int32_t rank, int32_t merged);
    const Entry* find(int32_t left, int32_t right) const;

  private:
    static constexpr uint64_t kEmpty = ~uint64_t{0};
    size_t slot(uint64_t key) const;
    void grow();

    std::vector<Entry> slots_;
    size_t used_ = 0;
};

class Bpe {
  public:
    void add_token(int32_t id, std::string_view mapped);
    void add_raw_token(int32_t id, std::string bytes);
    // Ids must have been added before. False when a part or the result is not in the vocabulary.
    bool add_merge(std::string_view left, std::string_view right);
    // tiktoken's rule instead of a list: the pair whose concatenation has the lowest id goes first.
    void merge_by_rank();
    // Call once after the last token and merge.
    void finish();

    void set_ignore_merges(bool value) { ignore_merges_ = value; }

    void set_unknown(int32_t id, bool fuse) {
        unknown_id_ = id;
        fuse_unknown_ = fuse;
    }

    int32_t id_of_mapped(std::string_view mapped) const;  // -1 when absent

    const std::vector<std::string>& bytes_of_ids() const { return bytes_; }

    bool is_defined(int32_t id) const {
        return id >= 0 && static_cast<size_t>(id) < defined_.size() &&
               defined_[static_cast<size_t>(id)];
    }

    uint64_t hash(uint64_t seed) const;

    // Appends the ids of one piece (raw bytes, not mapped). Bytes that the vocabulary lacks are
    // left out, or become the unknown token. O(n log n) in the length of the piece.
    void encode(std::string_view piece, std::vector<int32_t>& ids) const;

  private:
    void define(int32_t id, std::string bytes);
    void merge_piece(std::string_view piece, std::vector<int32_t>& ids) const;

    struct TextHash {
        using is_transparent = void;

        size_t operator()(std::string_view text) const {
            return std::hash<std::string_view>{}(text);
        }
    };

    using IdMap = std::unordered_map<std::string, int32_t, TextHash, std::equal_to<>>;

    IdMap ids_;                       // raw bytes -> id
    IdMap literal_ids_;               // tokens that are no mapped bytes
    std::vector<std::string> bytes_;  // by id
    std::vector<bool> defined_;
    std::vector<int32_t> byte_ids_ = std::vector<int32_t>(256, -1);
    MergeTable merges_;
    int32_t num_merges_ = 0;
    uint64_t merges_hash_ = 0;
    bool ignore_merges_ = false;
    int32_t unknown_id_ = -1;
    bool fuse_unknown_ = false;

    // 0: not known, 1: merging the token's bytes gives the token itself, 2: it does not. Most
    // pieces of real text are tokens, and this note saves merging them again.
    std::unique_ptr<std::atomic<uint8_t>[]> whole_;
};

}  // namespace orbit
