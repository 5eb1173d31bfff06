// A Hugging Face folder (models.md 9): config, one or many safetensors files, tokenizer, template.
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/log.h"
#include "model/checkpoint.h"
#include "model/config.h"

namespace orbit {
namespace {

using nlohmann::json;

// Names of Hugging Face files are read from the folder alone: a name with a separator could lead
// anywhere.
void check_shard_name(const std::string& name, const std::string& index) {
    USER_CHECK(
        !name.empty() && name.find('/') == std::string::npos &&
            name.find('\\') == std::string::npos && name != ".." &&
            name.find('\0') == std::string::npos,
        "{}: the file name \"{}\" leaves the folder.",
        index,
        name
    );
}

// Tensor name -> file name. Empty without an index.
std::map<std::string, std::string> read_index(const std::string& path) {
    const json index = json::parse(read_file(path), nullptr, false);
    USER_CHECK(
        index.is_object() && index.contains("weight_map") && index["weight_map"].is_object(),
        "{}: \"weight_map\" is missing; fetch the file again.",
        path
    );
    std::map<std::string, std::string> files;
    for (const auto& [tensor, file] : index["weight_map"].items()) {
        USER_CHECK(file.is_string(), "{}: \"{}\" has no file name.", path, tensor);
        check_shard_name(file.get<std::string>(), path);
        files.emplace(tensor, file.get<std::string>());
    }
    return files;
}

using TensorMap = std::map<std::string, const StoredTensor*>;

TensorMap open_safetensors(const std::string& folder, Checkpoint& checkpoint) {
    TensorMap tensors;
    const std::string single = folder + "/model.safetensors";
    const std::string index = folder + "/model.safetensors.index.json";
    if (file_exists(single) || !file_exists(index)) {
        USER_CHECK(
            file_exists(single),
            "{} holds neither model.safetensors nor model.safetensors.index.json; weights in other "
            "formats (.bin, .pth) have to be saved as safetensors first.",
            folder
        );
        checkpoint.safetensors.push_back(std::make_unique<SafetensorsFile>(single));
        for (const auto& [name, tensor] : checkpoint.safetensors.back()->tensors()) {
            tensors.emplace(name, &tensor);
        }
        return tensors;
    }
    std::map<std::string, const SafetensorsFile*> opened;
    for (const auto& [name, file] : read_index(index)) {
        const SafetensorsFile*& shard = opened[file];
        if (shard == nullptr) {
            checkpoint.safetensors.push_back(std::make_unique<SafetensorsFile>(folder + "/" + file)
            );
            shard = checkpoint.safetensors.back().get();
        }
        tensors.emplace(name, &shard->tensor(name));
    }
    return tensors;
}

StoredWeight plain_weight(const StoredTensor& tensor) {
    StoredWeight weight;
    weight.name = tensor.name;
    weight.file = tensor.file;
    weight.shape = tensor.shape;
    weight.data = tensor.bytes;
    USER_CHECK(
        tensor.dtype == "BF16" || tensor.dtype == "F16" || tensor.dtype == "F32",
        "{}: the tensor \"{}\" is {}; BF16, F16 and F32 are supported.",
        tensor.file,
        tensor.name,
        tensor.dtype
    );
    weight.format = tensor.dtype == "BF16"  ? WeightFormat::kBF16
                    : tensor.dtype == "F16" ? WeightFormat::kF16
                                            : WeightFormat::kF32;
    return weight;
}

const StoredTensor& sibling(
    const TensorMap& tensors, const StoredTensor& packed, const std::string& name
) {
    const auto found = tensors.find(name);
    USER_CHECK(
        found != tensors.end(),
        "{}: the tensor \"{}\" has no \"{}\" beside it.",
        packed.file,
        packed.name,
        name
    );
    return *found->second;
}

// weight_shape: two integers (I32 or I64), the unpacked [out, in].
std::vector<int64_t> unpacked_shape(const StoredTensor& shape) {
    USER_CHECK(
        shape.numel() == 2 && (shape.dtype == "I32" || shape.dtype == "I64"),
        "{}: the tensor \"{}\" must hold two I32 or I64 sizes.",
        shape.file,
        shape.name
    );
    std::vector<int64_t> dims;
    for (size_t i = 0; i < 2; ++i) {
        int64_t value = 0;
        if (shape.dtype == "I32") {
            int32_t narrow = 0;
            std::memcpy(&narrow, shape.bytes.data() + i * sizeof narrow, sizeof narrow);
            value = narrow;
        } else {
            std::memcpy(&value, shape.bytes.data() + i * sizeof value, sizeof value);
        }
        dims.push_back(value);
    }
    return dims;
}

// compressed-tensors pack-quantized, symmetric INT4 (models.md 10.4).
StoredWeight packed_weight(
    const TensorMap& tensors, const StoredTensor& packed, const std::string& module
) {
    const StoredTensor& scale = sibling(tensors, packed, module + ".weight_scale");
    const StoredTensor& shape = sibling(tensors, packed, module + ".weight_shape");
    for (const char* refused : {".weight_zero_point", ".weight_g_idx"}) {
        USER_CHECK(
            !tensors.contains(module + refused),
            "{}: \"{}{}\" belongs to asymmetric or reordered INT4, which is not supported.",
            packed.file,
            module,
            refused
        );
    }
    StoredWeight weight = plain_weight(scale);
    weight.scale_format = weight.format;
    weight.format = WeightFormat::kInt4;
    weight.name = packed.name;
    weight.file = packed.file;
    weight.data = packed.bytes;
    weight.scales = scale.bytes;
    weight.shape = unpacked_shape(shape);
    const int64_t rows = weight.shape[0];
    const int64_t cols = weight.shape[1];
    const bool fits = packed.dtype == "I32" && packed.shape.size() == 2 &&
                      scale.shape.size() == 2 && rows > 0 && cols > 0 && cols % 32 == 0 &&
                      packed.shape[0] == rows && packed.shape[1] == cols / 8 &&
                      scale.shape[0] == rows && scale.shape[1] > 0 && cols % scale.shape[1] == 0 &&
                      (cols / scale.shape[1]) % 32 == 0 && cols / scale.shape[1] <= 1024;
    USER_CHECK(
        fits,
        "{}: \"{}\" ({} {}) and its scales {} do not make an INT4 matrix {} with groups of a "
        "multiple of 32 columns.",
        packed.file,
        packed.name,
        packed.dtype,
        shape_text(packed.shape),
        shape_text(scale.shape),
        shape_text(weight.shape)
    );
    weight.group_size = static_cast<int32_t>(cols / scale.shape[1]);
    return weight;
}

void read_weights(const std::string& folder, Checkpoint& checkpoint) {
    const TensorMap tensors = open_safetensors(folder, checkpoint);
    constexpr std::string_view kPacked = ".weight_packed";
    for (const auto& [name, tensor] : tensors) {
        if (name.ends_with(kPacked)) {
            const std::string module = name.substr(0, name.size() - kPacked.size());
            checkpoint.weights.emplace(module + ".weight", packed_weight(tensors, *tensor, module));
        }
    }
    for (const auto& [name, tensor] : tensors) {
        const size_t dot = name.rfind('.');
        const std::string leaf = dot == std::string::npos ? name : name.substr(dot);
        const bool part_of_packed =
            leaf == kPacked || ((leaf == ".weight_scale" || leaf == ".weight_shape") &&
                                tensors.contains(name.substr(0, dot) + std::string(kPacked)));
        if (part_of_packed || name.ends_with("rotary_emb.inv_freq")) {
            continue;
        }
        const bool added = checkpoint.weights.emplace(name, plain_weight(*tensor)).second;
        USER_CHECK(added, "{}: \"{}\" is there both packed and plain.", tensor->file, name);
    }
}

// transformers ties the head only when the file holds no other one.
void untie_when_different(Checkpoint& checkpoint) {
    const auto head = checkpoint.weights.find("lm_head.weight");
    const auto embedding = checkpoint.weights.find("model.embed_tokens.weight");
    if (!checkpoint.config.tied_embeddings || head == checkpoint.weights.end() ||
        embedding == checkpoint.weights.end()) {
        return;
    }
    const auto& a = head->second.data;
    const auto& b = embedding->second.data;
    if (a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0) {
        checkpoint.weights.erase(head);
        return;
    }
    warn_line(fmt::format(
        "{}: the config ties the head to the embedding, but lm_head.weight differs from it; the "
        "stored head is used.",
        head->second.file
    ));
    checkpoint.config.tied_embeddings = false;
}

json read_json_object(const std::string& path) {
    json parsed = json::parse(read_file(path), nullptr, false);
    USER_CHECK(parsed.is_object(), "{} is not a JSON object; fetch the file again.", path);
    return parsed;
}

// bos_token and eos_token are strings, or objects with "content".
std::string token_text(const json& config, const char* key) {
    const auto found = config.find(key);
    if (found == config.end()) {
        return "";
    }
    if (found->is_string()) {
        return found->get<std::string>();
    }
    if (found->is_object() && found->contains("content") && (*found)["content"].is_string()) {
        return (*found)["content"].get<std::string>();
    }
    return "";
}

// A string, or a list of {"name", "template"} of which "default" is the one for chats.
std::optional<std::string> template_of(const json& config, const std::string& path) {
    const auto found = config.find("chat_template");
    if (found == config.end() || found->is_null()) {
        return std::nullopt;
    }
    if (found->is_string()) {
        return found->get<std::string>();
    }
    USER_CHECK(found->is_array(), "{}: \"chat_template\" is no text and no list.", path);
    for (const json& entry : *found) {
        const bool complete = entry.is_object() && entry.contains("name") &&
                              entry.contains("template") && entry["template"].is_string();
        if (complete && entry["name"] == "default") {
            return entry["template"].get<std::string>();
        }
    }
    throw UserError(fmt::format("{}: \"chat_template\" has no template named \"default\".", path));
}

void read_tokenizer(const std::string& folder, Checkpoint& checkpoint) {
    checkpoint.tokenizer_file = folder + "/tokenizer.json";
    if (!file_exists(checkpoint.tokenizer_file)) {
        USER_CHECK(
            !file_exists(folder + "/tokenizer.model"),
            "{} has only a SentencePiece tokenizer.model; a byte-level BPE tokenizer.json is "
            "needed.",
            folder
        );
        throw UserError(fmt::format(
            "{} is missing; fetch it from where the model came from.", checkpoint.tokenizer_file
        ));
    }
    checkpoint.tokenizer_json = read_file(checkpoint.tokenizer_file);
    const std::string config_path = folder + "/tokenizer_config.json";
    if (file_exists(config_path)) {
        const json config = read_json_object(config_path);
        checkpoint.bos_token = token_text(config, "bos_token");
        checkpoint.eos_token = token_text(config, "eos_token");
        checkpoint.chat_template = template_of(config, config_path);
    }
    const std::string template_path = folder + "/chat_template.jinja";
    if (file_exists(template_path)) {
        checkpoint.chat_template = read_file(template_path);
    }
}

}  // namespace

Checkpoint open_hf_folder(const std::string& folder, const OpenOptions& options) {
    Checkpoint checkpoint;
    checkpoint.path = folder;
    const std::string config_path = folder + "/config.json";
    USER_CHECK(
        file_exists(config_path),
        "{} has no config.json; give the folder of a Hugging Face model, or a .gguf file.",
        folder
    );
    const HfConfig config = parse_hf_config(read_file(config_path), config_path);
    checkpoint.config = config.model;
    checkpoint.eos_ids = config.eos_ids;
    const std::string generation_path = folder + "/generation_config.json";
    if (file_exists(generation_path)) {
        for (const int32_t id : parse_eos_ids(read_file(generation_path), generation_path)) {
            checkpoint.eos_ids.push_back(id);
        }
    }
    if (options.tokenizer) {
        read_tokenizer(folder, checkpoint);
    }
    if (options.weights) {
        read_weights(folder, checkpoint);
        untie_when_different(checkpoint);
        check_weights(checkpoint);
    }
    return checkpoint;
}

}  // namespace orbit
