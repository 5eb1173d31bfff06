// AdapterStore: slots and versions, the same bits everywhere, PEFT files in and out, damaged files.
#include "adapter/adapter.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "adapter/peft_config.h"
#include "adapter_inputs.h"
#include "base/file.h"
#include "base/philox.h"
#include "base/safetensors.h"

namespace orbit {
namespace {

// Without write_file_atomic's fsyncs, which cost more than the tests.
void write_plain(const std::string& path, const std::string& content) {
    std::ofstream(path, std::ios::binary) << content;
}

// A small model: two layers with q_proj and down_proj.
std::vector<AdapterSite> small_sites() {
    std::vector<AdapterSite> sites;
    for (const char* layer : {"0", "1"}) {
        const std::string prefix = std::string("model.layers.") + layer;
        sites.push_back({prefix + ".self_attn.q_proj", 64, 48});
        sites.push_back({prefix + ".self_attn.k_proj", 64, 16});
        sites.push_back({prefix + ".mlp.down_proj", 96, 64});
    }
    return sites;
}

AdapterOptions options_of(const char* kind) {
    AdapterOptions options;
    options.kind = kind;
    options.rank = 4;
    options.block_size = 16;
    return options;
}

void fill_masters(AdapterStore& store, float scale, uint32_t stream) {
    for (int64_t i = 0; i < store.num_parameters(); ++i) {
        store.masters()[i] = scale * static_cast<float>(noise(static_cast<uint32_t>(i), stream));
    }
}

TEST(AdapterStore, OftStartsAtTheIdentityBitForBit) {
    const Device device = make_device("cpu", "auto", 2);
    for (const DType type : {DType::kBF16, DType::kF32}) {
        for (const bool exact : {false, true}) {
            AdapterOptions options = options_of("oft");
            options.exact_cayley = exact;
            AdapterStore store(device, options, small_sites(), type, 2, 1);
            EXPECT_EQ(store.current_version(), 0);
            const Tensor d = store.view(store.pin_current(), 2).oft_d;
            EXPECT_EQ(d.shape[0], 6);
            EXPECT_EQ(d.shape[1], 16);
            const auto* bytes = static_cast<const char*>(d.data);
            EXPECT_TRUE(std::all_of(bytes, bytes + d.bytes(), [](char c) { return c == 0; }));
        }
    }
}

TEST(AdapterStore, LoraStartsWithZeroBAndBoundedA) {
    const Device device = make_device("cpu", "auto", 2);
    AdapterOptions options = options_of("lora");
    options.targets = {"q_proj"};
    AdapterStore store(device, options, small_sites(), DType::kBF16, 2, 42);
    EXPECT_EQ(store.num_parameters(), 2 * 4 * (64 + 48));
    EXPECT_EQ(store.view(0, 1).kind, AdapterKind::kNone);
    EXPECT_EQ(store.gradient(1).lora_a, nullptr);
    const AdapterView view = store.view(0, 0);
    EXPECT_EQ(view.lora_scale, 8.0f);
    float largest = 0;
    double sum = 0;
    for (int64_t i = 0; i < 256; ++i) {
        largest = std::max(largest, std::abs(store.masters()[i]));
        sum += static_cast<double>(store.masters()[i]);
        EXPECT_EQ(to_float(view.lora_a.as<bf16>()[i]), round_to_bf16(store.masters()[i]));
    }
    EXPECT_LE(largest, 0.125f);
    EXPECT_GT(largest, 0.115f);
    EXPECT_LT(std::abs(sum / 256), 0.02);
    for (int64_t i = 0; i < 4 * 48; ++i) {
        EXPECT_EQ(view.lora_b.as<bf16>()[i].bits, 0);
    }
    AdapterStore same(device, options, small_sites(), DType::kBF16, 1, 42);
    AdapterStore other(device, options, small_sites(), DType::kBF16, 1, 43);
    const auto bytes = static_cast<size_t>(store.num_parameters()) * 4;
    EXPECT_EQ(std::memcmp(store.masters(), same.masters(), bytes), 0);
    EXPECT_NE(std::memcmp(store.masters(), other.masters(), bytes), 0);
    options.rslora = true;
    AdapterStore rs(device, options, small_sites(), DType::kBF16, 1, 42);
    EXPECT_EQ(rs.view(0, 0).lora_scale, 16.0f);
}

TEST(AdapterStore, EveryInstructionSetDerivesTheSameBits) {
    const Device plain = make_device("cpu", "reference", 1);
    AdapterStore expected(plain, options_of("oft"), small_sites(), DType::kF32, 2, 1);
    fill_masters(expected, 0.05f, 5);
    Stream plain_stream(plain);
    const int slot = expected.publish(plain_stream, 1);
    for (const char* isa : {"reference", "avx2", "avx512"}) {
        if (parse_cpu_isa("auto") < parse_cpu_isa("reference") ||
            (std::string(isa) == "avx2" && best_cpu_isa() < CpuIsa::kAvx2) ||
            (std::string(isa) == "avx512" && best_cpu_isa() < CpuIsa::kAvx512)) {
            continue;
        }
        const Device device = make_device("cpu", isa, 3);
        AdapterStore store(device, options_of("oft"), small_sites(), DType::kF32, 2, 1);
        fill_masters(store, 0.05f, 5);
        Stream stream(device);
        const int at = store.publish(stream, 1);
        for (int32_t site = 0; site < 6; ++site) {
            const Tensor want = expected.view(slot, site).oft_d;
            const Tensor got = store.view(at, site).oft_d;
            ASSERT_EQ(std::memcmp(want.data, got.data, static_cast<size_t>(want.bytes())), 0);
        }
        std::vector<float> gradients[2];
        int n = 0;
        for (AdapterStore* each : {&expected, &store}) {
            Stream own(n == 0 ? plain : device);
            each->zero_gradients(own);
            for (int32_t site = 0; site < 6; ++site) {
                const int64_t count = each->view(0, site).oft_d.numel();
                for (int64_t i = 0; i < count; ++i) {
                    each->gradient(site).oft_d[i] =
                        static_cast<float>(noise(static_cast<uint32_t>(i), 77));
                }
            }
            each->finish_gradients(own);
            gradients[n].assign(each->gradients(), each->gradients() + each->num_parameters());
            each->finish_gradients(own);  // nothing is turned in twice
            for (int64_t i = 0; i < each->num_parameters(); ++i) {
                ASSERT_EQ(each->gradients()[i], gradients[n][static_cast<size_t>(i)]);
            }
            ++n;
        }
        ASSERT_EQ(gradients[0], gradients[1]);
    }
}

TEST(AdapterStore, SlotsAreReusedOnlyWhenNothingPinsThem) {
    const Device device = make_device("cpu", "auto", 2);
    Stream stream(device);
    AdapterStore store(device, options_of("oft"), small_sites(), DType::kBF16, 3, 1);
    const int first = store.pin_current();
    fill_masters(store, 0.02f, 1);
    const int second = store.publish(stream, 1);
    EXPECT_NE(second, first);
    EXPECT_EQ(store.current_version(), 1);
    EXPECT_EQ(store.version_of(first), 0);
    EXPECT_EQ(store.pin_current(), second);
    fill_masters(store, 0.02f, 2);
    const int third = store.publish(stream, 2);
    EXPECT_NE(third, first);
    EXPECT_NE(third, second);
    EXPECT_EQ(store.view(first, 0).oft_d.as<bf16>()[1].bits, 0);  // version 0 did not change
    EXPECT_DEATH(store.publish(stream, 3), "num_slots");
    store.unpin(second);
    EXPECT_EQ(store.publish(stream, 3), second);
    EXPECT_EQ(store.version_of(first), 0);
    store.unpin(first);
    EXPECT_DEATH(store.unpin(first), "pins");
}

TEST(AdapterStore, ReadersSeeWholeVersionsWhilePublishing) {
    const Device device = make_device("cpu", "auto", 1);
    Stream stream(device);
    AdapterOptions options = options_of("oft");
    options.neumann_terms = 2;  // D = 2 Q: every entry above the diagonal tells the version
    AdapterStore store(device, options, small_sites(), DType::kF32, 3, 1);
    std::atomic<bool> done{false};
    std::atomic<int64_t> torn{0};
    std::thread reader([&] {
        while (!done) {
            const int slot = store.pin_current();
            const auto version = static_cast<float>(store.version_of(slot));
            for (int32_t site = 0; site < 6; ++site) {
                const Tensor d = store.view(slot, site).oft_d;
                torn += d.as<float>()[1] != 2 * version / 1024 ? 1 : 0;
                torn += d.as<float>()[d.numel() - 17] != 2 * version / 1024 ? 1 : 0;
            }
            store.unpin(slot);
        }
    });
    for (int64_t version = 1; version <= 200; ++version) {
        const float value = static_cast<float>(version) / 1024;
        std::fill(store.masters(), store.masters() + store.num_parameters(), 0.0f);
        for (const auto& range : store.tensors()) {
            const int64_t size = range.shape[0] * range.shape[1];
            store.masters()[range.offset] = value;
            store.masters()[range.offset + size - 1] = value;
        }
        store.publish(stream, version);
    }
    done = true;
    reader.join();
    EXPECT_EQ(torn, 0);
    EXPECT_EQ(store.current_version(), 200);
}

TEST(AdapterStore, RefusesARotationBeyondTheSeries) {
    const Device device = make_device("cpu", "auto", 1);
    Stream stream(device);
    AdapterStore store(device, options_of("oft"), small_sites(), DType::kBF16, 2, 1);
    store.masters()[0] = 1.01f;
    try {
        store.publish(stream, 1);
        FAIL();
    } catch (const UserError& error) {
        EXPECT_NE(std::string(error.what()).find("block 0 of model.layers.0"), std::string::npos);
    }
    EXPECT_EQ(store.current_version(), 0);
    EXPECT_NEAR(store.oft_health(stream).theta_max, 1.01, 1e-6);
    store.masters()[0] = 0.99f;
    store.publish(stream, 1);
    store.masters()[0] = std::nanf("");
    EXPECT_THROW(store.publish(stream, 2), UserError);
    EXPECT_EQ(store.current_version(), 1);
    AdapterOptions exact = options_of("oft");
    exact.exact_cayley = true;
    AdapterStore unlimited(device, exact, small_sites(), DType::kBF16, 2, 1);
    unlimited.masters()[0] = 5.0f;
    EXPECT_NO_THROW(unlimited.publish(stream, 1));
}

std::string message_of(const std::function<void()>& body) {
    try {
        body();
    } catch (const UserError& error) {
        return error.what();
    }
    return "";
}

TEST(AdapterStore, OptionErrorsNameTheFix) {
    const Device device = make_device("cpu", "auto", 1);
    const auto build = [&](const AdapterOptions& options) {
        return message_of([&] {
            AdapterStore store(device, options, small_sites(), DType::kBF16, 1, 1);
        });
    };
    AdapterOptions options = options_of("oft");
    options.targets = {"q_porj"};
    EXPECT_NE(build(options).find("did you mean \"q_proj\""), std::string::npos);
    options = options_of("oft");
    options.block_size = 64;
    EXPECT_NE(build(options).find("does not divide the input width 96"), std::string::npos);
    options.targets = {"q_proj"};
    EXPECT_EQ(build(options), "");
    options = options_of("dora");
    EXPECT_NE(build(options).find("adapter.kind"), std::string::npos);
    options = options_of("lora");
    options.rank = 2000000000;
    EXPECT_NE(build(options).find("adapter.rank"), std::string::npos);
    options = options_of("none");
    EXPECT_EQ(build(options), "");
}

class Folder {
  public:
    Folder() {
        path_ = fmt::format(
            "{}/orbit_adapter_{}_{}",
            std::filesystem::temp_directory_path().string(),
            getpid(),
            counter_++
        );
        make_directories(path_);
    }

