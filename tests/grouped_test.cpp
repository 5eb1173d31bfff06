// Experts decoded first, in chunks of any size, give the bits of experts decoded inside the
// product.
#include <gtest/gtest.h>

#include <cstring>
#include <optional>
#include <random>

#include "ops/moe.h"

namespace orbit {
namespace {

constexpr int64_t kExperts = 5;
constexpr int64_t kBlock = 16;  // OFT
constexpr int64_t kRank = 4;

// Random packed experts: every code is allowed except NaN.
struct Experts {
    std::vector<QuantizedMatrix> w;
    std::vector<std::vector<uint8_t>> data;
    std::vector<std::vector<uint8_t>> scales;

    Experts(WeightFormat format, int64_t rows, int64_t cols) {
        std::mt19937 random(7);
        for (int64_t e = 0; e < kExperts; ++e) {
            QuantizedMatrix m;
            m.format = format;
            m.rows = rows;
            m.cols = cols;
            m.global_scale = 0.37f;
            m.global_divides = e % 2 == 1;
            auto& bytes = data.emplace_back(static_cast<size_t>(rows * row_bytes(format, cols)));
            for (uint8_t& byte : bytes) {
                byte = static_cast<uint8_t>(random() % 256);
                byte = format == WeightFormat::kFp8 && (byte & 127) == 127 ? 0 : byte;
            }
            if (format == WeightFormat::kBF16) {
                for (size_t i = 1; i < bytes.size(); i += 2) {
                    bytes[i] = static_cast<uint8_t>(0x3c + (bytes[i] & 0x83));
                }
            }
            auto& scale = scales.emplace_back(static_cast<size_t>(m.scale_bytes()) + 16);
            const auto put = [&](size_t i, auto value) {
                if ((i + 1) * sizeof value <= scale.size()) {
                    std::memcpy(scale.data() + i * sizeof value, &value, sizeof value);
                }
            };
            for (size_t i = 0; i < scale.size(); ++i) {
                const float f = 0.01f * static_cast<float>(1 + random() % 50);
                if (format == WeightFormat::kInt4) {
                    put(i, to_bf16(f));
                } else if (format == WeightFormat::kFp8) {
                    put(i, f);
                } else {
                    const uint32_t code =
                        format == WeightFormat::kMxFp4 ? 120 + random() % 8 : random() % 126;
                    put(i, static_cast<uint8_t>(code));
                }
            }
            w.push_back(m);
        }
        for (size_t e = 0; e < w.size(); ++e) {
            w[e].data = data[e].data();
            (format == WeightFormat::kInt4 ? reinterpret_cast<const void*&>(w[e].scales)
                                           : w[e].block_scales) = scales[e].data();
        }
    }
};

struct Shape {
    WeightFormat format;
    DType compute;
    AdapterKind adapter;
    int64_t in;
    int64_t out;
};

struct Result {
    std::vector<uint8_t> y, dx, added;
    std::vector<float> grads;
    int64_t decoded = 0;

    bool operator==(const Result& r) const {
        return y == r.y && dx == r.dx && added == r.added && grads == r.grads;
    }
};

class GroupedTest : public ::testing::TestWithParam<const char*> {
  protected:
    Tensor random(DType type, std::initializer_list<int64_t> shape, float size) {
        std::normal_distribution<float> normal(0.0f, size);
        const Tensor t = stream_.scratch.take(type, shape);
        for (int64_t i = 0; i < t.numel(); ++i) {
            const float value = normal(random_);
            if (type == DType::kF32) {
                t.as<float>()[i] = value;
            } else {
                t.as<bf16>()[i] = to_bf16(value);
            }
        }
        return t;
    }

    static std::vector<uint8_t> bytes_of(const Tensor& t) {
        const auto* from = static_cast<const uint8_t*>(t.data);
        return {from, from + t.bytes()};
    }

