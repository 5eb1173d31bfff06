#include "model/synthetic.h"

#include <algorithm>
#include <cmath>

#include "base/philox.h"
#include "model/base_bytes.h"
#include "model/rope_table.h"

namespace orbit {
namespace {

constexpr size_t kPoolValues = size_t{1} << 22;

struct Shape {
    const char* name;
    int64_t layers, width, heads, kv_heads, head_dim, mlp, vocab;
    bool tied;
    const char* family;
};

// models.md 2 and 3.
constexpr Shape kShapes[] = {
    {"smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, true, "llama"},
    {"qwen3-0.6b", 28, 1024, 16, 8, 128, 3072, 151936, true, "qwen3"},
    {"qwen3-1.7b", 28, 2048, 16, 8, 128, 6144, 151936, true, "qwen3"},
    {"qwen3-4b", 36, 2560, 32, 8, 128, 9728, 151936, true, "qwen3"},
    {"qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936, false, "qwen3"},
};

// Random words and near-normal bf16 values, reused from different offsets for every matrix.
class Pool {
  public:
    explicit Pool() : words_(kPoolValues), values_(kPoolValues) {
        for (size_t i = 0; i < kPoolValues; i += 4) {
            const PhiloxWords w = philox(static_cast<uint32_t>(i), 0, 0, 0, 1234, 0);
            for (size_t j = 0; j < 4; ++j) {
                words_[i + j] = w.word[j];
                // The sum of four uniform bytes: near enough to a normal distribution of
                // variance 1.
                const uint32_t x = w.word[j];
                const auto sum = static_cast<float>(
                    (x & 255) + ((x >> 8) & 255) + ((x >> 16) & 255) + (x >> 24)
                );
                values_[i + j] = (sum - 510.0f) / 147.8f;
            }
        }
    }

    // count bf16 values of standard deviation `scale`, written to device memory.
    void write_bf16(Stream& stream, void* to, int64_t count, float scale) {
        std::vector<bf16> part(
            static_cast<size_t>(std::min<int64_t>(count, static_cast<int64_t>(kPoolValues)))
        );
        for (int64_t done = 0; done < count; done += static_cast<int64_t>(part.size())) {
            const auto n = static_cast<size_t>(
                std::min<int64_t>(count - done, static_cast<int64_t>(part.size()))
            );
            const size_t start = next_offset();
            for (size_t i = 0; i < n; ++i) {
                part[i] = to_bf16(scale * values_[(start + i) % kPoolValues]);
            }
            copy_to_device(stream, static_cast<bf16*>(to) + done, part.data(), n * sizeof(bf16));
            synchronize(stream);
        }
    }

    void write_words(Stream& stream, void* to, int64_t count) {
        for (int64_t done = 0; done < count;) {
            const size_t start = next_offset() % (kPoolValues / 2);
            const auto n = std::min<int64_t>(count - done, static_cast<int64_t>(kPoolValues / 2));
            copy_to_device(
                stream,
                static_cast<uint32_t*>(to) + done,
                words_.data() + start,
                static_cast<size_t>(n) * sizeof(uint32_t)
            );
            done += n;
        }
        synchronize(stream);
    }

  private:
    size_t next_offset() {
        offset_ = (offset_ + 104729) % kPoolValues;
        return offset_;
    }

    std::vector<uint32_t> words_;
    std::vector<float> values_;
    size_t offset_ = 0;
};

struct Builder {
    Stream& stream;
    Model& model;
    Pool pool;
    bool int4;

    QuantizedMatrix matrix(const char* name, int64_t rows, int64_t cols, bool packed, float scale) {
        QuantizedMatrix w;
        w.rows = rows;
        w.cols = cols;
        if (!packed) {
            w.format = WeightFormat::kBF16;
            const Tensor t = model.arena.take(name, DType::kBF16, {rows, cols});
            pool.write_bf16(stream, t.data, rows * cols, scale);
            w.data = t.data;
            return w;
        }
        w.format = WeightFormat::kInt4;
        w.group_size = 32;
        const Tensor words = model.arena.take(name, DType::kI32, {rows, cols / 8});
        pool.write_words(stream, words.data, rows * cols / 8);
        const Tensor scales = model.arena.take(name, DType::kBF16, {rows, cols / 32});
        // Nibbles are uniform over -8..7: standard deviation 4.6.
        const std::vector<bf16> row(static_cast<size_t>(rows * cols / 32), to_bf16(scale / 4.6f));
        copy_to_device(stream, scales.data, row.data(), row.size() * sizeof(bf16));
        w.data = words.data;
        w.scales = scales.as<bf16>();
        return w;
    }

    const float* ones(int64_t count) {
        const Tensor t = model.arena.take("base.norms", DType::kF32, {count});
        const std::vector<float> values(static_cast<size_t>(count), 1.0f);
        copy_to_device(stream, t.data, values.data(), values.size() * sizeof(float));
        synchronize(stream);
        return t.as<float>();
    }

    LinearWeights linear(int64_t layer, const char* leaf, int64_t out, int64_t in) {
        LinearWeights l;
        l.module = fmt::format("model.layers.{}.{}", layer, leaf);
        l.w = matrix("base.linear", out, in, int4, 1.0f / std::sqrt(static_cast<float>(in)));
        l.site = static_cast<int32_t>(model.sites.size());
        model.sites.push_back({l.module, in, out});
        return l;
    }

    LayerWeights layer(int64_t index) {
        const ModelConfig& c = model.config;
        LayerWeights w;
        w.input_norm = ones(c.width);
        w.post_attention_norm = ones(c.width);
        if (c.qk_norm) {
            w.q_norm = ones(c.head_dim);
            w.k_norm = ones(c.head_dim);
        }
        w.q = linear(index, "self_attn.q_proj", c.num_heads * c.head_dim, c.width);
        w.k = linear(index, "self_attn.k_proj", c.num_kv_heads * c.head_dim, c.width);
        w.v = linear(index, "self_attn.v_proj", c.num_kv_heads * c.head_dim, c.width);
        w.o = linear(index, "self_attn.o_proj", c.width, c.num_heads * c.head_dim);
        w.gate = linear(index, "mlp.gate_proj", c.mlp_width, c.width);
        w.up = linear(index, "mlp.up_proj", c.mlp_width, c.width);
        w.down = linear(index, "mlp.down_proj", c.width, c.mlp_width);
        return w;
    }
};

}  // namespace

std::vector<std::string> synthetic_shapes() {
    std::vector<std::string> names;
    for (const Shape& shape : kShapes) {
        names.emplace_back(shape.name);
    }
    return names;
}

ModelConfig synthetic_config(const std::string& name) {
    for (const Shape& shape : kShapes) {
        if (name != shape.name) {
            continue;
        }
        ModelConfig c;
        c.family = shape.family;
        c.width = shape.width;
        c.mlp_width = shape.mlp;
        c.num_layers = shape.layers;
        c.num_heads = shape.heads;
        c.num_kv_heads = shape.kv_heads;
        c.head_dim = shape.head_dim;
        c.vocab_size = shape.vocab;
        c.max_positions = 32768;
        c.rope_theta = 1e6;
        c.tied_embeddings = shape.tied;
        c.qk_norm = c.family == "qwen3";
        return c;
    }
    throw UserError(fmt::format(
        "there is no shape \"{}\"; did you mean \"{}\"?",
        name,
        nearest_name(name, synthetic_shapes())
    ));
}

std::unique_ptr<Model> make_synthetic_model(
    Stream& stream, const std::string& shape, const std::string& format
) {
    USER_CHECK(
        format == "bf16" || format == "int4",
        "the format \"{}\" is unknown; it is bf16 or int4.",
        format
    );
    auto model = std::make_unique<Model>(stream.device);
    model->config = synthetic_config(shape);
    model->name = shape + " (random " + format + ")";
    model->path = shape;
    const ModelConfig& c = model->config;
    model->arena.reserve(static_cast<size_t>(base_bytes(c, [&](const ExpectedWeight& weight) {
        const bool packed = weight.linear && format == "int4";
        return MatrixFormat{packed ? WeightFormat::kInt4 : WeightFormat::kBF16};
    })));
    Builder build{stream, *model, Pool(), format == "int4"};
    model->embedding = build.matrix("base.embedding", c.vocab_size, c.width, false, 1.0f);
    const float head_scale = 1.0f / std::sqrt(static_cast<float>(c.width));
    model->head = c.tied_embeddings
                      ? model->embedding
                      : build.matrix("base.head", c.vocab_size, c.width, false, head_scale);
    for (int64_t layer = 0; layer < c.num_layers; ++layer) {
        model->layers.push_back(build.layer(layer));
    }
    model->final_norm = build.ones(c.width);
    model->rope = make_rope_table(stream, model->arena, c, {});
    return model;
}

}  // namespace orbit
