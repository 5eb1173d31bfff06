// What is kept for backward, and where, changes no bit of training: layer inputs in host memory,
// attention's outputs or attention once more.
#include <gtest/gtest.h>

#include "base/philox.h"
#include "train/trainer.h"

namespace orbit {
namespace {

class OffloadTest : public ::testing::TestWithParam<std::tuple<const char*, const char*>> {
  protected:
    OffloadTest() : device_(make_device("cpu", "auto", 2)), stream_(device_) {
        const auto& [path, kind] = GetParam();
        model_ = load_model(stream_, std::string(ORBIT_SOURCE_DIR) + "/" + path);
        options_.kind = kind;
        options_.block_size = 16;
    }

    std::vector<int32_t> text(int64_t length) const {
        std::vector<int32_t> ids;
        for (int64_t i = 0; i < length; ++i) {
            const auto seed = static_cast<uint32_t>(length);
            const uint32_t word = philox(static_cast<uint32_t>(i), seed, 0, 0, 17, 0).word[0];
            const auto vocabulary = static_cast<uint32_t>(model_->config.vocab_size);
            ids.push_back(static_cast<int32_t>(word % vocabulary));
        }
        return ids;
    }

    // Log-probs, gradients and weights of two steps of two batches, the largest one first: what is
    // left of a batch in host memory must not reach the next.
    std::vector<float> train(TrainOptions options) {
        AdapterStore adapter(device_, options_, model_->sites, model_->compute, 2, 1);
        options.lr = 1e-2;
        const bool offload = options.activation_offloading;
        Trainer trainer(stream_, *model_, adapter, options, SamplingFilter{}, false, 119);
        const ModelConfig& c = model_->config;
        EXPECT_EQ(trainer.offloaded_bytes(), offload ? (c.num_layers - 1) * 119 * c.width * 2 : 0);
        std::vector<float> seen;
        for (int step = 0; step < 2; ++step) {
            const int slot = adapter.pin_current();
            for (const std::vector<int64_t>& lengths :
                 {std::vector<int64_t>{50, 71}, {9, 33, 20}}) {
                std::vector<std::vector<int32_t>> texts;
                std::vector<TrainSequence> batch;
                for (const int64_t length : lengths) {
                    texts.push_back(text(length));
                }
                for (const auto& ids : texts) {
                    batch.push_back({&ids, 4, static_cast<int64_t>(batch.size())});
                }
                trainer.accumulate(batch, slot, [&](auto, auto columns, auto coefficients) {
                    for (size_t i = 0; i < columns.size(); ++i) {
                        const auto& logprob = columns[i].logprob;
                        seen.insert(seen.end(), logprob.begin(), logprob.end());
                        std::fill(
                            coefficients[i].d_logprob.begin(),
                            coefficients[i].d_logprob.end(),
                            -0.25f
                        );
                    }
                });
            }
            adapter.unpin(slot);
            adapter.finish_gradients(stream_);
            const int64_t count = adapter.num_parameters();
            seen.insert(seen.end(), adapter.gradients(), adapter.gradients() + count);
            trainer.apply();
            seen.insert(seen.end(), adapter.masters(), adapter.masters() + count);
            adapter.publish(stream_, step + 1);
        }
        return seen;
    }

    Device device_;
    Stream stream_;
    std::unique_ptr<Model> model_;
    AdapterOptions options_;
};

void expect_equal(const std::vector<float>& left, const std::vector<float>& right) {
    ASSERT_EQ(left.size(), right.size());
    for (size_t i = 0; i < left.size(); ++i) {
        ASSERT_EQ(float_bits(left[i]), float_bits(right[i])) << i << " of " << left.size();
    }
}

TEST_P(OffloadTest, ChangesNoBit) {
    const std::vector<float> full = train({.recompute = "full"});
    expect_equal(full, train({.recompute = "full", .activation_offloading = true}));
    expect_equal(full, train({.recompute = "selective"}));
}

INSTANTIATE_TEST_SUITE_P(
    Models,
    OffloadTest,
    ::testing::Combine(
        ::testing::Values("models/mini-qwen3-int4", "tests/models/tiny-qwen3-moe"),
        ::testing::Values("lora", "oft")
    )
);

// Every layer uses the same buffer, as every second one does in a pass.
TEST(Offload, InputsComeBackAsTheyLeft) {
    const Device device = make_device("cpu");
    Stream stream(device);
    Model model(device);
    model.config.num_layers = 4;
    model.config.width = 8;
    ActivationOffload offload(device, model, 5);
    EXPECT_EQ(offload.bytes(), 3 * 5 * 8 * 2);
    const Tensor x = stream.scratch.take(DType::kBF16, {5, 8});
    for (int64_t layer = 0; layer < 3; ++layer) {
        for (int64_t i = 0; i < x.numel(); ++i) {
            x.as<bf16>()[i] = to_bf16(static_cast<float>(100 * layer + i));
        }
        offload.store(stream, layer, x);
        offload.wait(stream);
    }
    for (int64_t layer = 2; layer >= 0; --layer) {
        offload.fetch(stream, layer, x);
        offload.wait(stream);
        for (int64_t i = 0; i < x.numel(); ++i) {
            EXPECT_EQ(
                to_float(x.as<bf16>()[i]), to_float(to_bf16(static_cast<float>(100 * layer + i)))
            );
        }
    }
    const Tensor larger = stream.scratch.take(DType::kBF16, {6, 8});
    EXPECT_DEATH(offload.store(stream, 2, larger), "more tokens than were announced");
}

}  // namespace
}  // namespace orbit
