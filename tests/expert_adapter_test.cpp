// Adapters that the experts of a layer share: LoRA's outer factors, OFT's rotation before gate and
// up; their gradients, and the stacked tensors of their files.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "adapter/adapter.h"
#include "base/safetensors.h"
#include "model/score.h"
#include "model_files.h"
#include "train/trainer.h"

namespace orbit {
namespace {

using model_files::Folder;
using model_files::refusal;

constexpr int64_t kExperts = 8;

class ExpertAdapterTest : public ::testing::TestWithParam<const char*> {
  protected:
    ExpertAdapterTest() : device_(make_device("cpu", "auto", 2)), stream_(device_) {
        for (uint32_t t = 0; t < 3; ++t) {
            std::vector<int32_t> ids;
            for (uint32_t i = 0; i < 30 + 7 * t; ++i) {
                ids.push_back(static_cast<int32_t>((37 * i + 11 * t) % 200));
            }
            texts_.push_back(ids);
        }
    }

    std::unique_ptr<Model> load(DType compute) {
        LoadOptions options;
        options.compute = compute;
        return load_model(stream_, ORBIT_SOURCE_DIR "/tests/models/tiny-qwen3-moe", options);
    }

    std::unique_ptr<AdapterStore> store(const Model& model, const std::string& sharing) {
        AdapterOptions options;
        options.kind = GetParam();
        options.rank = 4;
        options.block_size = 16;
        options.expert_sharing = sharing;
        return std::make_unique<AdapterStore>(device_, options, model.sites, model.compute, 2, 1);
    }

    static void randomise(Stream& stream, AdapterStore& adapter, uint32_t seed) {
        std::mt19937 random(seed);
        std::uniform_real_distribution<float> value(-0.05f, 0.05f);
        for (int64_t i = 0; i < adapter.num_parameters(); ++i) {
            adapter.masters()[i] = value(random);
        }
        adapter.publish(stream, 1);
    }

    // "X.experts.3.up_proj.lora_A.weight" without the expert: the tensor that may be shared.
    static std::string without_expert(const std::string& name, bool oft) {
        const size_t at = name.find(".experts.");
        if (at == std::string::npos) {
            return name;
        }
        const size_t leaf = name.find('.', at + 9) + 1;
        std::string rest = name.substr(leaf);
        if (oft && !rest.starts_with("down")) {
            rest = "gate_up_proj.oft_R.weight";
        }
        return name.substr(0, at + 9) + rest;
    }

    // The masters of a shared adapter, copied into one without sharing. `source[i]`: the shared
    // parameter that parameter i of `whole` is a copy of.
    static std::vector<int64_t> tie(Stream& stream, AdapterStore& shared, AdapterStore& whole) {
        std::map<std::string, int64_t> offset_of;
        for (const auto& range : shared.tensors()) {
            offset_of[range.name] = range.offset;
        }
        std::vector<int64_t> source(static_cast<size_t>(whole.num_parameters()));
        for (const auto& range : whole.tensors()) {
            auto found = offset_of.find(range.name);
            if (found == offset_of.end()) {
                found = offset_of.find(without_expert(range.name, whole.options().kind == "oft"));
            }
            EXPECT_NE(found, offset_of.end()) << range.name;
            for (int64_t i = 0; i < range.shape[0] * range.shape[1]; ++i) {
                source[static_cast<size_t>(range.offset + i)] = found->second + i;
                whole.masters()[range.offset + i] = shared.masters()[found->second + i];
            }
        }
        whole.publish(stream, 1);
        return source;
    }

    std::vector<std::vector<float>> logprobs(const Model& model, AdapterStore& adapter) {
        const int slot = adapter.pin_current();
        std::vector<std::vector<float>> result;
        for (auto& scores : score_texts(stream_, model, &adapter, slot, texts_)) {
            result.push_back(std::move(scores.logprobs));
        }
        adapter.unpin(slot);
        return result;
    }

    static float weight(size_t text, size_t i) {
        return static_cast<float>((5 * i + 3 * text) % 7) / 3.0f - 1.0f;
    }

