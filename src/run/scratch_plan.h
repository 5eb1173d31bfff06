// Predicts the scratch memory of a forward, a training batch and a decode step by walking through
// the takes of the ops, in their order, without doing the work. It mirrors forward.cpp,
// trainer.cpp, engine.cpp, decode_loop.cpp and the ops of either device: who changes what they take
// changes it here, and tests/plan_test.cpp says so when they differ.
#pragma once

#include <cstdint>

#include "adapter/adapter.h"
#include "model/base_bytes.h"
#include "ops/logprob.h"

namespace orbit {

// What the takes depend on, beside the batch.
struct ScratchModel {
    ModelConfig config;
    AdapterOptions adapter;  // kind "none": the base
    DType compute = DType::kBF16;
    bool on_cpu = true;
    CpuIsa isa = CpuIsa::kReference;
    int64_t threads = 1;
    DequantOptions dequant;      // of experts
    int64_t staged = 0;          // bytes for the experts of a layer that stays in host memory
    bool decodes_first = false;  // the device does (ops/decoded_weights.h)
    PackedParts packed;
};

ScratchModel scratch_model(
    const Device& device, const ModelConfig& config, const AdapterOptions& adapter
);

// A packed batch of whole sequences.
struct TrainShape {
    int64_t tokens = 0;  // computed: of each sequence all but the last one
    int64_t rows = 0;    // response tokens
    int64_t sequences = 1;
    int64_t longest = 0;  // tokens of the longest sequence
    SamplingFilter filter;
    bool replay_routing = false;
    bool offload = false;         // layer inputs, all but two, in host memory
    bool keep_attention = false;  // its outputs, of every layer, for backward
};

struct PrefillShape {
    int64_t tokens = 0;
    int64_t draws = 0;  // first tokens drawn after it
    int64_t sequences = 1;
    int64_t longest = 0;
    SamplingFilter filter;
};

int64_t training_pages(const TrainShape& shape);        // at the most
int64_t routing_page_bytes(const ScratchModel& model);  // recorded choices of experts

// In use at the most, all in one block (Scratch::reserve).
int64_t training_scratch(const ScratchModel& model, const TrainShape& shape);
int64_t prefill_scratch(const ScratchModel& model, const PrefillShape& shape);

// Allocated by the stream of a decode loop, in blocks.
int64_t decode_scratch(
    const ScratchModel& model, int64_t batch, int64_t longest, const SamplingFilter& filter
);

}  // namespace orbit
