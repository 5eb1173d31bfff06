// The record of chosen experts: complete whatever the schedule, equal in training, counted when
// tampered with, and obeyed when replayed.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <map>

#include "ops/moe.h"
#include "rollout/engine.h"
#include "train/trainer.h"

namespace orbit {
namespace {

using Record = std::vector<uint8_t>;

class RoutingTest : public ::testing::Test {
  protected:
    RoutingTest() : device_(make_device("cpu", "auto", 2)), stream_(device_) {
        model_ = load_model(stream_, ORBIT_SOURCE_DIR "/tests/models/tiny-qwen3-moe");
        AdapterOptions options;
        options.kind = "lora";
        adapter_ =
            std::make_unique<AdapterStore>(device_, options, model_->sites, model_->compute, 2, 1);
    }

    // Prompts 0 and 1 share their first 40 tokens.
    static std::vector<int32_t> prompt(int index) {
        std::vector<int32_t> ids;
        for (int i = 0; i < 44 + 3 * index; ++i) {
            ids.push_back((i < 40 && index < 2 ? 7 * i : 7 * i + 31 * index) % 200);
        }
        return ids;
    }

    struct Answer {
        std::vector<int32_t> ids;  // prompt then response
        int32_t prompt_length = 0;
        std::vector<float> logprobs;
        Record routing;
    };

    std::vector<Answer> roll_out(const EngineOptions& options) {
        RolloutEngine engine(stream_, *model_, adapter_.get(), options);
        for (int index = 0; index < 3; ++index) {
            Request r;
            r.prompt = prompt(index);
            r.num_samples = 3;
            r.seed = 4;
            for (uint64_t s = 0; s < 3; ++s) {
                r.request_ids.push_back(10 * static_cast<uint64_t>(index) + s);
            }
            r.max_tokens = 21;
            engine.submit(std::move(r));
        }
        while (engine.step()) {
        }
        cached_tokens_ = engine.stats().cached_tokens;
        std::map<std::pair<int64_t, int32_t>, Answer> answers;
        for (Completion& done : engine.take_finished()) {
            Answer& a = answers[{done.ticket, done.sample}];
            a.ids = prompt(static_cast<int>(done.ticket));
            a.prompt_length = static_cast<int32_t>(a.ids.size());
            a.ids.insert(a.ids.end(), done.ids.begin(), done.ids.end());
            a.logprobs = std::move(done.logprobs);
            a.routing = std::move(done.routing);
        }
        std::vector<Answer> list;
        for (auto& [key, answer] : answers) {
            list.push_back(std::move(answer));
        }
        return list;
    }

    static EngineOptions recording() {
        EngineOptions options;
        options.kv_tokens = 4096;
        options.record_routing = true;
        return options;
    }

    struct Trained {
        RoutingCheck check;
        std::vector<std::vector<float>> logprobs;
        std::vector<float> gradient;
    };

    Trained train(const std::vector<Answer>& answers, bool replay) {
        Trained trained;
        Trainer trainer(stream_, *model_, *adapter_, TrainOptions{}, SamplingFilter{}, replay);
        std::vector<TrainSequence> sequences;
        for (const Answer& a : answers) {
            const auto index = static_cast<int64_t>(sequences.size());
            sequences.push_back({&a.ids, a.prompt_length, index, &a.routing});
        }
        const int slot = adapter_->pin_current();
        trained.check =
            trainer.accumulate(sequences, slot, [&](auto, auto columns, auto coefficients) {
                for (size_t i = 0; i < columns.size(); ++i) {
                    trained.logprobs.push_back(columns[i].logprob);
                    std::fill(
                        coefficients[i].d_logprob.begin(), coefficients[i].d_logprob.end(), 0.5f
                    );
                }
            });
        adapter_->unpin(slot);
        const auto count = static_cast<size_t>(adapter_->num_parameters());
        trained.gradient.assign(adapter_->gradients(), adapter_->gradients() + count);
        return trained;
    }

    int64_t pairs_of(const std::vector<Answer>& answers) const {
        int64_t tokens = 0;
        for (const Answer& a : answers) {
            tokens += static_cast<int64_t>(a.ids.size()) - 1;
        }
        return tokens * model_->config.num_expert_layers();
    }

    // Gives one (token, layer) pair another set of experts.
    void tamper(Answer& answer, int64_t token, int64_t layer) const {
        const ModelConfig& c = model_->config;
        const int64_t at = (token * c.num_expert_layers() + layer) * c.experts_per_token;
        uint8_t* ids = answer.routing.data() + at;
        uint8_t other = 0;
        while (std::find(ids, ids + c.experts_per_token, other) != ids + c.experts_per_token) {
            ++other;
        }
        ASSERT_LT(other, c.num_experts);
        ids[0] = other;
        std::sort(ids, ids + c.experts_per_token);
    }