    double loss(const Model& model, AdapterStore& adapter) {
        double sum = 0;
        const auto rows = logprobs(model, adapter);
        for (size_t t = 0; t < rows.size(); ++t) {
            for (size_t i = 0; i < rows[t].size(); ++i) {
                sum += static_cast<double>(weight(t, i)) * static_cast<double>(rows[t][i]);
            }
        }
        return sum;
    }

    std::vector<float> gradient(const Model& model, AdapterStore& adapter) {
        Trainer trainer(stream_, model, adapter, TrainOptions{}, SamplingFilter{});
        std::vector<TrainSequence> sequences;
        for (const auto& text : texts_) {
            sequences.push_back({&text, 1, static_cast<int64_t>(sequences.size())});
        }
        const int slot = adapter.pin_current();
        trainer.accumulate(sequences, slot, [](auto, auto, auto coefficients) {
            for (size_t t = 0; t < coefficients.size(); ++t) {
                for (size_t i = 0; i < coefficients[t].d_logprob.size(); ++i) {
                    coefficients[t].d_logprob[i] = weight(t, i);
                }
            }
        });
        adapter.unpin(slot);
        adapter.finish_gradients(stream_);
        return {adapter.gradients(), adapter.gradients() + adapter.num_parameters()};
    }

    bool oft() const { return std::string(GetParam()) == "oft"; }

