// Loading Hugging Face folders: what is read, in which form it lands, and what is refused with
// which words.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>

#include "base/safetensors.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/model.h"
#include "model/rope_table.h"
#include "model_files.h"

namespace orbit {
namespace {

using namespace model_files;
using nlohmann::json;

HfConfig parsed(const json& config) {
    return parse_hf_config(config.dump(), "config.json");
}

std::string config_refusal(const char* key, const json& value, const char* family = "llama") {
    json config = tiny_model(family).config;
    config[key] = value;
    return refusal([&] { parsed(config); });
}

#define EXPECT_HAS(text, part) EXPECT_NE(std::string(text).find(part), std::string::npos) << text

TEST(HfConfig, ReadsBothSpellings) {
    json old_style = tiny_model("llama").config;
    old_style["rope_theta"] = 500000.0;
    old_style["torch_dtype"] = "bfloat16";
    old_style["rope_scaling"] = {
        {"type", "llama3"},
        {"factor", 8.0},
        {"low_freq_factor", 1.0},
        {"high_freq_factor", 4.0},
        {"original_max_position_embeddings", 8192}};
    json new_style = tiny_model("llama").config;
    new_style.erase("rope_theta");
    new_style["dtype"] = "bfloat16";
    new_style["rope_parameters"] = old_style["rope_scaling"];
    new_style["rope_parameters"]["rope_theta"] = 500000.0;
    new_style["rope_parameters"]["rope_type"] = "llama3";
    for (const json& config : {old_style, new_style}) {
        const ModelConfig model = parsed(config).model;
        EXPECT_EQ(model.rope_theta, 500000.0);
        EXPECT_EQ(model.rope_scaling.type, "llama3");
        EXPECT_EQ(model.rope_scaling.factor, 8.0);
        EXPECT_EQ(model.rope_scaling.original_max_positions, 8192.0);
    }
}

TEST(HfConfig, FamiliesAndDefaults) {
    json config = tiny_model("llama").config;
    for (const char* key :
         {"head_dim", "num_key_value_heads", "rope_theta", "tie_word_embeddings"}) {
        config.erase(key);
    }
    config["eos_token_id"] = json::array({3, 5});
    const HfConfig llama = parsed(config);
    EXPECT_EQ(llama.model.head_dim, 16);
    EXPECT_EQ(llama.model.num_kv_heads, 4);
    EXPECT_EQ(llama.model.rope_theta, 10000.0);
    EXPECT_FALSE(llama.model.tied_embeddings);
    EXPECT_EQ(llama.eos_ids, (std::vector<int32_t>{3, 5}));
    config["eos_token_id"] = nullptr;
    EXPECT_TRUE(parsed(config).eos_ids.empty());
    EXPECT_TRUE(parsed(tiny_model("qwen2").config).model.qkv_bias);
    EXPECT_FALSE(parsed(tiny_model("qwen2").config).model.qk_norm);
    EXPECT_TRUE(parsed(tiny_model("qwen3").config).model.qk_norm);
    EXPECT_FALSE(llama.model.qkv_bias);
}

TEST(HfConfig, RefusesWhatTheForwardDoesNotCompute) {
    EXPECT_HAS(config_refusal("model_type", "gemma2"), "supported are llama, qwen2, qwen3");
    EXPECT_HAS(config_refusal("attention_bias", true), "attention_bias");
    EXPECT_HAS(config_refusal("mlp_bias", true), "mlp_bias");
    EXPECT_HAS(config_refusal("hidden_act", "gelu"), "gelu");
    EXPECT_HAS(config_refusal("use_sliding_window", true, "qwen2"), "use_sliding_window");
    EXPECT_HAS(
        config_refusal("layer_types", {"full_attention", "sliding_attention"}, "qwen3"),
        "sliding_attention"
    );
    EXPECT_HAS(config_refusal("rope_scaling", {{"type", "dynamic"}, {"factor", 2}}), "dynamic");
    EXPECT_HAS(config_refusal("quantization_config", {{"quant_method", "awq"}}), "awq");
    EXPECT_HAS(config_refusal("partial_rotary_factor", 0.5), "partial_rotary_factor");
    EXPECT_EQ(config_refusal("attention_bias", false), "");  // negative control
    EXPECT_EQ(config_refusal("rope_scaling", nullptr), "");
}

TEST(HfConfig, RefusesImpossibleNumbers) {
    EXPECT_HAS(config_refusal("hidden_size", nullptr), "\"hidden_size\" is missing");
    EXPECT_HAS(config_refusal("hidden_size", "big"), "whole number");
    EXPECT_HAS(config_refusal("hidden_size", -64), "hidden size is -64");
    EXPECT_HAS(config_refusal("num_attention_heads", 0), "num_attention_heads");
    EXPECT_HAS(config_refusal("num_key_value_heads", 3), "do not fit together");
    EXPECT_HAS(config_refusal("num_hidden_layers", 1e9), "whole number");
    EXPECT_HAS(config_refusal("num_hidden_layers", 1000000000), "number of layers");
    EXPECT_HAS(config_refusal("rope_theta", -1.0), "rope base");
    EXPECT_HAS(config_refusal("eos_token_id", "x"), "eos_token_id");
    EXPECT_HAS(refusal([] { parse_hf_config("[1]", "c.json"); }), "c.json is not a JSON object");
}

ModelConfig rope_config(int64_t dim, double theta, RopeScaling scaling) {
    ModelConfig config;
    config.head_dim = dim;
    config.rope_theta = theta;
    config.rope_scaling = std::move(scaling);
    return config;
}

// The check values of models.md 1.3.
TEST(Rope, Llama3Frequencies) {
    RopeScaling scaling{.type = "llama3", .factor = 8, .original_max_positions = 8192};
    const auto f = rope_frequencies(rope_config(128, 5e5, scaling), {}).frequency;
    EXPECT_NEAR(f[28], 3.21144599e-3, 1e-11);
    EXPECT_NEAR(f[32], 5.24846161e-4, 1e-12);
    EXPECT_NEAR(f[40], 3.42810220e-5, 1e-13);
    EXPECT_NEAR(f[63], 3.06892599e-7, 1e-15);
    scaling.factor = 32;
    const auto g = rope_frequencies(rope_config(64, 5e5, scaling), {}).frequency;
    EXPECT_NEAR(g[16], 4.29556797e-4, 1e-12);
    EXPECT_NEAR(g[20], 8.57025549e-6, 1e-14);
    EXPECT_NEAR(g[31], 9.41830673e-8, 1e-16);
}

TEST(Rope, YarnFrequencies) {
    RopeScaling scaling{.type = "yarn", .factor = 64, .original_max_positions = 4096};
    const RopeFrequencies f = rope_frequencies(rope_config(64, 5e4, scaling), {});
    EXPECT_NEAR(f.frequency[1], 7.131110849e-1, 1e-9);
    EXPECT_NEAR(f.frequency[12], 1.161915994e-2, 1e-11);
    EXPECT_NEAR(f.frequency[20], 1.807023387e-5, 1e-14);
    EXPECT_NEAR(f.frequency[31], 4.382206456e-7, 1e-16);
    EXPECT_NEAR(f.attention_factor, 1.415888, 1e-6);
    scaling.attention_factor = 2;
    EXPECT_EQ(rope_frequencies(rope_config(64, 5e4, scaling), {}).attention_factor, 2.0);
}

TEST(Rope, LinearAndStoredFactorsDivide) {
    const auto plain = rope_frequencies(rope_config(4, 100, {}), {}).frequency;
    EXPECT_DOUBLE_EQ(plain[1], 0.1);
    RopeScaling linear{.type = "linear", .factor = 4};
    EXPECT_DOUBLE_EQ(rope_frequencies(rope_config(4, 100, linear), {}).frequency[1], 0.025);
    EXPECT_DOUBLE_EQ(rope_frequencies(rope_config(4, 100, {}), {1.0f, 2.0f}).frequency[1], 0.05);
}

class LoaderTest : public testing::Test {
  protected:
    std::unique_ptr<Model> load(const LoadOptions& options = {}) {
        return load_model(stream_, folder_.path(), options);
    }

