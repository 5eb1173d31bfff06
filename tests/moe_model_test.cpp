// Loading models with experts in every published layout, packed here by scalar code of its own.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>

#include "base/hash.h"
#include "model/base_bytes.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/forward.h"
#include "model/model.h"
#include "model/token_batch.h"
#include "model_files.h"
#include "run/verify.h"

namespace orbit {
namespace {

using namespace model_files;

constexpr int64_t kExperts = 5;
constexpr int64_t kExpertWidth = 160;  // no multiple of 128: partial FP8 blocks

std::string expert_name(int64_t layer, int64_t expert, const std::string& projection) {
    return "model.layers." + std::to_string(layer) + ".mlp.experts." + std::to_string(expert) +
           "." + projection + ".weight";
}

// Layer 0 is dense (mlp_only_layers), the others have experts.
TinyModel tiny_moe(int64_t layers = 2) {
    TinyModel shape;
    shape.layers = layers;
    TinyModel m = tiny_model("qwen3", true, shape);
    m.family = "qwen3_moe";
    m.config["model_type"] = "qwen3_moe";
    m.config["num_experts"] = kExperts;
    m.config["num_experts_per_tok"] = 2;
    m.config["moe_intermediate_size"] = kExpertWidth;
    m.config["mlp_only_layers"] = {0};
    m.config["norm_topk_prob"] = true;
    std::mt19937 random(6);
    std::normal_distribution<float> normal(0.0f, 0.2f);
    const auto add = [&](const std::string& name, int64_t rows, int64_t cols) {
        Dense dense{{rows, cols}, std::vector<float>(static_cast<size_t>(rows * cols))};
        for (float& value : dense.values) {
            value = round_to_bf16(normal(random));
        }
        m.weights[name] = std::move(dense);
    };
    for (int64_t l = 1; l < layers; ++l) {
        const std::string mlp = "model.layers." + std::to_string(l) + ".mlp.";
        for (const char* projection : {"gate", "up", "down"}) {
            m.weights.erase(mlp + projection + "_proj.weight");
        }
        add(mlp + "gate.weight", kExperts, m.width);
        for (int64_t e = 0; e < kExperts; ++e) {
            add(expert_name(l, e, "gate_proj"), kExpertWidth, m.width);
            add(expert_name(l, e, "up_proj"), kExpertWidth, m.width);
            add(expert_name(l, e, "down_proj"), m.width, kExpertWidth);
        }
    }
    return m;
}

class MoeModelTest : public ::testing::Test {
  protected:
    std::unique_ptr<Model> load(
        const TinyModel& tiny,
        const std::map<std::string, RawTensor>& tensors,
        const LoadOptions& options = {}
    ) {
        write_hf(folder_.path(), tiny);
        write_plain(folder_.path("model.safetensors"), safetensors_text(tensors));
        return load_model(stream_, folder_.path(), options);
    }

    struct Passes {
        std::vector<float> values;  // hidden states, then the adapter's gradients
        size_t peak = 0;            // scratch
        int64_t tokens = 0;
        std::string digest;
    };

    // Forward and backward over three texts, with LoRA on everything.
    Passes run_passes(
        const TinyModel& tiny,
        const std::map<std::string, RawTensor>& tensors,
        const LoadOptions& load_options
    ) {
        const auto model = load(tiny, tensors, load_options);
        Stream stream(device_);
        AdapterOptions options;
        options.kind = "lora";
        AdapterStore adapter(device_, options, model->sites, model->compute, 2, 1);
        TokenBatch batch;
        for (int32_t text = 0; text < 3; ++text) {
            std::vector<int32_t> ids;
            for (int32_t i = 0; i < 30; ++i) {
                const auto vocab = static_cast<int32_t>(model->config.vocab_size);
                ids.push_back((17 * i + 5 * text) % vocab);
            }
            batch.add(ids, 0, std::vector<int32_t>{2 * text, 2 * text + 1});
        }
        const KvCache kv(*model, 1, 6);
        const int slot = adapter.pin_current();
        Pass pass{stream, *model, batch.upload(stream), kv, &adapter, slot};
        SavedActivations saved;
        const Tensor hidden = forward_hidden(pass, &saved);
        Passes passes;
        for (int64_t i = 0; i < hidden.numel(); ++i) {
            passes.values.push_back(to_float(hidden.as<bf16>()[i]));
        }
        backward_layers(pass, saved, hidden);
        adapter.unpin(slot);
        passes.values.insert(
            passes.values.end(), adapter.gradients(), adapter.gradients() + adapter.num_parameters()
        );
        passes.peak = stream.scratch.peak_bytes();
        passes.tokens = batch.num_tokens();
        passes.digest = model->weights_digest;
        return passes;
    }

