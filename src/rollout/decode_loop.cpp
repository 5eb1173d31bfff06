#include "rollout/decode_loop.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace orbit {
namespace {

constexpr int64_t kPositionBucket = 512;

int64_t power_of_two_from(int64_t count) {
    int64_t bucket = 1;
    while (bucket < count) {
        bucket *= 2;
    }
    return bucket;
}

// Rows of a captured batch: powers of two on a GPU, the exact number on the CPU, where nothing is
// captured.
int64_t bucket_of(const Stream& stream, int64_t count, int64_t max_batch) {
    return stream.is_cpu() ? count : std::min(power_of_two_from(count), max_batch);
}

// Where each array stands in the uploaded blob; the order is that of Layout's use below.
struct Layout {
    size_t bytes = 0;

    size_t add(size_t count, size_t item) {
        const size_t at = bytes;
        bytes += (count * item + 63) / 64 * 64;
        return at;
    }
};

}  // namespace

DecodeLoop::DecodeLoop(
    const Model& model,
    const KvCache& kv,
    AdapterStore* adapter,
    int64_t max_batch,
    int64_t max_steps,
    int64_t max_blocks,
    int32_t spare_page
)
    : model_(&model),
      kv_(&kv),
      adapter_(adapter),
      stream_(model.arena.device()),
      arena_(model.arena.device()),
      max_batch_(max_batch),
      max_steps_(max_steps),
      spare_page_(spare_page) {
    const auto B = static_cast<size_t>(max_batch);
    const auto steps = static_cast<size_t>(max_steps);
    Layout layout;
    const size_t ids = layout.add(B, sizeof(int32_t));
    const size_t positions = layout.add(B, sizeof(int32_t));
    const size_t limits = layout.add(B, sizeof(int32_t));
    const size_t rows = layout.add(B, sizeof(int32_t));
    const size_t begin = layout.add(B + 1, sizeof(int32_t));
    const size_t step = layout.add(1, sizeof(int32_t));
    const size_t samples = layout.add(B, sizeof(SampleRow));
    const size_t table = layout.add(B * static_cast<size_t>(max_blocks), sizeof(int32_t));
    const size_t forced = layout.add(B * (steps + 1), sizeof(int32_t));
    blob_ = arena_.take("decode.state", DType::kU8, {static_cast<int64_t>(layout.bytes)});
    host_blob_.resize(layout.bytes);
    char* base = static_cast<char*>(blob_.data);
    const auto ints = [&](size_t at) { return reinterpret_cast<int32_t*>(base + at); };
    state_.max_blocks = static_cast<int32_t>(max_blocks);
    state_.ids = ints(ids);
    state_.positions = ints(positions);
    state_.limits = ints(limits);
    state_.rows = ints(rows);
    state_.sequence_begin = ints(begin);
    state_.step = ints(step);
    state_.samples = reinterpret_cast<SampleRow*>(base + samples);
    state_.block_table = ints(table);
    state_.forced = ints(forced);
    const auto rows_max = static_cast<int64_t>(B);
    state_.sampled = arena_.take("decode.sampled", DType::kI32, {rows_max}).as<int32_t>();
    state_.sampled_logprob =
        arena_.take("decode.sampled_logprob", DType::kF32, {rows_max}).as<float>();
    state_.tokens = arena_.take("decode.tokens", DType::kI32, {max_steps, rows_max}).as<int32_t>();
    state_.logprobs =
        arena_.take("decode.logprobs", DType::kF32, {max_steps, rows_max}).as<float>();
}

