#include "run/parity.h"

#include <algorithm>
#include <bit>

#include "base/philox.h"
#include "model/score.h"
#include "rollout/engine.h"
#include "train/trainer.h"

namespace orbit {
namespace {

using Texts = std::vector<std::vector<int32_t>>;
using Logprobs = std::vector<std::vector<float>>;

// Ragged random texts; some share a beginning, so that the prefix cache has something to find.
Texts random_texts(const Model& model, const ParityOptions& options) {
    // A synthetic model has no tokenizer; a real one's vocabulary may be padded.
    const int64_t named = model.tokenizer ? model.tokenizer->size() : model.config.vocab_size;
    const auto vocab = static_cast<uint32_t>(std::min<int64_t>(model.config.vocab_size, named));
    const auto longest =
        static_cast<uint32_t>(std::min(options.longest, model.config.max_positions - 1));
    Texts texts;
    for (int64_t t = 0; t < options.num_texts; ++t) {
        const auto index = static_cast<uint32_t>(t);
        const uint32_t draw =
            philox(index, 0, 0, 1, static_cast<uint32_t>(options.seed), 0).word[0];
        const uint32_t length = t == 0 ? longest : 2 + draw % (longest - 1);
        std::vector<int32_t> ids;
        for (uint32_t i = 0; i < length; ++i) {
            const uint32_t stream =
                i < 40 ? index / 4 : index + 1000;  // four texts share their first 40 tokens
            ids.push_back(static_cast<int32_t>(
                philox(i, stream, 0, 2, static_cast<uint32_t>(options.seed), 0).word[0] % vocab
            ));
        }
        texts.push_back(std::move(ids));
    }
    return texts;
}

Logprobs score(
    Stream& stream,
    const Model& model,
    AdapterStore* adapter,
    int slot,
    const Texts& texts,
    int64_t batch,
    int64_t chunk
) {
    ScoreOptions options;
    options.tokens_per_batch = batch;
    options.chunk = chunk;
    Logprobs result;
    for (auto& scores : score_texts(stream, model, adapter, slot, texts, options)) {
        result.push_back(std::move(scores.logprobs));
    }
    return result;
}

// The engine decodes every text token by token after a prompt of its first `prompt` tokens.
Logprobs decode(
    Stream& stream,
    const Model& model,
    AdapterStore* adapter,
    const Texts& texts,
    int64_t prompt,
    int64_t max_batch,
    int64_t prefill_chunk,
    bool prefix_cache
) {
    EngineOptions options;
    options.max_batch = max_batch;
    options.prefill_chunk = prefill_chunk;
    options.prefix_cache = prefix_cache;
    size_t longest = 0;
    for (const auto& text : texts) {
        longest = std::max(longest, text.size());
    }
    options.kv_tokens = std::min<int64_t>(max_batch, static_cast<int64_t>(texts.size())) *
                        static_cast<int64_t>(longest + 2 * kPageTokens);
    RolloutEngine engine(stream, model, adapter, options);
    Logprobs result(texts.size());
    std::vector<size_t> text_of;
    for (size_t t = 0; t < texts.size(); ++t) {
        const int64_t cut = std::min(prompt, static_cast<int64_t>(texts[t].size()) - 1);
        Request request;
        request.prompt.assign(texts[t].begin(), texts[t].begin() + cut);
        request.forced.assign(texts[t].begin() + cut, texts[t].end());
        request.request_ids = {t};
        request.use_adapter = adapter != nullptr;
        result[t].assign(static_cast<size_t>(cut - 1), 0.0f);
        engine.submit(std::move(request));
    }
    while (engine.step()) {
    }
    for (Completion& done : engine.take_finished()) {
        auto& row = result[static_cast<size_t>(done.ticket)];
        row.insert(row.end(), done.logprobs.begin(), done.logprobs.end());
    }
    return result;
}

// Counts the tokens from `first` on (an index into the log-probs) that differ in any bit.
ParityRow compare(
    const std::string& adapter,
    const std::string& what,
    const Logprobs& a,
    const Logprobs& b,
    int64_t first
) {
    ParityRow row{adapter, what, 0, 0, ""};
    for (size_t t = 0; t < a.size(); ++t) {
        CHECK_EQ(a[t].size(), b[t].size());
        for (size_t i = static_cast<size_t>(std::min(first, static_cast<int64_t>(a[t].size())));
             i < a[t].size();
             ++i) {
            ++row.tokens;
            if (std::bit_cast<uint32_t>(a[t][i]) != std::bit_cast<uint32_t>(b[t][i]) &&
                row.different++ == 0) {
                row.first =
                    fmt::format("text {} token {}: {:.9g} and {:.9g}", t, i + 1, a[t][i], b[t][i]);
            }
        }
    }
    return row;
}

// Samples answers with the engine, then reads the log-probs that the trainer's forward gives to the
// same tokens, and the experts that it chooses for them.
void rollout_and_training(
    std::vector<ParityRow>& rows,
    Stream& stream,
    const Model& model,
    AdapterStore& adapter,
    const std::string& name,
    const Texts& texts,
    bool bare
) {
    EngineOptions options;
    options.max_batch = 64;
    options.kv_tokens = 64 * 160;
    options.record_routing = true;
    RolloutEngine engine(stream, model, &adapter, options);
    Texts prompts;
    for (size_t t = 0; t < std::min<size_t>(texts.size(), 16); ++t) {
        Request request;
        request.prompt.assign(
            texts[t].begin(),
            texts[t].begin() + static_cast<int64_t>(std::min<size_t>(texts[t].size(), 8 + 5 * t))
        );
        prompts.push_back(request.prompt);
        request.num_samples = 4;
        request.request_ids = {4 * t, 4 * t + 1, 4 * t + 2, 4 * t + 3};
        request.max_tokens = 48;
        request.use_adapter = !bare;
        engine.submit(std::move(request));
    }
    while (engine.step()) {
    }
    Logprobs sampled;
    Texts whole;
    std::vector<TrainSequence> sequences;
    std::vector<Completion> completions = engine.take_finished();
    for (Completion& done : completions) {
        const auto& prompt = prompts[static_cast<size_t>(done.ticket)];
        whole.push_back(prompt);
        whole.back().insert(whole.back().end(), done.ids.begin(), done.ids.end());
        sampled.push_back(std::move(done.logprobs));
    }
    for (size_t i = 0; i < whole.size(); ++i) {
        const auto prompt =
            static_cast<int32_t>(prompts[static_cast<size_t>(completions[i].ticket)].size());
        sequences.push_back({&whole[i], prompt, static_cast<int64_t>(i), &completions[i].routing});
    }
    Logprobs trained;
    Trainer trainer(stream, model, adapter, TrainOptions{}, SamplingFilter{});
    const int slot = bare ? kNoAdapter : adapter.pin_current();
    const RoutingCheck routing = trainer.accumulate(sequences, slot, [&](auto, auto columns, auto) {
        for (const auto& column : columns) {
            trained.push_back(column.logprob);
        }
    });
    if (!bare) {
        adapter.unpin(slot);
    }
    rows.push_back(compare(name, "rollout = training", sampled, trained, 0));
    if (routing.pairs > 0) {
        rows.push_back({name, "routing of both", routing.pairs, routing.mismatches, routing.first});
    }
}

void add_rows(
    std::vector<ParityRow>& rows,
    Stream& stream,
    const Model& model,
    AdapterStore& adapter,
    const std::string& name,
    const Texts& texts,
    bool bare
) {
    AdapterStore* used = bare ? nullptr : &adapter;
    const int slot = bare ? kNoAdapter : adapter.pin_current();
    constexpr int64_t kPrompt = 44;  // decode starts inside the prompt's third page
    const Logprobs whole = score(stream, model, used, slot, texts, 8192, 0);
    const Logprobs decoded = decode(stream, model, used, texts, kPrompt, 64, 512, false);
    rows.push_back(compare(name, "prefill = decode", whole, decoded, kPrompt - 1));
    rows.push_back(
        compare(name, "batch 1 = batch 64", score(stream, model, used, slot, texts, 1, 0), whole, 0)
    );
    rows.push_back(compare(
        name,
        "chunk 16 = chunk 512",
        score(stream, model, used, slot, texts, 1, 16),
        score(stream, model, used, slot, texts, 1, 512),
        0
    ));
    rows.push_back(compare(
        name,
        "prefix cache on = off",
        decode(stream, model, used, texts, kPrompt, 16, 64, true),
        decoded,
        kPrompt - 1
    ));
    if (!bare) {
        adapter.unpin(slot);
    }
    rollout_and_training(rows, stream, model, adapter, name, texts, bare);
}

// A random adapter, far enough from the identity that leaving it out would show.
std::unique_ptr<AdapterStore> random_adapter(
    Stream& stream, const Model& model, const std::string& kind, const std::string& sharing
) {
    AdapterOptions options;
    options.kind = kind;
    options.expert_sharing = sharing;
    for (const auto& site : model.sites) {  // the largest block up to 32 that divides every width
        while (kind == "oft" && site.in % options.block_size != 0) {
            options.block_size /= 2;
        }
    }
    auto adapter = std::make_unique<AdapterStore>(
        model.arena.device(), options, model.sites, model.compute, 2, 5
    );
    std::vector<float> masters(static_cast<size_t>(adapter->num_parameters()));
    for (size_t i = 0; i < masters.size(); ++i) {
        const uint32_t word = philox(static_cast<uint32_t>(i), 3, 0, 0, 11, 0).word[0];
        masters[i] = (uniform_from_word(word) - 0.5f) * 0.06f;
    }
    copy_to_device(stream, adapter->masters(), masters.data(), masters.size() * sizeof(float));
    adapter->publish(stream, 1);
    return adapter;
}

}  // namespace

std::vector<ParityRow> parity_table(
    Stream& stream,
    const Model& model,
    const std::string& adapter_folder,
    const ParityOptions& options
) {
    const Texts texts = random_texts(model, options);
    std::vector<ParityRow> rows;
    if (!adapter_folder.empty()) {
        const auto adapter = AdapterStore::load_peft(
            model.arena.device(), adapter_folder, model.sites, model.compute, 2
        );
        add_rows(rows, stream, model, *adapter, "none", texts, true);
        add_rows(rows, stream, model, *adapter, adapter_folder, texts, false);
        return rows;
    }
    const bool can_share = model.config.num_experts > 0;
    for (const std::string sharing : {"none", "shared"}) {
        for (const std::string kind : {"lora", "oft"}) {
            if (sharing == "shared" && !can_share) {
                continue;
            }
            const auto adapter = random_adapter(stream, model, kind, sharing);
            if (rows.empty()) {
                add_rows(rows, stream, model, *adapter, "none", texts, true);
            }
            const std::string name = sharing == "none" ? kind
                                     : kind == "lora"  ? "lora outer"
                                                       : "oft in";
            add_rows(rows, stream, model, *adapter, name, texts, false);
        }
    }
    return rows;
}

}  // namespace orbit
