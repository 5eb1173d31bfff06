// What a run takes of the device's memory, line by line, before any weight is read.
#pragma once

#include <string>
#include <vector>

#include "model/base_bytes.h"
#include "rollout/engine.h"
#include "run/config.h"
#include "run/scratch_plan.h"

namespace orbit {

// Everything that is there at the same time, at the worst moment of the run.
struct MemoryPlan {
    std::vector<LedgerEntry> entries;  // of the device
    size_t scratch = 0;       // of the main stream: the larger of a training batch and a prefill
    size_t pinned = 0;        // of the host beside a GPU: layer inputs of a training batch
    size_t offloadable = 0;   // what train.activation_offloading would make of them
    size_t recomputable = 0;  // of the device: what train.recompute = "full" would save
    int64_t host_layers = 0;  // layers whose experts stay in host memory
    size_t host_experts = 0;  // of the host beside a GPU: bytes of those

    void add(const std::string& name, int64_t bytes);
    size_t total() const;
};

// The rollout engine's side; zero max_batch: no rollout.
struct RolloutShape {
    EngineOptions engine;
    int64_t longest_prompt = 0;
    int64_t longest = 0;  // prompt and answer
    SamplingFilter filter;
};

MemoryPlan plan_memory(
    const ScratchModel& model,
    int64_t base_bytes,
    const RolloutShape& rollout,
    const TrainShape& train
);

EngineOptions engine_options(const Config& config, int64_t longest_prompt);
TrainShape largest_batch(const Config& config, const ModelConfig& model, int64_t longest_prompt);
// Of the run that `config` describes. `available`: bytes of the device; when they are known and
// moe.host_layers is -1, a GPU keeps only the experts that fit.
MemoryPlan plan_run(
    const Config& config,
    const Device& device,
    const Checkpoint& checkpoint,
    int64_t longest_prompt,
    size_t available = 0
);

// UserError when the plan exceeds `available` bytes, or its pinned memory `host_available` (0: not
// known): the largest lines, and what to change.
void check_fits(
    const MemoryPlan& plan, const Config& config, size_t available, size_t host_available
);

std::string plan_text(const MemoryPlan& plan);  // "base 10.0 MiB, KV pages 2.0 MiB, ..."

}  // namespace orbit