    Folder folder_;
    Device device_ = make_device("cpu", "reference", 2);
    Stream stream_{device_};
};

void expect_values(
    const QuantizedMatrix& w, const std::vector<float>& values, const std::string& name
) {
    ASSERT_EQ(static_cast<size_t>(w.rows * w.cols), values.size()) << name;
    std::vector<float> row(static_cast<size_t>(w.cols));
    for (int64_t r = 0; r < w.rows; ++r) {
        decode_f32(w, r, 0, w.cols, row.data());
        for (int64_t c = 0; c < w.cols; ++c) {
            ASSERT_EQ(row[static_cast<size_t>(c)], values[static_cast<size_t>(r * w.cols + c)])
                << name << " row " << r << " column " << c;
        }
    }
}

TEST_F(MoeModelTest, ExpertsLandAsStoredAndAreSites) {
    const TinyModel tiny = tiny_moe();
    const auto model = load(tiny, raw_tensors(tiny, "BF16"));
    EXPECT_FALSE(model->layers[0].moe.has_value());
    ASSERT_TRUE(model->layers[1].moe.has_value());
    const MoeWeights& moe = *model->layers[1].moe;
    expect_values(moe.router, tiny.weights.at("model.layers.1.mlp.gate.weight").values, "router");
    for (int64_t e = 0; e < kExperts; ++e) {
        const auto at = static_cast<size_t>(e);
        const auto check = [&](const ExpertWeights& experts, const char* projection) {
            const std::string name = expert_name(1, e, projection);
            expect_values(experts.w[at], tiny.weights.at(name).values, name);
            const AdapterSite& site = model->sites.at(static_cast<size_t>(experts.sites[at]));
            EXPECT_EQ(site.module + ".weight", name);
            EXPECT_EQ(site.in, experts.w[at].cols);
        };
        check(moe.gate, "gate_proj");
        check(moe.up, "up_proj");
        check(moe.down, "down_proj");
    }
    EXPECT_EQ(model->sites.size(), 7u + 4u + 3u * kExperts);
}

TEST_F(MoeModelTest, FusedExpertsAreTheSameModel) {
    const TinyModel tiny = tiny_moe();
    auto tensors = raw_tensors(tiny, "BF16");
    const std::string digest = load(tiny, tensors)->weights_digest;
    RawTensor gate_up{"BF16", {kExperts, 2 * kExpertWidth, tiny.width}, ""};
    RawTensor down{"BF16", {kExperts, tiny.width, kExpertWidth}, ""};
    for (int64_t e = 0; e < kExperts; ++e) {
        for (const char* projection : {"gate_proj", "up_proj", "down_proj"}) {
            const std::string name = expert_name(1, e, projection);
            (std::string(projection) == "down_proj" ? down : gate_up).bytes += tensors[name].bytes;
            tensors.erase(name);
        }
    }
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = gate_up;
    tensors["model.layers.1.mlp.experts.down_proj"] = down;
    EXPECT_EQ(load(tiny, tensors)->weights_digest, digest);
    tensors[expert_name(1, 0, "up_proj")] =
        stored_as(tiny.weights.at(expert_name(1, 0, "up_proj")), "BF16");
    EXPECT_NE(refusal([&] { load(tiny, tensors); }).find("twice"), std::string::npos);
}

// --- packers, from models.md 10 alone ---

float e2m1(int code) {
    constexpr float kMagnitude[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    return code >= 8 ? -kMagnitude[code & 7] : kMagnitude[code];
}

float e4m3(int code) {
    const int exponent = (code >> 3) & 15;
    const float mantissa = static_cast<float>(code & 7);
    return exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
}

// Codes need not come close to the weights: the loader must only read them as they are meant.
struct PackedTensors {
    std::map<std::string, RawTensor> tensors;
    std::map<std::string, std::vector<float>> values;  // by weight name
};

// No two matrices are alike: one in the place of another is noticed.
uint32_t seed_of(const std::string& module) {
    return static_cast<uint32_t>(hash64(module.data(), module.size()));
}

enum class Layout { kMxFp4, kDeepSeekFp4, kNvFp4, kModelOpt, kFp8F32, kFp8Bf16, kFp8E8m0 };

void pack_fp4(
    const std::string& module, int64_t rows, int64_t cols, Layout layout, PackedTensors& out
) {
    const bool nvfp4 = layout == Layout::kNvFp4 || layout == Layout::kModelOpt;
    const int64_t group = nvfp4 ? 16 : 32;
    const bool divides = layout == Layout::kNvFp4;
    const float global = divides ? 700.0f : 0.0013f;
    std::mt19937 random(seed_of(module));
    RawTensor data{layout == Layout::kDeepSeekFp4 ? "I8" : "U8", {rows, cols / 2}, ""};
    RawTensor scales{
        nvfp4                            ? "F8_E4M3"
        : layout == Layout::kDeepSeekFp4 ? "F8_E8M0"
                                         : "U8",
        {rows, cols / group},
        ""};
    auto& values = out.values[module + ".weight"];
    for (int64_t i = 0; i < rows * cols / group; ++i) {
        const int code =
            nvfp4 ? static_cast<int>(random() % 127) : 118 + static_cast<int>(random() % 8);
        scales.bytes += static_cast<char>(code);
        const float block = !nvfp4    ? std::ldexp(1.0f, code - 127)
                            : divides ? e4m3(code) / global
                                      : e4m3(code) * global;
        for (int64_t j = 0; j < group; j += 2) {
            const int byte = static_cast<int>(random() % 256);
            data.bytes += static_cast<char>(byte);
            values.push_back(round_to_bf16(e2m1(byte & 15) * block));
            values.push_back(round_to_bf16(e2m1(byte >> 4) * block));
        }
    }
    const std::string global_bytes(reinterpret_cast<const char*>(&global), 4);
    out.tensors.erase(module + ".weight");
    switch (layout) {
        case Layout::kModelOpt:
            out.tensors[module + ".weight_scale_2"] = {"F32", {}, global_bytes};
            out.tensors[module + ".input_scale"] = {"F32", {}, global_bytes};
            out.tensors[module + ".weight"] = data;
            out.tensors[module + ".weight_scale"] = scales;
            break;
        case Layout::kDeepSeekFp4:
            out.tensors[module + ".weight"] = data;
            out.tensors[module + ".scale"] = scales;
            break;
        case Layout::kNvFp4:
            out.tensors[module + ".weight_global_scale"] = {"F32", {1}, global_bytes};
            [[fallthrough]];
        default:
            out.tensors[module + ".weight_packed"] = data;
            out.tensors[module + ".weight_scale"] = scales;
            break;
    }
}

void pack_fp8(
    const std::string& module, int64_t rows, int64_t cols, Layout layout, PackedTensors& out
) {
    const int64_t down = (rows + 127) / 128;
    const int64_t across = (cols + 127) / 128;
    std::mt19937 random(seed_of(module));
    Dense scales{{down, across}, {}};
    RawTensor e8m0{"F8_E8M0", {down, across}, ""};
    for (int64_t i = 0; i < down * across; ++i) {
        const int code = 112 + static_cast<int>(random() % 8);
        e8m0.bytes += static_cast<char>(code);
        const float power = std::ldexp(1.0f, code - 127);
        scales.values.push_back(
            layout == Layout::kFp8E8m0   ? power
            : layout == Layout::kFp8Bf16 ? round_to_bf16(power * 1.37f)
                                         : power * 1.37f
        );
    }
    RawTensor data{"F8_E4M3", {rows, cols}, ""};
    auto& values = out.values[module + ".weight"];
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) {
            const int code = static_cast<int>(random() % 127);
            const bool negative = random() % 2 == 1;
            data.bytes += static_cast<char>(code | (negative ? 128 : 0));
            const float scale = scales.values[static_cast<size_t>(r / 128 * across + c / 128)];
            values.push_back(round_to_bf16((negative ? -e4m3(code) : e4m3(code)) * scale));
        }
    }
    out.tensors[module + ".weight"] = data;
    if (layout == Layout::kFp8E8m0) {
        out.tensors[module + ".scale"] = e8m0;
    } else {
        out.tensors[module + ".weight_scale_inv"] =
            stored_as(scales, layout == Layout::kFp8F32 ? "F32" : "BF16");
    }
}

PackedTensors pack_experts(const TinyModel& tiny, Layout layout) {
    PackedTensors out;
    out.tensors = raw_tensors(tiny, "BF16");
    const bool fp8 = layout >= Layout::kFp8F32;
    for (const auto& [name, dense] : tiny.weights) {
        if (name.find(".experts.") != std::string::npos) {
            const std::string module = name.substr(0, name.rfind('.'));
            (fp8 ? pack_fp8 : pack_fp4)(module, dense.shape[0], dense.shape[1], layout, out);
        }
    }
    return out;
}

TEST_F(MoeModelTest, PackedLayoutsKeepTheirValues) {
    const TinyModel tiny = tiny_moe();
    for (const Layout layout :
         {Layout::kMxFp4,
          Layout::kDeepSeekFp4,
          Layout::kNvFp4,
          Layout::kModelOpt,
          Layout::kFp8F32,
          Layout::kFp8Bf16,
          Layout::kFp8E8m0}) {
        SCOPED_TRACE(static_cast<int>(layout));
        const PackedTensors packed = pack_experts(tiny, layout);
        const auto model = load(tiny, packed.tensors);
        const MoeWeights& moe = *model->layers[1].moe;
        const WeightFormat format = layout >= Layout::kFp8F32        ? WeightFormat::kFp8
                                    : layout <= Layout::kDeepSeekFp4 ? WeightFormat::kMxFp4
                                                                     : WeightFormat::kNvFp4;
        EXPECT_EQ(moe.up.w[0].format, format);
        for (int64_t e = 0; e < kExperts; ++e) {
            const auto at = static_cast<size_t>(e);
            expect_values(moe.up.w[at], packed.values.at(expert_name(1, e, "up_proj")), "up");
            expect_values(moe.down.w[at], packed.values.at(expert_name(1, e, "down_proj")), "down");
        }
    }
}

// The experts of a layer in gpt-oss's two tensors, gate and up rows by turns.
void fuse_as_gpt_oss(
    std::map<std::string, RawTensor>& tensors,
    const std::string& experts,
    const std::vector<std::string>& projections,
    const std::string& fused
) {
    const auto part = [&](int64_t e, const std::string& projection, const char* suffix) {
        return tensors.extract(fmt::format("{}{}.{}{}", experts, e, projection, suffix)).mapped();
    };
    for (const auto& [from, to] :
         {std::pair{".weight_packed", "_blocks"}, {".weight_scale", "_scales"}}) {
        RawTensor all{"U8", {}, ""};
        for (int64_t e = 0; e < kExperts; ++e) {
            std::vector<RawTensor> parts;
            for (const std::string& projection : projections) {
                parts.push_back(part(e, projection, from));
            }
            const int64_t rows = parts[0].shape[0];
            const auto bytes = static_cast<size_t>(parts[0].shape[1]);
            for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
                for (const RawTensor& one : parts) {
                    all.bytes += one.bytes.substr(row * bytes, bytes);
                }
            }
            all.shape = {kExperts, rows * static_cast<int64_t>(parts.size()), parts[0].shape[1]};
        }
        if (std::string(to) == "_blocks") {
            all.shape.back() /= 16;
            all.shape.push_back(16);
        }
        tensors[experts + fused + to] = all;
    }
}

