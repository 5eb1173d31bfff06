#include <fmt/core.h>

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/log.h"
#include "cli/commands.h"
#include "data/dataset.h"
#include "rl/step.h"
#include "rollout/engine.h"

namespace orbit {
namespace {

int64_t longest_prompt(const Model& model, const Dataset& data, const EvalArgs& args) {
    int64_t longest = 0;
    for (int64_t i = 0; i < data.size(); ++i) {
        const auto length = static_cast<int64_t>(prompt_ids(model, data[i], args.system).size());
        USER_CHECK(
            length < model.config.max_positions,
            "{} line {}: the prompt has {} tokens, the model reads at most {}; shorten or remove "
            "it.",
            data[i].file,
            data[i].line,
            length,
            model.config.max_positions
        );
        longest = std::max(longest, length);
    }
    return longest;
}

void print_json(const EvalArgs& args, const EvalReport& report) {
    nlohmann::ordered_json out;
    out["model"] = args.model.model;
    out["adapter"] = args.model.adapter.empty() ? nlohmann::ordered_json(nullptr)
                                                : nlohmann::ordered_json(args.model.adapter);
    out["data"] = args.data;
    out["questions"] = report.questions;
    out["accuracy"] = report.accuracy;
    out["unscored"] = report.unscored;
    out["response_length"] = report.response_length;
    out["truncated"] = report.truncated_share;
    for (const auto& [k, value] : report.pass_at_k) {
        out["pass_at_k"][std::to_string(k)] = value;
    }
    fmt::print("{}\n", out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}

void print_words(const EvalReport& report) {
    fmt::print(
        "accuracy {:.4f} on {} questions (greedy), answers of {:.1f} tokens, {:.1f} % cut off\n",
        report.accuracy,
        report.questions,
        report.response_length,
        100 * report.truncated_share
    );
    for (const auto& [k, value] : report.pass_at_k) {
        fmt::print("pass@{} {:.4f}\n", k, value);
    }
    if (report.unscored > 0) {
        fmt::print("{} answers could not be scored and count as wrong\n", report.unscored);
    }
}

}  // namespace

int run_eval(const EvalArgs& args) {
    EvalOptions options;
    options.samples = args.samples;
    options.max_questions = args.max_questions;
    options.temperature = args.temperature;
    options.k.clear();
    for (const int64_t k : args.k) {
        USER_CHECK(k >= 1, "--k {} must be at least 1.", k);
        if (k <= args.samples) {
            options.k.push_back(k);
        } else if (args.samples > 0) {
            warn_line(fmt::format("pass@{} needs --samples {} or more", k, k));
        }
    }
    DataOptions data_options;
    data_options.prompt_field = args.prompt_field;
    data_options.answer_field = args.answer_field;
    const Dataset data = Dataset::load(args.data, data_options);
    Reward reward(args.reward);
    OpenModel open(args.model);
    RolloutOptions rollout;
    rollout.max_tokens = args.max_tokens;
    EngineOptions engine_options;
    engine_options.max_batch = std::max(args.max_batch, args.samples);
    engine_options.kv_tokens = engine_options.max_batch * (longest_prompt(*open.model, data, args) +
                                                           args.max_tokens + 2 * kPageTokens);
    RolloutEngine engine(open.stream, *open.model, open.adapter.get(), engine_options);
    const EvalReport report = evaluate(
        *open.model,
        engine,
        reward,
        data,
        options,
        rollout,
        args.system,
        args.seed,
        open.adapter != nullptr
    );
    args.json ? print_json(args, report) : print_words(report);
    return 0;
}

}  // namespace orbit
