// Adapters on the experts of a layer: which parts they share (algorithms.md 1.2, 1.7), and the
// stacked tensors of a file (docs/ADAPTERS.md).
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "adapter/state.h"
#include "base/safetensors.h"

namespace orbit {

// "model.layers.3.mlp.experts.7.up_proj" taken apart.
struct ExpertModule {
    std::string group;  // "model.layers.3.mlp.experts"
    int64_t expert = 0;
    std::string leaf;  // "up_proj"
};

std::optional<ExpertModule> expert_module(const std::string& module);

// The common module name of a part that all experts of a layer share, or "" for a part of its own.
// Shared: LoRA's A of gate and up (the layer's input) and B of down (its output); OFT's one
// rotation before gate and up.
std::string shared_module(const AdapterOptions& options, const std::string& module, bool is_b);

// UserError when sharing is on and some expert of a layer is adapted and another one is not.
void check_expert_groups(const AdapterOptions& options, const std::vector<SiteLayout>& sites);

using AdapterTensors = std::map<std::string, StoredTensor>;

// The tensors of a file with the stacked ones taken apart, each expert's under its own name; a
// shared part is every expert's. `sharing` becomes what the shapes say: "none" or "shared".
AdapterTensors split_stacked(
    const SafetensorsFile& file, const std::vector<AdapterSite>& sites, std::string& sharing
);

// A tensor ready to be written.
struct OwnedTensor {
    std::string name;
    std::vector<int64_t> shape;
    std::vector<float> values;
};

// All tensors of an adapter with shared parts: the experts' stacked, the others as they are.
std::vector<OwnedTensor> stack_tensors(
    const AdapterStore::State& state, const std::vector<float>& masters
);

}  // namespace orbit
