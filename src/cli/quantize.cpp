#include "model/quantize.h"

#include <fmt/core.h>

#include <algorithm>
#include <deque>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "base/file.h"
#include "base/log.h"
#include "base/safetensors.h"
#include "cli/commands.h"
#include "model/checkpoint.h"

namespace orbit {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

bool is_included(const std::string& name, const std::vector<std::string>& include) {
    return include.empty() || std::any_of(include.begin(), include.end(), [&](const auto& part) {
               return name.find(part) != std::string::npos;
           });
}

std::string module_of(const std::string& weight) {
    return weight.substr(0, weight.rfind('.'));
}

// Which matrices change their format, and which stay.
struct Plan {
    std::set<std::string> packed;    // weights
    std::vector<std::string> plain;  // modules, for the config
};

Plan make_plan(const Checkpoint& checkpoint, const QuantizeArgs& args) {
    Plan plan;
    for (const auto& expected : expected_weights(checkpoint.config)) {
        if (expected.linear && is_included(expected.name, args.include)) {
            const StoredWeight& stored = checkpoint.weights.at(expected.name);
            USER_CHECK(
                stored.scales.empty() && stored.format <= WeightFormat::kF16,
                "{}: \"{}\" is {} already; quantise the original model.",
                stored.file,
                expected.name,
                format_name(stored.format)
            );
            plan.packed.insert(expected.name);
        } else if (expected.linear || expected.name.ends_with(".mlp.gate.weight")) {
            plan.plain.push_back(module_of(expected.name));
        }
    }
    plan.plain.push_back("lm_head");
    USER_CHECK(!plan.packed.empty(), "--include names no linear layer of {}.", checkpoint.path);
    return plan;
}

// The weights that a stored tensor holds: itself, or the experts fused in it.
std::vector<std::string> weights_in(const Checkpoint& checkpoint, const StoredTensor& stored) {
    const std::string& name = stored.name;
    const bool gate_up = name.ends_with(".experts.gate_up_proj");
    if (!gate_up && !name.ends_with(".experts.down_proj")) {
        return {name};
    }
    std::vector<std::string> names;
    const std::string prefix = name.substr(0, name.rfind('.') + 1);
    for (int64_t e = 0; e < checkpoint.config.num_experts; ++e) {
        for (const char* projection : {"gate_proj", "up_proj", "down_proj"}) {
            if ((std::string_view(projection) == "down_proj") != gate_up) {
                names.push_back(fmt::format("{}{}.{}.weight", prefix, e, projection));
            }
        }
    }
    return names;
}

struct Totals {
    double error_sum = 0;
    double error_max = 0;
    int64_t matrices = 0;
    size_t bytes = 0;
};

class ShardWriter {
  public:
    ShardWriter(const Checkpoint& checkpoint, const Plan& plan, WeightFormat format)
        : checkpoint_(checkpoint), plan_(plan), format_(format), device_(make_device("cpu")) {}

    // Adds the tensors' names to the index.
    void write(const SafetensorsFile& shard, const std::string& path, ordered_json& weight_map) {
        std::vector<TensorToStore> tensors;
        std::deque<PackedMatrix> packed;
        for (const auto& [name, stored] : shard.tensors()) {
            for (const std::string& weight : weights_in(checkpoint_, stored)) {
                add(weight, stored, packed, tensors);
            }
        }
        for (const auto& tensor : tensors) {
            weight_map[tensor.name] = fs::path(path).filename().string();
            totals_.bytes += tensor.bytes;
        }
        write_safetensors(path, tensors, {{"format", "pt"}});
    }

    const Totals& totals() const { return totals_; }