    ~Folder() { std::filesystem::remove_all(path_); }

    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;

    const std::string& path() const { return path_; }

    std::string config() const { return path_ + "/adapter_config.json"; }

    std::string weights() const { return path_ + "/adapter_model.safetensors"; }

    void edit(const std::function<void(nlohmann::ordered_json&)>& change) const {
        auto json = nlohmann::ordered_json::parse(read_file(config()));
        change(json);
        write_file_atomic(config(), json.dump());
    }

  private:
    static int counter_;
    std::string path_;
};

int Folder::counter_ = 0;

void save_small(const Device& device, const AdapterOptions& options, const Folder& folder) {
    Stream stream(device);
    AdapterStore store(device, options, small_sites(), DType::kBF16, 1, 7);
    fill_masters(store, 0.03f, 9);
    store.save_peft(stream, folder.path(), "small");
}

std::string load_error(const Device& device, const Folder& folder) {
    return message_of([&] {
        AdapterStore::load_peft(device, folder.path(), small_sites(), DType::kBF16, 1);
    });
}

void expect_error(const Device& device, const Folder& folder, const std::string& part) {
    const std::string message = load_error(device, folder);
    EXPECT_NE(message.find(part), std::string::npos) << "wanted: " << part << "\ngot: " << message;
}

TEST(Peft, RoundTripKeepsEveryBit) {
    const Device device = make_device("cpu", "auto", 1);
    Stream stream(device);
    for (const char* kind : {"lora", "oft", "exact"}) {
        AdapterOptions options = options_of(kind[0] == 'l' ? "lora" : "oft");
        options.exact_cayley = kind[0] == 'e';
        options.alpha = 12.5f;
        AdapterStore store(device, options, small_sites(), DType::kF32, 2, 7);
        fill_masters(store, 0.03f, 9);
        const int slot = store.publish(stream, 1);
        Folder folder;
        store.save_peft(stream, folder.path(), "small");
        auto loaded = AdapterStore::load_peft(device, folder.path(), small_sites(), DType::kF32, 2);
        ASSERT_EQ(loaded->num_parameters(), store.num_parameters());
        const auto bytes = static_cast<size_t>(store.num_parameters()) * 4;
        EXPECT_EQ(std::memcmp(loaded->masters(), store.masters(), bytes), 0);
        EXPECT_EQ(loaded->options().targets.size(), 3u);
        for (int32_t site = 0; site < 6; ++site) {
            const AdapterView want = store.view(slot, site);
            const AdapterView got = loaded->view(0, site);
            const Tensor a = want.kind == AdapterKind::kLora ? want.lora_b : want.oft_d;
            const Tensor b = got.kind == AdapterKind::kLora ? got.lora_b : got.oft_d;
            EXPECT_EQ(std::memcmp(a.data, b.data, static_cast<size_t>(a.bytes())), 0);
            EXPECT_EQ(want.lora_scale, got.lora_scale);
        }
        // The exact transform is stored with PEFT's sign.
        const SafetensorsFile file(folder.weights());
        const auto& first = file.tensor(store.tensors()[0].name);
        float stored = 0;
        std::memcpy(&stored, first.bytes.data(), 4);
        EXPECT_EQ(stored, options.exact_cayley ? -store.masters()[0] : store.masters()[0]);
        const auto json = nlohmann::json::parse(read_file(folder.config()));
        EXPECT_EQ(json["peft_version"], "0.18.0");
        EXPECT_EQ(json["target_modules"], nlohmann::json({"down_proj", "k_proj", "q_proj"}));
        EXPECT_EQ(file.metadata().at("format"), "pt");
    }
}

TEST(Peft, OldFilesKeepTheirSeries) {
    const Device device = make_device("cpu", "auto", 1);
    Stream stream(device);
    Folder folder;
    save_small(device, options_of("oft"), folder);
    const auto d_of = [&] {
        auto store = AdapterStore::load_peft(device, folder.path(), small_sites(), DType::kF32, 1);
        const Tensor d = store->view(0, 0).oft_d;
        store->save_peft(stream, folder.path(), "small");
        return std::vector<float>(d.as<float>(), d.as<float>() + d.numel());
    };
    const auto now = d_of();
    folder.edit([](auto& json) { json["peft_version"] = "0.17.0"; });
    const auto old = d_of();
    EXPECT_NE(now, old);
    EXPECT_EQ(d_of(), old);  // saved again, it still is an old file
    folder.edit([](auto& json) { json.erase("peft_version"); });
    EXPECT_EQ(d_of(), old);
    folder.edit([](auto& json) { json["peft_version"] = "0.21.0"; });
    EXPECT_EQ(d_of(), now);
}

TEST(Peft, RanksAlphasAndTargetsPerLayer) {
    const Device device = make_device("cpu", "auto", 1);
    Stream stream(device);
    Folder folder;
    std::vector<float> data(64 * 8);
    for (size_t i = 0; i < data.size(); ++i) {
        data[i] = static_cast<float>(i) * 1e-3f;
    }
    const std::string prefix = "base_model.model.model.layers.";
    write_safetensors(
        folder.weights(),
        {{prefix + "0.self_attn.q_proj.lora_A.weight", "F32", {8, 64}, data.data(), 8 * 64 * 4},
         {prefix + "0.self_attn.q_proj.lora_B.weight", "F32", {48, 8}, data.data(), 8 * 48 * 4},
         {prefix + "1.self_attn.q_proj.lora_A.weight", "F32", {2, 64}, data.data(), 2 * 64 * 4},
         {prefix + "1.self_attn.q_proj.lora_B.weight", "F32", {48, 2}, data.data(), 2 * 48 * 4},
         {prefix + "1.mlp.down_proj.lora_A.weight", "F32", {2, 96}, data.data(), 2 * 96 * 4},
         {prefix + "1.mlp.down_proj.lora_B.weight", "F32", {64, 2}, data.data(), 2 * 64 * 4}},
        {}
    );
    write_file_atomic(
        folder.config(),
        R"json({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "peft_version": "0.18.0",
            "target_modules": ".*\\.(layers\\.\\d\\.self_attn\\.q_proj|1\\.mlp\\.down_proj)",
            "rank_pattern": {"layers.0.self_attn.q_proj": 8},
            "alpha_pattern": {"0\\.self_attn\\.q_.*": 32, ".*q_proj": 6}})json"
    );
    for (int round = 0; round < 2; ++round) {
        auto store = AdapterStore::load_peft(device, folder.path(), small_sites(), DType::kF32, 1);
        EXPECT_EQ(store->view(0, 0).lora_a.shape[0], 8);
        EXPECT_EQ(store->view(0, 0).lora_scale, 4.0f);
        EXPECT_EQ(store->view(0, 3).lora_a.shape[0], 2);
        EXPECT_EQ(store->view(0, 3).lora_scale, 3.0f);
        EXPECT_EQ(store->view(0, 5).lora_scale, 2.0f);
        EXPECT_EQ(store->view(0, 2).kind, AdapterKind::kNone);
        EXPECT_EQ(
            store->options().targets,
            (std::vector<std::string>{"model.layers.1.mlp.down_proj", "q_proj"})
        );
        store->save_peft(stream, folder.path(), "small");
    }
    folder.edit([](auto& json) { json["alpha_pattern"] = {{"q_proj", 6}, {"0.*q_proj", 32}}; });
    auto store = AdapterStore::load_peft(device, folder.path(), small_sites(), DType::kF32, 1);
    EXPECT_EQ(store->view(0, 0).lora_scale, 0.75f);  // the first match wins
}

