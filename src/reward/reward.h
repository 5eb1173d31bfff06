// Reward: (question, answer, response) -> value and named parts. Built in, or the user's own
// program (reward.command). A program that crashes, hangs or prints garbage is reported apart
// (Score::status) and never scored as a wrong answer.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "data/example.h"
#include "reward/options.h"

namespace orbit {

struct RewardJob {
    const Example* example = nullptr;
    std::string response;  // text, special tokens left out
    int64_t response_tokens = 0;
    FinishReason finish = FinishReason::kStop;
};

class Reward {
  public:
    // UserError: unknown name (with the nearest one), a pattern that does not compile, a program
    // that cannot start (with the end of its stderr).
    explicit Reward(const RewardOptions& options);
    ~Reward();
    Reward(Reward&&) noexcept;

    // Scores in job order; runs workers side by side for a command.
    std::vector<Score> score(std::span<const RewardJob> jobs);

  private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace orbit