TEST_F(MoeModelTest, GptOssLayoutKeepsItsValues) {
    const TinyModel tiny = tiny_moe();
    PackedTensors packed = pack_experts(tiny, Layout::kMxFp4);
    const std::string experts = "model.layers.1.mlp.experts.";
    fuse_as_gpt_oss(packed.tensors, experts, {"gate_proj", "up_proj"}, "gate_up_proj");
    fuse_as_gpt_oss(packed.tensors, experts, {"down_proj"}, "down_proj");
    const auto model = load(tiny, packed.tensors);
    const MoeWeights& moe = *model->layers[1].moe;
    EXPECT_EQ(moe.up.w[0].format, WeightFormat::kMxFp4);
    for (int64_t e = 0; e < kExperts; ++e) {
        const auto at = static_cast<size_t>(e);
        expect_values(moe.gate.w[at], packed.values.at(expert_name(1, e, "gate_proj")), "gate");
        expect_values(moe.up.w[at], packed.values.at(expert_name(1, e, "up_proj")), "up");
        expect_values(moe.down.w[at], packed.values.at(expert_name(1, e, "down_proj")), "down");
    }
    const std::string gate_up = experts + "gate_up_proj";
    const auto refused = [&](const auto& change) {
        auto tensors = packed.tensors;
        change(tensors);
        const std::string sentence = refusal([&] { load(tiny, tensors); });
        EXPECT_NE(sentence.find(gate_up), std::string::npos) << sentence;
        return sentence;
    };
    using Tensors = std::map<std::string, RawTensor>;
    const auto has = [](const std::string& sentence, const char* part) {
        EXPECT_NE(sentence.find(part), std::string::npos) << sentence;
    };
    has(refused([&](Tensors& t) { t.erase(gate_up + "_scales"); }), "beside it");
    has(refused([&](Tensors& t) { t[gate_up + "_scales"].bytes[3] = '\xff'; }), "NaN");
    has(refused([&](Tensors& t) {
            RawTensor& blocks = t[gate_up + "_blocks"];
            blocks.shape = {blocks.shape[0], blocks.shape[1], blocks.shape[2] * 16};
        }),
        "do not make");
}

