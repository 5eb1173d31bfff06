// The engine and the trainer on the embedded model: scheduling never changes a result, the adapter
// is applied, caches never mix versions, and training sees the sampler's bits.
#include "rollout/engine.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "base/philox.h"
#include "model/score.h"
#include "rl/step.h"
#include "run/parity.h"
#include "train/trainer.h"

namespace orbit {
namespace {

class EngineTest : public ::testing::Test {
  protected:
    EngineTest() : device_(make_device("cpu", "auto", 2)), stream_(device_) {
        model_ = load_model(stream_, ORBIT_SOURCE_DIR "/models/mini-qwen3-int4");
    }

    std::vector<int32_t> prompt(int index) const {
        return encode_chat(
            *model_,
            {{"user", fmt::format("What is {} + {}?", 11 + 7 * index, 300 - 13 * index)}},
            false
        );
    }

    std::unique_ptr<AdapterStore> adapter(const std::string& kind, bool random) {
        AdapterOptions options;
        options.kind = kind;
        auto store =
            std::make_unique<AdapterStore>(device_, options, model_->sites, model_->compute, 3, 1);
        if (random) {
            std::vector<float> masters(static_cast<size_t>(store->num_parameters()));
            for (size_t i = 0; i < masters.size(); ++i) {
                masters[i] =
                    0.08f *
                    (uniform_from_word(philox(static_cast<uint32_t>(i), 0, 0, 0, 1, 0).word[0]) -
                     0.5f);
            }
            copy_to_device(
                stream_, store->masters(), masters.data(), masters.size() * sizeof(float)
            );
            store->publish(stream_, 1);
        }
        return store;
    }

    Request request(int index, int32_t samples = 2) const {
        Request r;
        r.prompt = prompt(index);
        r.num_samples = samples;
        for (int32_t s = 0; s < samples; ++s) {
            r.request_ids.push_back(static_cast<uint64_t>(100 * index + s));
        }
        r.seed = 9;
        r.max_tokens = 40;
        return r;
    }

    // Answers by (request, sample), submitted in the given order.
    std::map<std::pair<int, int>, Completion> run(
        AdapterStore* store,
        const EngineOptions& options,
        const std::vector<int>& order,
        bool use_adapter = true
    ) {
        RolloutEngine engine(stream_, *model_, store, options);
        std::map<int64_t, int> index_of;
        for (const int index : order) {
            Request r = request(index);
            r.use_adapter = use_adapter;
            index_of[engine.submit(std::move(r))] = index;
        }
        while (engine.step()) {
        }
        std::map<std::pair<int, int>, Completion> answers;
        for (auto& done : engine.take_finished()) {
            answers[{index_of.at(done.ticket), done.sample}] = done;
        }
        return answers;
    }

