// Config: everything that defines a run. Each layer owns its option struct; this file puts them
// into one tree, and config.cpp reads it from TOML and from --set, writes it back complete, and
// checks ranges. A key that does not exist, a wrong type and a value out of range are UserErrors
// that name file, line and the nearest key.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "adapter/adapter.h"
#include "data/options.h"
#include "reward/options.h"
#include "rl/options.h"
#include "rollout/options.h"
#include "train/options.h"

namespace orbit {

struct CpuOptions {
    std::string isa = "auto";
    int32_t threads = 0;

    void visit(auto&& field) {
        field("isa", isa, "auto, reference, avx2, avx512 or amx");
        field("threads", threads, "worker threads; 0: one per processor");
    }
};

struct CheckpointOptions {
    int64_t every = 10;
    int64_t keep = 2;

    void visit(auto&& field) {
        field("every", every, "steps between checkpoints; 0: only at the end");
        field("keep", keep, "newest checkpoints that are kept");
    }
};

constexpr int64_t kHostLayersAuto = -1;

struct MoeOptions {
    int64_t dequant_bytes = int64_t{256} << 20;
    int64_t dequant_rows = 0;
    bool replay_routing = false;
    int64_t host_layers = kHostLayersAuto;

    void visit(auto&& field) {
        field(
            "dequant_bytes",
            dequant_bytes,
            "temporary memory for experts that are decoded to bf16 before the product"
        );
        field(
            "dequant_rows",
            dequant_rows,
            "rows per expert from which a forward or backward decodes first; 0: never"
        );
        field(
            "replay_routing",
            replay_routing,
            "training takes the experts that the rollout recorded, not its own choice"
        );
        field(
            "host_layers",
            host_layers,
            "layers, counted from the last, whose experts stay in host memory; -1: on a GPU as "
            "many "
            "as do not fit"
        );
    }
};

struct Config {
    std::string model;
    std::string quantize;
    std::string algorithm = "grpo";
    uint64_t seed = 1;
    std::string device = "auto";
    CpuOptions cpu;
    DataOptions data;
    RewardOptions reward;
    RolloutOptions rollout;
    AdapterOptions adapter;
    TrainOptions train;
    MoeOptions moe;
    CheckpointOptions checkpoint;
    EvalOptions eval;

    // Top-level keys, then section by section; `section` is called before the keys of each.
    void visit(auto&& section, auto&& field) {
        field("model", model, "Hugging Face folder or GGUF file of the base model");
        field("quantize", quantize, "quantise a BF16 base while loading: int4; empty: as stored");
        field("algorithm", algorithm, "grpo");
        field("seed", seed, "the run is a function of config and seed");
        field("device", device, "auto, cpu or cuda:0");
        const auto visit_section = [&](const char* name, auto& options) {
            section(name);
            options.visit(field);
        };
        visit_section("cpu", cpu);
        visit_section("data", data);
        visit_section("reward", reward);
        visit_section("rollout", rollout);
        visit_section("adapter", adapter);
        visit_section("train", train);
        visit_section("moe", moe);
        visit_section("checkpoint", checkpoint);
        visit_section("eval", eval);
    }
};

// `overrides`: "key=value" as given to --set, applied in order; a value that is not TOML is taken
// as a string. Relative paths (model, data.*) are looked for beside the config file, then in the
// working directory, and become absolute.
Config load_config(const std::string& path, const std::vector<std::string>& overrides = {});

// The same from text; `path` is for messages and relative paths.
Config parse_config(
    std::string_view text, const std::string& path, const std::vector<std::string>& overrides = {}
);

// UserError with a sentence for the first value out of range.
void check_config(const Config& config);

// The complete config, each key with its value; parse_config() of it gives the same config.
std::string to_toml(const Config& config);

// docs/CONFIG.md: every key with type, default and meaning.
std::string config_reference();

// Every key as "section.key", in order.
std::vector<std::string> config_keys();

}  // namespace orbit
