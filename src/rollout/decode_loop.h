// DecodeLoop: decodes a batch several tokens at a time without the host. The rows' state lives at
// fixed device addresses; one step (embedding to sampled token, adapter, page append, advance) is
// captured once per batch bucket and adapter slot, and replayed. A new adapter version in a slot
// needs no new capture. On the CPU the step is called. It has a stream and scratch of its own,
// since a captured graph keeps its addresses.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <tuple>
#include <vector>

#include "device/graph.h"
#include "model/forward.h"
#include "ops/decode_state.h"

namespace orbit {

// One sequence that is being decoded.
struct DecodeRow {
    int32_t last = 0;                 // its newest token, not yet read
    int32_t position = 0;             // of that token
    std::span<const int32_t> pages;   // enough for position + steps tokens, or up to its limit
    SampleRow sample;                 // of the first draw
    std::span<const int32_t> forced;  // of the draws from now on; empty: drawn
};

class DecodeLoop {
  public:
    // `spare_page`: a page for the padding rows of a bucket.
    DecodeLoop(
        const Model& model,
        const KvCache& kv,
        AdapterStore* adapter,
        int64_t max_batch,
        int64_t max_steps,
        int64_t max_blocks,
        int32_t spare_page
    );

    // Decodes `steps` tokens of every row. tokens, logprobs: [steps][rows.size()], row after row of
    // a step.
    void run(
        std::span<const DecodeRow> rows,
        int64_t steps,
        int slot,
        std::vector<int32_t>& tokens,
        std::vector<float>& logprobs
    );

    size_t num_graphs() const { return graphs_.size(); }

    size_t memory_bytes() const { return arena_.total_bytes() + stream_.scratch.allocated_bytes(); }

  private:
    using Key = std::tuple<int64_t, int64_t, int>;  // batch bucket, position bucket, adapter slot

    void upload(std::span<const DecodeRow> rows, int64_t bucket, int64_t steps);
    void step(int64_t bucket, int64_t positions, int slot);
    Graph& graph(int64_t bucket, int64_t positions, int slot);

    const Model* model_;
    const KvCache* kv_;
    AdapterStore* adapter_;
    Stream stream_;
    Arena arena_;
    int64_t max_batch_;
    int64_t max_steps_;
    int32_t spare_page_;
    DecodeState state_;
    Tensor blob_;  // the part of the state that upload() writes, in one piece
    std::vector<std::byte> host_blob_;
    std::map<Key, std::unique_ptr<Graph>> graphs_;
};

}  // namespace orbit