TEST(Peft, ARotationBeyondTheSeriesNamesTheFolder) {
    const Device device = make_device("cpu", "auto", 1);
    Folder folder;
    save_small(device, options_of("oft"), folder);
    const std::vector<float> large(120, 0.5f);
    folder.edit([](auto& json) {
        json["target_modules"] = {"layers.0.self_attn.q_proj"};
        json["block_share"] = true;
    });
    write_safetensors(
        folder.weights(),
        {{"base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight",
          "F32",
          {1, 120},
          large.data(),
          480}},
        {}
    );
    expect_error(device, folder, folder.path() + ": block 0 of model.layers.0.self_attn.q_proj");
    folder.edit([](auto& json) { json["use_cayley_neumann"] = false; });
    EXPECT_EQ(load_error(device, folder), "");
}

TEST(Peft, SharedBlocksAndFixedNumberOfBlocks) {
    const Device device = make_device("cpu", "auto", 2);
    Stream stream(device);
    Folder folder;
    const auto v = noises(oft_parameters(16), 0.05, 3);
    const std::vector<float> data(v.begin(), v.end());
    write_safetensors(
        folder.weights(),
        {{"base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight",
          "F32",
          {1, 120},
          data.data(),
          480}},
        {}
    );
    write_file_atomic(
        folder.config(),
        R"({"peft_type": "OFT", "r": 4, "oft_block_size": 0, "block_share": true,
            "target_modules": ["layers.0.self_attn.q_proj"], "peft_version": "0.18.0"})"
    );
    for (int round = 0; round < 2; ++round) {
        auto store = AdapterStore::load_peft(device, folder.path(), small_sites(), DType::kF32, 1);
        const Tensor d = store->view(0, 0).oft_d;
        ASSERT_EQ(d.shape[0], 4);
        for (int n = 1; n < 4; ++n) {
            EXPECT_EQ(std::memcmp(d.data, d.as<float>() + n * 256, 1024), 0);
        }
        std::vector<double> g_sum(256, 0.0);
        store->zero_gradients(stream);
        for (uint32_t i = 0; i < 1024; ++i) {
            const auto value = static_cast<float>(noise(i, 50));
            store->gradient(0).oft_d[i] = value;
            g_sum[i % 256] += static_cast<double>(value);
        }
        store->finish_gradients(stream);
        const auto want = gradient_of({data.begin(), data.end()}, g_sum, 16, kSeries5);
        for (size_t i = 0; i < 120; ++i) {
            EXPECT_NEAR(static_cast<double>(store->gradients()[i]), want[i], 2e-5);
        }
        store->save_peft(stream, folder.path(), "small");
    }
    folder.edit([](auto& json) { json["block_share"] = false; });
    expect_error(device, folder, "needs [64 / b");
}

