#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/philox.h"
#include "model_files.h"
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
    const DequantOptions& dequant = {}
) {
    const std::string what = fmt::format("{} {} {} {}", path, options.kind, isa, dequant.rows);
    const Device device = make_device("cpu", isa, 2);
    Stream stream(device);
    LoadOptions load;
    load.dequant = dequant;
    const auto model = load_model(stream, path, load);
    AdapterStore adapter(device, options, model->sites, model->compute, 2, 1);
    ScratchModel m = scratch_model(device, model->config, options);
    m.dequant = dequant;

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
    const int64_t training = training_scratch(m, shape);
    stream.scratch.reserve(static_cast<size_t>(training));
    Trainer trainer(stream, *model, adapter, TrainOptions{}, SamplingFilter{});
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
        rest += entry.name == "KV pages" || entry.name == "decoding" ? entry.bytes : 0;
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
        return model_files::refusal([&] { check_fits(plan, config, available); });
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

}  // namespace
}  // namespace orbit