// moe.dequant_bytes and moe.dequant_rows change no bit, and the memory is the option.
TEST_F(MoeModelTest, DequantBytesAreTheTemporaryMemory) {
    const TinyModel tiny = tiny_moe();
    const PackedTensors packed = pack_experts(tiny, Layout::kMxFp4);
    std::vector<std::vector<float>> results;
    std::vector<size_t> peaks;
    const auto run = [&](const DequantOptions& dequant) {
        LoadOptions options;
        options.dequant = dequant;
        const Passes passes = run_passes(tiny, packed.tensors, options);
        results.push_back(passes.values);
        peaks.push_back(passes.peak);
        const ModelConfig config = parse_hf_config(tiny.config.dump(), "config.json").model;
        return dequant_bytes(config, dequant, passes.tokens);
    };
    const int64_t layer = 3 * kExperts * kExpertWidth * tiny.width * 2;
    EXPECT_EQ(run({1 << 30, 0}), 0) << "off";
    EXPECT_EQ(run({1 << 30, 37}), 0) << "180 rows are 36 for each of 5 experts";
    EXPECT_EQ(run({65536, 36}), 65536);
    EXPECT_EQ(run({8192, 36}), 8192);
    EXPECT_EQ(run({1 << 30, 36}), layer) << "no more than the experts of a layer";
    for (size_t i = 1; i < results.size(); ++i) {
        EXPECT_EQ(results[i], results[0]) << i;
    }
    EXPECT_EQ(peaks[1], peaks[0]);
    EXPECT_EQ(peaks[2], peaks[0] + 65536);
    EXPECT_EQ(peaks[4], peaks[0] + static_cast<size_t>(layer));
}

