// Options of the reward (config section [reward]).
#pragma once

#include <cstdint>
#include <string>

namespace orbit {

struct RewardOptions {
    std::string name = "exact";
    std::string command;
    std::string marker = "####";
    std::string pattern;
    double length_penalty = 0;
    int64_t length_target = 0;
    int64_t workers = 2;
    double timeout_s = 10;

    void visit(auto&& field) {
        field("name", name, "exact, number, regex, format or length; ignored with a command");
        field(
            "command",
            command,
            "your own reward program: reads JSON Lines on stdin, writes a score per line"
        );
        field("marker", marker, "exact and number: the answer is what follows the last marker");
        field("pattern", pattern, "regex and format: the pattern that a response must match");
        field("length_penalty", length_penalty, "taken off per token beyond length_target; 0: off");
        field("length_target", length_target, "tokens that a response may have for free");
        field("workers", workers, "copies of the reward program that run side by side");
        field("timeout_s", timeout_s, "seconds that one score may take");
    }
};

}  // namespace orbit