    Device device_;
    Stream stream_;
    std::unique_ptr<Model> model_;
};

void expect_equal_bits(const Completion& a, const Completion& b) {
    ASSERT_EQ(a.ids, b.ids);
    ASSERT_EQ(a.logprobs.size(), b.logprobs.size());
    for (size_t i = 0; i < a.logprobs.size(); ++i) {
        ASSERT_EQ(std::bit_cast<uint32_t>(a.logprobs[i]), std::bit_cast<uint32_t>(b.logprobs[i]))
            << i;
    }
    EXPECT_EQ(a.finish, b.finish);
}

TEST_F(EngineTest, SchedulingNeverChangesAnAnswer) {
    const auto store = adapter("oft", true);
    EngineOptions wide;
    wide.kv_tokens = 8192;
    const auto expected = run(store.get(), wide, {0, 1, 2, 3, 4, 5, 6, 7});
    ASSERT_EQ(expected.size(), 16u);
    EngineOptions narrow;  // two sequences at a time, prompts in pieces of five, no cache
    narrow.max_batch = 2;
    narrow.prefill_chunk = 5;
    narrow.prefix_cache = false;
    narrow.kv_tokens = 400;
    EngineOptions blocks = wide;  // the host looks every eight tokens
    blocks.decode_steps = 8;
    for (const EngineOptions& options : {narrow, blocks}) {
        const auto answers = run(store.get(), options, {7, 0, 3, 1, 6, 2, 5, 4});
        ASSERT_EQ(answers.size(), expected.size());
        for (const auto& [key, answer] : answers) {
            expect_equal_bits(answer, expected.at(key));
        }
    }
}

TEST_F(EngineTest, TheAdapterIsApplied) {
    EngineOptions options;
    options.kv_tokens = 4096;
    for (const char* kind : {"oft", "lora"}) {
        const auto fresh = adapter(kind, false);
        const auto random = adapter(kind, true);
        const auto base = run(fresh.get(), options, {0, 1, 2}, false);
        const auto identity = run(fresh.get(), options, {0, 1, 2});
        const auto moved = run(random.get(), options, {0, 1, 2});
        int different = 0;
        for (const auto& [key, answer] : base) {
            expect_equal_bits(answer, identity.at(key));  // an adapter at its start changes no bit
            different += answer.logprobs != moved.at(key).logprobs ? 1 : 0;
        }
        EXPECT_EQ(different, static_cast<int>(base.size())) << kind;
    }
}

TEST_F(EngineTest, BaseAndAdapterNeverShareAPage) {
    const auto store = adapter("lora", true);
    EngineOptions options;
    options.kv_tokens = 4096;
    RolloutEngine engine(stream_, *model_, store.get(), options);
    for (const bool use_adapter : {true, false, true}) {
        Request r = request(3);
        r.use_adapter = use_adapter;
        engine.submit(std::move(r));
        while (engine.step()) {
        }
    }
    auto done = engine.take_finished();
    ASSERT_EQ(done.size(), 6u);
    std::sort(done.begin(), done.end(), [](const Completion& a, const Completion& b) {
        return std::pair(a.ticket, a.sample) < std::pair(b.ticket, b.sample);
    });
    expect_equal_bits(done[0], done[4]);
    EXPECT_NE(done[0].logprobs, done[2].logprobs);
    EXPECT_EQ(done[0].adapter_version, 1);
    EXPECT_EQ(done[2].adapter_version, -1);
    EXPECT_GT(engine.stats().cached_tokens, 0);
    const auto alone = run(store.get(), options, {3}, false);
    expect_equal_bits(done[2], alone.at({3, 0}));
}

TEST_F(EngineTest, StopsAtAStringAndAtTheLimit) {
    EngineOptions options;
    options.kv_tokens = 2048;
    RolloutEngine engine(stream_, *model_, nullptr, options);
    Request r = request(1, 1);
    r.filter.temperature = 0;
    r.stop = {"="};
    engine.submit(r);
    r.stop.clear();
    r.max_tokens = 3;
    engine.submit(r);
    while (engine.step()) {
    }
    auto done = engine.take_finished();
    ASSERT_EQ(done.size(), 2u);
    for (const auto& d : done) {
        if (d.ticket == 0) {
            EXPECT_EQ(d.finish, FinishReason::kStop);
            EXPECT_EQ(response_text(*model_, d.ids, {"="}).find('='), std::string::npos);
            EXPECT_NE(response_text(*model_, d.ids, {}).find('='), std::string::npos);
        } else {
            EXPECT_EQ(d.finish, FinishReason::kLength);
            EXPECT_EQ(d.ids.size(), 3u);
        }
    }
}

TEST_F(EngineTest, AnAbandonedEngineReleasesItsAdapterVersion) {
    const auto store = adapter("oft", true);
    EngineOptions options;
    options.kv_tokens = 2048;
    options.max_batch = 2;
    {
        RolloutEngine engine(stream_, *model_, store.get(), options);
        engine.submit(request(0));
        engine.submit(request(1));  // still waiting when the engine goes
        engine.step();
        engine.step();
    }
    for (int version = 2; version < 6; ++version) {
        store->publish(stream_, version);  // needs a slot that nothing pins
    }
    EXPECT_EQ(store->current_version(), 5);
}

TEST_F(EngineTest, WhatNeverFitsIsAUserError) {
    EngineOptions options;
    options.kv_tokens = 64;
    RolloutEngine engine(stream_, *model_, nullptr, options);
    EXPECT_THROW(engine.submit(request(0)), UserError);
}

TEST_F(EngineTest, ParityTableIsAllZero) {
    ParityOptions options;
    options.num_texts = 12;
    options.longest = 90;
    for (const auto& row : parity_table(stream_, *model_, "", options)) {
        EXPECT_EQ(row.different, 0) << row.adapter << " " << row.comparison << " " << row.first;
        EXPECT_GT(row.tokens, 100) << row.adapter << " " << row.comparison;
    }
}

TEST_F(EngineTest, GradientsDoNotDependOnTheSplit) {
    const auto store = adapter("oft", true);
    std::vector<std::vector<int32_t>> texts;
    for (int i = 0; i < 6; ++i) {
        texts.push_back(prompt(i));
    }
    const auto gradient = [&](size_t pieces) {
        Trainer trainer(stream_, *model_, *store, TrainOptions{}, SamplingFilter{});
        std::vector<TrainSequence> all;
        for (size_t i = 0; i < texts.size(); ++i) {
            all.push_back({&texts[i], 3, static_cast<int64_t>(i)});
        }
        const int slot = store->pin_current();
        const size_t each = all.size() / pieces;
        for (size_t p = 0; p < pieces; ++p) {
            trainer.accumulate(
                std::span(all).subspan(p * each, each),
                slot,
                [](auto, auto, auto coefficients) {
                    for (auto& c : coefficients) {
                        std::fill(c.d_logprob.begin(), c.d_logprob.end(), -0.25f);
                    }
                }
            );
        }
        store->unpin(slot);
        store->finish_gradients(stream_);
        std::vector<float> g(static_cast<size_t>(store->num_parameters()));
        copy_to_host(stream_, g.data(), store->gradients(), g.size() * sizeof(float));
        return g;
    };
    const auto once = gradient(1);
    EXPECT_EQ(once, gradient(1));
    const auto split = gradient(3);
    double difference = 0;
    double norm = 0;
    for (size_t i = 0; i < once.size(); ++i) {
        difference += std::pow(static_cast<double>(once[i]) - static_cast<double>(split[i]), 2);
        norm += std::pow(static_cast<double>(once[i]), 2);
    }
    EXPECT_GT(norm, 0);
    EXPECT_LT(std::sqrt(difference / norm), 1e-6);
}

}  // namespace
}  // namespace orbit
