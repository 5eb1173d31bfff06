#include <fmt/core.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "adapter/peft_config.h"
#include "base/error.h"
#include "base/file.h"
#include "base/safetensors.h"
#include "cli/commands.h"
#include "model/checkpoint.h"
#include "run/checkpoint.h"
#include "run/config.h"

namespace orbit {
namespace {

std::string mlp_text(const ModelConfig& c) {
    return c.num_experts == 0 ? fmt::format("MLP {}", c.mlp_width)
                              : fmt::format(
                                    "{} experts of {} ({} a token)",
                                    c.num_experts,
                                    c.expert_width,
                                    c.experts_per_token
                                );
}

std::string size_text(double bytes) {
    const char* units[] = {"bytes", "KB", "MB", "GB", "TB"};
    int unit = 0;
    while (bytes >= 1000 && unit < 4) {
        bytes /= 1000;
        ++unit;
    }
    return unit == 0 ? fmt::format("{:.0f} bytes", bytes)
                     : fmt::format("{:.2f} {}", bytes, units[unit]);
}

std::string count_text(double count) {
    return count >= 1e9   ? fmt::format("{:.2f} billion", count / 1e9)
           : count >= 1e6 ? fmt::format("{:.2f} million", count / 1e6)
                          : fmt::format("{:.0f}", count);
}

// Parameters of the adapters that the defaults put on every linear layer.
void print_adapter_sizes(const std::vector<ExpectedWeight>& weights) {
    const AdapterOptions defaults;
    double oft = 0;
    double lora = 0;
    for (const auto& w : weights) {
        if (w.linear) {
            oft += static_cast<double>(w.shape[1]) * (defaults.block_size - 1) / 2;
            lora += static_cast<double>((w.shape[0] + w.shape[1]) * defaults.rank);
        }
    }
    // Masters, gradients and two moments in float32; two compute copies in bf16.
    fmt::print(
        "training adds: OFT block {} {} parameters, about {}; LoRA r{} {}, about {}; beside "
        "activations and KV pages\n",
        defaults.block_size,
        count_text(oft),
        size_text(oft * 16 + oft * 2 * 2 * defaults.block_size * 2 / (defaults.block_size - 1)),
        defaults.rank,
        count_text(lora),
        size_text(lora * 20)
    );
}

void inspect_model(const std::string& path) {
    const Checkpoint checkpoint = open_checkpoint(path);
    check_weights(checkpoint);
    const ModelConfig& c = checkpoint.config;
    double parameters = 0;
    double bytes = 0;
    std::map<std::string, std::pair<int64_t, double>> formats;  // name -> tensors, bytes
    for (const auto& [name, weight] : checkpoint.weights) {
        parameters += static_cast<double>(weight.numel());
        bytes += static_cast<double>(weight.bytes());
        auto& entry = formats[format_name(weight.format)];
        ++entry.first;
        entry.second += static_cast<double>(weight.bytes());
    }
    fmt::print(
        "{}: a {} model in {}\n",
        path,
        c.family,
        checkpoint.is_gguf ? "a GGUF file" : "a Hugging Face folder"
    );
    fmt::print(
        "{} parameters: {} layers, width {}, {}, {} heads of {} ({} for keys and values), "
        "vocabulary {}{}\n",
        count_text(parameters),
        c.num_layers,
        c.width,
        mlp_text(c),
        c.num_heads,
        c.head_dim,
        c.num_kv_heads,
        c.vocab_size,
        c.tied_embeddings ? ", embedding and head shared" : ""
    );
    fmt::print(
        "reads up to {} tokens; a token's keys and values take {}\n",
        c.max_positions,
        size_text(static_cast<double>(c.num_layers * 2 * c.num_kv_heads * c.head_dim * 2))
    );
    std::string list;
    for (const auto& [name, entry] : formats) {
        list += fmt::format(
            "{}{} {} ({} tensors)",
            list.empty() ? "" : ", ",
            name,
            size_text(entry.second),
            entry.first
        );
    }
    fmt::print("weights: {} as stored and in memory: {}\n", size_text(bytes), list);
    print_adapter_sizes(expected_weights(c));
    std::string stops;
    for (const int32_t id : checkpoint.eos_ids) {
        stops += (stops.empty() ? "" : ", ") + std::to_string(id);
    }
    fmt::print(
        "chat template: {}; end ids of the configs: {}\n",
        checkpoint.chat_template ? "yes" : "none (only --raw prompts)",
        stops.empty() ? "none" : stops
    );
}

void inspect_adapter(const std::string& path) {
    const std::string config_path = path + "/adapter_config.json";
    const PeftConfig config = parse_peft_config(config_path, read_file(config_path));
    const SafetensorsFile file(path + "/adapter_model.safetensors");
    int64_t parameters = 0;
    for (const auto& [name, tensor] : file.tensors()) {
        parameters += tensor.numel();
    }
    if (config.kind == AdapterKind::kLora) {
        fmt::print("{}: a LoRA adapter, r {}, alpha {}", path, config.rank, config.alpha);
        fmt::print("{}\n", config.rslora ? " (rank-stabilised)" : "");
    } else {
        fmt::print(
            "{}: an OFT adapter, {} {}, {}\n",
            path,
            config.block_size > 0 ? "block size" : "blocks",
            config.block_size > 0 ? config.block_size : config.num_blocks,
            config.exact_cayley ? "exact Cayley transform"
                                : fmt::format("Cayley-Neumann with {} terms", config.neumann_terms)
        );
    }
    std::string targets = config.all_linear ? "all linear layers" : config.target_regex;
    for (const auto& target : config.target_list) {
        targets += (targets.empty() ? "" : ", ") + target;
    }
    fmt::print(
        "{} parameters in {} tensors, on {}\n",
        count_text(static_cast<double>(parameters)),
        file.tensors().size(),
        targets
    );
}

void inspect_checkpoint(const std::string& path) {
    const RunCheckpoint checkpoint = load_checkpoint(path);
    fmt::print("{}: a whole checkpoint after {} steps\n", path, checkpoint.step);
    for (const auto& tensor : checkpoint.tensors) {
        fmt::print("  {}: {} float32 numbers\n", tensor.name, tensor.values.size());
    }
    fmt::print("state: {}\n", checkpoint.state_json);
    fmt::print("the adapter in PEFT form: {}/adapter\n", path);
}

void inspect_run(const std::string& path) {
    const Config config = load_config(path + "/config.toml");
    int64_t lines = 0;
    std::string last;
    std::ifstream metrics(path + "/metrics.jsonl");
    for (std::string line; std::getline(metrics, line);) {
        last = line;
        ++lines;
    }
    fmt::print(
        "{}: a run of {} on {}, {} adapter, {} of {} steps in metrics.jsonl\n",
        path,
        config.algorithm,
        config.model,
        config.adapter.kind,
        lines,
        config.train.steps
    );
    const auto row = nlohmann::json::parse(last, nullptr, false);
    if (row.is_object() && row.contains("reward/mean") && row["reward/mean"].is_number()) {
        fmt::print("last reward: {:.3f}\n", row["reward/mean"].get<double>());
    }
    if (const auto checkpoint = find_latest_checkpoint(path + "/checkpoints")) {
        fmt::print("newest whole checkpoint: {} steps\n", checkpoint->step);
    } else {
        fmt::print("no whole checkpoint\n");
    }
    if (file_exists(path + "/summary.json")) {
        fmt::print("finished: {}", read_file(path + "/summary.json"));
    } else {
        fmt::print("not finished; go on with: orbit resume {}\n", path);
    }
}

}  // namespace

int run_inspect(const std::string& path) {
    USER_CHECK(file_exists(path) || is_directory(path), "there is no {}.", path);
    if (file_exists(path + "/config.toml")) {
        inspect_run(path);
    } else if (file_exists(path + "/checkpoint.json")) {
        inspect_checkpoint(path);
    } else if (file_exists(path + "/adapter_config.json")) {
        inspect_adapter(path);
    } else {
        USER_CHECK(
            file_exists(path) || file_exists(path + "/config.json"),
            "{} holds no config.json (model), adapter_config.json (adapter), config.toml (run) or "
            "checkpoint.json (checkpoint).",
            path
        );
        inspect_model(path);
    }
    return 0;
}

}  // namespace orbit
