// GGUF files: the container, the names, the row order of llama's q and k, the check mode.
#include "model/gguf.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>

#include "model/checkpoint.h"
#include "model/model.h"
#include "model_files.h"

namespace orbit {
namespace {

using namespace model_files;

#define EXPECT_HAS(text, part) EXPECT_NE(std::string(text).find(part), std::string::npos) << text

class GgufTest : public testing::Test {
  protected:
    std::string path() const { return folder_.path("m.gguf"); }

    std::unique_ptr<Model> load(DType compute = DType::kBF16) {
        return load_model(stream_, path(), {.compute = compute, .quantize = ""});
    }

    std::string refusal_of(const std::string& file) {
        write_plain(path(), file);
        return refusal([&] { load(); });
    }

    std::vector<float> row_of(const QuantizedMatrix& w, int64_t row) {
        std::vector<float> values(static_cast<size_t>(w.cols));
        decode_f32(w, row, 0, w.cols, values.data());
        return values;
    }

    void expect_linears(const Model& model, const TinyModel& tiny) {
        for (const LayerWeights& layer : model.layers) {
            for (const LinearWeights* linear :
                 {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
                const Dense& dense = tiny.weights.at(linear->module + ".weight");
                ASSERT_EQ(linear->w.rows, dense.shape[0]) << linear->module;
                for (int64_t r = 0; r < linear->w.rows; ++r) {
                    const auto begin = dense.values.begin() + r * linear->w.cols;
                    const std::vector<float> expected(begin, begin + linear->w.cols);
                    ASSERT_EQ(row_of(linear->w, r), expected) << linear->module << " row " << r;
                }
            }
        }
    }

    Folder folder_;
    Device device_ = make_device("cpu", "reference", 2);
    Stream stream_{device_};
};

TEST_F(GgufTest, EveryFamilyHasTheRowsOfHuggingFace) {
    for (const char* family : {"llama", "qwen2", "qwen3"}) {
        for (const bool tied : {true, false}) {
            const TinyModel tiny = tiny_model(family, tied);
            write_plain(path(), gguf_file(tiny));
            const auto model = load();
            expect_linears(*model, tiny);
            EXPECT_FALSE(model->rope.interleaved);
            EXPECT_EQ(model->config.tied_embeddings, tied);
            EXPECT_EQ(model->head.data == model->embedding.data, tied);
            EXPECT_EQ(model->config.head_dim, 16);
            EXPECT_EQ(model->config.max_positions, 64);
            EXPECT_EQ(model->stop_ids, (std::vector<int32_t>{256}));
            EXPECT_EQ(model->layers[0].q.bias != nullptr, std::string(family) == "qwen2");
            const auto ids = encode_chat(*model, {{"user", "hi"}}, false);
            EXPECT_EQ(model->tokenizer->decode(ids, false), "[user]hi<|im_end|>[assistant]");
        }
    }
}

// Negative control: the stored rows differ from ours, so the test above is about something.
TEST_F(GgufTest, LlamaRowsAreReorderedAndQwenRowsAreNot) {
    const TinyModel llama = tiny_model("llama");
    const Dense& q = llama.weights.at("model.layers.0.self_attn.q_proj.weight");
    EXPECT_NE(interleaved(q, llama.heads).values, q.values);
    EXPECT_NE(interleaved(q, llama.heads).values, interleaved(q, 2).values);
}

TEST_F(GgufTest, TheCheckModeKeepsFloat32) {
    TinyModel tiny = tiny_model("qwen3");
    float& value = tiny.weights["model.layers.0.mlp.up_proj.weight"].values[0];
    value = 1.0f + 1.0f / 1024;
    write_plain(path(), gguf_file(tiny, 0));
    const auto check = load(DType::kF32);
    EXPECT_EQ(check->layers[0].up.w.format, WeightFormat::kF32);
    EXPECT_EQ(row_of(check->layers[0].up.w, 0)[0], value);
    EXPECT_EQ(check->largest_rounding_error, 0.0);
    const auto fast = load();
    EXPECT_EQ(fast->layers[0].up.w.format, WeightFormat::kBF16);
    EXPECT_EQ(row_of(fast->layers[0].up.w, 0)[0], 1.0f);
    EXPECT_EQ(fast->largest_rounding_error, 1.0 / 1024);
}

// A matrix of Q8_0 blocks whose row r has the scale 2^-(r mod 8) and the codes 0, 1, 2, ...
std::string q8_rows(int64_t rows, int64_t cols) {
    std::string bytes;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t block = 0; block < cols / 32; ++block) {
            const auto d = static_cast<uint16_t>((15 - r % 8) << 10);
            bytes.append(reinterpret_cast<const char*>(&d), 2);
            for (int64_t i = 0; i < 32; ++i) {
                bytes += static_cast<char>(i);
            }
        }
    }
    return bytes;
}

std::string with_q_proj(const TinyModel& tiny, uint32_t type, const std::string& bytes) {
    GgufWriter w = gguf_keys(tiny);
    for (const auto& [name, dense] : tiny.weights) {
        const bool replaced = name == "model.layers.0.self_attn.q_proj.weight";
        w.tensor(
            gguf_name(name),
            dense.shape,
            replaced ? type : 0,
            replaced ? bytes : stored_as(dense, "F32").bytes
        );
    }
    return w.file();
}

TEST_F(GgufTest, RowsOfBlocksAreReorderedWhole) {
    const TinyModel tiny = tiny_model("llama");
    write_plain(path(), with_q_proj(tiny, 8, q8_rows(64, 64)));
    const auto model = load();
    const QuantizedMatrix& q = model->layers[0].q.w;
    ASSERT_EQ(q.format, WeightFormat::kQ8_0);
    for (int64_t row = 0; row < 64; ++row) {
        const int64_t channel = row % 16;
        const int64_t source = row / 16 * 16 + 2 * (channel % 8) + channel / 8;
        EXPECT_EQ(row_of(q, row)[33], std::ldexp(1.0f, static_cast<int>(-(source % 8)))) << row;
    }
}

TEST_F(GgufTest, F16Tensors) {
    const TinyModel tiny = tiny_model("qwen3");
    std::string bytes;
    for (int i = 0; i < 64 * 64; ++i) {
        const uint16_t half = 0x3C01;  // 1 + 2^-10
        bytes.append(reinterpret_cast<const char*>(&half), 2);
    }
    write_plain(path(), with_q_proj(tiny, 1, bytes));
    EXPECT_EQ(row_of(load(DType::kF32)->layers[0].q.w, 5)[7], 1.0f + 1.0f / 1024);
    EXPECT_EQ(row_of(load()->layers[0].q.w, 5)[7], 1.0f);
}

TEST_F(GgufTest, RefusalsNameTheTensorOrKey) {
    const TinyModel tiny = tiny_model("qwen3");
    const std::string k4 = refusal_of(with_q_proj(tiny, 12, std::string(64 * 64, '\0')));
    EXPECT_HAS(k4, "blk.0.attn_q.weight");
    EXPECT_HAS(k4, "Q4_K");
    EXPECT_HAS(refusal_of(with_q_proj(tiny, 77, "")), "unknown type 77");
    std::string nan = q8_rows(64, 64);
    nan[0] = '\xff';
    nan[1] = '\x7f';
    EXPECT_HAS(refusal_of(with_q_proj(tiny, 8, nan)), "NaN");
    EXPECT_HAS(refusal_of("GGUX"), "neither a GGUF file");
    EXPECT_HAS(refusal_of(""), "truncated");
    TinyModel other = tiny;
    other.family = "mamba";
    EXPECT_HAS(refusal_of(gguf_file(other)), "supported are llama, qwen2, qwen3");
    TinyModel missing = tiny;
    missing.weights.erase("model.layers.1.mlp.up_proj.weight");
    EXPECT_HAS(refusal_of(gguf_file(missing)), "model.layers.1.mlp.up_proj.weight");
    const std::string whole = gguf_file(tiny);
    EXPECT_HAS(refusal_of(whole.substr(0, whole.size() - 64)), "truncated");
    std::string version = whole;
    version[4] = 1;
    EXPECT_HAS(refusal_of(version), "version 1");
    EXPECT_EQ(refusal_of(whole), "");  // negative control
}

TEST_F(GgufTest, RopeFactorsDivideTheFrequencies) {
    const TinyModel tiny = tiny_model("llama");
    GgufWriter w = gguf_keys(tiny);
    for (const auto& [name, dense] : tiny.weights) {
        w.tensor(gguf_name(name), dense.shape, 0, stored_as(dense, "F32").bytes);
    }
    const Dense factors{{8}, {2, 1, 1, 1, 1, 1, 1, 1}};
    w.tensor("rope_freqs.weight", factors.shape, 0, stored_as(factors, "F32").bytes);
    write_plain(path(), w.file());
    const auto model = load();
    EXPECT_EQ(model->rope.cosine[8], static_cast<float>(std::cos(0.5)));
    const Dense zero{{8}, {0, 1, 1, 1, 1, 1, 1, 1}};
    GgufWriter bad = gguf_keys(tiny);
    bad.tensor("rope_freqs.weight", zero.shape, 0, stored_as(zero, "F32").bytes);
    bad.tensor("token_embd.weight", {320, 64}, 0, std::string(320 * 64 * 4, '\0'));
    EXPECT_HAS(refusal_of(bad.file()), "rope_freqs.weight");
}

TEST_F(GgufTest, SmolLM2) {
    const char* file = std::getenv("ORBIT_SMOLLM2");
    if (file == nullptr) {
        GTEST_SKIP() << "ORBIT_SMOLLM2 names no GGUF file";
    }
    const auto model = load_model(stream_, file);
    EXPECT_EQ(model->config.num_layers, 30);
    EXPECT_EQ(model->config.num_heads, 9);
    EXPECT_EQ(model->layers[0].q.w.format, WeightFormat::kQ4_1);
    EXPECT_EQ(model->embedding.format, WeightFormat::kQ8_0);
}

}  // namespace
}  // namespace orbit