// moe.host_layers changes where the experts of the last layers lie and no bit: plain and packed,
// with and without decoding first, whose buffer must not take one layer's staged matrix for the
// next's.
TEST_F(MoeModelTest, ExpertsInHostMemoryGiveTheSameBits) {
    const TinyModel tiny = tiny_moe(4);
    const auto check = [&](const std::map<std::string, RawTensor>& tensors,
                           DequantOptions dequant) {
        LoadOptions options;
        options.dequant = dequant;
        const Passes whole = run_passes(tiny, tensors, options);
        for (int64_t layers = 1; layers <= 3; ++layers) {
            options.host_layers = layers;
            const Passes passes = run_passes(tiny, tensors, options);
            EXPECT_EQ(passes.values, whole.values) << layers << " layers";
            EXPECT_EQ(passes.digest, whole.digest);
            EXPECT_GT(passes.peak, whole.peak);
        }
    };
    check(raw_tensors(tiny, "BF16"), {});
    for (const Layout layout : {Layout::kMxFp4, Layout::kNvFp4, Layout::kFp8F32}) {
        SCOPED_TRACE(static_cast<int>(layout));
        const PackedTensors packed = pack_experts(tiny, layout);
        check(packed.tensors, {});
        check(packed.tensors, {1 << 30, 1});
        check(packed.tensors, {32768, 1});
    }
}

