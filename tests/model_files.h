// Tiny models written as files by code that is independent of the readers under test.
#pragma once

#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/number_formats.h"

namespace orbit::model_files {

class Folder {
  public:
    Folder() {
        std::string pattern =
            (std::filesystem::temp_directory_path() / "orbit_model_XXXXXX").string();
        path_ = mkdtemp(pattern.data());
    }

    ~Folder() { std::filesystem::remove_all(path_); }

    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;

    std::string path(const std::string& name = "") const {
        return name.empty() ? path_ : path_ + "/" + name;
    }

  private:
    std::string path_;
};

// Without the library's fsyncs, which cost more than the tests. The old file goes first: some file
// systems flush a file that is cut to nothing and written again.
inline void write_plain(const std::string& path, const std::string& content) {
    std::filesystem::remove(path);
    std::ofstream(path, std::ios::binary | std::ios::trunc) << content;
}

// The sentence of the UserError that `body` throws; "" when it throws none.
template <typename Body>
std::string refusal(const Body& body) {
    try {
        body();
    } catch (const UserError& error) {
        return error.what();
    }
    return "";
}

struct Dense {
    std::vector<int64_t> shape;
    std::vector<float> values;  // exact in bf16, unless a test changes them
};

struct TinyModel {
    std::string family;
    int64_t width = 64, mlp = 96, layers = 2, heads = 4, kv_heads = 2, head_dim = 16, vocab = 320;
    bool tied = true;
    std::map<std::string, Dense> weights;
    nlohmann::json config;
};

inline TinyModel tiny_model(const std::string& family, bool tied = true, TinyModel m = {}) {
    m.family = family;
    m.tied = tied;
    std::mt19937 random(5);
    std::normal_distribution<float> normal(0.0f, 0.2f);
    const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
        int64_t numel = 1;
        for (const int64_t dim : shape) {
            numel *= dim;
        }
        Dense dense{std::move(shape), std::vector<float>(static_cast<size_t>(numel))};
        for (float& value : dense.values) {
            value = round_to_bf16(normal(random));
        }
        m.weights[name] = std::move(dense);
    };
    const int64_t q = m.heads * m.head_dim;
    const int64_t kv = m.kv_heads * m.head_dim;
    add("model.embed_tokens.weight", {m.vocab, m.width});
    for (int64_t l = 0; l < m.layers; ++l) {
        const std::string layer = "model.layers." + std::to_string(l) + ".";
        add(layer + "input_layernorm.weight", {m.width});
        add(layer + "post_attention_layernorm.weight", {m.width});
        add(layer + "self_attn.q_proj.weight", {q, m.width});
        add(layer + "self_attn.k_proj.weight", {kv, m.width});
        add(layer + "self_attn.v_proj.weight", {kv, m.width});
        add(layer + "self_attn.o_proj.weight", {m.width, q});
        add(layer + "mlp.gate_proj.weight", {m.mlp, m.width});
        add(layer + "mlp.up_proj.weight", {m.mlp, m.width});
        add(layer + "mlp.down_proj.weight", {m.width, m.mlp});
        if (family == "qwen2") {
            add(layer + "self_attn.q_proj.bias", {q});
            add(layer + "self_attn.k_proj.bias", {kv});
            add(layer + "self_attn.v_proj.bias", {kv});
        }
        if (family == "qwen3") {
            add(layer + "self_attn.q_norm.weight", {m.head_dim});
            add(layer + "self_attn.k_norm.weight", {m.head_dim});
        }
    }
    add("model.norm.weight", {m.width});
    if (!tied) {
        add("lm_head.weight", {m.vocab, m.width});
    }
    m.config = {
        {"model_type", family},
        {"hidden_size", m.width},
        {"intermediate_size", m.mlp},
        {"num_hidden_layers", m.layers},
        {"num_attention_heads", m.heads},
        {"num_key_value_heads", m.kv_heads},
        {"head_dim", m.head_dim},
        {"vocab_size", m.vocab},
        {"max_position_embeddings", 64},
        {"rms_norm_eps", 1e-5},
        {"rope_theta", 10000.0},
        {"tie_word_embeddings", tied},
        {"eos_token_id", 256}};
    return m;
}

// --- safetensors ---

struct RawTensor {
    std::string dtype;
    std::vector<int64_t> shape;
    std::string bytes;
};