TEST(Peft, CoftKeepsBlocksInTheBall) {
    const Device device = make_device("cpu", "auto", 1);
    Stream stream(device);
    Folder folder;
    save_small(device, options_of("oft"), folder);
    folder.edit([](auto& json) {
        json["coft"] = true;
        json["eps"] = 0.01;
    });
    auto store = AdapterStore::load_peft(device, folder.path(), small_sites(), DType::kF32, 2);
    // q_proj has 4 blocks, down_proj 6: the larger limit is eps / sqrt(4).
    EXPECT_NEAR(store->oft_health(stream).block_norm_max, 0.01 / 2, 1e-7);
    std::vector<float> before(store->masters(), store->masters() + store->num_parameters());
    store->publish(stream, 1);
    EXPECT_EQ(
        std::memcmp(before.data(), store->masters(), before.size() * 4), 0
    );  // a projection of a projection moves nothing
}

TEST(Peft, ReadsEveryFloatType) {
    const Device device = make_device("cpu", "auto", 1);
    std::vector<double> wide(120, 0.5);
    std::vector<bf16> brain(120, to_bf16(0.5f));
    std::vector<f16> half(120, f16{0x3800});
    const auto load = [&](const char* type, const void* data, size_t bytes) {
        Folder folder;
        save_small(device, options_of("oft"), folder);
        folder.edit([](auto& json) {
            json["target_modules"] = {"layers.0.self_attn.q_proj"};
            json["block_share"] = true;
            json["use_cayley_neumann"] = false;
        });
        write_safetensors(
            folder.weights(),
            {{"base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight",
              type,
              {1, 120},
              data,
              bytes}},
            {}
        );
        auto store = AdapterStore::load_peft(device, folder.path(), small_sites(), DType::kF32, 1);
        return store->masters()[119];
    };
    EXPECT_EQ(load("F64", wide.data(), 960), -0.5f);
    EXPECT_EQ(load("BF16", brain.data(), 240), -0.5f);
    EXPECT_EQ(load("F16", half.data(), 240), -0.5f);
    EXPECT_THROW(load("I16", half.data(), 240), UserError);
    wide[7] = 1e300;  // no float32
    EXPECT_THROW(load("F64", wide.data(), 960), UserError);
}

