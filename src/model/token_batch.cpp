#include "model/token_batch.h"

#include <algorithm>

namespace orbit {

void TokenBatch::add(
    std::span<const int32_t> ids, int32_t position, std::span<const int32_t> pages
) {
    CHECK_GE(
        static_cast<int64_t>(pages.size()) * kPageTokens,
        static_cast<int64_t>(position) + static_cast<int64_t>(ids.size())
    );
    begin_.push_back(num_tokens());
    const int32_t sequence = num_sequences();
    position_.push_back(position);
    pages_.emplace_back(pages.begin(), pages.end());
    for (size_t i = 0; i < ids.size(); ++i) {
        ids_.push_back(ids[i]);
        positions_.push_back(position + static_cast<int32_t>(i));
        sequence_of_.push_back(sequence);
    }
}

BatchView TokenBatch::upload(Stream& stream) const {
    BatchView view;
    view.num_tokens = num_tokens();
    view.num_sequences = num_sequences();
    for (const auto& pages : pages_) {
        view.max_blocks = std::max(view.max_blocks, static_cast<int32_t>(pages.size()));
    }
    for (const int32_t position : positions_) {
        view.max_positions = std::max(view.max_positions, position + 1);
    }
    std::vector<int32_t> blob;
    const auto put = [&](const std::vector<int32_t>& values) {
        const size_t at = blob.size();
        blob.insert(blob.end(), values.begin(), values.end());
        blob.resize((blob.size() + 15) / 16 * 16);  // 64-byte starts
        return at;
    };
    const size_t ids = put(ids_);
    const size_t positions = put(positions_);
    const size_t sequence_of = put(sequence_of_);
    std::vector<int32_t> begin = begin_;
    begin.push_back(num_tokens());
    const size_t sequence_begin = put(begin);
    const size_t sequence_position = put(position_);
    std::vector<int32_t> table(
        static_cast<size_t>(view.num_sequences) * static_cast<size_t>(view.max_blocks), 0
    );
    for (size_t s = 0; s < pages_.size(); ++s) {
        std::copy(
            pages_[s].begin(),
            pages_[s].end(),
            table.begin() + static_cast<int64_t>(s) * view.max_blocks
        );
    }
    const size_t block_table = put(table);
    const int32_t* device = upload_array<int32_t>(stream, blob);
    view.ids = device + ids;
    view.positions = device + positions;
    view.sequence_of = device + sequence_of;
    view.sequence_begin = device + sequence_begin;
    view.sequence_position = device + sequence_position;
    view.block_table = device + block_table;
    return view;
}

}  // namespace orbit
