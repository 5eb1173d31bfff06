// Models as `orbit plan` sees them: lists of matrices with their formats. The published models of
// models.md 13 are known by name; a folder or a GGUF file says the rest. Planning knows more
// families than the engine runs.
#pragma once

#include <string>
#include <vector>

#include "model/base_bytes.h"

namespace orbit {

// `count` matrices of one shape, all layers together.
struct PlanMatrix {
    std::string leaf;  // "q_proj"
    int64_t rows = 0;
    int64_t cols = 0;
    int64_t count = 0;
    WeightFormat format = WeightFormat::kBF16;
    int32_t group_size = 32;  // kInt4
    bool expert = false;      // of a routed expert
    bool linear = false;      // may be quantised and adapted
    bool attention = false;

    double params() const;
    double bytes() const;
};

struct PlanModel {
    std::string name;
    std::string family;
    bool runs = false;   // the engine computes this family
    ModelConfig config;  // when it runs
    int64_t num_layers = 0;
    int64_t expert_layers = 0;
    int64_t width = 0;
    int64_t vocabulary = 0;
    int64_t experts = 0;
    int64_t experts_per_token = 0;
    int64_t expert_width = 0;
    int64_t shared_experts = 0;
    int64_t mlp_width = 0;
    int64_t streams = 1;           // residual streams
    int64_t kv_shards = 1;         // GPUs that can share the keys and values of one sequence
    double kv_token_bytes = 0;     // of one token, all layers, bf16
    double kv_sequence_bytes = 0;  // of one sequence, whatever its length
    double vector_params = 0;      // norms, biases and tables
    double vector_bytes = 0;
    std::vector<PlanMatrix> matrices;

    double params() const;
    double expert_bytes() const;
    double other_bytes() const;
    double expert_params() const;
};

std::vector<std::string> planned_models();  // names

// `model`: a folder with a config.json, a GGUF file, or one of planned_models(). `format`: "" as
// published, or bf16, int4, fp8, mxfp4, nvfp4 for the routed experts (of a dense model: for all
// linear layers).
PlanModel plan_model(const std::string& model, const std::string& format);

}  // namespace orbit
