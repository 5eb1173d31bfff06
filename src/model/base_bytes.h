// What a base takes in its arena, known from the headers of its files before any weight is read.
#pragma once

#include <cstdint>
#include <functional>

#include "model/checkpoint.h"

namespace orbit {

struct MatrixFormat {
    WeightFormat format = WeightFormat::kBF16;
    int32_t group_size = 32;  // kInt4
};

// The format in which a weight lies in memory; asked for matrices only, vectors are float32.
using FormatOf = std::function<MatrixFormat(const ExpectedWeight&)>;

// Those that the loader chooses; `checkpoint` must outlive the function.
FormatOf placed_formats(const Checkpoint& checkpoint, const LoadOptions& options);

// Weights and rope tables, as the loader places them: every piece starts on 256 bytes.
int64_t base_bytes(const ModelConfig& config, const FormatOf& format_of);
int64_t base_bytes(const Checkpoint& checkpoint, const LoadOptions& options);

// Every linear layer that can carry an adapter, in the order of Model::sites.
std::vector<AdapterSite> adapter_sites(const ModelConfig& config);

}  // namespace orbit
