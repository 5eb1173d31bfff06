// Checkpoint: what the files of a model say, checked but not copied. One shape for a Hugging Face
// folder and a GGUF file, so that loading, inspecting and quantising need not know the container.
// Owns the mappings that its weights point into.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/safetensors.h"
#include "model/model.h"

namespace orbit {

struct StoredWeight {
    std::string name;  // as in the file, for people
    std::string file;
    WeightFormat format = WeightFormat::kBF16;
    std::vector<int64_t> shape;       // logical and row-major: [out, in], or [n]
    std::span<const std::byte> data;  // unaligned
    std::span<const std::byte> scales;
    WeightFormat scale_format = WeightFormat::kBF16;  // kInt4, kFp8: BF16, F16 or F32
    int32_t group_size = 32;                          // kInt4
    bool e8m0_scales = false;                         // kFp8: instead of scale_format
    float global_scale = 1;                           // kNvFp4, as in QuantizedMatrix
    bool global_divides = false;
    // Heads whose rows are stored in the interleaved rope order (q and k of llama GGUF files); 0:
    // rows are as Hugging Face has them.
    int64_t interleaved_heads = 0;
    // Row r of the matrix is row first_row + r row_step of `data` and `scales` (kMxFp4).
    int64_t first_row = 0;
    int64_t row_step = 1;

    int64_t numel() const;

    size_t bytes() const { return (data.size() + scales.size()) / static_cast<size_t>(row_step); }
};

struct Checkpoint {
    std::string path;
    bool is_gguf = false;
    ModelConfig config;
    std::vector<float> rope_factors;  // GGUF rope_freqs.weight: frequency i is divided by [i]
    // By Hugging Face name: "model.layers.0.self_attn.q_proj.weight".
    std::map<std::string, StoredWeight> weights;

    std::string tokenizer_file;          // for messages
    std::string tokenizer_json;          // Hugging Face
    GgufTokenizerFields tokenizer_gguf;  // GGUF
    std::optional<std::string> chat_template;
    std::string bos_token;  // texts, may be empty
    std::string eos_token;
    std::vector<int32_t> eos_ids;  // of config.json and generation_config.json

    std::vector<std::unique_ptr<SafetensorsFile>> safetensors;
    std::unique_ptr<MappedFile> gguf;
};

struct OpenOptions {
    bool weights = true;
    bool tokenizer = true;
};

// UserError names the file, the tensor or field, and the fix.
Checkpoint open_checkpoint(const std::string& path, const OpenOptions& options = {});
Checkpoint open_hf_folder(const std::string& folder, const OpenOptions& options);
Checkpoint open_gguf(const std::string& file, const OpenOptions& options);

// What a family's checkpoint must hold, by Hugging Face name, with its shape, in the order of the
// forward pass: embedding, layers, final norm, head (absent when tied).
struct ExpectedWeight {
    std::string name;
    std::vector<int64_t> shape;
    bool linear = false;        // a matrix of a layer that may be quantised and adapted
    int64_t expert_layer = -1;  // of a routed expert: its layer, counted among those with experts
};

std::vector<ExpectedWeight> expected_weights(const ModelConfig& config);

// Every expected weight is there in its shape and nothing is left over that the family would need.
void check_weights(const Checkpoint& checkpoint);

// load_model in two steps: config, tokenizer and template; then the weights.
std::unique_ptr<Model> make_model(const Device& device, const Checkpoint& checkpoint);
void load_weights(
    Stream& stream, const Checkpoint& checkpoint, const LoadOptions& options, Model& model
);

std::string shape_text(const std::vector<int64_t>& shape);  // "[256, 768]"

}  // namespace orbit
