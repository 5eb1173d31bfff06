// The user's own reward program (reward.command): started once per worker, asked by JSON Lines.
//
// One request a line on its stdin:
//   {"id", "prompt" (the last user message), "messages", "response", "answer", "row" (the whole row
//   of
//    the data file), "file", "line", "tokens", "finish" ("stop", "length" or "abort")}
// and one answer a line on its stdout, before the next request comes:
//   {"score": number, "reason": text, "parts": {name: number}, "id": as asked}      all but score
//   optional
// stderr is kept for error messages. A program that ends, answers too late or prints something else
// is started again, and that row's Score says so; it is never scored as wrong.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "reward/reward.h"

namespace orbit {

class CommandReward {
  public:
    // Starts the programs. UserError when they end at once.
    CommandReward(const std::string& command, int64_t workers, double timeout_s);
    // Closes their stdin, gives them a second, then kills them.
    ~CommandReward();
    CommandReward(const CommandReward&) = delete;
    CommandReward& operator=(const CommandReward&) = delete;

    std::vector<Score> score(std::span<const RewardJob> jobs);

  private:
    class Program;
    std::vector<std::unique_ptr<Program>> programs_;
};

}  // namespace orbit
