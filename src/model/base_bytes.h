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

// Of that, the experts of the last `layers` layers that have some, which host memory holds instead
// of the device. UserError when the model has fewer such layers.
struct HostExperts {
    int64_t bytes = 0;
    int64_t staged = 0;  // on the device, for one layer at a time: the largest
};

// UserError when the model has fewer layers with experts.
void check_host_layers(const ModelConfig& config, int64_t layers);

HostExperts host_experts(const ModelConfig& config, const FormatOf& format_of, int64_t layers);

// One block of `model`'s arena for the base, one of host memory for the experts that stay there,
// and staged_bytes.
void reserve_base(Model& model, const FormatOf& format_of, int64_t host_layers);

// Which of a base's weights are packed, in the formats in which they lie in memory.
struct PackedParts {
    bool linears = false;  // some of those outside of experts
    bool head = false;
};

PackedParts packed_parts(const ModelConfig& config, const FormatOf& format_of);
PackedParts packed_parts(const Model& model);

// Every linear layer that can carry an adapter, in the order of Model::sites.
std::vector<AdapterSite> adapter_sites(const ModelConfig& config);

}  // namespace orbit