TEST_F(MoeModelTest, HostMemoryHoldsWhatTheArenaDoesNot) {
    const TinyModel tiny = tiny_moe(4);
    const PackedTensors packed = pack_experts(tiny, Layout::kMxFp4);
    const auto whole = load(tiny, packed.tensors);
    EXPECT_EQ(whole->host.total_bytes(), 0U);
    EXPECT_EQ(whole->staged_bytes, 0);
    const Checkpoint checkpoint = open_checkpoint(folder_.path(), {.tokenizer = false});
    for (int64_t layers = 1; layers <= 3; ++layers) {
        LoadOptions options;
        options.host_layers = layers;
        const auto model = load(tiny, packed.tensors, options);
        const HostExperts host =
            host_experts(model->config, placed_formats(checkpoint, options), layers);
        EXPECT_EQ(model->host.total_bytes(), static_cast<size_t>(host.bytes));
        EXPECT_EQ(model->staged_bytes, host.bytes / layers) << "layers of one size";
        EXPECT_EQ(
            model->arena.total_bytes() + model->host.total_bytes(), whole->arena.total_bytes()
        );
        for (int64_t l = 1; l < 4; ++l) {
            EXPECT_EQ(model->layers[static_cast<size_t>(l)].moe->on_host, l >= 4 - layers) << l;
        }
    }
    LoadOptions options;
    options.host_layers = 4;
    EXPECT_EQ(
        refusal([&] { load(tiny, packed.tensors, options); }),
        "moe.host_layers = 4 is more than the number of layers with experts, which is 3 here; "
        "lower it."
    );
}