TEST(Peft, FieldsThatChangeTheForwardAreRefusedByName) {
    const Device device = make_device("cpu", "auto", 1);
    using Change = std::pair<const char*, nlohmann::json>;
    const std::vector<Change> lora = {
        {"use_dora", true},
        {"lora_bias", true},
        {"bias", "all"},
        {"fan_in_fan_out", true},
        {"modules_to_save", {"lm_head"}},
        {"layer_replication", {{0, 4}}},
        {"loftq_config", {{"bits", 4}}},
        {"use_qalora", true},
        {"alora_invocation_tokens", {1}},
        {"trainable_token_indices", {1}},
        {"megatron_config", {{"a", 1}}},
        {"use_bdlora", true},
        {"arrow_config", {{"a", 1}}},
        {"kasa_config", {{"a", 1}}},
        {"velora_config", {{"a", 1}}},
        {"monteclora_config", {{"a", 1}}},
        {"init_lora_weights", "pissa_niter_4"},
        {"target_parameters", {"mlp.experts.down_proj"}},
        {"use_newthing", true},
        {"newthing_config", {{"a", 1}}},
        {"r", "eight"},
        {"lora_alpha", nullptr},
        {"peft_type", "IA3"},
        {"target_modules", 3},
        {"target_modules", "((a+)+"}};
    for (const auto& [key, value] : lora) {
        Folder folder;
        save_small(device, options_of("lora"), folder);
        folder.edit([&](auto& json) { json[key] = value; });
        if (std::string(key) == "lora_alpha") {  // null is PEFT's default, no error
            EXPECT_EQ(load_error(device, folder), "");
            continue;
        }
        const bool pattern = value == "((a+)+";
        expect_error(device, folder, pattern ? "regular expression" : key);
    }
    const std::vector<Change> oft = {
        {"module_dropout", 0.1},
        {"bias", "oft_only"},
        {"r", 8},
        {"oft_block_size", nullptr},
        {"oft_block_size", 0},
        {"num_cayley_neumann_terms", 1e9},
        {"eps", -1}};
    for (const auto& [key, value] : oft) {
        Folder folder;
        save_small(device, options_of("oft"), folder);
        folder.edit([&](auto& json) { json[key] = value; });
        expect_error(device, folder, key);
    }
}

