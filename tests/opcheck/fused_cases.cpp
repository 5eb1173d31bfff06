// Ops in a row, as a layer has them: kernels of a GPU may do a part of the next op in their end, or
// of the one before in their beginning. Which of them do depends on the rows, so the rows of a case
// alone and in batches of every size compare them with the ops one by one.
#include <fmt/core.h>

#include <cmath>

#include "opcheck/cases.h"
#include "opcheck/weights.h"
#include "ops/activation.h"
#include "ops/dense.h"
#include "ops/norm.h"

namespace orbit::opcheck {
namespace {

constexpr int64_t kBlock = 32;
constexpr int64_t kNextOut = 192;  // of each of two layers that read the norm
constexpr float kEps = 1e-5f;

// An MLP, and the norm and first layers of what comes after it.
struct Shape {
    WeightFormat format;
    int64_t rows;
    int64_t width;
    int64_t mlp;
    AdapterKind adapter = AdapterKind::kOft;
};

enum : size_t {
    kX,
    kNorm,
    kGate,  // of each layer data, scales, and of its adapter D or A, and B
    kUp = kGate + 4,
    kDown = kUp + 4,
    kFirst = kDown + 4,
    kSecond = kFirst + 4,
};

constexpr const char* kAdapterNames[] = {"none", "lora", "oft"};
constexpr int64_t kRank = 12;
constexpr float kLoraScale = 0.5f;

using Row = std::vector<double>;

// x W^T.
Row product(const Row& x, const Row& w) {
    Row y(w.size() / x.size());
    for (size_t i = 0; i < w.size(); ++i) {
        y[i / x.size()] += x[i % x.size()] * w[i];
    }
    return y;
}

// x + x D.
Row rotated(const Row& x, const Row& d) {
    const auto b = static_cast<size_t>(kBlock);
    Row y = x;
    for (size_t j = 0; j < x.size(); ++j) {
        for (size_t i = 0; i < b; ++i) {
            y[j] += x[j / b * b + i] * d[(j / b * b + i) * b + j % b];
        }
    }
    return y;
}

// A layer's product with its adapter, but for the roundings.
Row linear_row(AdapterKind adapter, const Row& x, const Values& in, size_t layer) {
    if (adapter == AdapterKind::kOft) {
        return product(rotated(x, in[layer + 2]), in[layer]);
    }
    Row y = product(x, in[layer]);
    if (adapter == AdapterKind::kLora) {
        const Row low_rank = product(product(x, in[layer + 2]), in[layer + 3]);
        for (size_t i = 0; i < y.size(); ++i) {
            y[i] += static_cast<double>(kLoraScale) * low_rank[i];
        }
    }
    return y;
}

Row norm_row(const Row& x, const Row& weight) {
    double squares = 0;
    for (const double v : x) {
        squares += v * v;
    }
    const double mean = squares / static_cast<double>(x.size());
    Row y = x;
    for (size_t i = 0; i < x.size(); ++i) {
        y[i] *= weight[i] / std::sqrt(mean + static_cast<double>(kEps));
    }
    return y;
}

Values reference(const Shape& s, const Values& in) {
    Values out(2);
    const auto width = static_cast<size_t>(s.width);
    for (size_t at = 0; at < in[kX].size(); at += width) {
        const Row x(&in[kX][at], &in[kX][at] + width);
        Row y = linear_row(s.adapter, x, in, kGate);
        const Row up = linear_row(s.adapter, x, in, kUp);
        for (size_t i = 0; i < y.size(); ++i) {
            y[i] *= up[i] / (1 + std::exp(-y[i]));
        }
        Row h = linear_row(s.adapter, y, in, kDown);
        for (size_t i = 0; i < width; ++i) {
            h[i] += x[i];
        }
        const Row normed = norm_row(h, in[kNorm]);
        for (size_t i = 0; i < 2; ++i) {
            const Row z = linear_row(s.adapter, normed, in, i == 0 ? kFirst : kSecond);
            out[i].insert(out[i].end(), z.begin(), z.end());
        }
    }
    return out;
}

void run(
    Stream& stream,
    AdapterKind adapter,
    const std::vector<QuantizedMatrix>& weights,
    const Tensors& in,
    const Tensors& out
) {
    const ScratchScope scope(stream.scratch);
    const Tensor x = in[kX];
    const auto params_of = [&](const Tensor& input, size_t layer) {
        LinearParams p;
        p.x = input;
        p.w = at_tensors(weights[(layer - kGate) / 4], in[layer], in[layer + 1]);
        p.adapter.kind = adapter;
        if (adapter == AdapterKind::kOft) {
            p.adapter.oft_d = in[layer + 2];
        } else if (adapter == AdapterKind::kLora) {
            p.adapter.lora_a = in[layer + 2];
            p.adapter.lora_b = in[layer + 3];
            p.adapter.lora_scale = kLoraScale;
        }
        return p;
    };
    const auto take = [&](int64_t columns) {
        return stream.scratch.take(x.dtype, {x.rows(), columns});
    };
    const std::vector<LinearParams> gate_up{params_of(x, kGate), params_of(x, kUp)};
    const int64_t mlp = gate_up[0].w.rows;
    const Tensors y{take(mlp), take(mlp)};
    const SwigluResult result =
        linear_swiglu(stream, gate_up, y, adapter == AdapterKind::kOft ? in[kDown + 2] : Tensor{});
    if (result == SwigluResult::kGateAndUp) {
        swiglu(stream, y[0], y[1], y[0]);
    }
    LinearParams down = params_of(y[0], kDown);
    if (result == SwigluResult::kRotated) {
        down.adapter = {};
    }
    down.residual = x;
    down.before_rotations = adapter == AdapterKind::kOft;
    const Tensor h = take(x.cols());
    linear(stream, down, h);
    const Tensor normed = take(x.cols());
    rms_norm(stream, h, in[kNorm].as<float>(), kEps, normed);
    linear_group(stream, std::vector{params_of(normed, kFirst), params_of(normed, kSecond)}, out);
    synchronize(stream);
}

void add_case(CaseList& cases, const Shape& s) {
    Random random(cases.size() + 1);
    Case c;
    c.op = "fused_mlp";
    c.name = fmt::format(
        "{} {} {}x{}x{}",
        format_name(s.format),
        kAdapterNames[static_cast<size_t>(s.adapter)],
        s.rows,
        s.width,
        s.mlp
    );
    c.inputs = {
        per_row(input("x", DType::kBF16, {s.rows, s.width}, random.normals(s.rows * s.width))),
        input("norm", DType::kF32, {s.width}, random.normals(s.width)),
    };
    std::vector<QuantizedMatrix> weights;
    const auto add_layer = [&](int64_t columns, int64_t rows) {
        const TestWeight w = make_weight(s.format, rows, columns, random);
        weights.push_back(w.shape);
        c.inputs.push_back(weight_input(w, false));
        c.inputs.push_back(raw_input("scales", w.scales, {}));
        const auto add = [&](const char* name, const std::vector<int64_t>& shape, float scale) {
            int64_t size = 1;
            for (const int64_t n : shape) {
                size *= n;
            }
            c.inputs.push_back(input(name, DType::kBF16, shape, random.normals(size, scale)));
        };
        if (s.adapter == AdapterKind::kLora) {
            add("lora_a", {kRank, columns}, 1.0f / std::sqrt(static_cast<float>(columns)));
            add("lora_b", {rows, kRank}, 0.3f);
        } else {
            add("oft_d", {columns / kBlock, kBlock, kBlock}, 0.1f);
            add("unused", {1}, 1.0f);
        }
    };
    add_layer(s.width, s.mlp);
    add_layer(s.width, s.mlp);
    add_layer(s.mlp, s.width);
    add_layer(s.width, kNextOut);
    add_layer(s.width, kNextOut);
    c.outputs = {
        {"first", DType::kBF16, {s.rows, kNextOut}, true},
        {"second", DType::kBF16, {s.rows, kNextOut}, true},
    };
    c.run = [adapter = s.adapter, weights](Stream& stream, const Tensors& in, const Tensors& out) {
        run(stream, adapter, weights, in, out);
    };
    c.reference = [s](const Values& in) { return reference(s, in); };
    c.forward_tolerance = 3e-2;
    c.gpu_only = true;
    cases.push_back(std::move(c));
}

}  // namespace

void add_fused_cases(CaseList& cases) {
    for (const Shape& s :
         {Shape{WeightFormat::kInt4, 70, 256, 2048},
          Shape{WeightFormat::kInt4, 33, 512, 1056},
          Shape{WeightFormat::kInt4, 21, 1280, 768},
          Shape{WeightFormat::kInt4, 6, 256, 768},
          Shape{WeightFormat::kBF16, 6, 512, 2048},
          Shape{WeightFormat::kBF16, 70, 256, 2048},
          Shape{WeightFormat::kBF16, 40, 768, 416},
          Shape{WeightFormat::kInt4, 6, 256, 768, AdapterKind::kNone},
          Shape{WeightFormat::kInt4, 6, 2048, 8192, AdapterKind::kLora},
          Shape{WeightFormat::kInt4, 40, 4608, 768, AdapterKind::kLora},
          Shape{WeightFormat::kBF16, 6, 2048, 448, AdapterKind::kNone},
          Shape{WeightFormat::kBF16, 6, 320, 2048, AdapterKind::kLora},
          Shape{WeightFormat::kNvFp4, 6, 768, 512, AdapterKind::kLora},
          Shape{WeightFormat::kFp8, 6, 512, 384, AdapterKind::kNone}}) {
        add_case(cases, s);
    }
}

}  // namespace orbit::opcheck
