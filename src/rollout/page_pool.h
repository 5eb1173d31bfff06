// PagePool: reference-counted KV pages with a prefix cache over full pages. Entries are keyed by
// adapter version, so base and adapter never mix. A cached page that nobody else uses is evicted,
// oldest use first, when a page is needed.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "ops/batch.h"

namespace orbit {

class PagePool {
  public:
    explicit PagePool(int64_t num_pages);

    int64_t num_available() const;  // free, or cached and otherwise unused
    int32_t take();                 // one page with one reference; CHECKs that one is available
    void retain(int32_t page);
    void release(int32_t page);

    // The longest run of cached full pages at the start of `ids`, at most `max_pages`; each gets
    // one more reference.
    std::vector<int32_t> match(int64_t version, std::span<const int32_t> ids, int64_t max_pages);
    // Offers the full pages of `ids` to the cache (pages already cached are left alone).
    void insert(int64_t version, std::span<const int32_t> ids, std::span<const int32_t> pages);

  private:
    struct Entry {
        uint64_t parent;  // key of the page before; the version's seed for the first
        std::array<int32_t, kPageTokens> ids;  // compared on a hit: equal hashes are not enough
        int32_t page;
        uint64_t used;  // clock of the last hit
    };

    uint64_t key_of(uint64_t parent, std::span<const int32_t> ids) const;
    bool evict_one();

    std::vector<int32_t> references_;
    std::vector<int32_t> free_;
    std::unordered_map<uint64_t, Entry> cache_;
    uint64_t clock_ = 0;
};

}  // namespace orbit