TEST(Peft, WrongTensorsAreNamed) {
    const Device device = make_device("cpu", "auto", 1);
    const std::string q = "base_model.model.model.layers.0.self_attn.q_proj";
    std::vector<float> data(8 * 96, 0.01f);

    struct Case {
        std::string name;
        std::vector<int64_t> shape;
        const char* expected;
    };

    const auto run = [&](const std::vector<Case>& tensors, const char* expected) {
        Folder folder;
        save_small(device, options_of("lora"), folder);
        folder.edit([](auto& json) { json["layers_to_transform"] = {0}; });
        std::vector<TensorToStore> stored;
        for (const Case& each : tensors) {
            size_t bytes = 4;
            for (const int64_t dim : each.shape) {
                bytes *= static_cast<size_t>(dim);
            }
            stored.push_back({each.name, "F32", each.shape, data.data(), bytes});
        }
        write_safetensors(folder.weights(), stored, {});
        expect_error(device, folder, expected);
    };
    run({{q + ".lora_A.weight", {4, 64}, ""}}, "lora_B.weight\" is missing");
    run({{q + ".lora_B.weight", {48, 4}, ""}}, "lora_A.weight\" is missing");
    run({{q + ".lora_A.weight", {4, 96}, ""}, {q + ".lora_B.weight", {48, 4}, ""}}, "[rank, 64]");
    run({{q + ".lora_A.weight", {4, 64}, ""}, {q + ".lora_B.weight", {48, 3}, ""}}, "[48, 4]");
    run({{q + ".lora_A.weight", {64}, ""}, {q + ".lora_B.weight", {48, 3}, ""}}, "[rank, 64]");
    run({{"base_model.model.model.layers.9.x.lora_A.weight", {4, 64}, ""}}, "layers.9.x");
    run({{q + ".oft_R.weight", {4, 120}, ""}}, "peft_type");
    run({{q + ".lora_magnitude_vector", {48}, ""}}, "DoRA");
    run({{"base_model.model.lm_head.weight", {4, 4}, ""}}, "lm_head.weight");
    run({}, "no tensors");
    data[5] = std::nanf("");
    run({{q + ".lora_A.weight", {4, 64}, ""}, {q + ".lora_B.weight", {48, 4}, ""}}, "not finite");
    // A targeted layer without tensors.
    Folder folder;
    save_small(device, options_of("lora"), folder);
    const auto text = read_file(folder.weights());
    data[5] = 0;
    write_safetensors(
        folder.weights(),
        {{q + ".lora_A.weight", "F32", {4, 64}, data.data(), 1024},
         {q + ".lora_B.weight", "F32", {48, 4}, data.data(), 768}},
        {}
    );
    expect_error(device, folder, "model.layers.0.self_attn.k_proj");
    std::filesystem::remove(folder.weights());
    expect_error(device, folder, "adapter_model.safetensors");
    std::filesystem::remove(folder.config());
    expect_error(device, folder, "adapter_config.json");
}