void DecodeLoop::upload(std::span<const DecodeRow> rows, int64_t bucket, int64_t steps) {
    char* base = static_cast<char*>(blob_.data);
    const auto host = [&](auto* device) {
        using T = std::remove_pointer_t<decltype(device)>;
        return reinterpret_cast<T*>(host_blob_.data() + (reinterpret_cast<char*>(device) - base));
    };
    const auto B = static_cast<size_t>(bucket);
    std::fill_n(host(state_.forced), B * static_cast<size_t>(steps + 1), -1);
    host(state_.step)[0] = 0;
    for (size_t b = 0; b <= B; ++b) {
        host(state_.sequence_begin)[b] = static_cast<int32_t>(b);
    }
    for (size_t b = 0; b < B; ++b) {
        const bool padding = b >= rows.size();
        int32_t* table = host(state_.block_table) + b * static_cast<size_t>(state_.max_blocks);
        std::fill_n(table, state_.max_blocks, spare_page_);
        host(state_.rows)[b] = static_cast<int32_t>(b);
        host(state_.ids)[b] = padding ? 0 : rows[b].last;
        host(state_.positions)[b] = padding ? 0 : rows[b].position;
        host(state_.samples)[b] = padding ? SampleRow{} : rows[b].sample;
        host(state_.limits)[b] = 0;
        if (padding) {
            continue;
        }
        CHECK_LE(static_cast<int32_t>(rows[b].pages.size()), state_.max_blocks);
        host(state_.limits)[b] = static_cast<int32_t>(
            std::min<int64_t>(
                static_cast<int64_t>(rows[b].pages.size()) * kPageTokens,
                model_->config.max_positions
            ) -
            1
        );
        std::copy(rows[b].pages.begin(), rows[b].pages.end(), table);
        for (size_t i = 0; i < std::min(rows[b].forced.size(), static_cast<size_t>(steps)); ++i) {
            host(state_.forced)[i * B + b] = rows[b].forced[i];
        }
        if (!rows[b].forced.empty()) {
            host(state_.samples)[b].forced = rows[b].forced[0];
        }
    }
    copy_to_device(stream_, blob_.data, host_blob_.data(), host_blob_.size());
}

void DecodeLoop::step(int64_t bucket, int64_t positions, int slot) {
    BatchView view;
    view.num_tokens = static_cast<int32_t>(bucket);
    view.num_sequences = static_cast<int32_t>(bucket);
    view.max_blocks = state_.max_blocks;
    view.max_positions = static_cast<int32_t>(positions);
    view.ids = state_.ids;
    view.positions = state_.positions;
    view.sequence_of = state_.rows;
    view.sequence_begin = state_.sequence_begin;
    view.sequence_position = state_.positions;
    view.block_table = state_.block_table;
    Pass pass{stream_, *model_, view, *kv_, adapter_, slot};
    const Tensor h = head_hidden(pass, forward_hidden(pass), state_.rows, bucket);
    sample_tokens(
        stream_, head_params(*model_, h), state_.samples, state_.sampled, state_.sampled_logprob
    );
    DecodeState state = state_;
    state.batch = static_cast<int32_t>(bucket);
    advance_decode(stream_, state);
}

Graph& DecodeLoop::graph(int64_t bucket, int64_t positions, int slot) {
    const Key key{stream_.is_cpu() ? 0 : bucket, stream_.is_cpu() ? 0 : positions, slot};
    auto& found = graphs_[key];
    if (found == nullptr || stream_.is_cpu()) {
        if (!stream_.is_cpu()) {
            upload(
                {}, bucket, max_steps_
            );  // the capture's real run must touch the spare page only
        }
        found = std::make_unique<Graph>(stream_, [this, bucket, positions, slot] {
            step(bucket, positions, slot);
        });
    }
    return *found;
}

void DecodeLoop::run(
    std::span<const DecodeRow> rows,
    int64_t steps,
    int slot,
    std::vector<int32_t>& tokens,
    std::vector<float>& logprobs
) {
    CHECK_LE(steps, max_steps_);
    const auto count = static_cast<int64_t>(rows.size());
    CHECK_LE(count, max_batch_);
    const int64_t bucket = bucket_of(stream_, count, max_batch_);
    int64_t positions = 1;
    for (const auto& row : rows) {
        positions = std::max(positions, row.position + steps);
    }
    // A multiple that grows with the length keeps the number of captures small.
    positions =
        kPositionBucket * power_of_two_from((positions + kPositionBucket - 1) / kPositionBucket);
    Graph& decode = graph(bucket, positions, slot);
    upload(rows, bucket, steps);
    for (int64_t i = 0; i < steps; ++i) {
        decode.launch();
    }
    const auto all = static_cast<size_t>(steps * bucket);
    std::vector<int32_t> padded_tokens(all);
    std::vector<float> padded_logprobs(all);
    copy_to_host(stream_, padded_tokens.data(), state_.tokens, all * sizeof(int32_t));
    copy_to_host(stream_, padded_logprobs.data(), state_.logprobs, all * sizeof(float));
    tokens.clear();
    logprobs.clear();
    for (int64_t i = 0; i < steps; ++i) {
        const int64_t from = i * bucket;
        tokens.insert(
            tokens.end(), padded_tokens.begin() + from, padded_tokens.begin() + from + count
        );
        logprobs.insert(
            logprobs.end(), padded_logprobs.begin() + from, padded_logprobs.begin() + from + count
        );
    }
}

}  // namespace orbit
