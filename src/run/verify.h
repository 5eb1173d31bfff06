// orbit verify: compares a model with a reference folder written by transformers and PEFT
// (tools/make_reference.py).
#pragma once

#include <string>
#include <vector>

#include "model/model.h"

namespace orbit {

struct VerifyRow {
    std::string what;  // "base", "lora", "oft"
    int64_t documents = 0;
    int64_t tokens = 0;
    double logprob_difference = 0;  // largest |difference| over every token
    double logprob_difference_mean = 0;
    std::string worst_place;  // document and token of the largest
    bool has_gradients = false;
    double gradient_difference = 0;  // largest over tensors of ||g - ref|| / ||ref||
    std::string worst_tensor;
};

struct VerifyReport {
    std::vector<VerifyRow> rows;
    int64_t tokenized_equal = 0;  // documents whose text gives the reference's ids
    int64_t tokenized = 0;
    int64_t greedy_equal = 0;
    int64_t greedy = 0;
    double logprob_difference = 0;  // largest of the rows
    double gradient_difference = 0;
};

// `reference`: a folder with reference.json and, if they are there, lora/ and oft/.
VerifyReport verify_model(Stream& stream, const Model& model, const std::string& reference);

}  // namespace orbit
