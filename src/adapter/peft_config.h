// adapter_config.json of PEFT (algorithms.md 1.10): what Orbit honours, and the refusal, by name,
// of every field that would change the forward in a way Orbit does not compute.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "ops/dense.h"

namespace orbit {

struct PeftConfig {
    AdapterKind kind = AdapterKind::kLora;
    std::string path;  // of the file, for messages

    // target_modules: a list, a regular expression, or neither ("all-linear", or left to PEFT).
    std::vector<std::string> target_list;
    std::string target_regex;
    bool all_linear = false;
    std::vector<std::string> exclude_list;
    std::string exclude_regex;
    bool layers_restricted = false;  // layers_to_transform or layers_pattern

    // LoRA
    int64_t rank = 0;
    double alpha = 0;
    bool rslora = false;
    std::vector<std::pair<std::string, double>> rank_pattern;  // in file order: first match wins
    std::vector<std::pair<std::string, double>> alpha_pattern;

    // OFT
    int64_t num_blocks = 0;  // PEFT's r; exactly one of it and block_size is not 0
    int64_t block_size = 0;
    bool exact_cayley = false;
    int32_t neumann_terms = 5;
    bool old_neumann_rule = false;
    bool block_share = false;
    bool coft = false;
    double coft_eps = 6e-5;
};

PeftConfig parse_peft_config(const std::string& path, const std::string& text);

// PEFT's rules: whether target_modules and exclude_modules select the module.
bool selects_module(const PeftConfig& config, const std::string& module);

// The value of the first pattern that matches the end of the path at a dot, or `otherwise`.
double pattern_value(
    const PeftConfig& config,
    const std::vector<std::pair<std::string, double>>& patterns,
    const std::string& module,
    double otherwise
);

// The block size that PEFT really uses for an input width that `wanted` does not divide.
int64_t peft_block_size(int64_t in, int64_t wanted);

}  // namespace orbit