    // bytes < 0: no buffer.
    Result run(const Shape& s, int64_t bytes) {
        const ScratchScope scope(stream_.scratch);
        random_.seed(3);
        const Experts experts(s.format, s.out, s.in);
        const int32_t offsets[kExperts + 1] = {0, 3, 3, 60, 61, 78};  // expert 1 has no rows
        const int64_t rows = offsets[kExperts];
        const Tensor x = random(s.compute, {rows, s.in}, 1.0f);
        const Tensor dy = random(s.compute, {rows, s.out}, 1.0f);
        const Tensor added = random(s.compute, {rows, s.in}, 1.0f);
        std::vector<AdapterView> views;
        std::vector<AdapterGrad> grads;
        Result result;
        const int64_t each = s.adapter == AdapterKind::kLora  ? kRank * (s.in + s.out)
                             : s.adapter == AdapterKind::kOft ? s.in * kBlock
                                                              : 0;
        result.grads.resize(static_cast<size_t>(each * kExperts));
        for (int64_t e = 0; e < kExperts && each > 0; ++e) {
            AdapterView view;
            view.kind = s.adapter;
            view.lora_scale = 0.5f;
            AdapterGrad grad;
            float* at = result.grads.data() + e * each;
            if (s.adapter == AdapterKind::kLora) {
                view.lora_a = random(s.compute, {kRank, s.in}, 0.1f);
                view.lora_b = random(s.compute, {s.out, kRank}, 0.1f);
                grad.lora_a = at;
                grad.lora_b = at + kRank * s.in;
            } else {
                view.oft_d = random(s.compute, {s.in / kBlock, kBlock, kBlock}, 0.05f);
                grad.oft_d = at;
            }
            views.push_back(view);
            grads.push_back(grad);
        }
        std::optional<DequantBuffer> buffer;
        GroupedLinearParams p{x, experts.w, views, offsets};
        if (bytes >= 0) {
            p.dequant = &buffer.emplace(stream_, bytes);
        }
        const Tensor y = stream_.scratch.take(s.compute, {rows, s.out});
        const Tensor dx = stream_.scratch.take(s.compute, {rows, s.in});
        grouped_linear(stream_, p, y);
        grouped_linear_backward(stream_, p, dy, dx, false, grads);
        result.decoded = buffer ? buffer->num_decoded() : 0;
        grouped_linear_backward(stream_, p, dy, added, true, grads);
        result.y = bytes_of(y);
        result.dx = bytes_of(dx);
        result.added = bytes_of(added);
        return result;
    }

    Device device_ = make_device("cpu", GetParam(), 2);
    Stream stream_{device_};
    std::mt19937 random_;
};

TEST_P(GroupedTest, AnyNumberOfBytesGivesTheBitsOfNone) {
    for (const WeightFormat format :
         {WeightFormat::kBF16,
          WeightFormat::kInt4,
          WeightFormat::kFp8,
          WeightFormat::kMxFp4,
          WeightFormat::kNvFp4}) {
        for (const DType compute : {DType::kBF16, DType::kF32}) {
            for (const AdapterKind adapter :
                 {AdapterKind::kNone, AdapterKind::kLora, AdapterKind::kOft}) {
                // An odd depth takes products of its own; 160 cuts a 128-block.
                for (const int64_t out : {160, 67}) {
                    const Shape s{format, compute, adapter, 192, out};
                    const Result expected = run(s, -1);
                    const int64_t matrix = s.in * s.out * 2;
                    for (const int64_t bytes :
                         {5 * matrix, 2 * matrix, matrix, matrix - 2, matrix / 3, int64_t{700}}) {
                        const Result result = run(s, bytes);
                        ASSERT_TRUE(result == expected)
                            << format_name(format) << " compute " << static_cast<int>(compute)
                            << " adapter " << static_cast<int>(adapter) << " out " << out
                            << " bytes " << bytes;
                    }
                }
            }
        }
    }
}

TEST_P(GroupedTest, OnlyActiveExpertsAreDecodedAndBackwardFindsThem) {
    const Shape s{WeightFormat::kInt4, DType::kBF16, AdapterKind::kNone, 192, 160};
    const int64_t matrix = s.in * s.out * 2;
    EXPECT_EQ(run(s, 4 * matrix).decoded, 4) << "forward alone: backward finds all four";
    EXPECT_EQ(run(s, 2 * matrix).decoded, 6) << "backward finds the last two";
    EXPECT_EQ(run(s, matrix).decoded, 7);
    EXPECT_EQ(run(s, matrix / 2).decoded, 4 * 2 + 4 * 2) << "halves: outputs, then inputs";
}

INSTANTIATE_TEST_SUITE_P(Isa, GroupedTest, ::testing::Values("auto", "avx2", "reference"));

}  // namespace
}  // namespace orbit
