// A Hugging Face folder (models.md 9): config, one or many safetensors files, tokenizer, template.
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "base/log.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/packed_weights.h"

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

void read_weights(const std::string& folder, Checkpoint& checkpoint) {
    const TensorMap tensors = open_safetensors(folder, checkpoint);
    std::set<std::string> consumed;
    for (const auto& [name, tensor] : tensors) {
        if (auto weight = read_packed_weight(tensors, *tensor, consumed)) {
            checkpoint.weights.emplace(packed_weight_name(name), std::move(*weight));
        }
    }
    for (const auto& [name, tensor] : tensors) {
        if (consumed.contains(name) || is_left_over(name)) {
            continue;
        }
        const bool added = checkpoint.weights.emplace(name, read_plain_weight(*tensor)).second;
        USER_CHECK(added, "{}: \"{}\" is there both packed and plain.", tensor->file, name);
    }
    split_fused_experts(checkpoint);
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
