#include "model/score.h"

#include <algorithm>
#include <numeric>

#include "model/token_batch.h"

namespace orbit {
namespace {

std::vector<int32_t> page_range(int64_t first, int64_t count) {
    std::vector<int32_t> pages(static_cast<size_t>(count));
    std::iota(pages.begin(), pages.end(), static_cast<int32_t>(first));
    return pages;
}

struct Target {
    size_t text;
    size_t index;  // of the predicting token
};

// Runs one batch and stores the log-probs of `targets` (batch row i predicts targets[i]).
void score_batch(
    Pass& pass,
    const std::vector<int32_t>& rows,
    const std::vector<int32_t>& ids,
    const std::vector<Target>& targets,
    const ScoreOptions& options,
    std::vector<TokenScores>& scores
) {
    const Tensor hidden = forward_hidden(pass);
    if (rows.empty()) {
        return;
    }
    Stream& stream = pass.stream;
    const auto count = static_cast<int64_t>(rows.size());
    const Tensor h = head_hidden(pass, hidden, upload_array<int32_t>(stream, rows), count);
    auto* logprobs = stream.scratch.take(DType::kF32, {count}).as<float>();
    auto* entropies =
        options.entropy ? stream.scratch.take(DType::kF32, {count}).as<float>() : nullptr;
    token_logprobs(
        stream,
        head_params(pass.model, h),
        upload_array<int32_t>(stream, ids),
        options.filter,
        logprobs,
        entropies
    );
    std::vector<float> host(rows.size());
    copy_to_host(stream, host.data(), logprobs, host.size() * sizeof(float));
    for (size_t i = 0; i < targets.size(); ++i) {
        scores[targets[i].text].logprobs[targets[i].index] = host[i];
    }
    if (options.entropy) {
        copy_to_host(stream, host.data(), entropies, host.size() * sizeof(float));
        for (size_t i = 0; i < targets.size(); ++i) {
            scores[targets[i].text].entropies[targets[i].index] = host[i];
        }
    }
}

}  // namespace

std::vector<TokenScores> score_texts(
    Stream& stream,
    const Model& model,
    AdapterStore* adapter,
    int slot,
    std::span<const std::vector<int32_t>> texts,
    const ScoreOptions& options
) {
    std::vector<TokenScores> scores(texts.size());
    int64_t longest = 1;
    for (size_t t = 0; t < texts.size(); ++t) {
        const size_t predicted = texts[t].empty() ? 0 : texts[t].size() - 1;
        scores[t].logprobs.resize(predicted);
        scores[t].entropies.resize(options.entropy ? predicted : 0);
        longest = std::max(longest, static_cast<int64_t>(texts[t].size()));
        USER_CHECK(
            static_cast<int64_t>(texts[t].size()) <= model.config.max_positions,
            "a text has {} tokens, the model reads at most {}; shorten it.",
            texts[t].size(),
            model.config.max_positions
        );
    }
    const int64_t batch_tokens = std::max(options.tokens_per_batch, longest);
    // A text that is cut into chunks needs the pages of every layer; whole texts need one layer's.
    const KvCache kv(
        model,
        options.chunk > 0 ? model.config.num_layers : 1,
        pages_for(batch_tokens) + static_cast<int64_t>(texts.size())
    );
    size_t t = 0;
    int64_t done = 0;  // tokens of text t that are computed
    while (t < texts.size()) {
        TokenBatch batch;
        std::vector<int32_t> rows;
        std::vector<int32_t> ids;
        std::vector<Target> targets;
        int64_t page = 0;
        while (t < texts.size()) {
            const auto& text = texts[t];
            const int64_t left = static_cast<int64_t>(text.size()) - done;
            const int64_t take = options.chunk > 0 ? std::min(options.chunk, left) : left;
            if (!batch.empty() &&
                (options.chunk > 0 || batch.num_tokens() + take > options.tokens_per_batch)) {
                break;
            }
            const int64_t pages = pages_for(done + take);
            for (int64_t i = done; i < done + take && i + 1 < static_cast<int64_t>(text.size());
                 ++i) {
                rows.push_back(batch.num_tokens() + static_cast<int32_t>(i - done));
                ids.push_back(text[static_cast<size_t>(i + 1)]);
                targets.push_back({t, static_cast<size_t>(i)});
            }
            if (take > 0) {
                batch.add(
                    std::span(text).subspan(static_cast<size_t>(done), static_cast<size_t>(take)),
                    static_cast<int32_t>(done),
                    page_range(options.chunk > 0 ? 0 : page, pages)
                );
                page += pages;
            }
            done += take;
            if (done < static_cast<int64_t>(text.size())) {
                break;
            }
            ++t;
            done = 0;
        }
        if (!batch.empty()) {
            const ScratchScope scope(stream.scratch);
            Pass pass{stream, model, batch.upload(stream), kv, adapter, slot};
            score_batch(pass, rows, ids, targets, options, scores);
        }
    }
    return scores;
}

}  // namespace orbit
