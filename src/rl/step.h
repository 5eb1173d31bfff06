// One step of reinforcement learning, and evaluation. step.cpp is the first file to read: it names
// the whole product.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "data/dataset.h"
#include "reward/reward.h"
#include "rl/objectives/grpo.h"
#include "rl/options.h"
#include "rollout/engine.h"
#include "rollout/options.h"
#include "train/trainer.h"

namespace orbit {

// What a step works with. Owned by run/; nothing here owns memory of its own.
struct Session {
    Stream& stream;
    const Model& model;
    AdapterStore& adapter;
    RolloutEngine& rollout;
    Trainer& trainer;
    Reward& reward;
    const Dataset& data;
    RolloutOptions rollout_options;
    TrainOptions train_options;
    std::string system_prompt;
    uint64_t seed = 1;
};

struct StepReport {
    int64_t step = 0;
    std::vector<Group> groups;
    // Metrics by name, in the order of their names; those under time/ and mem/ are not
    // reproducible.
    std::map<std::string, double> metrics;
    int64_t parity_mismatches = 0;
    int64_t parity_tokens = 0;
    std::string first_mismatch;  // where rollout and training log-probs differ first
    RoutingCheck routing;        // chosen experts of rollout and training, where recorded
    int64_t num_tokens = 0;      // response tokens
};

StepReport rl_step(Session& session, int64_t step);

struct EvalQuestion {
    std::string response;
    bool correct = false;
    ScoreStatus status = ScoreStatus::kScored;
};

struct EvalReport {
    int64_t questions = 0;
    double accuracy = 0;  // greedy; unscored questions count as wrong and are counted in `unscored`
    int64_t unscored = 0;
    double response_length = 0;
    double truncated_share = 0;
    std::map<int64_t, double> pass_at_k;
    std::vector<EvalQuestion> answers;  // greedy answers
};

// Greedy accuracy over the first `max_questions` rows, and pass@k from `samples` draws each. A
// score of at least 1 is right. use_adapter false: the base. Uses the engine's current adapter
// version.
EvalReport evaluate(
    const Model& model,
    RolloutEngine& engine,
    Reward& reward,
    const Dataset& data,
    const EvalOptions& options,
    const RolloutOptions& rollout,
    const std::string& system_prompt,
    uint64_t seed,
    bool use_adapter
);

// Unbiased pass@k (Chen et al. 2021) for c right of n.
double pass_at_k(int64_t n, int64_t c, int64_t k);

// The text of a response: special tokens left out, cut at the first stop string.
std::string response_text(
    const Model& model, const std::vector<int32_t>& ids, const std::vector<std::string>& stop
);

std::vector<int32_t> prompt_ids(
    const Model& model, const Example& example, const std::string& system_prompt
);

}  // namespace orbit
