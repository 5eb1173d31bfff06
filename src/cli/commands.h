// One function per command. main.cpp fills the arguments from the command line; results go to
// stdout, words about progress to stderr. The return value is the exit status: 0 done, 1 a check
// failed, 130 stopped by Ctrl-C with a checkpoint. Bad input is a UserError.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "adapter/adapter.h"
#include "model/model.h"
#include "ops/logprob.h"
#include "reward/options.h"
#include "rollout/options.h"
#include "run/bench.h"
#include "run/gpu_plan.h"

namespace orbit {

struct DeviceArgs {
    std::string device = "auto";
    std::string cpu_isa = "auto";
    int threads = 0;
};

struct ModelArgs {
    std::string model;
    std::string adapter;               // PEFT folder, or a run folder; empty: none
    std::string quantize;              // "int4": quantise at load
    std::string activations = "bf16";  // "f32": the check mode
    int64_t host_layers = 0;           // as moe.host_layers, but nothing is chosen here
    DeviceArgs device;
};

struct TrainArgs {
    std::string config;
    std::vector<std::string> overrides;
    std::string device;  // empty: the config's
    std::string run;
};

struct EvalArgs {
    ModelArgs model;
    std::string data;
    std::string prompt_field = "prompt";
    std::string answer_field = "answer";
    std::string system;
    RewardOptions reward;
    int64_t samples = 0;
    std::vector<int64_t> k = {1, 4};
    int64_t max_questions = 0;
    int64_t max_tokens = 64;
    int64_t max_batch = 256;
    float temperature = 1.0f;
    uint64_t seed = 1;
    bool json = false;
};

struct GenerateArgs {
    ModelArgs model;
    std::string prompt;
    bool has_prompt = false;
    std::string system;
    int64_t max_tokens = 256;
    SamplingFilter filter{0.0f, 1.0f, 0, 0.0f};
    std::vector<std::string> stop;
    uint64_t seed = 1;
    bool raw = false;
};

struct VerifyArgs {
    ModelArgs model;
    std::string reference;
    double tolerance = -1;           // of log-probs; below 0: the default of the mode
    double gradient_tolerance = -1;  // the same
};

struct ParityArgs {
    ModelArgs model;
    std::string shape;  // a synthetic model instead
    std::string format = "bf16";
    int64_t num_texts = 64;
    int64_t longest = 192;
};

struct ScoreArgs {
    std::string data;
    std::string response_field = "response";
    std::string answer_field = "answer";
    RewardOptions reward;
    bool json = false;
};

struct QuantizeArgs {
    std::string in;
    std::string out;
    std::string format = "int4";
    std::vector<std::string> include;
};

struct BenchArgs {
    std::string model;
    std::string shape;  // a synthetic model instead
    std::string format = "bf16";
    int64_t host_layers = 0;  // > 0: also without, and both side by side
    BenchOptions options;
    std::vector<std::string> only;
    std::string json;
    DeviceArgs device;
};

struct PlanArgs {
    std::string model;
    std::string format;  // empty: as published
    GpuPlanOptions options;
};

int run_plan(const PlanArgs& args);
int run_bench(const BenchArgs& args);
int run_train(const TrainArgs& args);
int run_resume(const std::string& folder);
int run_eval(const EvalArgs& args);
int run_generate(const GenerateArgs& args);
int run_verify(const VerifyArgs& args);
int run_parity(const ParityArgs& args);
int run_score(const ScoreArgs& args);
int run_quantize(const QuantizeArgs& args);
int run_inspect(const std::string& path);

// The model at `path`, or with a `shape` a synthetic one; exactly one of them is given.
std::unique_ptr<Model> load_or_make_model(
    Stream& stream,
    const std::string& path,
    const LoadOptions& load,
    const std::string& shape,
    const std::string& format
);

// A model on its device, with the adapter that was asked for.
struct OpenModel {
    explicit OpenModel(const ModelArgs& args);

    Device device;
    Stream stream;
    std::unique_ptr<Model> model;
    std::unique_ptr<AdapterStore> adapter;  // null: the base
};

// The PEFT folder that `path` names: itself, or the final adapter of a run folder.
std::string adapter_folder(const std::string& path);

}  // namespace orbit