TEST(Peft, DamagedFilesAreUserErrorsAndNeverCrashes) {
    const Device device = make_device("cpu", "auto", 1);
    for (const char* kind : {"lora", "oft"}) {
        Folder folder;
        save_small(device, options_of(kind), folder);
        for (const std::string& path : {folder.config(), folder.weights()}) {
            const std::string good = read_file(path);
            int failures = 0;
            for (uint32_t round = 0; round < 200; ++round) {
                std::string bad = good;
                const PhiloxWords dice = philox(round, 1, 0, 0, 3, 4);
                const size_t span = std::min<size_t>(bad.size(), 2000);
                const size_t at = dice.word[0] % span;
                switch (dice.word[1] % 4) {
                    case 0:
                        bad.resize(dice.word[0] % bad.size());
                        break;
                    case 1:
                        bad[at] = static_cast<char>(dice.word[2]);
                        break;
                    case 2:
                        bad.erase(at, 1 + dice.word[2] % 8);
                        break;
                    default:
                        bad.insert(at, "999");
                }
                write_plain(path, bad);
                failures += load_error(device, folder).empty() ? 0 : 1;
            }
            EXPECT_GT(failures, 50);
            write_file_atomic(path, good);
        }
        EXPECT_EQ(load_error(device, folder), "");
    }
}

