#include "rollout/engine.h"

#include <algorithm>
#include <optional>
#include <set>
#include <utility>

namespace orbit {
namespace {

constexpr int32_t kSparePage = 0;  // for the padding rows of a decode batch

}  // namespace

struct RolloutEngine::Group {
    Request request;
    int64_t ticket = 0;
    int slot = kNoAdapter;
    int64_t version = -1;
    std::vector<int32_t> pages;  // of the prompt
    int64_t computed = 0;        // prompt tokens whose keys and values are in the pages
    int32_t pins = 0;            // samples (and the group itself) that still hold the slot
};

struct RolloutEngine::Sequence {
    std::shared_ptr<Group> group;
    int32_t sample = 0;
    std::vector<int32_t> response;
    std::vector<float> logprobs;
    std::vector<int32_t> pages;
    std::optional<StreamDecoder> decoder;  // only with stop strings
    std::string text;
    bool done = false;

    int64_t length() const {
        return static_cast<int64_t>(group->request.prompt.size() + response.size());
    }
};

struct RolloutEngine::Round {
    TokenBatch batch;
    std::vector<int32_t> rows;  // of the hidden states, one per draw
    std::vector<SampleRow> samples;
    std::vector<Sequence*> decoding;                // the first draws
    std::vector<std::shared_ptr<Group>> prefilled;  // then num_samples draws each
};

RolloutEngine::RolloutEngine(
    Stream& stream, const Model& model, AdapterStore* adapter, const EngineOptions& options
)
    : stream_(&stream),
      model_(&model),
      adapter_(adapter),
      options_(options),
      kv_(model,
          model.config.num_layers,
          pages_for(std::max<int64_t>(options.kv_tokens, kPageTokens)) + 1,
          options.record_routing),
      pages_(kv_.num_pages()) {
    CHECK_EQ(pages_.take(), kSparePage);
    if (options_.decode_steps == 0) {
        options_.decode_steps = stream.is_cpu() ? 1 : 8;
    }
}

RolloutEngine::~RolloutEngine() {
    // Requests that were never finished still pin their adapter version.
    std::set<Group*> unfinished;
    for (const auto& sequence : running_) {
        unfinished.insert(sequence->group.get());
    }
    for (const auto* queue : {&waiting_, &prefilling_}) {
        for (const auto& group : *queue) {
            unfinished.insert(group.get());
        }
    }
    for (const Group* group : unfinished) {
        if (group->slot != kNoAdapter) {
            adapter_->unpin(group->slot);
        }
    }
}

// A sequence may run up to decode_steps - 1 tokens past its end before the host sees it.
int64_t RolloutEngine::longest_length(const Request& request) const {
    return static_cast<int64_t>(request.prompt.size()) + request.max_tokens +
           options_.decode_steps - 1;
}

int64_t RolloutEngine::pages_needed(const Request& request) const {
    const int64_t shared = static_cast<int64_t>(request.prompt.size()) / kPageTokens;
    return shared + request.num_samples * (pages_for(longest_length(request)) - shared);
}

int64_t RolloutEngine::submit(Request request) {
    const int64_t prompt = static_cast<int64_t>(request.prompt.size());
    CHECK_GE(prompt, 1);
    CHECK_EQ(
        static_cast<int64_t>(request.request_ids.size()), static_cast<int64_t>(request.num_samples)
    );
    USER_CHECK(
        prompt < model_->config.max_positions,
        "a prompt has {} tokens, the model reads at most {}; shorten the prompt.",
        prompt,
        model_->config.max_positions
    );
    request.max_tokens = std::min(request.max_tokens, model_->config.max_positions - prompt);
    if (!request.forced.empty()) {
        request.max_tokens = static_cast<int64_t>(request.forced.size());
    }
    USER_CHECK(
        request.num_samples <= options_.max_batch && pages_needed(request) < kv_.num_pages(),
        "{} answers of up to {} tokens after a prompt of {} need {} tokens of key-value memory, "
        "there are {}; lower "
        "rollout.samples_per_prompt or rollout.max_tokens, or raise rollout.max_batch.",
        request.num_samples,
        request.max_tokens,
        prompt,
        pages_needed(request) * kPageTokens,
        (kv_.num_pages() - 1) * kPageTokens
    );
    auto group = std::make_shared<Group>();
    group->request = std::move(request);
    group->ticket = next_ticket_++;
    if (adapter_ != nullptr && group->request.use_adapter) {
        group->slot = adapter_->pin_current();
        group->version = adapter_->version_of(group->slot);
    }
    waiting_.push_back(std::move(group));
    return waiting_.back()->ticket;
}

void RolloutEngine::admit() {
    int64_t running = num_running();
    int64_t promised = 0;  // pages of admitted groups that they have not taken yet
    for (const auto& group : prefilling_) {
        running += group->request.num_samples;
        promised += pages_needed(group->request) - static_cast<int64_t>(group->pages.size());
    }
    for (const auto& sequence : running_) {
        promised += pages_for(longest_length(sequence->group->request)) -
                    static_cast<int64_t>(sequence->pages.size());
    }
    while (!waiting_.empty()) {
        const auto& group = waiting_.front();
        const Request& request = group->request;
        if (running + request.num_samples > options_.max_batch ||
            promised + pages_needed(request) > pages_.num_available()) {
            return;
        }
        if (options_.prefix_cache) {
            // At least the last prompt token is computed: its hidden state starts the answers.
            const int64_t most = (static_cast<int64_t>(request.prompt.size()) - 1) / kPageTokens;
            group->pages = pages_.match(group->version, request.prompt, most);
            group->computed = static_cast<int64_t>(group->pages.size()) * kPageTokens;
            stats_.cached_tokens += group->computed;
        }
        running += request.num_samples;
        promised += pages_needed(request) - static_cast<int64_t>(group->pages.size());
        prefilling_.push_back(group);
        waiting_.pop_front();
    }
}

bool RolloutEngine::step() {
    admit();
    std::vector<int> slots;
    const auto note = [&](int slot) {
        if (std::find(slots.begin(), slots.end(), slot) == slots.end()) {
            slots.push_back(slot);
        }
    };
    for (const auto& group : prefilling_) {
        note(group->slot);
    }
    for (const int slot : slots) {
        prefill(slot);
    }
    if (!slots.empty()) {
        return true;  // prompts first: decoding is cheapest with a full batch
    }
    for (const auto& sequence : running_) {
        note(sequence->group->slot);
    }
    for (const int slot : slots) {
        decode(slot);
    }
    CHECK(!slots.empty() || waiting_.empty(), "(a waiting request always fits an idle engine)");
    return !slots.empty();
}

SampleRow RolloutEngine::first_draw(const Request& request, int32_t sample, int64_t generated)
    const {
    SampleRow row;
    row.filter = request.filter;
    row.seed = request.seed;
    row.request = request.request_ids[static_cast<size_t>(sample)];
    row.position = static_cast<int32_t>(static_cast<int64_t>(request.prompt.size()) + generated);
    row.forced = request.forced.empty() ? -1 : request.forced[static_cast<size_t>(generated)];
    return row;
}

void RolloutEngine::collect(int slot, Round& round) {
    int64_t budget = options_.prefill_chunk;
    for (const auto& group : prefilling_) {
        if (group->slot != slot || budget <= 0) {
            continue;
        }
        const Request& request = group->request;
        const int64_t prompt = static_cast<int64_t>(request.prompt.size());
        const int64_t count = std::min(budget, prompt - group->computed);
        while (static_cast<int64_t>(group->pages.size()) < pages_for(group->computed + count)) {
            group->pages.push_back(pages_.take());
        }
        round.batch.add(
            std::span(request.prompt)
                .subspan(static_cast<size_t>(group->computed), static_cast<size_t>(count)),
            static_cast<int32_t>(group->computed),
            group->pages
        );
        group->computed += count;
        budget -= count;
        stats_.prompt_tokens += count;
        if (group->computed == prompt) {
            for (int32_t sample = 0; sample < request.num_samples; ++sample) {
                round.rows.push_back(round.batch.num_tokens() - 1);
                round.samples.push_back(first_draw(request, sample, 0));
            }
            round.prefilled.push_back(group);
        }
    }
}

void RolloutEngine::prefill(int slot) {
    Round round;
    collect(slot, round);
    const ScratchScope scope(stream_->scratch);
    Pass pass{*stream_, *model_, round.batch.upload(*stream_), kv_, adapter_, slot};
    const Tensor hidden = forward_hidden(pass);
    ++stats_.forwards;
    const size_t count = round.rows.size();
    if (count == 0) {
        synchronize(*stream_);
        return;
    }
    const int32_t* rows = upload_array<int32_t>(*stream_, round.rows);
    const Tensor h = head_hidden(pass, hidden, rows, static_cast<int64_t>(count));
    const SampleRow* samples = upload_array<SampleRow>(*stream_, round.samples);
    auto* device_tokens =
        static_cast<int32_t*>(stream_->scratch.take_bytes(count * sizeof(int32_t)));
    auto* device_logprobs = static_cast<float*>(stream_->scratch.take_bytes(count * sizeof(float)));
    sample_tokens(*stream_, head_params(*model_, h), samples, device_tokens, device_logprobs);
    std::vector<int32_t> tokens(count);
    std::vector<float> logprobs(count);
    copy_to_host(*stream_, tokens.data(), device_tokens, count * sizeof(int32_t));
    copy_to_host(*stream_, logprobs.data(), device_logprobs, count * sizeof(float));
    size_t at = 0;
    for (const auto& group : round.prefilled) {
        accept_prefill(group, &tokens[at], &logprobs[at]);
        at += static_cast<size_t>(group->request.num_samples);
    }
    std::erase_if(running_, [](const auto& sequence) { return sequence->done; });
    synchronize(*stream_);  // copied pages are there before the decode loop's own stream reads them
}

void RolloutEngine::decode(int slot) {
    std::vector<Sequence*> sequences;
    std::vector<DecodeRow> rows;
    int64_t steps = options_.decode_steps;
    for (const auto& sequence : running_) {
        if (sequence->group->slot == slot) {
            sequences.push_back(sequence.get());
        }
    }
    for (Sequence* sequence : sequences) {
        const Request& request = sequence->group->request;
        const int64_t generated = static_cast<int64_t>(sequence->response.size());
        while (static_cast<int64_t>(sequence->pages.size()) <
               pages_for(sequence->length() + steps - 1)) {
            sequence->pages.push_back(pages_.take());
        }
        DecodeRow row;
        row.last = sequence->response.back();
        row.position = static_cast<int32_t>(sequence->length() - 1);
        row.pages = sequence->pages;
        row.sample = first_draw(request, sequence->sample, generated);
        if (!request.forced.empty()) {
            row.forced = std::span(request.forced).subspan(static_cast<size_t>(generated));
        }
        rows.push_back(row);
    }
    std::vector<int32_t> tokens;
    std::vector<float> logprobs;
    decode_loop(rows).run(rows, steps, slot, tokens, logprobs);
    stats_.forwards += steps;
    for (size_t i = 0; i < tokens.size(); ++i) {
        Sequence& sequence = *sequences[i % sequences.size()];
        if (!sequence.done) {
            ++stats_.decoded_tokens;
            accept_token(sequence, tokens[i], logprobs[i]);
        }
    }
    std::erase_if(running_, [](const auto& sequence) { return sequence->done; });
}

DecodeLoop& RolloutEngine::decode_loop(std::span<const DecodeRow> rows) {
    int64_t blocks = loop_blocks_;
    for (const auto& row : rows) {
        blocks = std::max(blocks, static_cast<int64_t>(row.pages.size()));
    }
    if (loop_ == nullptr || blocks > loop_blocks_) {
        loop_blocks_ = std::min(
            std::max<int64_t>(blocks * 2, 32), pages_for(model_->config.max_positions) + 2
        );
        loop_ = std::make_unique<DecodeLoop>(
            *model_,
            kv_,
            adapter_,
            options_.max_batch,
            options_.decode_steps,
            loop_blocks_,
            kSparePage
        );
    }
    return *loop_;
}

void RolloutEngine::accept_prefill(
    const std::shared_ptr<Group>& group, const int32_t* tokens, const float* logprobs
) {
    std::erase(prefilling_, group);
    const int64_t prompt = static_cast<int64_t>(group->request.prompt.size());
    if (options_.prefix_cache) {
        pages_.insert(group->version, group->request.prompt, group->pages);
    }
    group->pins = group->request.num_samples;
    stats_.cached_tokens += prompt * (group->request.num_samples - 1);
    for (int32_t sample = 0; sample < group->request.num_samples; ++sample) {
        auto sequence = std::make_unique<Sequence>();
        sequence->group = group;
        sequence->sample = sample;
        sequence->pages = group->pages;
        if (!group->request.stop.empty()) {
            sequence->decoder.emplace(*model_->tokenizer);
        }
        if (sample > 0) {
            // Full pages are shared; a partly filled last page gets a copy per sample, which will
            // be appended to.
            for (int64_t i = 0; i < prompt / kPageTokens; ++i) {
                pages_.retain(group->pages[static_cast<size_t>(i)]);
            }
            if (prompt % kPageTokens != 0) {
                sequence->pages.back() = pages_.take();
                kv_.copy_page(*stream_, group->pages.back(), sequence->pages.back());
            }
        }
        running_.push_back(std::move(sequence));
    }
    const size_t first = running_.size() - static_cast<size_t>(group->request.num_samples);
    for (int32_t sample = 0; sample < group->request.num_samples; ++sample) {
        accept_token(
            *running_[first + static_cast<size_t>(sample)], tokens[sample], logprobs[sample]
        );
    }
}

void RolloutEngine::accept_token(Sequence& sequence, int32_t token, float logprob) {
    const Request& request = sequence.group->request;
    sequence.response.push_back(token);
    sequence.logprobs.push_back(logprob);
    if (on_token) {
        on_token(sequence.group->ticket, sequence.sample, token);
    }
    const bool full = static_cast<int64_t>(sequence.response.size()) >= request.max_tokens;
    if (!request.forced.empty()) {
        if (full) {
            finish(sequence, FinishReason::kLength);
        }
        return;
    }
    const auto& stops = model_->stop_ids;
    if (!request.ignore_stop && std::find(stops.begin(), stops.end(), token) != stops.end()) {
        finish(sequence, FinishReason::kStop);
        return;
    }
    if (sequence.decoder) {
        const size_t seen = sequence.text.size();
        sequence.text += sequence.decoder->push(token);
        for (const auto& stop : request.stop) {
            const size_t from = seen > stop.size() ? seen - stop.size() : 0;
            if (sequence.text.find(stop, from) != std::string::npos) {
                finish(sequence, FinishReason::kStop);
                return;
            }
        }
    }
    if (full) {
        finish(sequence, FinishReason::kLength);
    }
}

void RolloutEngine::finish(Sequence& sequence, FinishReason reason) {
    Group& group = *sequence.group;
    Completion completion;
    completion.ticket = group.ticket;
    completion.sample = sequence.sample;
    completion.routing = kv_.read_routing(*stream_, sequence.pages, sequence.length() - 1);
    completion.ids = std::move(sequence.response);
    completion.logprobs = std::move(sequence.logprobs);
    completion.finish = reason;
    completion.adapter_version = group.version;
    finished_.push_back(std::move(completion));
    for (const int32_t page : sequence.pages) {
        pages_.release(page);
    }
    sequence.done = true;
    if (--group.pins == 0 && group.slot != kNoAdapter) {
        adapter_->unpin(group.slot);
    }
}

std::vector<Completion> RolloutEngine::take_finished() {
    return std::exchange(finished_, {});
}

}  // namespace orbit
