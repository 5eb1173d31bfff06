// orbit bench: times of kernels, the decode step, the training step and the RL step on the device
// at hand, each beside its floor (bytes over bandwidth, operations over the matrix rate).
#pragma once

#include <string>
#include <vector>

#include "adapter/adapter.h"
#include "model/model.h"

namespace orbit {

struct BenchOptions {
    std::string adapter = "lora";  // lora, oft, none: on every linear layer
    double copy_bytes_per_s = 0;   // ceilings; 0: measured here (copy), or left out (matrix rate)
    double matrix_flops_per_s = 0;
    std::vector<int64_t> decode_batches = {1, 64, 256};
    int64_t context = 1024;
    int64_t train_length = 2048;          // tokens of one packed sequence
    int64_t train_tokens = 8192;          // tokens of one batch
    std::string recompute = "selective";  // train.recompute
    bool activation_offloading = false;
    int64_t rl_prompts = 64;
    int64_t rl_samples = 8;
    int64_t rl_prompt_tokens = 128;
    int64_t rl_response_tokens = 512;
    size_t memory_before = 0;  // of a GPU, in use before the model was made
    bool kernels = true;
    bool decode = true;
    bool train = true;
    bool rl = true;
};

struct BenchRow {
    std::string what;  // "linear", "decode step", ...
    std::string shape;
    double time_us = 0;   // median
    double floor_us = 0;  // 0: no floor known
    double tokens_per_s = 0;
    double memory_bytes = 0;
    double streamed_us = 0;  // of experts in host memory: predicted bytes over the link's rate
    std::string digest;      // of the tokens and log-probs, or of the trained adapter
    std::string note;
};

// A row of a model with all experts on the device, and of the same with some in host memory.
struct HostExpertsRow {
    std::string what;
    std::string shape;
    double device_us = 0;
    double host_us = 0;
    double predicted_us = 0;  // device_us and what is streamed; 0: no prediction
    bool equal_bits = false;
};

std::vector<HostExpertsRow> compare_host_experts(
    const std::vector<BenchRow>& device, const std::vector<BenchRow>& host
);

std::vector<BenchRow> run_bench_table(
    Stream& stream, const Model& model, const BenchOptions& options
);

}  // namespace orbit