  private:
    void add(
        const std::string& name,
        const StoredTensor& stored,
        std::deque<PackedMatrix>& packed,
        std::vector<TensorToStore>& tensors
    ) {
        if (!plan_.packed.contains(name)) {
            const bool fused = name != stored.name;
            const StoredWeight* part = fused ? &checkpoint_.weights.at(name) : nullptr;
            const auto bytes = fused ? part->data : stored.bytes;
            const auto& shape = fused ? part->shape : stored.shape;
            tensors.push_back({name, stored.dtype, shape, bytes.data(), bytes.size()});
            return;
        }
        const StoredWeight& weight = checkpoint_.weights.at(name);
        const PackedMatrix& matrix =
            packed.emplace_back(pack_matrix(*device_.threads, weight, format_));
        const std::string module = module_of(name);
        for (const PackedTensor& t : matrix.tensors) {
            tensors.push_back({module + t.suffix, t.dtype, t.shape, t.bytes.data(), t.bytes.size()}
            );
        }
        fmt::print(
            "{:<48} {:>14} error {:.4f}\n", module, shape_text(weight.shape), matrix.relative_error
        );
        totals_.error_sum += matrix.relative_error;
        totals_.error_max = std::max(totals_.error_max, matrix.relative_error);
        ++totals_.matrices;
    }

    const Checkpoint& checkpoint_;
    const Plan& plan_;
    WeightFormat format_;
    Device device_;
    Totals totals_;
};

// Everything a model folder has beside its weights and its config.
void copy_other_files(const std::string& in, const std::string& out) {
    for (const char* name :
         {"tokenizer.json",
          "tokenizer_config.json",
          "special_tokens_map.json",
          "added_tokens.json",
          "vocab.json",
          "merges.txt",
          "chat_template.jinja",
          "chat_template.json",
          "generation_config.json",
          "LICENSE"}) {
        if (file_exists(in + "/" + name)) {
            write_file_atomic(out + "/" + name, read_file(in + "/" + name));
        }
    }
}

}  // namespace

int run_quantize(const QuantizeArgs& args) {
    const WeightFormat format = parse_quantized_format(args.format);
    std::error_code error;
    USER_CHECK(
        !fs::exists(args.out, error) || fs::is_empty(args.out, error),
        "{} exists and is not empty; name a new folder.",
        args.out
    );
    const Checkpoint checkpoint = open_checkpoint(args.in);
    USER_CHECK(
        !checkpoint.is_gguf,
        "{} is a GGUF file; orbit quantize reads Hugging Face folders.",
        args.in
    );
    check_weights(checkpoint);
    const Plan plan = make_plan(checkpoint, args);
    make_directories(args.out);
    ordered_json weight_map = ordered_json::object();
    ShardWriter writer(checkpoint, plan, format);
    const size_t count = checkpoint.safetensors.size();
    for (size_t i = 0; i < count; ++i) {
        const std::string name =
            count == 1 ? "model.safetensors"
                       : fmt::format("model-{:05d}-of-{:05d}.safetensors", i + 1, count);
        writer.write(*checkpoint.safetensors[i], args.out + "/" + name, weight_map);
    }
    const Totals& totals = writer.totals();
    if (count > 1) {
        const ordered_json index = {
            {"metadata", {{"total_size", totals.bytes}}}, {"weight_map", weight_map}};
        write_file_atomic(args.out + "/model.safetensors.index.json", index.dump(2) + "\n");
    }
    copy_other_files(args.in, args.out);
    // The config comes last: a folder without it is no model yet.
    auto config = ordered_json::parse(read_file(args.in + "/config.json"), nullptr, false);
    CHECK(config.is_object());  // open_checkpoint has read it
    config["quantization_config"] =
        ordered_json::parse(quantization_config_text(format, plan.plain));
    write_file_atomic(args.out + "/config.json", config.dump(1) + "\n");
    fmt::print(
        "{}: {} matrices in {}, {:.1f} MB, relative error mean {:.4f} max {:.4f}\n",
        args.out,
        totals.matrices,
        args.format,
        static_cast<double>(totals.bytes) / 1e6,
        totals.error_sum / static_cast<double>(std::max<int64_t>(totals.matrices, 1)),
        totals.error_max
    );
    return 0;
}

}  // namespace orbit
