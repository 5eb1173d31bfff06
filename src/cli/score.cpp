#include <fmt/core.h>

#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "data/dataset.h"
#include "reward/reward.h"

namespace orbit {
namespace {

void print_json(const Example& row, const Score& score) {
    nlohmann::ordered_json out;
    out["line"] = row.line;
    out["score"] = score.status == ScoreStatus::kScored ? nlohmann::ordered_json(score.value)
                                                        : nlohmann::ordered_json(nullptr);
    out["reason"] = score.reason;
    out["status"] = status_name(score.status);
    for (const RewardPart& part : score.parts) {
        out["parts"][part.name] = part.value;
    }
    fmt::print("{}\n", out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}

}  // namespace

int run_score(const ScoreArgs& args) {
    // A stored response takes the prompt's place in the reader: a text, checked the same way.
    DataOptions options;
    options.prompt_field = args.response_field;
    options.answer_field = args.answer_field;
    const Dataset data = Dataset::load(args.data, options);
    Reward reward(args.reward);
    std::vector<RewardJob> jobs;
    for (int64_t i = 0; i < data.size(); ++i) {
        RewardJob& job = jobs.emplace_back();
        job.example = &data[i];
        job.response = data[i].messages.back().content;
    }
    const std::vector<Score> scores = reward.score(jobs);
    double sum = 0;
    int64_t scored = 0;
    for (size_t i = 0; i < scores.size(); ++i) {
        const Score& score = scores[i];
        const Example& row = *jobs[i].example;
        if (score.status == ScoreStatus::kScored) {
            sum += score.value;
            ++scored;
        }
        if (args.json) {
            print_json(row, score);
        } else if (score.status == ScoreStatus::kScored) {
            fmt::print("{}:{}: {} ({})\n", row.file, row.line, score.value, score.reason);
        } else {
            fmt::print(
                "{}:{}: {} ({})\n", row.file, row.line, status_name(score.status), score.reason
            );
        }
    }
    fmt::print(stderr, "{} of {} rows scored", scored, scores.size());
    if (scored > 0) {
        fmt::print(stderr, ", mean {:.4f}", sum / static_cast<double>(scored));
    }
    fmt::print(stderr, "\n");
    return 0;
}

}  // namespace orbit
