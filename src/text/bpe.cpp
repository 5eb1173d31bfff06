#include "text/bpe.h"

#include <array>
#include <queue>

#include "base/error.h"
#include "base/hash.h"
#include "text/utf8.h"

namespace orbit {

namespace {

constexpr uint32_t kMappedEnd = 0x144;  // 256 + 68 bytes that are not printable

// Code point of the printable form -> byte, or -1.
std::array<int16_t, kMappedEnd> make_byte_of_code_point() {
    std::array<int16_t, kMappedEnd> table{};
    table.fill(-1);
    uint32_t next = 256;
    for (int16_t byte = 0; byte < 256; ++byte) {
        const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) ||
                               (byte >= 174 && byte <= 255);
        table[printable ? static_cast<uint32_t>(byte) : next++] = byte;
    }
    return table;
}

uint64_t pair_key(int32_t left, int32_t right) {
    return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) |
           static_cast<uint32_t>(right);
}

struct Symbol {
    int32_t id;
    int32_t previous;
    int32_t next;
    bool alive;
};

struct Candidate {
    int32_t rank;
    int32_t position;
    int32_t merged;

    // The queue's top is the lowest rank, and the leftmost of those.
    bool operator<(const Candidate& other) const {
        return rank != other.rank ? rank > other.rank : position > other.position;
    }
};

}  // namespace

std::optional<std::string> unmap_bytes(std::string_view mapped) {
    static const std::array<int16_t, kMappedEnd> table = make_byte_of_code_point();
    std::string out;
    out.reserve(mapped.size());
    for (size_t at = 0; at < mapped.size();) {
        const Utf8Step step = utf8_step(mapped, at);
        if (!step.valid || step.code_point >= kMappedEnd || table[step.code_point] < 0) {
            return std::nullopt;
        }
        out.push_back(static_cast<char>(table[step.code_point]));
        at += step.bytes;
    }
    return out;
}

size_t MergeTable::slot(uint64_t key) const {
    const uint64_t mixed = (key ^ (key >> 29)) * 0x9E3779B97F4A7C15u;
    return static_cast<size_t>(mixed >> 20) & (slots_.size() - 1);
}

void MergeTable::reserve(size_t count) {
    size_t size = 16;
    while (size < 2 * count) {
        size *= 2;
    }
    std::vector<Entry> old(size);
    old.swap(slots_);
    used_ = 0;
    for (const Entry& entry : old) {
        if (entry.key != kEmpty) {
            put(static_cast<int32_t>(entry.key >> 32),
                static_cast<int32_t>(entry.key & 0xFFFFFFFFu),
                entry.rank,
                entry.merged);
        }
    }
}

void MergeTable::put(int32_t left, int32_t right, int32_t rank, int32_t merged) {
    if (2 * (used_ + 1) > slots_.size()) {
        reserve(used_ + 1 + used_);
    }
    const uint64_t key = pair_key(left, right);
    size_t at = slot(key);
    while (slots_[at].key != kEmpty && slots_[at].key != key) {
        at = (at + 1) & (slots_.size() - 1);
    }
    used_ += slots_[at].key == kEmpty ? 1 : 0;
    slots_[at] = {key, rank, merged};
}

const MergeTable::Entry* MergeTable::find(int32_t left, int32_t right) const {
    if (slots_.empty()) {
        return nullptr;
    }
    const uint64_t key = pair_key(left, right);
    for (size_t at = slot(key); slots_[at].key != kEmpty; at = (at + 1) & (slots_.size() - 1)) {
        if (slots_[at].key == key) {
            return &slots_[at];
        }
    }
    return nullptr;
}

void Bpe::define(int32_t id, std::string bytes) {
    CHECK_GE(id, 0);
    const auto index = static_cast<size_t>(id);
    if (index >= bytes_.size()) {
        bytes_.resize(index + 1);
        defined_.resize(index + 1, false);
    }
    bytes_[index] = std::move(bytes);
    defined_[index] = true;
}

void Bpe::add_token(int32_t id, std::string_view mapped) {
    std::optional<std::string> raw = unmap_bytes(mapped);
    if (raw) {
        add_raw_token(id, std::move(*raw));
        return;
    }
    literal_ids_.insert_or_assign(std::string(mapped), id);
    define(id, std::string(mapped));
}

void Bpe::add_raw_token(int32_t id, std::string bytes) {
    ids_.insert_or_assign(bytes, id);
    if (bytes.size() == 1) {
        byte_ids_[static_cast<uint8_t>(bytes[0])] = id;
    }
    define(id, std::move(bytes));
}

int32_t Bpe::id_of_mapped(std::string_view mapped) const {
    if (const std::optional<std::string> raw = unmap_bytes(mapped)) {
        const auto it = ids_.find(*raw);
        return it == ids_.end() ? -1 : it->second;
    }
    const auto it = literal_ids_.find(mapped);
    return it == literal_ids_.end() ? -1 : it->second;
}

