// RolloutEngine: a queue of requests, continuous batching over paged keys and values, a prefix
// cache, and the sampler.
//
// A request is one prompt with num_samples answers; the prompt is computed once and its full pages
// are shared. Scheduling (max_batch, chunking, arrival order, the cache) changes speed and never
// results: each row of the forward depends on its own sequence alone, and draws are keyed by (seed,
// request id, position). A request pins the adapter version that is current when it is submitted.
// Not thread safe: one thread drives it.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "data/example.h"
#include "model/forward.h"
#include "model/token_batch.h"
#include "rollout/decode_loop.h"
#include "rollout/page_pool.h"

namespace orbit {

struct Request {
    std::vector<int32_t> prompt;  // at least one token
    int32_t num_samples = 1;
    std::vector<uint64_t> request_ids;  // one per sample: the key of its random stream
    uint64_t seed = 0;
    SamplingFilter filter;
    int64_t max_tokens = 64;
    std::vector<std::string> stop;  // stop strings
    std::vector<int32_t>
        forced;  // not empty: these tokens are taken instead of drawn (scoring by decode)
    bool use_adapter = true;   // false: the base
    bool ignore_stop = false;  // go on after an end-of-turn token (benchmarks)
};

struct Completion {
    int64_t ticket = 0;  // what submit() returned
    int32_t sample = 0;
    std::vector<int32_t> ids;     // the response
    std::vector<float> logprobs;  // of each response token, as sampled
    FinishReason finish = FinishReason::kStop;
    int64_t adapter_version = 0;  // -1: the base
    // The experts that every processed token chose, prompt included and the last token not: ids
    // [tokens, layers with experts, K]; empty unless recorded.
    std::vector<uint8_t> routing;
};

struct EngineOptions {
    int64_t max_batch = 256;
    int64_t prefill_chunk = 512;
    bool prefix_cache = true;
    int64_t decode_steps =
        0;                  // tokens decoded between looks of the host; 0: 1 on a CPU, 8 on a GPU
    int64_t kv_tokens = 0;  // capacity of the page pool, in tokens
    bool record_routing = false;  // fill Completion::routing, for models with experts
};

struct EngineStats {
    int64_t prompt_tokens = 0;  // computed
    int64_t cached_tokens = 0;  // taken from the prefix cache or shared inside a group
    int64_t decoded_tokens = 0;
    int64_t forwards = 0;
};

class RolloutEngine {
  public:
    RolloutEngine(
        Stream& stream, const Model& model, AdapterStore* adapter, const EngineOptions& options
    );
    ~RolloutEngine();
    RolloutEngine(const RolloutEngine&) = delete;
    RolloutEngine& operator=(const RolloutEngine&) = delete;

    // UserError when the prompt or the answers can never fit.
    int64_t submit(Request request);
    // One round: admit; then prefill a chunk if there is a prompt left, else decode every running
    // sequence. False when there is nothing to do.
    bool step();
    std::vector<Completion> take_finished();

    int64_t num_running() const { return static_cast<int64_t>(running_.size()); }

    const EngineStats& stats() const { return stats_; }

    size_t kv_bytes() const { return kv_.total_bytes(); }

    // Keys and values, and what decoding takes beside the caller's stream.
    size_t memory_bytes() const {
        return kv_bytes() + (loop_ == nullptr ? 0 : loop_->memory_bytes());
    }

    // Called after each sampled token (ticket, sample, id); for streaming to a terminal and
    // progress.
    std::function<void(int64_t, int32_t, int32_t)> on_token;

  private:
    struct Group;     // a request that is being prefilled
    struct Sequence;  // one answer that is being decoded
    struct Round;     // the rows of one prefill

    void admit();
    int64_t pages_needed(const Request& request) const;
    int64_t longest_length(const Request& request) const;
    void prefill(int slot);
    void collect(int slot, Round& round);
    void decode(int slot);
    SampleRow first_draw(const Request& request, int32_t sample, int64_t generated) const;
    DecodeLoop& decode_loop(std::span<const DecodeRow> rows);
    void accept_prefill(
        const std::shared_ptr<Group>& group, const int32_t* tokens, const float* logprobs
    );
    void accept_token(Sequence& sequence, int32_t token, float logprob);
    void finish(Sequence& sequence, FinishReason reason);

    Stream* stream_;
    const Model* model_;
    AdapterStore* adapter_;
    EngineOptions options_;
    KvCache kv_;
    PagePool pages_;
    std::unique_ptr<DecodeLoop> loop_;  // made anew when a sequence has more pages than it can hold
    int64_t loop_blocks_ = 0;
    std::deque<std::shared_ptr<Group>> waiting_;
    std::deque<std::shared_ptr<Group>> prefilling_;
    std::vector<std::unique_ptr<Sequence>> running_;
    std::vector<Completion> finished_;
    int64_t next_ticket_ = 0;
    EngineStats stats_;
};

}  // namespace orbit
