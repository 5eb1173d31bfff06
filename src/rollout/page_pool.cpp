#include "rollout/page_pool.h"

#include <algorithm>

#include "base/error.h"
#include "base/hash.h"

namespace orbit {
namespace {

uint64_t version_seed(int64_t version) {
    return hash64(&version, sizeof version, 0x6f72626974ull);
}

std::span<const int32_t> page_of(std::span<const int32_t> ids, int64_t index) {
    return ids.subspan(static_cast<size_t>(index) * kPageTokens, kPageTokens);
}

}  // namespace

PagePool::PagePool(int64_t num_pages) : references_(static_cast<size_t>(num_pages), 0) {
    for (int64_t page = num_pages - 1; page >= 0; --page) {
        free_.push_back(static_cast<int32_t>(page));
    }
}

uint64_t PagePool::key_of(uint64_t parent, std::span<const int32_t> ids) const {
    return hash64(ids.data(), ids.size_bytes(), parent);
}

int64_t PagePool::num_available() const {
    int64_t available = static_cast<int64_t>(free_.size());
    for (const auto& [key, entry] : cache_) {
        available += references_[static_cast<size_t>(entry.page)] == 1 ? 1 : 0;
    }
    return available;
}

bool PagePool::evict_one() {
    auto oldest = cache_.end();
    for (auto it = cache_.begin(); it != cache_.end(); ++it) {
        if (references_[static_cast<size_t>(it->second.page)] == 1 &&
            (oldest == cache_.end() || it->second.used < oldest->second.used)) {
            oldest = it;
        }
    }
    if (oldest == cache_.end()) {
        return false;
    }
    const int32_t page = oldest->second.page;
    cache_.erase(oldest);
    release(page);
    return true;
}

int32_t PagePool::take() {
    if (free_.empty()) {
        CHECK(evict_one(), "(a page was promised at admission)");
    }
    const int32_t page = free_.back();
    free_.pop_back();
    CHECK_EQ(references_[static_cast<size_t>(page)], 0);
    references_[static_cast<size_t>(page)] = 1;
    return page;
}

void PagePool::retain(int32_t page) {
    CHECK_GT(references_[static_cast<size_t>(page)], 0);
    ++references_[static_cast<size_t>(page)];
}

void PagePool::release(int32_t page) {
    CHECK_GT(references_[static_cast<size_t>(page)], 0);
    if (--references_[static_cast<size_t>(page)] == 0) {
        free_.push_back(page);
    }
}

std::vector<int32_t> PagePool::match(
    int64_t version, std::span<const int32_t> ids, int64_t max_pages
) {
    std::vector<int32_t> pages;
    uint64_t parent = version_seed(version);
    const int64_t full =
        std::min<int64_t>(max_pages, static_cast<int64_t>(ids.size()) / kPageTokens);
    for (int64_t i = 0; i < full; ++i) {
        const auto tokens = page_of(ids, i);
        const uint64_t key = key_of(parent, tokens);
        const auto found = cache_.find(key);
        if (found == cache_.end() || found->second.parent != parent ||
            !std::equal(tokens.begin(), tokens.end(), found->second.ids.begin())) {
            break;
        }
        found->second.used = ++clock_;
        retain(found->second.page);
        pages.push_back(found->second.page);
        parent = key;
    }
    return pages;
}

void PagePool::insert(
    int64_t version, std::span<const int32_t> ids, std::span<const int32_t> pages
) {
    uint64_t parent = version_seed(version);
    for (int64_t i = 0; i < static_cast<int64_t>(ids.size()) / kPageTokens; ++i) {
        const auto tokens = page_of(ids, i);
        const uint64_t key = key_of(parent, tokens);
        if (cache_.find(key) == cache_.end()) {
            Entry entry{parent, {}, pages[static_cast<size_t>(i)], ++clock_};
            std::copy(tokens.begin(), tokens.end(), entry.ids.begin());
            retain(entry.page);
            cache_.emplace(key, entry);
        }
        parent = key;
    }
}

}  // namespace orbit