std::vector<AdapterSite> sites_of_reference(const std::string& folder) {
    // From the LoRA file, which has both widths of every layer.
    const SafetensorsFile file(folder + "/lora/adapter_model.safetensors");
    std::vector<AdapterSite> sites;
    const std::string prefix = "base_model.model.";
    for (const auto& [name, tensor] : file.tensors()) {
        const auto at = name.find(".lora_A.weight");
        if (at != std::string::npos) {
            const std::string module = name.substr(prefix.size(), at - prefix.size());
            const auto& b = file.tensor(prefix + module + ".lora_B.weight");
            sites.push_back({module, tensor.shape[1], b.shape[0]});
        }
    }
    return sites;
}

TEST(Peft, ReferenceAdaptersRoundTripBitwise) {
    const char* models = std::getenv("ORBIT_MODELS");
    if (models == nullptr) {
        GTEST_SKIP() << "ORBIT_MODELS is not set";
    }
    const Device device = make_device("cpu", "auto", 2);
    Stream stream(device);
    int seen = 0;
    for (const char* name :
         {"mini-llama", "mini-qwen3", "mini-qwen3-moe", "mini-kimi", "mini-v4"}) {
        const std::string folder = std::string(models) + "/" + name;
        if (!is_directory(folder)) {
            continue;
        }
        const auto sites = sites_of_reference(folder);
        for (const char* kind : {"lora", "oft"}) {
            const std::string from = folder + "/" + kind;
            auto store = AdapterStore::load_peft(device, from, sites, DType::kBF16, 1);
            Folder to;
            store->save_peft(stream, to.path(), name);
            const SafetensorsFile want(from + "/adapter_model.safetensors");
            const SafetensorsFile got(to.weights());
            ASSERT_EQ(want.tensors().size(), got.tensors().size());
            for (const auto& [key, tensor] : want.tensors()) {
                const auto& other = got.tensor(key);
                ASSERT_EQ(tensor.shape, other.shape);
                ASSERT_EQ(
                    std::memcmp(tensor.bytes.data(), other.bytes.data(), tensor.bytes.size()), 0
                );
            }
            EXPECT_EQ(read_file(from + "/adapter_model.safetensors"), read_file(to.weights()))
                << "even the container is byte for byte PEFT's";
            ++seen;
        }
    }
    EXPECT_GT(seen, 0);
}

TEST(Peft, PeftsNearestBlockSize) {
    EXPECT_EQ(peft_block_size(96, 32), 32);
    EXPECT_EQ(peft_block_size(96, 64), 48);
    EXPECT_EQ(peft_block_size(96, 90), 96);
    EXPECT_EQ(peft_block_size(96, 500), 96);
}

}  // namespace
}  // namespace orbit
