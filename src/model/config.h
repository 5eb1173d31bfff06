// Reads config.json and generation_config.json of a Hugging Face folder (models.md 2, 3).
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "model/model.h"

namespace orbit {

struct HfConfig {
    ModelConfig model;
    std::vector<int32_t> eos_ids;
};

// Both spellings: rope_theta + rope_scaling, and rope_parameters. UserError names the file, the
// field and what was expected; an architecture or option that the forward pass does not compute is
// refused.
HfConfig parse_hf_config(std::string_view json_text, const std::string& file);

// eos_token_id (an integer, a list or null) of a JSON object.
std::vector<int32_t> parse_eos_ids(std::string_view json_text, const std::string& file);

// Sizes are positive, bounded and fit together; `where` names the file in the sentence.
void check_config(const ModelConfig& config, const std::string& where);

// The features a family adds to the llama layer; UserError when `family` is none of ours.
void apply_family(ModelConfig& config, const std::string& family, const std::string& where);

}  // namespace orbit
