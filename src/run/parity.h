// orbit parity: the product's promise as a table. Every row computes the same log-probs in two ways
// and counts the tokens whose bits differ.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/model.h"

namespace orbit {

struct ParityRow {
    std::string adapter;     // "none", "lora", "oft", or the folder given
    std::string comparison;  // "prefill = decode", ...
    int64_t tokens = 0;
    int64_t different = 0;
    std::string first;  // the first difference, with its coordinate
};

struct ParityOptions {
    int64_t num_texts = 64;
    int64_t longest = 192;  // tokens of the longest text; lengths are ragged
    uint64_t seed = 7;
};

// `adapter_folder` empty: the base alone, a random LoRA and a random OFT; else the base and that
// adapter.
std::vector<ParityRow> parity_table(
    Stream& stream,
    const Model& model,
    const std::string& adapter_folder,
    const ParityOptions& options
);

}  // namespace orbit