inline std::string safetensors_text(const std::map<std::string, RawTensor>& tensors) {
    nlohmann::json header = nlohmann::json::object();
    std::string data;
    for (const auto& [name, tensor] : tensors) {
        header[name] = {
            {"dtype", tensor.dtype},
            {"shape", tensor.shape},
            {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
        data += tensor.bytes;
    }
    const std::string text = header.dump();
    const uint64_t length = text.size();
    std::string file(8, '\0');
    std::memcpy(file.data(), &length, 8);
    return file + text + data;
}

inline RawTensor stored_as(const Dense& dense, const std::string& dtype) {
    RawTensor raw{dtype, dense.shape, ""};
    for (const float value : dense.values) {
        if (dtype == "F32") {
            raw.bytes.append(reinterpret_cast<const char*>(&value), 4);
        } else {
            const uint16_t bits = to_bf16(value).bits;
            raw.bytes.append(reinterpret_cast<const char*>(&bits), 2);
        }
    }
    return raw;
}

inline std::map<std::string, RawTensor> raw_tensors(
    const TinyModel& model, const std::string& dtype
) {
    std::map<std::string, RawTensor> tensors;
    for (const auto& [name, dense] : model.weights) {
        tensors[name] = stored_as(dense, dtype);
    }
    return tensors;
}

// --- tokenizer ---

inline std::vector<std::string> byte_tokens() {
    std::vector<std::string> tokens;
    int next = 256;
    for (int byte = 0; byte < 256; ++byte) {
        const bool printable =
            (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
        const int code = printable ? byte : next++;
        std::string text;
        if (code < 128) {
            text = static_cast<char>(code);
        } else {
            text += static_cast<char>(0xC0 | (code >> 6));
            text += static_cast<char>(0x80 | (code & 63));
        }
        tokens.push_back(text);
    }
    return tokens;
}

inline nlohmann::json tokenizer_json() {
    nlohmann::json vocab = nlohmann::json::object();
    int id = 0;
    for (const std::string& token : byte_tokens()) {
        vocab[token] = id++;
    }
    nlohmann::json root;
    root["added_tokens"] = nlohmann::json::array();
    root["added_tokens"].push_back({{"id", 256}, {"content", "<|im_end|>"}, {"special", true}});
    root["added_tokens"].push_back({{"id", 257}, {"content", "<s>"}, {"special", true}});
    root["normalizer"] = nullptr;
    root["pre_tokenizer"] = {
        {"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}};
    root["model"] = {{"type", "BPE"}, {"vocab", vocab}, {"merges", nlohmann::json::array()}};
    return root;
}

inline const char* kTemplate =
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}";

// A whole Hugging Face folder with one BF16 or F32 file.
inline void write_hf(
    const std::string& folder, const TinyModel& model, const std::string& dtype = "BF16"
) {
    write_plain(folder + "/config.json", model.config.dump());
    write_plain(folder + "/model.safetensors", safetensors_text(raw_tensors(model, dtype)));
    write_plain(folder + "/tokenizer.json", tokenizer_json().dump());
    write_plain(folder + "/chat_template.jinja", kTemplate);
}

// --- GGUF ---

class GgufWriter {
  public:
    void number(const std::string& key, uint32_t value) {
        this->key(key, 4);
        raw(keys_, value);
    }

    void real(const std::string& key, float value) {
        this->key(key, 6);
        raw(keys_, value);
    }

    void flag(const std::string& key, bool value) {
        this->key(key, 7);
        raw(keys_, static_cast<uint8_t>(value));
    }

    void text(const std::string& key, const std::string& value) {
        this->key(key, 8);
        text(keys_, value);
    }

    void texts(const std::string& key, const std::vector<std::string>& values) {
        this->key(key, 9);
        raw(keys_, uint32_t{8});
        raw(keys_, static_cast<uint64_t>(values.size()));
        for (const auto& value : values) {
            text(keys_, value);
        }
    }

    void numbers(const std::string& key, const std::vector<int32_t>& values) {
        this->key(key, 9);
        raw(keys_, uint32_t{5});
        raw(keys_, static_cast<uint64_t>(values.size()));
        for (const int32_t value : values) {
            raw(keys_, value);
        }
    }

    // [[7], [7, 7]] of u8: a kind no model needs, to be stepped over.
    void nested(const std::string& key) {
        this->key(key, 9);
        raw(keys_, uint32_t{9});
        raw(keys_, uint64_t{2});
        for (uint64_t count = 1; count <= 2; ++count) {
            raw(keys_, uint32_t{0});
            raw(keys_, count);
            keys_.append(count, '\7');
        }
    }

    void tensor(
        const std::string& name,
        const std::vector<int64_t>& shape,
        uint32_t type,
        const std::string& bytes
    ) {
        data_.resize((data_.size() + 31) / 32 * 32, '\0');
        text(infos_, name);
        raw(infos_, static_cast<uint32_t>(shape.size()));
        for (auto dim = shape.rbegin(); dim != shape.rend(); ++dim) {
            raw(infos_, static_cast<uint64_t>(*dim));
        }
        raw(infos_, type);
        raw(infos_, static_cast<uint64_t>(data_.size()));
        data_ += bytes;
        ++num_tensors_;
    }

    std::string file() const {
        std::string out = "GGUF";
        raw(out, uint32_t{3});
        raw(out, num_tensors_);
        raw(out, num_keys_);
        out += keys_ + infos_;
        out.resize((out.size() + 31) / 32 * 32, '\0');
        return out + data_;
    }

  private:
    template <typename T>
    static void raw(std::string& to, const T& value) {
        to.append(reinterpret_cast<const char*>(&value), sizeof value);
    }

    static void text(std::string& to, const std::string& value) {
        raw(to, static_cast<uint64_t>(value.size()));
        to += value;
    }

    void key(const std::string& name, uint32_t type) {
        text(keys_, name);
        raw(keys_, type);
        ++num_keys_;
    }

    std::string keys_, infos_, data_;
    uint64_t num_keys_ = 0, num_tensors_ = 0;
};

inline std::string gguf_name(std::string name) {
    const std::vector<std::pair<std::string, std::string>> parts = {
        {"model.layers.", "blk."},
        {"model.embed_tokens", "token_embd"},
        {"model.norm", "output_norm"},
        {"lm_head", "output"},
        {"input_layernorm", "attn_norm"},
        {"post_attention_layernorm", "ffn_norm"},
        {"self_attn.q_proj", "attn_q"},
        {"self_attn.k_proj", "attn_k"},
        {"self_attn.v_proj", "attn_v"},
        {"self_attn.o_proj", "attn_output"},
        {"self_attn.q_norm", "attn_q_norm"},
        {"self_attn.k_norm", "attn_k_norm"},
        {"mlp.gate_proj", "ffn_gate"},
        {"mlp.up_proj", "ffn_up"},
        {"mlp.down_proj", "ffn_down"}};
    for (const auto& [from, to] : parts) {
        const size_t at = name.find(from);
        if (at != std::string::npos) {
            name.replace(at, from.size(), to);
        }
    }
    return name;
}

// As llama.cpp's converter permutes q and k: reshape(heads, 2, d/2, in), swap the middle axes.
inline Dense interleaved(const Dense& dense, int64_t heads) {
    Dense out = dense;
    const int64_t cols = dense.shape[1];
    const int64_t half = dense.shape[0] / heads / 2;
    int64_t row = 0;
    for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = 0; i < half; ++i) {
            for (int64_t j = 0; j < 2; ++j, ++row) {
                const int64_t from = (h * 2 + j) * half + i;
                std::copy_n(
                    dense.values.begin() + from * cols, cols, out.values.begin() + row * cols
                );
            }
        }
    }
    return out;
}

inline GgufWriter gguf_keys(const TinyModel& m) {
    GgufWriter w;
    const std::string& a = m.family;
    w.text("general.architecture", a);
    w.nested("general.nested");
    w.number(a + ".block_count", static_cast<uint32_t>(m.layers));
    w.number(a + ".embedding_length", static_cast<uint32_t>(m.width));
    w.number(a + ".feed_forward_length", static_cast<uint32_t>(m.mlp));
    w.number(a + ".context_length", 64);
    w.number(a + ".attention.head_count", static_cast<uint32_t>(m.heads));
    w.number(a + ".attention.head_count_kv", static_cast<uint32_t>(m.kv_heads));
    w.real(a + ".attention.layer_norm_rms_epsilon", 1e-5f);
    w.real(a + ".rope.freq_base", 10000.0f);
    w.text("tokenizer.ggml.model", "gpt2");
    w.text("tokenizer.ggml.pre", "qwen2");
    auto tokens = byte_tokens();
    std::vector<int32_t> types(tokens.size(), 1);
    tokens.emplace_back("<|im_end|>");
    tokens.emplace_back("<s>");
    types.insert(types.end(), {3, 3});
    w.texts("tokenizer.ggml.tokens", tokens);
    w.numbers("tokenizer.ggml.token_type", types);
    w.texts("tokenizer.ggml.merges", {});
    w.number("tokenizer.ggml.eos_token_id", 256);
    w.number("tokenizer.ggml.bos_token_id", 257);
    w.flag("tokenizer.ggml.add_bos_token", false);
    w.text("tokenizer.chat_template", kTemplate);
    return w;
}

// Matrices as F32 (type 0) or BF16 (type 30), vectors as F32, llama's q and k permuted.
inline std::string gguf_file(const TinyModel& m, uint32_t type = 30) {
    GgufWriter w = gguf_keys(m);
    for (const auto& [name, dense] : m.weights) {
        Dense stored = dense;
        if (m.family == "llama" && name.ends_with("q_proj.weight")) {
            stored = interleaved(dense, m.heads);
        } else if (m.family == "llama" && name.ends_with("k_proj.weight")) {
            stored = interleaved(dense, m.kv_heads);
        }
        const bool matrix = dense.shape.size() == 2;
        const uint32_t stored_type = matrix ? type : 0;
        w.tensor(
            gguf_name(name),
            stored.shape,
            stored_type,
            stored_as(stored, stored_type == 0 ? "F32" : "BF16").bytes
        );
    }
    return w.file();
}

}  // namespace orbit::model_files