    Device device_;
    Stream stream_;
    std::unique_ptr<Model> model_;
    std::unique_ptr<AdapterStore> adapter_;
    int64_t cached_tokens_ = 0;
};

TEST_F(RoutingTest, TheRecordDoesNotDependOnTheSchedule) {
    const auto expected = roll_out(recording());
    ASSERT_EQ(expected.size(), 9u);
    EXPECT_GT(cached_tokens_, 0);
    EngineOptions narrow = recording();  // one group at a time: prompt 1 finds prompt 0's pages
    narrow.max_batch = 3;
    narrow.prefill_chunk = 5;
    EngineOptions apart = narrow;
    apart.prefix_cache = false;
    apart.decode_steps = 8;
    for (const EngineOptions& options : {narrow, apart}) {
        const auto answers = roll_out(options);
        for (size_t i = 0; i < expected.size(); ++i) {
            EXPECT_EQ(answers[i].ids, expected[i].ids);
            EXPECT_EQ(answers[i].routing, expected[i].routing) << i;
        }
    }
    const ModelConfig& c = model_->config;
    for (const Answer& a : expected) {
        ASSERT_EQ(
            static_cast<int64_t>(a.routing.size()),
            (static_cast<int64_t>(a.ids.size()) - 1) * c.num_expert_layers() * c.experts_per_token
        );
        for (const uint8_t id : a.routing) {
            ASSERT_LT(id, c.num_experts);
        }
    }
    EXPECT_NE(expected[0].routing, expected[3].routing);
    EngineOptions silent = recording();
    silent.record_routing = false;
    EXPECT_TRUE(roll_out(silent)[0].routing.empty());
}

TEST_F(RoutingTest, TrainingChoosesTheSameExpertsAndATamperedRecordIsCounted) {
    auto answers = roll_out(recording());
    const Trained clean = train(answers, false);
    EXPECT_EQ(clean.check.pairs, pairs_of(answers));
    EXPECT_EQ(clean.check.mismatches, 0) << clean.check.first;
    tamper(answers[1], 2, 0);                                                // a prompt token
    tamper(answers[4], static_cast<int64_t>(answers[4].ids.size()) - 2, 0);  // a decoded one
    const Trained counted = train(answers, false);
    EXPECT_EQ(counted.check.mismatches, 2);
    EXPECT_NE(counted.check.first.find("sequence 1 token 2"), std::string::npos)
        << counted.check.first;
    EXPECT_EQ(counted.logprobs, clean.logprobs) << "a record that is only compared changes nothing";
    answers[0].routing.clear();
    EXPECT_LT(train(answers, false).check.pairs, clean.check.pairs);
}

TEST_F(RoutingTest, ReplayTakesTheRecordedExperts) {
    auto answers = roll_out(recording());
    const Trained own = train(answers, false);
    const Trained replayed = train(answers, true);
    EXPECT_EQ(replayed.logprobs, own.logprobs);
    EXPECT_EQ(replayed.gradient, own.gradient);
    EXPECT_EQ(replayed.check.mismatches, 0);
    tamper(answers[2], answers[2].prompt_length + 1, 0);
    const Trained changed = train(answers, true);
    EXPECT_EQ(changed.check.mismatches, 1);
    EXPECT_NE(changed.logprobs[2], own.logprobs[2]);
    EXPECT_NE(changed.gradient, own.gradient);
    for (size_t i = 0; i < answers.size(); ++i) {
        if (i != 2) {
            EXPECT_EQ(changed.logprobs[i], own.logprobs[i]) << i;
        }
    }
}

// More than 256 experts take two bytes an id; the weights come from the own scores.
TEST_F(RoutingTest, WideIdsRoundTripThroughPages) {
    constexpr int64_t kTokens = 3;
    constexpr int64_t kExperts = 300;
    constexpr int32_t kSelected = 2;
    std::vector<float> x(kTokens * kTokens, 0.0f);
    std::vector<float> router(kExperts * kTokens, 0.0f);
    for (int64_t t = 0; t < kTokens; ++t) {
        x[static_cast<size_t>(t * kTokens + t)] = 1.0f;
        router[static_cast<size_t>((299 - t) * kTokens + t)] = 3.0f;
        router[static_cast<size_t>((5 + t) * kTokens + t)] = 2.0f;
    }
    const std::vector<int32_t> positions = {14, 15, 16};
    const std::vector<int32_t> sequence_of = {0, 0, 0};
    const std::vector<int32_t> table = {2, 0};
    std::vector<uint16_t> ids(3 * kPageTokens * 2 * kSelected, 999);
    RouterParams p;
    p.x = make_tensor(x.data(), DType::kF32, {kTokens, kTokens});
    p.weight.format = WeightFormat::kF32;
    p.weight.rows = kExperts;
    p.weight.cols = kTokens;
    p.weight.data = router.data();
    p.num_selected = kSelected;
    p.batch.max_blocks = 2;
    p.batch.positions = positions.data();
    p.batch.sequence_of = sequence_of.data();
    p.batch.block_table = table.data();
    p.layer = 1;
    p.record = {ids.data(), 2, kSelected, true};
    const Routing own = make_routing(stream_, kTokens, kExperts, kSelected);
    route(stream_, p, own);
    const auto place = [&](int64_t page, int64_t row) {
        return ((page * kPageTokens + row) * 2 + 1) * kSelected;
    };
    const int64_t places[] = {place(2, 14), place(2, 15), place(0, 0)};
    for (int64_t t = 0; t < kTokens; ++t) {
        EXPECT_EQ(ids[static_cast<size_t>(places[t])], 5 + t);
        EXPECT_EQ(ids[static_cast<size_t>(places[t]) + 1], 299 - t);
    }
    EXPECT_EQ(std::count(ids.begin(), ids.end(), 999), static_cast<long>(ids.size()) - 6);

    p.replay = p.record;
    p.record = {};
    ids[static_cast<size_t>(places[1])] = 200;
    const Routing replayed = make_routing(stream_, kTokens, kExperts, kSelected);
    route(stream_, p, replayed);
    EXPECT_EQ(replayed.expert[2], 200);
    EXPECT_EQ(replayed.expert[3], 298);
    EXPECT_LT(replayed.weight[2], own.weight[2]);
    EXPECT_FLOAT_EQ(replayed.weight[2] + replayed.weight[3], 1.0f);
    EXPECT_EQ(replayed.weight[0], own.weight[0]);
    EXPECT_EQ(replayed.offsets[kExperts], kTokens * kSelected);
}

}  // namespace
}  // namespace orbit
