#include <fmt/core.h>

#include <cmath>
#include <cstring>
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

constexpr int32_t kGroup = 32;

// The three tensors that stand for one matrix in compressed-tensors' pack-quantized layout.
struct PackedMatrix {
    std::vector<uint32_t> words;
    std::vector<bf16> scales;
    int64_t shape[2] = {0, 0};
    double relative_error = 0;  // RMS of the difference over RMS of the weights
};

PackedMatrix pack(const StoredWeight& weight) {
    const int64_t rows = weight.shape[0];
    const int64_t cols = weight.shape[1];
    PackedMatrix out;
    out.shape[0] = rows;
    out.shape[1] = cols;
    out.words.resize(static_cast<size_t>(rows * cols / 8));
    out.scales.resize(static_cast<size_t>(rows * cols / kGroup));
    const size_t stored = static_cast<size_t>(row_bytes(weight.format, cols));
    std::vector<float> aligned(stored / sizeof(float) + 1);  // the file's bytes are not aligned
    std::vector<float> row(static_cast<size_t>(cols));
    std::vector<float> back(static_cast<size_t>(cols));
    double error = 0;
    double total = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const std::byte* source = weight.data.data() + static_cast<size_t>(r) * stored;
        std::memcpy(aligned.data(), source, stored);
        const QuantizedMatrix plain{weight.format, 1, cols, kGroup, aligned.data(), nullptr};
        decode_f32(plain, 0, 0, cols, row.data());
        uint32_t* words = out.words.data() + r * cols / 8;
        bf16* scales = out.scales.data() + r * cols / kGroup;
        encode_int4(row.data(), cols, kGroup, words, scales);
        const QuantizedMatrix packed{WeightFormat::kInt4, 1, cols, kGroup, words, scales};
        decode_f32(packed, 0, 0, cols, back.data());
        for (size_t c = 0; c < row.size(); ++c) {
            const double difference = static_cast<double>(row[c]) - static_cast<double>(back[c]);
            error += difference * difference;
            total += static_cast<double>(row[c]) * static_cast<double>(row[c]);
        }
    }
    out.relative_error = total > 0 ? std::sqrt(error / total) : 0;
    return out;
}

ordered_json quantization_config() {
    return ordered_json::parse(R"({
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "kv_cache_scheme": null,
        "global_compression_ratio": null,
        "config_groups": {"group_0": {
            "input_activations": null, "output_activations": null, "targets": ["Linear"],
            "format": "pack-quantized",
            "weights": {"num_bits": 4, "type": "int", "symmetric": true, "group_size": 32,
                        "strategy": "group", "dynamic": false, "observer": "minmax",
                        "observer_kwargs": {}, "actorder": null, "block_structure": null}}},
        "ignore": ["lm_head"]})");
}

std::set<std::string> linear_names(const Checkpoint& checkpoint) {
    std::set<std::string> names;
    for (const auto& expected : expected_weights(checkpoint.config)) {
        if (!expected.linear) {
            continue;
        }
        const StoredWeight& weight = checkpoint.weights.at(expected.name);
        USER_CHECK(
            weight.format == WeightFormat::kBF16 || weight.format == WeightFormat::kF16 ||
                weight.format == WeightFormat::kF32,
            "{}: \"{}\" is {} already; quantise the original model.",
            weight.file,
            weight.name,
            format_name(weight.format)
        );
        USER_CHECK(
            weight.shape[1] % kGroup == 0,
            "{}: \"{}\" has {} columns, which groups of {} do not divide.",
            weight.file,
            weight.name,
            weight.shape[1],
            kGroup
        );
        names.insert(expected.name);
    }
    return names;
}

struct Totals {
    double error_sum = 0;
    double error_max = 0;
    int64_t matrices = 0;
    size_t bytes = 0;
};

// Writes one shard; adds its names to the index.
void write_shard(
    const Checkpoint& checkpoint,
    const SafetensorsFile& shard,
    const std::set<std::string>& linear,
    const std::string& path,
    ordered_json& weight_map,
    Totals& totals
) {
    std::vector<TensorToStore> tensors;
    std::vector<std::unique_ptr<PackedMatrix>> packed;
    for (const auto& [name, stored] : shard.tensors()) {
        if (!linear.contains(name)) {
            tensors.push_back(
                {name, stored.dtype, stored.shape, stored.bytes.data(), stored.bytes.size()}
            );
            continue;
        }
        const auto& p =
            packed.emplace_back(std::make_unique<PackedMatrix>(pack(checkpoint.weights.at(name))));
        const std::string base = name.substr(0, name.rfind('.'));
        const int64_t rows = p->shape[0];
        const int64_t cols = p->shape[1];
        tensors.push_back(
            {base + ".weight_packed", "I32", {rows, cols / 8}, p->words.data(), p->words.size() * 4}
        );
        tensors.push_back(
            {base + ".weight_scale",
             "BF16",
             {rows, cols / kGroup},
             p->scales.data(),
             p->scales.size() * 2}
        );
        tensors.push_back({base + ".weight_shape", "I64", {2}, p->shape, sizeof p->shape});
        fmt::print(
            "{:<48} {:>14} error {:.4f}\n", base, shape_text({rows, cols}), p->relative_error
        );
        totals.error_sum += p->relative_error;
        totals.error_max = std::max(totals.error_max, p->relative_error);
        ++totals.matrices;
    }
    for (const auto& tensor : tensors) {
        weight_map[tensor.name] = fs::path(path).filename().string();
        totals.bytes += tensor.bytes;
    }
    write_safetensors(path, tensors, {{"format", "pt"}});
}

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
    USER_CHECK(args.format == "int4", "--format must be int4, but is \"{}\".", args.format);
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
    const auto linear = linear_names(checkpoint);
    make_directories(args.out);
    ordered_json weight_map = ordered_json::object();
    Totals totals;
    const size_t count = checkpoint.safetensors.size();
    for (size_t i = 0; i < count; ++i) {
        const std::string name =
            count == 1 ? "model.safetensors"
                       : fmt::format("model-{:05d}-of-{:05d}.safetensors", i + 1, count);
        write_shard(
            checkpoint,
            *checkpoint.safetensors[i],
            linear,
            args.out + "/" + name,
            weight_map,
            totals
        );
    }
    if (count > 1) {
        const ordered_json index = {
            {"metadata", {{"total_size", totals.bytes}}}, {"weight_map", weight_map}};
        write_file_atomic(args.out + "/model.safetensors.index.json", index.dump(2) + "\n");
    }
    copy_other_files(args.in, args.out);
    // The config comes last: a folder without it is no model yet.
    auto config = ordered_json::parse(read_file(args.in + "/config.json"), nullptr, false);
    CHECK(config.is_object());  // open_checkpoint has read it
    config["quantization_config"] = quantization_config();
    write_file_atomic(args.out + "/config.json", config.dump(1) + "\n");
    fmt::print(
        "{}: {} matrices in int4, {:.1f} MB, relative error mean {:.4f} max {:.4f}\n",
        args.out,
        totals.matrices,
        static_cast<double>(totals.bytes) / 1e6,
        totals.error_sum / static_cast<double>(std::max<int64_t>(totals.matrices, 1)),
        totals.error_max
    );
    return 0;
}

}  // namespace orbit