    Device device_;
    Stream stream_;
    std::vector<std::vector<int32_t>> texts_;
};

TEST_P(ExpertAdapterTest, SharedPartsAreCountedOnce) {
    const auto model = load(DType::kBF16);
    const auto shared = store(*model, "shared");
    const auto whole = store(*model, "none");
    // One expert layer; width 48, experts of 32, rank 4, blocks of 16.
    const int64_t saved = oft() ? (2 * kExperts - 1) * 3 * 120 : (kExperts - 1) * 3 * 4 * 48;
    EXPECT_EQ(shared->num_parameters(), whole->num_parameters() - saved);
    const int last = shared->pin_current();
    const auto view = [&](const ExpertWeights& w, size_t e) {
        return shared->view(last, w.sites[e]);
    };
    const MoeWeights& moe = *model->layers[1].moe;
    if (oft()) {
        EXPECT_EQ(view(moe.gate, 0).oft_d.data, view(moe.up, 7).oft_d.data);
        EXPECT_NE(view(moe.down, 0).oft_d.data, view(moe.down, 7).oft_d.data);
    } else {
        EXPECT_EQ(view(moe.gate, 0).lora_a.data, view(moe.gate, 7).lora_a.data);
        EXPECT_NE(view(moe.gate, 0).lora_a.data, view(moe.up, 0).lora_a.data);
        EXPECT_NE(view(moe.gate, 0).lora_b.data, view(moe.gate, 7).lora_b.data);
        EXPECT_NE(view(moe.down, 0).lora_a.data, view(moe.down, 7).lora_a.data);
        EXPECT_EQ(view(moe.down, 0).lora_b.data, view(moe.down, 7).lora_b.data);
    }
    // What experts do not share lies at one distance from expert to expert: the GPU relies on it.
    for (const ExpertWeights* w : {&moe.gate, &moe.up, &moe.down}) {
        for (Tensor AdapterView::*part :
             {&AdapterView::lora_a, &AdapterView::lora_b, &AdapterView::oft_d}) {
            const auto address = [&](size_t e) {
                return reinterpret_cast<intptr_t>((view(*w, e).*part).data);
            };
            for (size_t e = 2; e < kExperts; ++e) {
                EXPECT_EQ(address(e) - address(e - 1), address(1) - address(0));
            }
        }
    }
    shared->unpin(last);
}

TEST_P(ExpertAdapterTest, TiedCopiesGiveTheSameBitsAndTheSumOfTheirGradients) {
    for (const DType compute : {DType::kBF16, DType::kF32}) {
        const auto model = load(compute);
        const auto shared = store(*model, "shared");
        const auto whole = store(*model, "none");
        randomise(stream_, *shared, 5);
        const std::vector<int64_t> source = tie(stream_, *shared, *whole);
        EXPECT_EQ(logprobs(*model, *shared), logprobs(*model, *whole));
        const std::vector<float> ours = gradient(*model, *shared);
        const std::vector<float> copies = gradient(*model, *whole);
        std::vector<double> sums(ours.size(), 0.0);
        for (size_t i = 0; i < copies.size(); ++i) {
            sums[static_cast<size_t>(source[i])] += static_cast<double>(copies[i]);
        }
        double difference = 0;
        double norm = 0;
        for (size_t i = 0; i < ours.size(); ++i) {
            difference += std::pow(static_cast<double>(ours[i]) - sums[i], 2);
            norm += sums[i] * sums[i];
        }
        EXPECT_GT(norm, 0);
        EXPECT_LT(std::sqrt(difference / norm), 1e-6);
        randomise(stream_, *whole, 6);
        EXPECT_NE(logprobs(*model, *shared), logprobs(*model, *whole));
    }
}

// Along a random direction in the experts' parameters of the only expert layer, so that no choice
// of experts changes.
TEST_P(ExpertAdapterTest, GradientsAreFiniteDifferences) {
    const auto model = load(DType::kF32);
    const auto adapter = store(*model, "shared");
    randomise(stream_, *adapter, 8);
    const std::vector<float> g = gradient(*model, *adapter);
    const std::vector<float> start(
        adapter->masters(), adapter->masters() + adapter->num_parameters()
    );
    std::mt19937 random(9);
    for (const bool only_shared : {true, false}) {
        std::vector<float> direction(g.size(), 0.0f);
        double along = 0;
        for (const auto& range : adapter->tensors()) {
            const size_t at = range.name.find(".experts.");
            const bool own = at != std::string::npos && std::isdigit(range.name[at + 9]) != 0;
            if (at == std::string::npos || (only_shared && own)) {
                continue;
            }
            for (int64_t i = 0; i < range.shape[0] * range.shape[1]; ++i) {
                const auto p = static_cast<size_t>(range.offset + i);
                // Half of it along the gradient: a direction without slope shows nothing.
                direction[p] = (random() % 2 == 0 ? 1.0f : -1.0f) + (g[p] > 0 ? 1.0f : -1.0f);
                along += static_cast<double>(g[p]) * static_cast<double>(direction[p]);
            }
        }
        const auto at = [&](float step) {
            for (size_t i = 0; i < start.size(); ++i) {
                adapter->masters()[i] = start[i] + step * direction[i];
            }
            adapter->publish(stream_, 2);
            return loss(*model, *adapter);
        };
        constexpr float kStep = 2e-3f;
        const double slope = (at(kStep) - at(-kStep)) / (2 * static_cast<double>(kStep));
        EXPECT_NEAR(slope / along, 1.0, 5e-3) << "slope " << slope << " gradient " << along;
        EXPECT_GT(std::abs(along), 1.0);
    }
}

TEST_P(ExpertAdapterTest, StackedFilesRoundTripAndScoreTheSame) {
    const auto model = load(DType::kBF16);
    const auto adapter = store(*model, "shared");
    randomise(stream_, *adapter, 3);
    const Folder folder;
    adapter->save_peft(stream_, folder.path("a"), "tiny");
    const auto again =
        AdapterStore::load_peft(device_, folder.path("a"), model->sites, model->compute, 2);
    EXPECT_EQ(again->options().expert_sharing, "shared");
    ASSERT_EQ(again->num_parameters(), adapter->num_parameters());
    EXPECT_EQ(logprobs(*model, *again), logprobs(*model, *adapter));
    again->save_peft(stream_, folder.path("b"), "tiny");
    const std::string weights = "/adapter_model.safetensors";
    EXPECT_EQ(read_file(folder.path("a") + weights), read_file(folder.path("b") + weights));
    const SafetensorsFile file(folder.path("a") + weights);
    const std::string experts = "base_model.model.model.layers.1.mlp.experts.";
    using Shape = std::vector<int64_t>;
    if (oft()) {
        EXPECT_EQ(file.tensor(experts + "w1.oft_R.weight").shape, (Shape{1, 3, 120}));
        EXPECT_EQ(file.tensor(experts + "w2.oft_R.weight").shape, (Shape{kExperts, 2, 120}));
        const auto& w1 = file.tensor(experts + "w1.oft_R.weight").bytes;
        const auto& w3 = file.tensor(experts + "w3.oft_R.weight").bytes;
        EXPECT_TRUE(std::equal(w1.begin(), w1.end(), w3.begin(), w3.end()));
    } else {
        EXPECT_EQ(file.tensor(experts + "w1.lora_A.weight").shape, (Shape{1, 4, 48}));
        EXPECT_EQ(file.tensor(experts + "w3.lora_B.weight").shape, (Shape{kExperts, 32, 4}));
        EXPECT_EQ(file.tensor(experts + "w2.lora_A.weight").shape, (Shape{kExperts, 4, 32}));
        EXPECT_EQ(file.tensor(experts + "w2.lora_B.weight").shape, (Shape{1, 48, 4}));
    }
}

// What a stacked file may not say.
TEST_P(ExpertAdapterTest, StackedFilesThatDoNotFitAreRefused) {
    const auto model = load(DType::kBF16);
    const auto adapter = store(*model, "shared");
    randomise(stream_, *adapter, 3);
    const Folder folder;
    const std::string path = folder.path("a");
    const std::string weights = path + "/adapter_model.safetensors";
    const std::string experts = "base_model.model.model.layers.1.mlp.experts.";

    struct Edited {
        std::vector<int64_t> shape;
        std::vector<std::byte> bytes;
    };

    const auto refused = [&](const auto& change) {
        adapter->save_peft(stream_, path, "tiny");
        std::map<std::string, Edited> tensors;
        {
            const SafetensorsFile file(weights);
            for (const auto& [name, tensor] : file.tensors()) {
                tensors[name] = {tensor.shape, {tensor.bytes.begin(), tensor.bytes.end()}};
            }
        }
        change(tensors);
        std::vector<TensorToStore> list;
        for (const auto& [name, tensor] : tensors) {
            list.push_back({name, "F32", tensor.shape, tensor.bytes.data(), tensor.bytes.size()});
        }
        write_safetensors(weights, list, {});
        return refusal([&] {
            AdapterStore::load_peft(device_, path, model->sites, model->compute, 2);
        });
    };
    using Tensors = std::map<std::string, Edited>;
    const std::string last = oft() ? ".oft_R.weight" : ".lora_A.weight";
    const auto copies = [](Edited& tensor, size_t count) {
        std::vector<std::byte> many;
        for (size_t i = 0; i < count; ++i) {
            many.insert(many.end(), tensor.bytes.begin(), tensor.bytes.end());
        }
        tensor.shape[0] *= static_cast<int64_t>(count);
        tensor.bytes = many;
    };
    const auto has = [](const std::string& sentence, const char* part) {
        EXPECT_NE(sentence.find(part), std::string::npos) << sentence;
    };
    EXPECT_EQ(refused([](Tensors&) {}), "");
    has(refused([&](Tensors& t) { copies(t[experts + "w1" + last], 3); }), "stacks 3 experts");
    has(refused([&](Tensors& t) { copies(t[experts + "w1" + last], kExperts); }),
        "for each expert");
    has(refused([&](Tensors& t) {
            Edited& down = t[experts + "w2" + last];
            down.shape[0] = 1;
            down.bytes.resize(down.bytes.size() / kExperts);
        }),
        "is shared by all experts");
    has(refused([&](Tensors& t) {
            Edited one = t[experts + "w2" + last];
            one.shape.erase(one.shape.begin());
            one.bytes.resize(one.bytes.size() / kExperts);
            t[experts + "5.down_proj" + last] = one;
        }),
        "a second time");
    has(refused([&](Tensors& t) { t.erase(experts + "w2" + last); }), oft() ? "" : "missing");
    has(refused([&](Tensors& t) {
            t["base_model.model.model.layers.0.mlp.experts.w1" + last] = t[experts + "w1" + last];
        }),
        "does not have");
    if (oft()) {
        has(refused([&](Tensors& t) { t[experts + "w3" + last].bytes[0] ^= std::byte{1}; }),
            "differs from w1");
    }
    AdapterOptions options = adapter->options();
    options.targets = {"3.gate_proj", "down_proj"};
    has(refusal([&] { AdapterStore(device_, options, model->sites, model->compute, 2, 1); }),
        "some experts");
}

INSTANTIATE_TEST_SUITE_P(Kind, ExpertAdapterTest, ::testing::Values("lora", "oft"));

}  // namespace
}  // namespace orbit