    std::string load_refusal(const LoadOptions& options = {}) {
        return refusal([&] { load(options); });
    }

    // Replaces one tensor's values and writes the folder again.
    std::string refusal_with(TinyModel model, const std::string& name, Dense dense) {
        model.weights[name] = std::move(dense);
        write_hf(folder_.path(), model);
        return load_refusal();
    }

    Folder folder_;
    Device device_ = make_device("cpu", "reference", 2);
    Stream stream_{device_};
};

void expect_rows(const QuantizedMatrix& w, const Dense& dense, const std::string& name) {
    ASSERT_EQ(w.rows, dense.shape[0]) << name;
    ASSERT_EQ(w.cols, dense.shape[1]) << name;
    std::vector<float> row(static_cast<size_t>(w.cols));
    for (int64_t r = 0; r < w.rows; ++r) {
        decode_f32(w, r, 0, w.cols, row.data());
        for (int64_t c = 0; c < w.cols; ++c) {
            ASSERT_EQ(
                row[static_cast<size_t>(c)], dense.values[static_cast<size_t>(r * w.cols + c)]
            ) << name
              << " row " << r << " column " << c;
        }
    }
}

void expect_model(const Model& model, const TinyModel& tiny) {
    expect_rows(model.embedding, tiny.weights.at("model.embed_tokens.weight"), "embedding");
    ASSERT_EQ(model.layers.size(), static_cast<size_t>(tiny.layers));
    ASSERT_EQ(model.sites.size(), static_cast<size_t>(7 * tiny.layers));
    int32_t site = 0;
    for (const LayerWeights& layer : model.layers) {
        for (const LinearWeights* linear :
             {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
            expect_rows(linear->w, tiny.weights.at(linear->module + ".weight"), linear->module);
            EXPECT_EQ(linear->site, site);
            EXPECT_EQ(model.sites[static_cast<size_t>(site)].module, linear->module);
            EXPECT_EQ(model.sites[static_cast<size_t>(site)].in, linear->w.cols);
            EXPECT_EQ(model.sites[static_cast<size_t>(site)].out, linear->w.rows);
            ++site;
        }
    }
    const Dense& norm = tiny.weights.at("model.layers.1.input_layernorm.weight");
    for (size_t i = 0; i < norm.values.size(); ++i) {
        EXPECT_EQ(model.layers[1].input_norm[i], norm.values[i]);
    }
}

TEST_F(LoaderTest, EveryFamilyLandsAsStored) {
    for (const char* family : {"llama", "qwen2", "qwen3"}) {
        for (const bool tied : {true, false}) {
            const TinyModel tiny = tiny_model(family, tied);
            write_hf(folder_.path(), tiny);
            const auto model = load();
            expect_model(*model, tiny);
            EXPECT_EQ(model->head.data == model->embedding.data, tied);
            EXPECT_EQ(model->layers[0].q.bias != nullptr, std::string(family) == "qwen2");
            EXPECT_EQ(model->layers[0].k_norm != nullptr, std::string(family) == "qwen3");
            EXPECT_EQ(model->largest_rounding_error, 0.0);
            EXPECT_EQ(model->stop_ids, (std::vector<int32_t>{256}));
            EXPECT_EQ(model->rope.max_positions, 64);
            EXPECT_EQ(model->rope.cosine[8], static_cast<float>(std::cos(1.0)));
        }
    }
}

TEST_F(LoaderTest, BiasesKeepTheirPlaces) {
    const TinyModel tiny = tiny_model("qwen2");
    write_hf(folder_.path(), tiny);
    const auto model = load();
    EXPECT_EQ(
        model->layers[1].k.bias[3],
        tiny.weights.at("model.layers.1.self_attn.k_proj.bias").values[3]
    );
    EXPECT_EQ(model->layers[1].o.bias, nullptr);
}

TEST_F(LoaderTest, F32IsRoundedToBf16InBothModesAndTheErrorIsKept) {
    TinyModel tiny = tiny_model("llama");
    Dense& up = tiny.weights["model.layers.0.mlp.up_proj.weight"];
    up.values[0] = 1.0f + 1.0f / 1024;  // bf16 rounds it to 1
    Dense& norm = tiny.weights["model.norm.weight"];
    norm.values[0] = 1.0f + 1.0f / 1024;
    write_hf(folder_.path(), tiny, "F32");
    for (const DType compute : {DType::kBF16, DType::kF32}) {
        const auto model = load({.compute = compute, .quantize = ""});
        float first[32];
        decode_f32(model->layers[0].up.w, 0, 0, 32, first);
        EXPECT_EQ(first[0], 1.0f);
        EXPECT_EQ(first[1], up.values[1]);
        EXPECT_EQ(model->layers[0].up.w.format, WeightFormat::kBF16);
        EXPECT_EQ(model->largest_rounding_error, 1.0 / 1024);
        EXPECT_EQ(model->final_norm[0], norm.values[0]) << "norms stay float32";
    }
}

TEST_F(LoaderTest, QuantizeAtLoadLeavesEmbeddingAndHeadAlone) {
    const TinyModel tiny = tiny_model("qwen3", false);
    write_hf(folder_.path(), tiny);
    const auto model = load({.quantize = "int4"});
    EXPECT_EQ(model->embedding.format, WeightFormat::kBF16);
    EXPECT_EQ(model->head.format, WeightFormat::kBF16);
    const QuantizedMatrix& down = model->layers[1].down.w;
    ASSERT_EQ(down.format, WeightFormat::kInt4);
    const Dense& dense = tiny.weights.at("model.layers.1.mlp.down_proj.weight");
    std::vector<uint32_t> words(static_cast<size_t>(tiny.mlp / 8));
    std::vector<bf16> scales(static_cast<size_t>(tiny.mlp / 32));
    for (int64_t row = 0; row < down.rows; ++row) {
        encode_int4(
            dense.values.data() + row * tiny.mlp, tiny.mlp, 32, words.data(), scales.data()
        );
        QuantizedMatrix expected{WeightFormat::kInt4, 1, tiny.mlp, 32, words.data(), scales.data()};
        std::vector<float> a(static_cast<size_t>(tiny.mlp));
        std::vector<float> b(a.size());
        decode_f32(expected, 0, 0, tiny.mlp, a.data());
        decode_f32(down, row, 0, tiny.mlp, b.data());
        ASSERT_EQ(a, b) << "row " << row;
    }
    EXPECT_HAS(load_refusal({.quantize = "int3"}), "int3");
}

// One linear of a BF16 folder replaced by its three packed tensors.
struct Packed {
    std::map<std::string, RawTensor> tensors;
    std::string module = "model.layers.0.mlp.up_proj";

    explicit Packed(const TinyModel& tiny, const std::string& scale_dtype, float scale) {
        tensors = raw_tensors(tiny, "BF16");
        tensors.erase(module + ".weight");
        RawTensor packed{"I32", {tiny.mlp, tiny.width / 8}, ""};
        for (int64_t i = 0; i < tiny.mlp * tiny.width / 8; ++i) {
            const uint32_t word = 0xFEDCBA98u;
            packed.bytes.append(reinterpret_cast<const char*>(&word), 4);
        }
        const Dense scales{
            {tiny.mlp, tiny.width / 32},
            std::vector<float>(static_cast<size_t>(tiny.mlp * tiny.width / 32), scale)};
        int64_t shape[2] = {tiny.mlp, tiny.width};
        tensors[module + ".weight_packed"] = packed;
        tensors[module + ".weight_scale"] = stored_as(scales, scale_dtype);
        tensors[module + ".weight_shape"] = {
            "I64", {2}, std::string(reinterpret_cast<const char*>(shape), 16)};
    }
};

TEST_F(LoaderTest, PackedInt4) {
    const TinyModel tiny = tiny_model("llama");
    write_hf(folder_.path(), tiny);
    for (const char* dtype : {"BF16", "F32"}) {
        const Packed packed(tiny, dtype, 0.25f);
        write_plain(folder_.path("model.safetensors"), safetensors_text(packed.tensors));
        const auto model = load();
        ASSERT_EQ(model->layers[0].up.w.format, WeightFormat::kInt4);
        EXPECT_EQ(model->layers[0].down.w.format, WeightFormat::kBF16);
        float row[64];
        decode_f32(model->layers[0].up.w, 95, 0, 64, row);
        EXPECT_EQ(row[63], 0.25f * 7.0f);
        EXPECT_EQ(row[1], 0.25f);
    }
    const Packed odd(tiny, "F32", 0.3f);
    write_plain(folder_.path("model.safetensors"), safetensors_text(odd.tensors));
    EXPECT_HAS(load_refusal(), "only scales that BF16 holds exactly");
}

TEST_F(LoaderTest, PackedInt4ThatDoesNotFit) {
    const TinyModel tiny = tiny_model("llama");
    write_hf(folder_.path(), tiny);
    const auto refused = [&](const std::function<void(Packed&)>& change) {
        Packed packed(tiny, "BF16", 0.25f);
        change(packed);
        write_plain(folder_.path("model.safetensors"), safetensors_text(packed.tensors));
        return load_refusal();
    };
    EXPECT_EQ(refused([](Packed&) {}), "");
    EXPECT_HAS(
        refused([](Packed& p) { p.tensors.erase(p.module + ".weight_scale"); }), "weight_scale"
    );
    EXPECT_HAS(
        refused([](Packed& p) { p.tensors[p.module + ".weight_shape"].bytes[0] = 7; }),
        "do not make an INT4 matrix"
    );
    EXPECT_HAS(
        refused([](Packed& p) {
            p.tensors[p.module + ".weight_scale"].bytes[1] = '\x7f';
            p.tensors[p.module + ".weight_scale"].bytes[0] = '\xff';
        }),
        "NaN"
    );
    EXPECT_HAS(
        refused([](Packed& p) {
            p.tensors[p.module + ".weight_zero_point"] = p.tensors[p.module + ".weight_packed"];
        }),
        "weight_zero_point"
    );
    EXPECT_HAS(
        refused([](Packed& p) { p.tensors.erase(p.module + ".weight_packed"); }), "weight_s"
    );
}

TEST_F(LoaderTest, WrongTensorsAreNamed) {
    const std::string name = "model.layers.1.self_attn.k_proj.weight";
    const TinyModel tiny = tiny_model("llama");
    const Dense good = tiny.weights.at(name);
    Dense bad = good;
    bad.shape = {64, 32};
    const std::string shape = refusal_with(tiny, name, bad);
    EXPECT_HAS(shape, name);
    EXPECT_HAS(shape, "[64, 32]");
    EXPECT_HAS(shape, "[32, 64]");
    for (const float value : {NAN, INFINITY}) {
        bad = good;
        bad.values[700] = value;
        const std::string said = refusal_with(tiny, name, bad);
        EXPECT_HAS(said, name);
        EXPECT_HAS(said, "model.safetensors");
    }
    EXPECT_EQ(refusal_with(tiny, name, good), "");
    EXPECT_HAS(refusal_with(tiny, "model.layers.1.self_attn.q_norm.weight", good), "has no place");
    EXPECT_HAS(refusal_with(tiny, "model.layers.7.mlp.up_proj.weight", good), "has no place");
    TinyModel missing = tiny;
    missing.weights.erase(name);
    write_hf(folder_.path(), missing);
    EXPECT_HAS(load_refusal(), name + "\" is missing");
}

TEST_F(LoaderTest, F32BeyondBf16IsRefused) {
    TinyModel tiny = tiny_model("llama");
    tiny.weights["model.layers.0.mlp.up_proj.weight"].values[5] = 3.4e38f;
    write_hf(folder_.path(), tiny, "F32");
    EXPECT_HAS(load_refusal(), "beyond the range of BF16");
}

TEST_F(LoaderTest, Shards) {
    const TinyModel tiny = tiny_model("qwen3");
    write_hf(folder_.path(), tiny);
    const auto whole = load();
    std::filesystem::remove(folder_.path("model.safetensors"));
    std::map<std::string, RawTensor> parts[2];
    json weight_map = json::object();
    size_t i = 0;
    for (const auto& [name, raw] : raw_tensors(tiny, "BF16")) {
        parts[i % 2][name] = raw;
        weight_map[name] = i % 2 == 0 ? "a.safetensors" : "b.safetensors";
        ++i;
    }
    parts[0]["not.in.the.map"] = {"U8", {1}, "x"};
    write_plain(folder_.path("a.safetensors"), safetensors_text(parts[0]));
    write_plain(folder_.path("b.safetensors"), safetensors_text(parts[1]));
    const auto index = [&](const json& map) {
        write_plain(
            folder_.path("model.safetensors.index.json"), json({{"weight_map", map}}).dump()
        );
    };
    index(weight_map);
    const auto model = load();
    expect_model(*model, tiny);
    EXPECT_EQ(model->weights_digest, whole->weights_digest);
    json bad = weight_map;
    bad["model.norm.weight"] = "../a.safetensors";
    index(bad);
    EXPECT_HAS(load_refusal(), "leaves the folder");
    bad["model.norm.weight"] = "c.safetensors";
    index(bad);
    EXPECT_HAS(load_refusal(), "c.safetensors");
    bad = weight_map;
    bad["model.extra.weight"] = "a.safetensors";
    index(bad);
    EXPECT_HAS(load_refusal(), "model.extra.weight");
}

TEST_F(LoaderTest, DigestSeesOneBit) {
    TinyModel tiny = tiny_model("llama");
    write_hf(folder_.path(), tiny);
    const std::string digest = load()->weights_digest;
    EXPECT_EQ(load()->weights_digest, digest);
    float& value = tiny.weights["model.layers.1.mlp.down_proj.weight"].values[9];
    value = float_from_bits(float_bits(value) ^ 0x10000u);
    write_hf(folder_.path(), tiny);
    EXPECT_NE(load()->weights_digest, digest);
}

TEST_F(LoaderTest, TiedHeadInTheFile) {
    TinyModel tiny = tiny_model("llama");
    tiny.weights["lm_head.weight"] = tiny.weights["model.embed_tokens.weight"];
    write_hf(folder_.path(), tiny);
    auto model = load();
    EXPECT_EQ(model->head.data, model->embedding.data);
    tiny.weights["lm_head.weight"].values[0] += 1.0f;
    write_hf(folder_.path(), tiny);
    model = load();
    EXPECT_NE(model->head.data, model->embedding.data) << "the stored head wins over the config";
}

TEST_F(LoaderTest, TemplateAndTokensFromEveryPlace) {
    const TinyModel tiny = tiny_model("llama");
    write_hf(folder_.path(), tiny);
    const auto prompt = [&](const std::string& text) {
        const auto model = load();
        return model->tokenizer->decode(encode_chat(*model, {{"user", text}}, false), false);
    };
    EXPECT_EQ(prompt("hi"), "[user]hi<|im_end|>[assistant]");
    std::filesystem::remove(folder_.path("chat_template.jinja"));
    EXPECT_HAS(refusal([&] { prompt("hi"); }), "no chat template");
    const auto model = load();
    EXPECT_EQ(encode_chat(*model, {{"user", "hi"}}, true).size(), 2u) << "raw needs none";
    json config = {
        {"bos_token", {{"content", "<s>"}}},
        {"eos_token", "<s>"},
        {"chat_template", "{{ bos_token }}{{ messages[0]['content'] }}"}};
    write_plain(folder_.path("tokenizer_config.json"), config.dump());
    EXPECT_EQ(prompt("hi"), "<s>hi");
    EXPECT_EQ(load()->stop_ids, (std::vector<int32_t>{256, 257}));
    config["chat_template"] = json::array(
        {{{"name", "tool_use"}, {"template", "wrong"}},
         {{"name", "default"}, {"template", "right {{ messages[0]['content'] }}"}}}
    );
    write_plain(folder_.path("tokenizer_config.json"), config.dump());
    EXPECT_EQ(prompt("hi"), "right hi");
}

TEST_F(LoaderTest, StopIdsAreTheUnion) {
    TinyModel tiny = tiny_model("llama");
    tiny.config["eos_token_id"] = json::array({7, 3});
    write_hf(folder_.path(), tiny);
    write_plain(folder_.path("generation_config.json"), R"({"eos_token_id": [9, 7]})");
    EXPECT_EQ(load()->stop_ids, (std::vector<int32_t>{3, 7, 9, 256}));
    write_plain(folder_.path("generation_config.json"), R"({"eos_token_id": 5000})");
    EXPECT_HAS(load_refusal(), "5000");
}

TEST_F(LoaderTest, MissingFilesAreNamed) {
    EXPECT_HAS(load_refusal(), "has no config.json");
    EXPECT_HAS(
        refusal([&] { load_model(stream_, folder_.path("nothing")); }), "there is no model at"
    );
    write_hf(folder_.path(), tiny_model("llama"));
    std::filesystem::remove(folder_.path("model.safetensors"));
    EXPECT_HAS(load_refusal(), "model.safetensors");
    EXPECT_EQ(load({.quantize = "", .weights = false})->config.width, 64);
    std::filesystem::remove(folder_.path("tokenizer.json"));
    EXPECT_HAS(load_refusal(), "tokenizer.json is missing");
    write_plain(folder_.path("tokenizer.model"), "x");
    EXPECT_HAS(load_refusal(), "SentencePiece");
}

TEST_F(LoaderTest, TokenizerOfAnotherModel) {
    TinyModel tiny = tiny_model("llama");
    json tokenizer = tokenizer_json();
    tokenizer["added_tokens"].push_back({{"id", 400}, {"content", "<x>"}, {"special", true}});
    write_hf(folder_.path(), tiny);
    write_plain(folder_.path("tokenizer.json"), tokenizer.dump());
    EXPECT_HAS(load_refusal(), "not of the same model");
}

TEST(Safetensors, HolesAndOverlapsAreDamage) {
    const Folder folder;
    const std::string path = folder.path("t.safetensors");
    const auto refused = [&](std::vector<int> a, std::vector<int> b, size_t bytes) {
        const std::string header =
            json{
                {"a", {{"dtype", "U8"}, {"shape", {a[1] - a[0]}}, {"data_offsets", a}}},
                {"b", {{"dtype", "U8"}, {"shape", {b[1] - b[0]}}, {"data_offsets", b}}}}
                .dump();
        std::string text(8, '\0');
        const uint64_t length = header.size();
        std::memcpy(text.data(), &length, 8);
        write_plain(path, text + header + std::string(bytes, 'x'));
        return refusal([&] { SafetensorsFile file(path); });
    };
    EXPECT_EQ(refused({0, 4}, {4, 8}, 8), "");
    EXPECT_EQ(refused({4, 8}, {0, 4}, 8), "");
    EXPECT_HAS(refused({0, 4}, {3, 8}, 8), "overlaps");
    EXPECT_HAS(refused({0, 4}, {5, 8}, 8), "hole");
    EXPECT_HAS(refused({0, 4}, {4, 8}, 9), "belong to no tensor");
    EXPECT_HAS(refused({0, 4}, {4, 8}, 7), "\"b\" ends at byte 8 of 7");
}

TEST(Safetensors, WrittenFilesReadBack) {
    const Folder folder;
    const std::string path = folder.path("t.safetensors");
    const std::vector<float> values = {1.0f, 2.0f, 3.0f};
    write_safetensors(
        path,
        {{"x", "F32", {3}, values.data(), 12}, {"none", "F32", {0}, nullptr, 0}},
        {{"format", "pt"}}
    );
    const SafetensorsFile file(path);
    EXPECT_EQ(std::memcmp(file.tensor("x").bytes.data(), values.data(), 12), 0);
    EXPECT_EQ(file.tensor("none").numel(), 0);
    EXPECT_EQ(file.metadata().at("format"), "pt");
    EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
}

TEST_F(LoaderTest, ReferenceModels) {
    const char* models = std::getenv("ORBIT_MODELS");
    if (models == nullptr) {
        GTEST_SKIP() << "ORBIT_MODELS is not set";
    }
    const std::string root = models;
    const auto plain = load_model(stream_, root + "/mini-qwen3", {.quantize = "int4"});
    const auto packed = load_model(stream_, root + "/packed/mini-qwen3-int4");
    EXPECT_EQ(plain->stop_ids, (std::vector<int32_t>{2}));
    for (size_t l = 0; l < packed->layers.size(); ++l) {
        const QuantizedMatrix& a = plain->layers[l].down.w;
        const QuantizedMatrix& b = packed->layers[l].down.w;
        ASSERT_EQ(a.bytes(), b.bytes());
        std::vector<float> x(static_cast<size_t>(a.cols));
        std::vector<float> y(x.size());
        for (int64_t row = 0; row < a.rows; ++row) {
            decode_f32(a, row, 0, a.cols, x.data());
            decode_f32(b, row, 0, b.cols, y.data());
            ASSERT_EQ(x, y) << "our quantiser against compressed-tensors, layer " << l;
        }
    }
    EXPECT_EQ(load_model(stream_, root + "/mini-llama")->config.num_kv_heads, 1);
}

}  // namespace
}  // namespace orbit
