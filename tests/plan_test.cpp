#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/philox.h"
#include "model_files.h"
#include "ops/decoded_weights.h"
#include "ops/head_chunk.h"
#include "run/gpu_plan.h"
#include "run/memory_plan.h"
#include "train/trainer.h"

namespace orbit {
namespace {

std::string source_path(const std::string& name) {
    return std::string(ORBIT_SOURCE_DIR) + "/" + name;
}

std::vector<int32_t> random_ids(const Model& model, int64_t count, uint32_t stream) {
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t word = philox(static_cast<uint32_t>(i), stream, 0, 0, 7, 0).word[0];
        ids.push_back(static_cast<int32_t>(word % static_cast<uint32_t>(model.config.vocab_size)));
    }
    return ids;
}

// Within 5 % of what was taken.
void expect_near(int64_t predicted, size_t taken, const std::string& what, double part = 0.05) {
    const auto real = static_cast<double>(taken);
    EXPECT_NEAR(static_cast<double>(predicted), real, part * real) << what;
    if (std::getenv("ORBIT_VERBOSE") != nullptr) {
        fmt::print("{}: predicted {}, taken {}\n", what, predicted, taken);
    }
}

// Peaks of a ragged training batch, a prefill and decoding on the CPU, beside the plan.
void compare(
    const std::string& path,
    const AdapterOptions& options,
    const char* isa,
    const DequantOptions& dequant = {},
    const TrainOptions& train = {},
    int64_t host_layers = 0
) {
    const std::string what = fmt::format(
        "{} {} {} {} {} {} {}",
        path,
        options.kind,
        isa,
        dequant.rows,
        train.activation_offloading,
        train.recompute,
        host_layers
    );
    const Device device = make_device("cpu", isa, 2);
    Stream stream(device);
    LoadOptions load;
    load.dequant = dequant;
    load.host_layers = host_layers;
    const auto model = load_model(stream, path, load);
    AdapterStore adapter(device, options, model->sites, model->compute, 2, 1);
    ScratchModel m = scratch_model(device, model->config, options);
    m.dequant = dequant;
    m.staged = model->staged_bytes;

    size_t held = 0;
    for (const auto& entry : adapter.ledger()) {
        held += entry.bytes;
    }
    int64_t planned = 0;
    for (const auto& entry : adapter_ledger(options, model->sites, model->compute, 2)) {
        planned += static_cast<int64_t>(entry.bytes);
    }
    EXPECT_EQ(planned, static_cast<int64_t>(held)) << what;

    const std::vector<int64_t> lengths = {190, 77, 230, 150, 33};
    std::vector<std::vector<int32_t>> texts;
    TrainShape shape;
    shape.sequences = static_cast<int64_t>(lengths.size());
    for (const int64_t length : lengths) {
        texts.push_back(random_ids(*model, length, static_cast<uint32_t>(length)));
        shape.tokens += length - 1;
        shape.rows += length - 20;
        shape.longest = std::max(shape.longest, length);
    }
    std::vector<TrainSequence> sequences;
    for (size_t i = 0; i < texts.size(); ++i) {
        sequences.push_back({&texts[i], 20, static_cast<int64_t>(i)});
    }
    shape.offload = train.activation_offloading;
    shape.keep_attention = train.keeps_attention();
    const int64_t training = training_scratch(m, shape);
    stream.scratch.reserve(static_cast<size_t>(training));
    Trainer trainer(stream, *model, adapter, train, SamplingFilter{}, false, shape.tokens);
    const int slot = adapter.pin_current();
    trainer.accumulate(sequences, slot, [](auto, auto, auto coefficients) {
        for (auto& c : coefficients) {
            std::fill(c.d_logprob.begin(), c.d_logprob.end(), -1e-3f);
        }
    });
    adapter.unpin(slot);
    expect_near(training, stream.scratch.peak_bytes(), what + " training");

    RolloutShape rollout;
    rollout.engine.max_batch = 24;
    rollout.engine.prefill_chunk = 512;
    rollout.longest_prompt = 100;
    rollout.longest = 140;
    rollout.engine.kv_tokens = rollout.engine.max_batch * (rollout.longest + 2 * kPageTokens);
    const MemoryPlan plan = plan_memory(m, 0, rollout, {});
    stream.scratch.reserve(plan.scratch);
    RolloutEngine engine(stream, *model, &adapter, rollout.engine);
    for (int64_t i = 0; i < 24; ++i) {
        Request request;
        request.prompt = random_ids(*model, rollout.longest_prompt, static_cast<uint32_t>(900 + i));
        request.request_ids = {static_cast<uint64_t>(i)};
        request.max_tokens = 40;
        request.ignore_stop = true;
        engine.submit(std::move(request));
    }
    while (engine.step()) {
    }
    size_t rest = 0;
    for (const auto& entry : plan.entries) {
        const bool of_engine = entry.name == "KV pages" || entry.name.ends_with("decoding");
        rest += of_engine ? entry.bytes : 0;
    }
    // Scratch of an expert grows with its rows, which are not known before.
    expect_near(
        static_cast<int64_t>(plan.scratch),
        stream.scratch.peak_bytes(),
        what + " prefill",
        model->config.num_experts > 0 ? 0.1 : 0.05
    );
    expect_near(static_cast<int64_t>(rest), engine.memory_bytes(), what + " rollout");
}

std::vector<AdapterOptions> both_kinds() {
    AdapterOptions lora;
    lora.kind = "lora";
    AdapterOptions oft;
    oft.kind = "oft";
    oft.block_size = 16;
    return {lora, oft};
}

void compare_all(const std::string& path) {
    for (const AdapterOptions& options : both_kinds()) {
        for (const char* isa : {"avx2", "auto"}) {
            if (best_cpu_isa() >= CpuIsa::kAvx2 || std::string(isa) != "avx2") {
                compare(path, options, isa);
            }
        }
    }
}

TEST(Plan, DenseModelTakesWhatWasPredicted) {
    compare_all(source_path("models/mini-qwen3-int4"));
}

TEST(Plan, ModelWithExpertsTakesWhatWasPredicted) {
    compare_all(source_path("tests/models/tiny-qwen3-moe"));
}

TEST(Plan, OffloadingTakesWhatWasPredicted) {
    for (const AdapterOptions& options : both_kinds()) {
        const TrainOptions train{.activation_offloading = true};
        compare(source_path("models/mini-qwen3-int4"), options, "auto", {}, train);
        compare(source_path("tests/models/tiny-qwen3-moe"), options, "auto", {}, train);
    }
}

TEST(Plan, FullRecomputationTakesWhatWasPredicted) {
    for (const AdapterOptions& options : both_kinds()) {
        const TrainOptions train{.recompute = "full"};
        compare(source_path("models/mini-qwen3-int4"), options, "auto", {}, train);
        compare(source_path("tests/models/tiny-qwen3-moe"), options, "auto", {}, train);
    }
}

ScratchModel demo_scratch() {
    ScratchModel m;
    m.config = open_checkpoint(source_path("models/mini-qwen3-int4"), {.tokenizer = false}).config;
    return m;
}

TrainShape large_batch() {
    TrainShape shape;
    shape.tokens = 8192;
    shape.rows = 8192;
    shape.sequences = 4;
    shape.longest = 2048;
    return shape;
}

// Two buffers instead of one for each layer and one for the output; the rest is on the host.
TEST(Plan, OffloadingMovesLayerInputsToTheHost) {
    ScratchModel m = demo_scratch();
    TrainShape shape = large_batch();
    const int64_t moved = (m.config.num_layers - 1) * shape.tokens * m.config.width * 2;
    for (const bool on_cpu : {false, true}) {
        m.on_cpu = on_cpu;
        shape.offload = false;
        const MemoryPlan kept = plan_memory(m, 0, {}, shape);
        shape.offload = true;
        const MemoryPlan offloaded = plan_memory(m, 0, {}, shape);
        EXPECT_EQ(kept.scratch - offloaded.scratch, static_cast<size_t>(moved));
        EXPECT_EQ(kept.pinned, 0U);
        // A CPU's host memory is its own.
        EXPECT_EQ(kept.total() - offloaded.total(), static_cast<size_t>(on_cpu ? 0 : moved));
        EXPECT_EQ(offloaded.pinned, static_cast<size_t>(on_cpu ? 0 : moved));
        EXPECT_EQ(plan_text(offloaded).find("pinned host memory") != std::string::npos, !on_cpu);
    }
}

// Outputs and log-sum-exps of all layers; one layer's would be there anyway.
TEST(Plan, KeptAttentionIsWhatFullRecomputationSaves) {
    ScratchModel m = demo_scratch();
    TrainShape shape = large_batch();
    const ModelConfig& c = m.config;
    const int64_t layer = shape.tokens * c.num_heads * (c.head_dim * 2 + 4);
    Config config;
    for (const bool on_cpu : {false, true}) {
        m.on_cpu = on_cpu;
        shape.keep_attention = false;
        const MemoryPlan full = plan_memory(m, 0, {}, shape);
        shape.keep_attention = true;
        const MemoryPlan kept = plan_memory(m, 0, {}, shape);
        EXPECT_EQ(kept.scratch - full.scratch, static_cast<size_t>((c.num_layers - 1) * layer));
        EXPECT_EQ(kept.recomputable, kept.scratch - full.scratch);
        EXPECT_EQ(full.recomputable, 0U);
        const std::string advice = "set train.recompute = \"full\"";
        const auto refused = [&](const MemoryPlan& plan) {
            return model_files::refusal([&] { check_fits(plan, config, 1000, 0); });
        };
        EXPECT_NE(refused(kept).find(advice), std::string::npos);
        EXPECT_EQ(refused(full).find(advice), std::string::npos);
    }
}

TEST(Plan, HeadTakesRowsEnoughAtOnce) {
    EXPECT_EQ(head_chunk_rows(8192, 151936), 512) << "what the pairs of blocks ask for";
    EXPECT_EQ(head_chunk_rows(100, 151936), 100);
    EXPECT_EQ(head_chunk_rows(8192, 128256), 640);
    EXPECT_EQ(head_chunk_rows(8192, int64_t{1} << 24), 128);
    EXPECT_EQ(head_chunk_rows(int64_t{1} << 20, 64), 16384);
}

// On a GPU that decodes packed weights before products of many rows.
TEST(Plan, DecodedWeightsHaveRoom) {
    ScratchModel m;
    m.config = plan_model("Qwen3-8B", "int4").config;
    m.adapter.kind = "none";
    m.on_cpu = false;
    TrainShape train;
    PrefillShape prefill;
    const auto more = [&](int64_t tokens) {
        train.tokens = train.rows = train.longest = prefill.tokens = prefill.longest = tokens;
        m.packed.linears = false;
        const int64_t training = training_scratch(m, train);
        const int64_t filling = prefill_scratch(m, prefill);
        m.packed.linears = true;
        return std::pair{
            training_scratch(m, train) - training, prefill_scratch(m, prefill) - filling};
    };
    const std::pair<int64_t, int64_t> nothing{0, 0};
    EXPECT_EQ(more(8192), nothing);
    m.decodes_first = true;
    EXPECT_EQ(more(1023), nothing);
    // Training uses most in the gradient of q, prefill in down, which is cut.
    EXPECT_EQ(more(8192), (std::pair<int64_t, int64_t>{2 * 4096 * 4096, kDecodedBytes}));
}

TEST(Plan, PackedPartsAreThoseOfTheFiles) {
    const Checkpoint checkpoint = open_checkpoint(source_path("models/mini-qwen3-int4"));
    const PackedParts parts = packed_parts(checkpoint.config, placed_formats(checkpoint, {}));
    EXPECT_TRUE(parts.linears);
    EXPECT_FALSE(parts.head);
    const Device device = make_device("cpu");
    Stream stream(device);
    for (const char* path : {"models/mini-qwen3-int4", "tests/models/tiny-qwen3-moe"}) {
        const Checkpoint files = open_checkpoint(source_path(path));
        const PackedParts planned = packed_parts(files.config, placed_formats(files, {}));
        const PackedParts loaded = packed_parts(*load_model(stream, source_path(path)));
        EXPECT_EQ(planned.linears, loaded.linears) << path;
        EXPECT_EQ(planned.head, loaded.head) << path;
    }
}

TEST(Plan, OffloadingIsSuggestedToAGpuThatIsTooSmall) {
    ScratchModel m = demo_scratch();
    TrainShape shape = large_batch();
    Config config;
    const auto refused = [&](bool on_cpu, bool offload, size_t available, size_t host) {
        m.on_cpu = on_cpu;
        shape.offload = offload;
        const MemoryPlan plan = plan_memory(m, 0, {}, shape);
        return model_files::refusal([&] { check_fits(plan, config, available, host); });
    };
    const std::string advice = "set train.activation_offloading = true";
    EXPECT_NE(refused(false, false, 1000, 0).find(advice), std::string::npos);
    EXPECT_EQ(refused(false, true, 1000, 0).find(advice), std::string::npos);
    EXPECT_EQ(refused(true, false, 1000, 0).find(advice), std::string::npos);
    const size_t huge = size_t{1} << 50;
    EXPECT_EQ(refused(false, true, huge, huge), "");
    EXPECT_EQ(refused(false, true, huge, 0), "") << "not known";
    EXPECT_NE(refused(false, true, huge, 1000).find("of host memory"), std::string::npos);
}

TEST(Plan, StagedExpertsTakeWhatWasPredicted) {
    compare(source_path("tests/models/tiny-qwen3-moe"), both_kinds()[0], "auto", {}, {}, 1);
}

// On a GPU that is too small the plan keeps the experts of as few layers as it takes in host
// memory.
TEST(Plan, ExpertsThatDoNotFitGoToHostMemory) {
    const char* models = std::getenv("ORBIT_MODELS");
    if (models == nullptr) {
        GTEST_SKIP() << "ORBIT_MODELS is not set";
    }
    Device gpu;  // nothing runs on it
    gpu.kind = DeviceKind::kCuda;
    gpu.threads = std::make_unique<ThreadPool>(1);
    const Device cpu = make_device("cpu");
    Config config;
    config.model = std::string(models) + "/mini-qwen3-moe";
    config.adapter.kind = "lora";
    config.adapter.targets = {"q_proj"};
    const Checkpoint checkpoint = open_checkpoint(config.model, {.tokenizer = false});
    const MemoryPlan whole = plan_run(config, gpu, checkpoint, 100);
    EXPECT_EQ(whole.host_layers, 0);
    EXPECT_EQ(plan_run(config, gpu, checkpoint, 100, whole.total()).host_layers, 0);
    const size_t available = whole.total() - (size_t{1} << 20);
    const MemoryPlan plan = plan_run(config, gpu, checkpoint, 100, available);
    EXPECT_GT(plan.host_layers, 0);
    EXPECT_LE(plan.total(), available);
    EXPECT_GT(plan.host_experts, 0U);
    config.moe.host_layers = plan.host_layers - 1;
    EXPECT_GT(plan_run(config, gpu, checkpoint, 100, available).total(), available);
    config.moe.host_layers = kHostLayersAuto;
    EXPECT_EQ(plan_run(config, cpu, checkpoint, 100, available).host_layers, 0)
        << "nothing is gained on a CPU";
    EXPECT_EQ(plan_run(config, gpu, checkpoint, 100, 1 << 20).host_layers, 0)
        << "no number of layers is enough";
}

TEST(Plan, ReferenceModelsTakeWhatWasPredicted) {
    const char* models = std::getenv("ORBIT_MODELS");
    if (models == nullptr) {
        GTEST_SKIP() << "ORBIT_MODELS is not set";
    }
    for (const AdapterOptions& options : both_kinds()) {
        for (const char* name : {"mini-llama", "mini-qwen3-moe", "packed/mini-qwen3-moe-fp8"}) {
            compare(std::string(models) + "/" + name, options, "auto");
        }
        const std::string packed = std::string(models) + "/packed/mini-qwen3-moe-fp8";
        compare(packed, options, "auto", {1 << 20, 32});
    }
}

TEST(Plan, BaseBytesAreThoseOfTheArena) {
    std::vector<std::string> paths = {source_path("models/mini-qwen3-int4")};
    if (const char* models = std::getenv("ORBIT_MODELS")) {
        for (const char* name :
             {"mini-llama",
              "mini-qwen3",
              "packed/mini-qwen3-moe-int4",
              "packed/mini-qwen3-moe-fp8",
              "packed/mini-qwen3-moe-mxfp4",
              "packed/mini-qwen3-moe-nvfp4"}) {
            paths.push_back(std::string(models) + "/" + name);
        }
    }
    const Device device = make_device("cpu");
    Stream stream(device);
    for (const std::string& path : paths) {
        for (const char* quantize : {"", "int4"}) {
            LoadOptions options;
            options.quantize = quantize;
            const int64_t predicted = base_bytes(open_checkpoint(path), options);
            const auto model = load_model(stream, path, options);
            EXPECT_GE(predicted, static_cast<int64_t>(model->arena.total_bytes())) << path;
            expect_near(predicted, model->arena.total_bytes(), path + " base " + quantize);
            EXPECT_EQ(adapter_sites(model->config).size(), model->sites.size());
        }
    }
}

TEST(Plan, RunThatDoesNotFitIsRefusedWithWhatToChange) {
    const Device device = make_device("cpu");
    Config config;
    config.model = source_path("models/mini-qwen3-int4");
    config.adapter.kind = "lora";
    const Checkpoint checkpoint = open_checkpoint(config.model, {.tokenizer = false});
    const auto refused = [&](size_t available) {
        const MemoryPlan plan = plan_run(config, device, checkpoint, 100);
        return model_files::refusal([&] { check_fits(plan, config, available, 0); });
    };
    const size_t total = plan_run(config, device, checkpoint, 100).total();
    EXPECT_EQ(refused(total), "");
    const std::string sentence = refused(total - 1);
    EXPECT_NE(sentence.find("this run needs"), std::string::npos) << sentence;
    EXPECT_NE(sentence.find("train.tokens_per_batch (8192)"), std::string::npos) << sentence;
    EXPECT_NE(sentence.find("rollout.max_batch (256)"), std::string::npos) << sentence;
    config.rollout.max_batch = 1 << 20;
    config.rollout.max_tokens = 1 << 24;
    const std::string huge = refused(size_t{1} << 40);
    EXPECT_NE(huge.find("the largest parts are KV pages"), std::string::npos) << huge;
}

TEST(Plan, SettingsChangeWhatIsNeeded) {
    const Device device = make_device("cpu");
    Config config;
    config.model = source_path("models/mini-qwen3-int4");
    config.adapter.kind = "lora";
    const Checkpoint checkpoint = open_checkpoint(config.model, {.tokenizer = false});
    const auto total = [&](const Config& c) {
        return plan_run(c, device, checkpoint, 100).total();
    };
    Config other = config;
    other.train.tokens_per_batch = 1024;
    EXPECT_LT(total(other), total(config));
    other = config;
    other.rollout.max_batch = 16;
    EXPECT_LT(total(other), total(config));
    other = config;
    other.adapter.rank = 128;
    EXPECT_GT(total(other), total(config));
    other = config;
    other.train.recompute = "full";
    EXPECT_LT(total(other), total(config));
    const size_t full = total(other);
    other.train.activation_offloading = true;
    EXPECT_EQ(total(other), full) << "a CPU's host memory is its own";
    other.train.recompute = "selective";
    EXPECT_EQ(total(other), full) << "offloading recomputes all";
}

TEST(Plan, ScratchIsReservedInOneBlock) {
    const Device device = make_device("cpu");
    Stream stream(device);
    stream.scratch.take_bytes(100);
    stream.scratch.release({});
    stream.scratch.reserve(size_t{100} << 20);
    EXPECT_EQ(stream.scratch.peak_bytes(), 0U);
    for (int i = 0; i < 3; ++i) {
        stream.scratch.take_bytes(size_t{33} << 20);
    }
    EXPECT_EQ(stream.scratch.allocated_bytes(), size_t{100} << 20);
    EXPECT_EQ(stream.scratch.peak_bytes(), size_t{99} << 20);
    stream.scratch.take_bytes(size_t{2} << 20);  // more than was reserved: one more block
    EXPECT_EQ(stream.scratch.allocated_bytes(), size_t{132} << 20);
    stream.scratch.release({});
    stream.scratch.reserve(0);
    EXPECT_EQ(stream.scratch.allocated_bytes(), 0U);
}

TEST(Plan, ArenaTakesFromWhatItReserved) {
    const Device device = make_device("cpu");
    Arena arena(device);
    arena.reserve(1024);
    const auto* first = static_cast<char*>(arena.take_bytes("a.x", 300));
    const auto* second = static_cast<char*>(arena.take_bytes("a.y", 512));
    EXPECT_EQ(second - first, 512);
    void* apart = arena.take_bytes("b", 4096);  // does not fit: memory of its own
    EXPECT_NE(apart, nullptr);
    EXPECT_EQ(arena.total_bytes(), 300U + 512U + 4096U);
    EXPECT_EQ(arena.ledger().size(), 2U);
}

TEST(Plan, MemoryOfTheMachineIsKnown) {
    const MemoryInfo info = memory_info(make_device("cpu"));
    EXPECT_GT(info.available, size_t{1} << 20);
    EXPECT_LE(info.available, info.total);
}

// models.md 13: parameters in billions, bytes in GB as published, KV bytes of a token.
struct Published {
    const char* name;
    double params, gb, kv;
    double expert_params = 0;
};

constexpr Published kPublished[] = {
    {"SmolLM2-135M", 0.135, 0.27, 23040},
    {"SmolLM2-360M", 0.362, 0.72, 40960},
    {"SmolLM2-1.7B", 1.711, 3.42, 196608},
    {"Llama-3.2-1B", 1.236, 2.47, 32768},
    {"Llama-3.2-3B", 3.213, 6.43, 114688},
    {"Llama-3.1-8B", 8.030, 16.06, 131072},
    {"Llama-3.3-70B", 70.554, 141.1, 327680},
    {"Qwen2.5-0.5B", 0.494, 0.99, 12288},
    {"Qwen2.5-1.5B", 1.544, 3.09, 28672},
    {"Qwen2.5-3B", 3.086, 6.17, 36864},
    {"Qwen2.5-7B", 7.616, 15.2, 57344},
    {"Qwen2.5-14B", 14.77, 29.5, 196608},
    {"Qwen2.5-32B", 32.76, 65.5, 262144},
    {"Qwen2.5-72B", 72.71, 145.4, 327680},
    {"Qwen3-0.6B", 0.596, 1.19, 114688},
    {"Qwen3-1.7B", 1.721, 3.44, 114688},
    {"Qwen3-4B", 4.022, 8.04, 147456},
    {"Qwen3-8B", 8.191, 16.4, 147456},
    {"Qwen3-14B", 14.77, 29.5, 163840},
    {"Qwen3-32B", 32.76, 65.5, 262144},
    {"Qwen3-30B-A3B", 30.53, 61.1, 98304, 28.99},
    {"Qwen3-235B-A22B", 235.1, 470, 192512, 227.1},
    {"DeepSeek-V3", 671.0, 673, 70272, 653.9},
    {"Kimi-K2-Instruct", 1026.4, 1029, 70272, 1014.7},
    {"Kimi-K2-Thinking", 1026.4, 594.2, 70272, 1014.7},
    {"Kimi-K2.5", 1026.4, 594.2, 70272, 1014.7},
    {"Kimi-K2.6", 1026.4, 594.2, 70272, 1014.7},
    {"DeepSeek-V4-Flash", 284.3, 156.0, 6880, 277.0},
    {"DeepSeek-V4-Pro", 1573.0, 850.8, 9848, 1547.4},
    {"gpt-oss-20b", 20.9, 13.8, 24576, 19.1},
    {"gpt-oss-120b", 116.8, 65.3, 36864, 114.7},
    {"GLM-4.5-Air", 106.9, 214, 188416},
    {"GLM-4.5", 352.8, 706, 376832},
};

TEST(GpuPlan, EveryPublishedModelHasItsSize) {
    for (const Published& published : kPublished) {
        const PlanModel m = plan_model(published.name, "");
        const double gb = (m.expert_bytes() + m.other_bytes()) / 1e9;
        EXPECT_NEAR(m.params() / 1e9, published.params, 0.005 * published.params + 0.0006)
            << published.name;
        EXPECT_NEAR(gb, published.gb, 0.01 * published.gb) << published.name;
        EXPECT_DOUBLE_EQ(m.kv_token_bytes, published.kv) << published.name;
        if (published.expert_params > 0) {
            EXPECT_NEAR(
                m.expert_params() / 1e9, published.expert_params, 0.005 * published.expert_params
            ) << published.name;
        }
    }
}

TEST(GpuPlan, FormatsOfExpertsHaveTheirSizes) {
    const auto gb = [](const char* model, const char* format) {
        const PlanModel m = plan_model(model, format);
        return (m.expert_bytes() + m.other_bytes()) / 1e9;
    };
    EXPECT_NEAR(gb("Qwen3-30B-A3B", "int4"), 19.4, 0.1);
    EXPECT_NEAR(gb("Qwen3-235B-A22B", "int4"), 143.7, 0.5);
    EXPECT_NEAR(gb("Qwen3-235B-A22B", "fp8"), 243, 1);
    EXPECT_NEAR(plan_model("Kimi-K2.6", "").expert_bytes() / 1e9, 570.8, 0.1);
    EXPECT_NEAR(plan_model("moonshotai/kimi-k2.6", "").other_bytes() / 1e9, 23.4, 0.1);
    EXPECT_NEAR(plan_model("DeepSeek-V4-Flash", "").expert_bytes() / 1e9, 147.2, 0.1);
    EXPECT_NEAR(plan_model("DeepSeek-V4-Flash", "").other_bytes() / 1e9, 8.85, 0.1);
    EXPECT_NEAR(plan_model("DeepSeek-V4-Pro", "").other_bytes() / 1e9, 28.7, 0.2);
    // Window and compressor state of one sequence, MiB.
    EXPECT_NEAR(plan_model("DeepSeek-V4-Flash", "").kv_sequence_bytes / (1 << 20), 17.0, 0.1);
    EXPECT_NEAR(plan_model("DeepSeek-V4-Pro", "").kv_sequence_bytes / (1 << 20), 25.4, 0.1);
    EXPECT_NEAR(plan_model("gpt-oss-20b", "").kv_sequence_bytes / (1 << 20), 3.0, 0.01);
}

// models.md 13.3.
TEST(GpuPlan, VerdictsAreThoseOfTheDesign) {
    const auto left = [](const char* model, const char* gpus) {  // GiB beside the weights
        const PlanModel m = plan_model(model, "");
        GpuPlanOptions options;
        options.gpus = gpus;
        options.adapter.kind = "none";
        const GpuPlan plan = plan_gpus(m, options);
        const double weights = (m.expert_bytes() + m.other_bytes()) / (1 << 30);
        return plan.usable / (1 << 30) - weights / static_cast<double>(plan.set.count);
    };
    EXPECT_NEAR(left("DeepSeek-V4-Flash", "8xH100"), 61, 1);
    EXPECT_NEAR(left("Kimi-K2.6", "8xH100"), 10, 1);
    EXPECT_NEAR(left("Kimi-K2.6", "8xH200"), 71, 1);
    EXPECT_NEAR(left("DeepSeek-R1", "8xH200"), 62, 1);
    EXPECT_NEAR(left("DeepSeek-V4-Pro", "8xH200"), 41, 1);
    EXPECT_NEAR(left("Kimi-K2-Instruct", "8xH200"), 20, 1);
    EXPECT_NEAR(left("Qwen3-235B-A22B", "8xH100"), 25, 1);
    EXPECT_LT(left("DeepSeek-V3", "8xH100"), 1.5);
    EXPECT_LT(left("DeepSeek-V4-Pro", "8xH100"), 0);
}

// The estimate of several GPUs beside what the engine takes of one.
TEST(GpuPlan, EstimateIsCloseToTheCountedActivations) {
    for (const char* name : {"Qwen3-0.6B", "Qwen3-8B", "Llama-3.1-8B", "Qwen3-30B-A3B"}) {
        GpuPlanOptions options;
        options.adapter.kind = "none";
        options.gpus = "H200";
        PlanModel m = plan_model(name, "");
        const auto sum = [&] {
            double bytes = 0;
            for (const auto& entry : plan_gpus(m, options).entries) {
                const bool counted =
                    entry.name.starts_with("activ") || entry.name.starts_with("work");
                bytes += counted ? static_cast<double>(entry.bytes) : 0.0;
            }
            return bytes;
        };
        const double exact = sum();
        m.runs = false;
        EXPECT_NEAR(sum(), exact, 0.25 * exact) << name;
    }
}

TEST(GpuPlan, HopperHasRoomForDecodedWeights) {
    GpuPlanOptions options;
    options.adapter.kind = "none";
    const auto rest = [&](const char* gpu, const char* format) {
        options.gpus = gpu;
        const PlanModel m = plan_model("Qwen3-8B", format);
        return plan_gpus(m, options).total() - m.other_bytes();
    };
    EXPECT_DOUBLE_EQ(rest("A100-80GB", "int4"), rest("A100-80GB", "bf16"));
    EXPECT_DOUBLE_EQ(rest("H200", "bf16"), rest("A100-80GB", "bf16"));
    EXPECT_DOUBLE_EQ(rest("H200", "int4") - rest("H200", "bf16"), 2 * 4096 * 4096);
}

TEST(GpuPlan, LayerInputsGoToHostMemoryWhenAsked) {
    PlanModel m = plan_model("Qwen3-8B", "");
    GpuPlanOptions options;
    options.gpus = "RTX4090";
    options.tokens = 65536;
    for (const bool counted : {true, false}) {
        m.runs = counted;
        options.recompute = "full";
        options.activation_offloading = false;
        const GpuPlan kept = plan_gpus(m, options);
        EXPECT_NE(gpu_plan_text(m, options, kept).find("--activation-off"), std::string::npos);
        options.recompute = "selective";  // means nothing to offloading
        options.activation_offloading = true;
        const GpuPlan offloaded = plan_gpus(m, options);
        EXPECT_EQ(offloaded.pinned, size_t{35} * 65536 * 4096 * 2);
        EXPECT_DOUBLE_EQ(kept.total() - offloaded.total(), static_cast<double>(offloaded.pinned));
        const std::string text = gpu_plan_text(m, options, offloaded);
        EXPECT_NE(text.find("in pinned host memory"), std::string::npos);
        EXPECT_EQ(text.find("--activation-off"), std::string::npos);
    }
}

TEST(GpuPlan, AttentionIsKeptUnlessFullRecomputationIsAsked) {
    PlanModel m = plan_model("Qwen3-8B", "");
    GpuPlanOptions options;
    options.gpus = "RTX4090";
    options.tokens = 65536;
    const double layer = 65536 * (32 * 128 * 2);
    for (const bool counted : {true, false}) {
        m.runs = counted;
        options.recompute = "selective";
        const GpuPlan kept = plan_gpus(m, options);
        EXPECT_NE(gpu_plan_text(m, options, kept).find("--recompute full"), std::string::npos);
        options.recompute = "full";
        const GpuPlan full = plan_gpus(m, options);
        EXPECT_EQ(gpu_plan_text(m, options, full).find("--recompute full"), std::string::npos);
        // Counted: with the log-sum-exps, and one layer's would be there anyway.
        const double expected = counted ? 35 * (layer + 65536 * 32 * 4) : 36 * layer;
        EXPECT_DOUBLE_EQ(kept.total() - full.total(), expected);
    }
}

TEST(GpuPlan, ExpertsGoToHostMemoryWhenTheyDoNotFit) {
    const PlanModel m = plan_model("DeepSeek-V4-Pro", "");
    GpuPlanOptions options;
    options.gpus = "2xH200";
    options.adapter.targets = {"wq_b", "wo_b"};
    const GpuPlan plan = plan_gpus(m, options);
    EXPECT_FALSE(plan.fits());
    EXPECT_GT(plan.host_layers, 30);
    EXPECT_LE(plan.host_layers, m.expert_layers);
    EXPECT_GT(plan.decode_slowdown, 2);
    // The layers that leave make room enough, one fewer does not.
    const double layer = m.expert_bytes() / static_cast<double>(m.expert_layers) / 2;
    const auto layers = static_cast<double>(plan.host_layers);
    EXPECT_DOUBLE_EQ(plan.staged_bytes, 2 * layer);
    EXPECT_LE(plan.total() + plan.staged_bytes - layers * layer, plan.usable);
    EXPECT_GT(plan.total() + plan.staged_bytes - (layers - 1) * layer, plan.usable);
    // 64 tokens, each with 6 of 384 experts.
    const double touched = 1 - std::pow(1 - 6.0 / 384, 64);
    EXPECT_NEAR(plan.decode_transfer_s, layers * layer * touched / 64e9, 1e-3);
    EXPECT_NEAR(plan.train_transfer_s, 2 * layers * layer / 64e9, 1e-3);
    const std::string text = gpu_plan_text(m, options, plan);
    EXPECT_NE(text.find("does not fit"), std::string::npos);
    EXPECT_NE(text.find("Prediction"), std::string::npos);
    EXPECT_NE(text.find("not built yet"), std::string::npos);
    options.gpus = "8xB200";
    EXPECT_TRUE(plan_gpus(m, options).fits());
}

TEST(GpuPlan, GpusAreUnderstood) {
    EXPECT_EQ(parse_gpus("8xH200").count, 8);
    EXPECT_STREQ(parse_gpus("8xH200").gpu.name, "H200");
    EXPECT_EQ(parse_gpus("b200").count, 1);
    EXPECT_STREQ(parse_gpus("4xA100").gpu.name, "A100-80GB");
    EXPECT_STREQ(parse_gpus("2 x RTX 4090").gpu.name, "RTX4090");
    EXPECT_STREQ(parse_gpus("RTX5090").gpu.name, "RTX5090");
    for (const char* wrong : {"", "8x", "0xH100", "9999xH100", "x", "8xTPU", "-1xH100"}) {
        EXPECT_NE(model_files::refusal([&] { parse_gpus(wrong); }), "") << wrong;
    }
}

TEST(GpuPlan, ConfigAloneIsEnough) {
    const model_files::Folder folder;
    const std::string source = source_path("models/mini-qwen3-int4");
    std::filesystem::copy(source + "/config.json", folder.path("config.json"));
    const PlanModel config_only = plan_model(folder.path(), "");
    const PlanModel whole = plan_model(source, "");
    EXPECT_DOUBLE_EQ(config_only.other_bytes(), whole.other_bytes());
    EXPECT_DOUBLE_EQ(config_only.params(), whole.params());
    // The config of a published model that is planned only.
    model_files::write_plain(
        folder.path("config.json"),
        R"({"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2",
            "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 64,
            "n_routed_experts": 384}})"
    );
    EXPECT_FALSE(plan_model(folder.path(), "").runs);
    for (const char* text :
         {R"({"model_type": "kimi_k25"})", "[]", "{", R"({"model_type": 3})", R"({})"}) {
        model_files::write_plain(folder.path("config.json"), text);
        EXPECT_NE(model_files::refusal([&] { plan_model(folder.path(), ""); }), "") << text;
    }
    EXPECT_NE(
        model_files::refusal([] { plan_model("Qwen3-8", ""); }).find("Qwen3-8B"), std::string::npos
    );
    EXPECT_NE(model_files::refusal([] { plan_model("Qwen3-8B", "int3"); }), "");
}

}  // namespace
}  // namespace orbit
