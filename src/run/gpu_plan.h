// orbit plan: what a model and its training take on each of several GPUs, by arithmetic alone.
#pragma once

#include <string>
#include <vector>

#include "run/memory_plan.h"
#include "run/plan_models.h"

namespace orbit {

struct Gpu {
    const char* name;
    double memory_mib;           // what the driver reports
    double memory_rate;          // bytes/s, published
    double host_rate;            // bytes/s from host memory, published one-way rate of the slot
    bool decodes_first = false;  // packed weights, for products of many rows: Hopper
};

const std::vector<Gpu>& known_gpus();

struct GpuSet {
    Gpu gpu;
    int64_t count = 1;
};

// "8xH200", "H100", "2xA100-40GB". UserError names the nearest.
GpuSet parse_gpus(const std::string& text);

struct GpuPlanOptions {
    std::string gpus = "1xH100";
    int64_t batch = 64;                   // sequences that are decoded together
    int64_t context = 4096;               // tokens of each, prompt and answer
    int64_t tokens = 8192;                // of a training batch
    std::string recompute = "selective";  // train.recompute
    bool activation_offloading = false;
    AdapterOptions adapter;
    int64_t dequant_bytes = MoeOptions{}.dequant_bytes;
};

struct GpuPlan {
    GpuSet set;
    std::vector<LedgerEntry> entries;  // of one GPU
    size_t pinned = 0;                 // of the host for each GPU: layer inputs
    double usable = 0;
    bool exact = false;            // counted as the engine takes it: one GPU, a family that runs
    int64_t host_layers = 0;       // layers whose experts would have to be in host memory
    double staged_bytes = 0;       // for the active ones of a layer, then
    double decode_slowdown = 1;    // predicted from floors, then
    double decode_transfer_s = 0;  // seconds that a decode step adds, then
    double train_transfer_s = 0;   // and a training batch

    double total() const;

    bool fits() const { return total() <= usable; }
};

GpuPlan plan_gpus(const PlanModel& model, const GpuPlanOptions& options);

// The table and the verdict, for people.
std::string gpu_plan_text(
    const PlanModel& model, const GpuPlanOptions& options, const GpuPlan& plan
);

}  // namespace orbit