bool Bpe::add_merge(std::string_view left, std::string_view right) {
    const int32_t left_id = id_of_mapped(left);
    const int32_t right_id = id_of_mapped(right);
    std::string joined(left);
    joined += right;
    const int32_t merged = id_of_mapped(joined);
    if (left_id < 0 || right_id < 0 || merged < 0) {
        return false;
    }
    merges_.put(left_id, right_id, num_merges_++, merged);
    const std::array<int32_t, 3> ids = {left_id, right_id, merged};
    merges_hash_ = hash64(ids.data(), sizeof(ids), merges_hash_);
    return true;
}

void Bpe::merge_by_rank() {
    for (const auto& [bytes, id] : ids_) {
        const std::string_view text = bytes;
        for (size_t cut = 1; cut < text.size(); ++cut) {
            const auto left = ids_.find(text.substr(0, cut));
            const auto right = ids_.find(text.substr(cut));
            if (left != ids_.end() && right != ids_.end()) {
                merges_.put(left->second, right->second, id, id);
            }
        }
    }
}

void Bpe::finish() {
    whole_ = std::make_unique<std::atomic<uint8_t>[]>(bytes_.size());
}

uint64_t Bpe::hash(uint64_t seed) const {
    uint64_t hash = hash64(&merges_hash_, sizeof(merges_hash_), seed);
    for (size_t id = 0; id < bytes_.size(); ++id) {
        if (defined_[id]) {
            hash = hash64(bytes_[id].data(), bytes_[id].size(), hash + id);
        }
    }
    const std::array<int32_t, 3> settings = {
        ignore_merges_ ? 1 : 0, unknown_id_, fuse_unknown_ ? 1 : 0};
    return hash64(settings.data(), sizeof(settings), hash);
}

void Bpe::encode(std::string_view piece, std::vector<int32_t>& ids) const {
    CHECK(whole_ != nullptr || bytes_.empty(), "finish() comes first");
    const auto it = ids_.find(piece);
    if (it == ids_.end()) {
        merge_piece(piece, ids);
        return;
    }
    if (ignore_merges_) {
        ids.push_back(it->second);
        return;
    }
    std::atomic<uint8_t>& note = whole_[static_cast<size_t>(it->second)];
    if (note.load(std::memory_order_relaxed) == 1) {
        ids.push_back(it->second);
        return;
    }
    const size_t before = ids.size();
    merge_piece(piece, ids);
    const bool whole = ids.size() == before + 1 && ids.back() == it->second;
    note.store(whole ? 1 : 2, std::memory_order_relaxed);
}

void Bpe::merge_piece(std::string_view piece, std::vector<int32_t>& ids) const {
    std::vector<Symbol> symbols;
    symbols.reserve(piece.size());
    for (const char c : piece) {
        int32_t id = byte_ids_[static_cast<uint8_t>(c)];
        if (id < 0) {
            const bool fused =
                fuse_unknown_ && !symbols.empty() && symbols.back().id == unknown_id_;
            if (unknown_id_ < 0 || fused) {
                continue;
            }
            id = unknown_id_;
        }
        const auto position = static_cast<int32_t>(symbols.size());
        symbols.push_back({id, position - 1, position + 1, true});
    }
    if (symbols.empty()) {
        return;
    }
    symbols.back().next = -1;

    std::priority_queue<Candidate> queue;
    const auto propose = [&](int32_t left) {
        const int32_t right = left < 0 ? -1 : symbols[static_cast<size_t>(left)].next;
        if (right < 0) {
            return;
        }
        const auto* entry = merges_.find(
            symbols[static_cast<size_t>(left)].id, symbols[static_cast<size_t>(right)].id
        );
        if (entry != nullptr) {
            queue.push({entry->rank, left, entry->merged});
        }
    };
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
        propose(static_cast<int32_t>(i));
    }
    while (!queue.empty()) {
        const Candidate top = queue.top();
        queue.pop();
        Symbol& left = symbols[static_cast<size_t>(top.position)];
        if (!left.alive || left.next < 0) {
            continue;
        }
        Symbol& right = symbols[static_cast<size_t>(left.next)];
        // An earlier merge may have changed this pair since it was proposed.
        const auto* entry = merges_.find(left.id, right.id);
        if (entry == nullptr || entry->merged != top.merged || entry->rank != top.rank) {
            continue;
        }
        left.id = top.merged;
        right.alive = false;
        left.next = right.next;
        if (right.next >= 0) {
            symbols[static_cast<size_t>(right.next)].previous = top.position;
        }
        propose(left.previous);
        propose(top.position);
    }
    for (const Symbol& symbol : symbols) {
        if (symbol.alive) {
            ids.push_back(symbol.id);
        }
    }
}

}  // namespace orbit