TEST_F(MoeModelTest, DamageIsNamed) {
    const TinyModel tiny = tiny_moe();
    const std::string module = "model.layers.1.mlp.experts.2.up_proj";
    const auto refused = [&](Layout layout, const auto& change) {
        PackedTensors packed = pack_experts(tiny, layout);
        change(packed.tensors);
        const std::string sentence = refusal([&] { load(tiny, packed.tensors); });
        EXPECT_NE(sentence.find(module), std::string::npos) << sentence;
        return sentence;
    };
    using Tensors = std::map<std::string, RawTensor>;
    const auto has = [](const std::string& sentence, const char* part) {
        EXPECT_NE(sentence.find(part), std::string::npos) << sentence;
    };
    has(refused(Layout::kFp8F32, [&](Tensors& t) { t.erase(module + ".weight_scale_inv"); }),
        "beside it");
    has(refused(Layout::kFp8E8m0, [&](Tensors& t) { t[module + ".scale"].bytes[0] = '\xff'; }),
        "range of float");
    has(refused(Layout::kFp8F32, [&](Tensors& t) { t[module + ".weight"].bytes[7] = '\x7f'; }),
        "NaN");
    has(refused(Layout::kMxFp4, [&](Tensors& t) { t[module + ".weight_scale"].bytes[3] = '\xfe'; }),
        "NaN");
    has(refused(Layout::kNvFp4, [&](Tensors& t) { t[module + ".weight_scale"].bytes[3] = '\xff'; }),
        "NaN");
    const std::string zero(4, '\0');
    has(refused(
            Layout::kNvFp4, [&](Tensors& t) { t[module + ".weight_global_scale"].bytes = zero; }
        ),
        "positive");
    has(refused(
            Layout::kModelOpt,
            [&](Tensors& t) {
                RawTensor& scale = t[module + ".weight_scale"];
                scale.shape = {scale.shape[0], scale.shape[1] / 2};
                scale.bytes.resize(scale.bytes.size() / 2);
            }
        ),
        "do not make");
}

TEST(MoeConfig, BothNamesOfTheNumberOfExperts) {
    TinyModel tiny = tiny_moe();
    const auto parse = [&] { return parse_hf_config(tiny.config.dump(), "config.json").model; };
    EXPECT_EQ(parse().num_experts, kExperts);
    EXPECT_TRUE(parse().normalize_router);
    tiny.config.erase("num_experts");
    tiny.config["num_local_experts"] = 4;
    tiny.config.erase("norm_topk_prob");
    tiny.config["mlp_only_layers"] = nlohmann::json::array();
    tiny.config["decoder_sparse_step"] = 2;
    const ModelConfig config = parse();
    EXPECT_EQ(config.num_experts, 4);
    EXPECT_FALSE(config.normalize_router) << "transformers' default";
    EXPECT_FALSE(config.layer_has_experts(0));
    EXPECT_TRUE(config.layer_has_experts(1));
    tiny.config["num_experts_per_tok"] = 5;
    EXPECT_NE(refusal([&] { parse(); }).find("experts per token"), std::string::npos);
}

// transformers in float32 on the same weights (contract.md, What verify reports).
TEST_F(MoeModelTest, ReferenceModels) {
    const char* models = std::getenv("ORBIT_MODELS");
    if (models == nullptr) {
        GTEST_SKIP() << "ORBIT_MODELS is not set";
    }
    const Device device = make_device("cpu");
    Stream stream(device);
    for (const char* name :
         {"mini-qwen3-moe",
          "packed/mini-qwen3-moe-int4",
          "packed/mini-qwen3-moe-fp8",
          "packed/mini-qwen3-moe-mxfp4",
          "packed/mini-qwen3-moe-nvfp4",
          "packed/mini-qwen3-moe-nvfp4-modelopt"}) {
        const std::string path = std::string(models) + "/" + name;
        const auto model = load_model(stream, path, {.compute = DType::kF32, .quantize = ""});
        const VerifyReport report = verify_model(stream, *model, path);
        EXPECT_LE(report.logprob_difference, 2e-4) << name;
        EXPECT_LE(report.gradient_difference, 1e-3) << name;
        EXPECT_EQ(report.greedy_equal, report.greedy) << name;
        EXPECT_EQ(report.rows.size(), 3u) << name;
    }
}

}  // namespace
}  // namespace orbit
