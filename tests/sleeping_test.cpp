// AdamW that leaves never-reached experts alone is the dense AdamW, bit for bit.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "train/trainer.h"

namespace orbit {
namespace {

struct Dense {
    std::vector<float> p, m, v;

    explicit Dense(AdapterStore& a)
        : p(a.masters(), a.masters() + a.num_parameters()), m(p.size(), 0.0f), v(p.size(), 0.0f) {}

    bool equals(AdapterStore& a) const {
        const size_t bytes = p.size() * sizeof(float);
        return std::memcmp(p.data(), a.masters(), bytes) == 0 &&
               std::memcmp(m.data(), a.moments_m(), bytes) == 0 &&
               std::memcmp(v.data(), a.moments_v(), bytes) == 0;
    }
};

class SleepingTest : public ::testing::TestWithParam<const char*> {
  protected:
    SleepingTest() : device_(make_device("cpu", "auto", 2)), stream_(device_) {
        model_ = load_model(stream_, ORBIT_SOURCE_DIR "/tests/models/tiny-qwen3-moe");
        AdapterOptions options;
        options.kind = GetParam();
        options.block_size = 16;
        options.expert_sharing = "shared";
        adapter_ =
            std::make_unique<AdapterStore>(device_, options, model_->sites, model_->compute, 2, 1);
        std::uniform_real_distribution<float> value(-0.01f, 0.01f);
        for (int64_t i = 0; i < adapter_->num_parameters(); ++i) {
            adapter_->masters()[i] = i % 11 == 0 ? -0.0f : value(random_);
        }
    }

    // Gradients of all dense layers and of a few experts; some zeros are negative.
    void fill_gradients(uint32_t active) {
        std::normal_distribution<float> normal(0.0f, 0.1f);
        for (const auto& range : adapter_->tensors()) {
            const size_t at = range.name.find(".experts.");
            const char digit = at == std::string::npos ? 'x' : range.name[at + 9];
            const bool reached = std::isdigit(digit) == 0 || ((active >> (digit - '0')) & 1) != 0;
            for (int64_t i = 0; i < range.shape[0] * range.shape[1]; ++i) {
                adapter_->gradients()[range.offset + i] =
                    reached ? normal(random_) : (i % 3 == 0 ? -0.0f : 0.0f);
            }
        }
    }

    Update step(Trainer& trainer, Dense& dense, const TrainOptions& options) {
        const auto count = adapter_->num_parameters();
        std::vector<float> g(adapter_->gradients(), adapter_->gradients() + count);
        const Update update = trainer.apply();
        AdamWParams params;
        params.lr = update.lr;
        params.beta1 = options.beta1;
        params.beta2 = options.beta2;
        params.eps = options.eps;
        params.weight_decay = options.weight_decay;
        params.step = trainer.optimizer_step();
        params.grad_scale = update.grad_scale;
        adamw(stream_, params, dense.p.data(), dense.m.data(), dense.v.data(), g.data(), count);
        return update;
    }

    Device device_;
    Stream stream_;
    std::unique_ptr<Model> model_;
    std::unique_ptr<AdapterStore> adapter_;
    std::mt19937 random_{3};
};

TEST_P(SleepingTest, EqualsTheDenseUpdateOverRandomActivity) {
    TrainOptions options;
    options.lr = 1e-3;
    Trainer trainer(stream_, *model_, *adapter_, options, SamplingFilter{});
    Dense dense(*adapter_);
    const uint32_t active[] = {0x05, 0x00, 0x21, 0x04, 0x80, 0x61, 0x00, 0x11};
    int64_t asleep = adapter_->num_parameters();
    for (size_t n = 0; n < std::size(active); ++n) {
        if (n == 5) {
            trainer.set_optimizer_step(trainer.optimizer_step());  // as after a resume
        }
        fill_gradients(active[n]);
        const Update update = step(trainer, dense, options);
        ASSERT_TRUE(dense.equals(*adapter_)) << "step " << n;
        EXPECT_LE(update.num_asleep, asleep) << "nobody falls asleep again";
        asleep = update.num_asleep;
        EXPECT_GT(asleep, 0) << "experts 1 and 3 are never reached";
    }
    // Experts 0, 2, 4, 5, 6 and 7 were reached; asleep is what 1 and 3 own.
    int64_t own = 0;
    for (const auto& range : adapter_->tensors()) {
        for (const char* name : {".experts.1.", ".experts.3."}) {
            own += range.name.find(name) != std::string::npos ? range.shape[0] * range.shape[1] : 0;
        }
    }
    EXPECT_EQ(asleep, own);
}

// What an expert was taught once goes on moving it: sleeping by the gradient alone would differ.
TEST_P(SleepingTest, AnExpertThatWasReachedIsNotLeftAlone) {
    TrainOptions options;
    options.lr = 1e-3;
    Trainer trainer(stream_, *model_, *adapter_, options, SamplingFilter{});
    Dense dense(*adapter_);
    fill_gradients(0x01);
    step(trainer, dense, options);
    const std::vector<float> before = dense.p;
    fill_gradients(0x02);
    step(trainer, dense, options);
    EXPECT_TRUE(dense.equals(*adapter_));
    int moved = 0;
    for (const auto& range : adapter_->tensors()) {
        if (range.name.find(".experts.0.") != std::string::npos) {
            const auto at = static_cast<size_t>(range.offset);
            moved += before[at + 1] != dense.p[at + 1] ? 1 : 0;
        }
    }
    EXPECT_GT(moved, 0);
}

TEST_P(SleepingTest, WeightDecayWakesEverybody) {
    TrainOptions options;
    options.lr = 1e-3;
    options.weight_decay = 0.1;
    Trainer trainer(stream_, *model_, *adapter_, options, SamplingFilter{});
    Dense dense(*adapter_);
    for (const uint32_t active : {0x01u, 0x00u, 0x06u}) {
        fill_gradients(active);
        EXPECT_EQ(step(trainer, dense, options).num_asleep, 0);
        EXPECT_TRUE(dense.equals(*adapter_));
    }
}

TEST(AllZero, SeesEverySingleValue) {
    std::vector<float> values(700, -0.0f);
    EXPECT_TRUE(all_zero(values.data(), 700));
    for (const size_t at : {0, 255, 256, 699}) {
        for (const float value : {1e-45f, -1.0f, std::nanf("")}) {
            values[at] = value;
            EXPECT_FALSE(all_zero(values.data(), 700)) << at;
        }
        values[at] = 0.0f;
    }
    EXPECT_TRUE(all_zero(values.data(), 0));
}

INSTANTIATE_TEST_SUITE_P(Kind, SleepingTest, ::testing::Values("lora", "oft"));

}  // namespace
}  // namespace orbit
