#include "model/synthetic.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/philox.h"
#include "model/base_bytes.h"
#include "model/rope_table.h"
#include "quant/place.h"

namespace orbit {
namespace {

constexpr size_t kPoolValues = size_t{1} << 22;

struct Shape {
    const char* name;
    int64_t layers, width, heads, kv_heads, head_dim, mlp, vocab;
    bool tied;
    const char* family;
    int64_t experts = 0, selected = 0, expert_width = 0;
};

// models.md 2 to 4.
constexpr Shape kShapes[] = {
    {"smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, true, "llama"},
    {"qwen3-0.6b", 28, 1024, 16, 8, 128, 3072, 151936, true, "qwen3"},
    {"qwen3-1.7b", 28, 2048, 16, 8, 128, 6144, 151936, true, "qwen3"},
    {"qwen3-4b", 36, 2560, 32, 8, 128, 9728, 151936, true, "qwen3"},
    {"qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936, false, "qwen3"},
    {"qwen3-30b-a3b", 48, 2048, 32, 4, 128, 6144, 151936, false, "qwen3_moe", 128, 8, 768},
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

    // bf16 values of standard deviation `scale`.
    void draw(std::vector<bf16>& values, float scale) {
        const size_t start = next_offset();
        for (size_t i = 0; i < values.size(); ++i) {
            values[i] = to_bf16(scale * values_[(start + i) % kPoolValues]);
        }
    }

    // Random bits, each word and'ed with `mask`.
    void draw(std::vector<uint32_t>& words, uint32_t mask) {
        const size_t start = next_offset();
        for (size_t i = 0; i < words.size(); ++i) {
            words[i] = words_[(start + i) % kPoolValues] & mask;
        }
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

// A random matrix in host memory.
class HostMatrix {
  public:
    HostMatrix(Pool& pool, WeightFormat format, int64_t rows, int64_t cols, float scale) {
        w_.format = format;
        w_.rows = rows;
        w_.cols = cols;
        if (format == WeightFormat::kBF16) {
            values_.resize(static_cast<size_t>(rows * cols));
            pool.draw(values_, scale);
            w_.data = values_.data();
            return;
        }
        // E4M3 codes without the exponent's highest bit: none is NaN.
        const uint32_t mask = format == WeightFormat::kFp8 ? 0xbfbfbfbfu : ~0u;
        words_.resize(static_cast<size_t>(rows * row_bytes(format, cols) / 4));
        pool.draw(words_, mask);
        if (format == WeightFormat::kInt4) {
            // Code 0 stands for -8, the others are even about 8: without it the mean is 0, and
            // tokens do not all come to look alike (and choose the same experts).
            for (uint32_t& word : words_) {
                const uint32_t zeros = ~(word | word >> 1 | word >> 2 | word >> 3) & 0x11111111u;
                word |= zeros << 3;
            }
        }
        w_.data = words_.data();
        set_scales(scale);
    }

    HostMatrix(HostMatrix&&) = default;
    HostMatrix(const HostMatrix&) = delete;
    HostMatrix& operator=(const HostMatrix&) = delete;

    const QuantizedMatrix& matrix() const { return w_; }

  private:
    // Such that the values have standard deviation `scale`; of the codes it is 4.6, 0.62 and 2.9.
    void set_scales(float scale) {
        const auto count = static_cast<size_t>(w_.scale_bytes());
        switch (w_.format) {
            case WeightFormat::kInt4:
                values_.assign(count / sizeof(bf16), to_bf16(scale / 4.6f));
                w_.scales = values_.data();
                return;
            case WeightFormat::kFp8:
                scales_.assign(count / sizeof(float), scale / 0.62f);
                w_.block_scales = scales_.data();
                return;
            case WeightFormat::kMxFp4:
                codes_.assign(count, static_cast<uint8_t>(127 + std::ilogb(scale / 2.9f)));
                break;
            default: {
                constexpr uint8_t kOne = 0x38;
                CHECK(w_.format == WeightFormat::kNvFp4);
                codes_.assign(count, kOne);
                w_.global_scale = 2.9f / scale;
                w_.global_divides = true;
                break;
            }
        }
        w_.block_scales = codes_.data();
    }

    QuantizedMatrix w_;
    std::vector<bf16> values_;
    std::vector<uint32_t> words_;
    std::vector<float> scales_;
    std::vector<uint8_t> codes_;
};

struct Builder {
    Stream& stream;
    Model& model;
    Pool pool;
    WeightFormat format;  // of linears
    int64_t host_layers;

    QuantizedMatrix plain(const char* name, int64_t rows, int64_t cols, float scale) {
        const HostMatrix host(pool, WeightFormat::kBF16, rows, cols, scale);
        return place_weight(stream, model.arena, name, host.matrix());
    }

    int32_t add_site(const std::string& module, int64_t out, int64_t in) {
        model.sites.push_back({module, in, out});
        return static_cast<int32_t>(model.sites.size()) - 1;
    }

    const float* ones(int64_t count) {
        const Tensor t = model.arena.take("base.norms", DType::kF32, {count});
        const std::vector<float> values(static_cast<size_t>(count), 1.0f);
        copy_to_device(stream, t.data, values.data(), values.size() * sizeof(float));
        synchronize(stream);
        return t.as<float>();
    }

    HostMatrix drawn(int64_t out, int64_t in) {
        return HostMatrix(pool, format, out, in, 1.0f / std::sqrt(static_cast<float>(in)));
    }

    LinearWeights linear(int64_t layer, const char* leaf, int64_t out, int64_t in) {
        LinearWeights l;
        l.module = fmt::format("model.layers.{}.{}", layer, leaf);
        l.w = place_weight(stream, model.arena, "base.linear", drawn(out, in).matrix());
        l.site = add_site(l.module, out, in);
        return l;
    }

    // The experts of a layer have equal weights at different places.
    MoeWeights experts(int64_t layer) {
        const ModelConfig& c = model.config;
        MoeWeights moe;
        moe.index = static_cast<int32_t>(layer);
        moe.on_host = c.on_host(layer, host_layers);
        Arena& arena = moe.on_host ? model.host : model.arena;
        const float router_scale = 1.0f / std::sqrt(static_cast<float>(c.width));
        moe.router = plain("base.router", c.num_experts, c.width, router_scale);

        struct Part {
            const char* leaf;
            ExpertWeights* to;
            HostMatrix host;
            MatrixStack stack;
        };

        const auto part = [&](const char* leaf, ExpertWeights& to, int64_t out, int64_t in) {
            return Part{leaf, &to, drawn(out, in), {arena, "base.experts", c.num_experts}};
        };
        Part parts[] = {
            part("gate_proj", moe.gate, c.expert_width, c.width),
            part("up_proj", moe.up, c.expert_width, c.width),
            part("down_proj", moe.down, c.width, c.expert_width)};
        for (int64_t e = 0; e < c.num_experts; ++e) {
            for (Part& p : parts) {
                p.to->w.push_back(p.stack.add(stream, p.host.matrix()));
                p.to->sites.push_back(add_site(
                    fmt::format("model.layers.{}.mlp.experts.{}.{}", layer, e, p.leaf),
                    p.to->w.back().rows,
                    p.to->w.back().cols
                ));
            }
        }
        return moe;
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
        if (c.layer_has_experts(index)) {
            w.moe = experts(index);
            return w;
        }
        w.gate = linear(index, "mlp.gate_proj", c.mlp_width, c.width);
        w.up = linear(index, "mlp.up_proj", c.mlp_width, c.width);
        w.down = linear(index, "mlp.down_proj", c.width, c.mlp_width);
        return w;
    }
};

WeightFormat synthetic_format(const std::string& name) {
    constexpr std::pair<const char*, WeightFormat> kFormats[] = {
        {"bf16", WeightFormat::kBF16},
        {"int4", WeightFormat::kInt4},
        {"fp8", WeightFormat::kFp8},
        {"mxfp4", WeightFormat::kMxFp4},
        {"nvfp4", WeightFormat::kNvFp4},
    };
    for (const auto& [known, format] : kFormats) {
        if (name == known) {
            return format;
        }
    }
    throw UserError(
        fmt::format("the format \"{}\" is unknown; it is bf16, int4, fp8, mxfp4 or nvfp4.", name)
    );
}

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
        c.qk_norm = c.family != "llama";
        c.num_experts = shape.experts;
        c.experts_per_token = shape.selected;
        c.expert_width = shape.expert_width;
        return c;
    }
    throw UserError(fmt::format(
        "there is no shape \"{}\"; it is one of {}.", name, fmt::join(synthetic_shapes(), ", ")
    ));
}

std::unique_ptr<Model> make_synthetic_model(
    Stream& stream, const std::string& shape, const std::string& format, int64_t host_layers
) {
    const WeightFormat weights = synthetic_format(format);
    auto model = std::make_unique<Model>(stream.device);
    model->config = synthetic_config(shape);
    model->name = shape + " (random " + format + ")";
    model->path = shape;
    const ModelConfig& c = model->config;
    const auto format_of = [&](const ExpectedWeight& weight) {
        return MatrixFormat{weight.linear ? weights : WeightFormat::kBF16};
    };
    reserve_base(*model, format_of, host_layers);
    Builder build{stream, *model, Pool(), weights, host_layers};
    model->embedding = build.plain("base.embedding", c.vocab_size, c.width, 1.0f);
    const float head_scale = 1.0f / std::sqrt(static_cast<float>(c.width));
    model->head = c.tied_embeddings ? model->embedding
                                    : build.plain("base.head", c.vocab_size, c.width, head_scale);
    for (int64_t layer = 0; layer < c.num_layers; ++layer) {
        model->layers.push_back(build.layer(layer));
    }
    model->final_norm = build.ones(c.width);
    model->rope = make_rope_table(stream, model->arena, c, {});
    return model;
}

}  // namespace orbit
