// linear_group_backward: several layers on one x, whose d(x) is one sum. The gradients are outputs
// here, for the reference is too slow at the sizes that bring in the GPU's kernels to be
// differentiated.
#include <fmt/core.h>

#include "opcheck/cases.h"
#include "opcheck/weights.h"
#include "ops/dense.h"

namespace orbit::opcheck {
namespace {

struct Group {
    int64_t rows = 0;
    int64_t in = 0;
    std::vector<int64_t> outs;  // of each layer
    AdapterKind adapter = AdapterKind::kNone;
    int64_t adapter_size = 0;  // rank or block size
    bool accumulates = false;  // d(x) holds something
    WeightFormat format = WeightFormat::kBF16;
    DType compute = DType::kBF16;
    size_t plain = 0;  // so many layers, the first, have no adapter

    AdapterKind adapter_of(size_t layer) const {
        return layer < plain ? AdapterKind::kNone : adapter;
    }
};

constexpr float kLoraScale = 0.5f;

// Places of the inputs: x and what d(x) holds before, then those of each layer.
enum : size_t { kX, kBefore, kFirstLayer };

enum : size_t { kDy, kData, kScales, kFirst, kSecond, kLayerInputs };

size_t place(size_t layer, size_t input) {
    return kFirstLayer + layer * kLayerInputs + input;
}

using Flat = std::vector<double>;

// c[m, n] += scale a[m, k] b[k, n].
void add_product(const Flat& a, const Flat& b, int64_t k, double scale, Flat& c) {
    const auto depth = static_cast<size_t>(k);
    const size_t rows = a.size() / depth;
    const size_t width = b.size() / depth;
    for (size_t i = 0; i < rows; ++i) {
        for (size_t j = 0; j < depth; ++j) {
            const double value = scale * a[i * depth + j];
            for (size_t o = 0; o < width; ++o) {
                c[i * width + o] += value * b[j * width + o];
            }
        }
    }
}

Flat transposed(const Flat& a, int64_t cols) {
    const auto width = static_cast<size_t>(cols);
    const size_t rows = a.size() / width;
    Flat t(a.size());
    for (size_t i = 0; i < rows; ++i) {
        for (size_t j = 0; j < width; ++j) {
            t[j * rows + i] = a[i * width + j];
        }
    }
    return t;
}

// Through the rotation x + x D of `g`, the gradient of its result: to dx, and dD.
void add_rotation(const Flat& x, const Flat& d, const Flat& g, const Group& s, Flat& dx, Flat& dd) {
    const auto b = static_cast<size_t>(s.adapter_size);
    const auto in = static_cast<size_t>(s.in);
    for (size_t t = 0; t < static_cast<size_t>(s.rows); ++t) {
        for (size_t i = 0; i < in; ++i) {
            dx[t * in + i] += g[t * in + i];
            for (size_t j = 0; j < b; ++j) {
                const size_t other = t * in + i / b * b + j;
                dx[t * in + i] += g[other] * d[i * b + j];
                dd[i * b + j] += x[t * in + i] * g[other];
            }
        }
    }
}

Flat zeros(int64_t count) {
    return Flat(static_cast<size_t>(count));
}

Values reference(const Group& s, const Values& in) {
    Flat dx = s.accumulates ? in[kBefore] : zeros(s.rows * s.in);
    Values all;
    for (size_t i = 0; i < s.outs.size(); ++i) {
        const int64_t out = s.outs[i];
        const Flat& dy = in[place(i, kDy)];
        const Flat& first = in[place(i, kFirst)];
        Flat through_base = zeros(s.rows * s.in);
        add_product(dy, in[place(i, kData)], out, 1.0, through_base);
        Flat d_first = zeros(static_cast<int64_t>(first.size()));
        Flat d_second = zeros(static_cast<int64_t>(in[place(i, kSecond)].size()));
        if (s.adapter_of(i) == AdapterKind::kOft) {
            add_rotation(in[kX], first, through_base, s, dx, d_first);
        } else {
            for (size_t at = 0; at < dx.size(); ++at) {
                dx[at] += through_base[at];
            }
        }
        if (s.adapter_of(i) == AdapterKind::kLora) {
            const auto scale = static_cast<double>(kLoraScale);
            Flat du = zeros(s.rows * s.adapter_size);
            add_product(dy, in[place(i, kSecond)], out, scale, du);
            add_product(du, first, s.adapter_size, 1.0, dx);
            add_product(transposed(du, s.adapter_size), in[kX], s.rows, 1.0, d_first);
            Flat u = zeros(s.rows * s.adapter_size);
            add_product(in[kX], transposed(first, s.in), s.in, 1.0, u);
            add_product(transposed(dy, out), u, s.rows, scale, d_second);
        }
        all.push_back(d_first);
        all.push_back(d_second);
    }
    all.insert(all.begin(), dx);
    return all;
}

AdapterView adapter_of(const Group& s, const Tensors& in, size_t layer) {
    AdapterView view;
    view.kind = s.adapter_of(layer);
    if (view.kind == AdapterKind::kLora) {
        view.lora_a = in[place(layer, kFirst)];
        view.lora_b = in[place(layer, kSecond)];
        view.lora_scale = kLoraScale;
    } else if (view.kind == AdapterKind::kOft) {
        view.oft_d = in[place(layer, kFirst)];
    }
    return view;
}

void run(
    const Group& s,
    const std::vector<QuantizedMatrix>& weights,
    Stream& stream,
    const Tensors& in,
    const Tensors& out
) {
    if (s.accumulates) {
        const auto bytes = static_cast<size_t>(out[0].bytes());
        copy_on_device(stream, out[0].data, in[kBefore].data, bytes);
    }
    std::vector<LinearParams> params;
    std::vector<AdapterGrad> grads;
    Tensors dy;
    for (size_t i = 0; i < weights.size(); ++i) {
        const Tensor& d_first = out[1 + 2 * i];
        const Tensor& d_second = out[2 + 2 * i];
        zero_fill(stream, d_first.data, static_cast<size_t>(d_first.bytes()));
        zero_fill(stream, d_second.data, static_cast<size_t>(d_second.bytes()));
        LinearParams p;
        p.x = in[kX];
        p.w = at_tensors(weights[i], in[place(i, kData)], in[place(i, kScales)]);
        p.adapter = adapter_of(s, in, i);
        params.push_back(p);
        dy.push_back(in[place(i, kDy)]);
        AdapterGrad grad;
        if (p.adapter.kind == AdapterKind::kLora) {
            grad.lora_a = d_first.as<float>();
            grad.lora_b = d_second.as<float>();
        } else if (p.adapter.kind == AdapterKind::kOft) {
            grad.oft_d = d_first.as<float>();
        }
        grads.push_back(grad);
    }
    linear_group_backward(stream, params, dy, out[0], s.accumulates, grads);
}

std::string name_of(const Group& s) {
    std::string name = fmt::format("{}x{}", s.rows, s.in);
    for (const int64_t out : s.outs) {
        name += fmt::format(" {}", out);
    }
    if (s.adapter == AdapterKind::kLora) {
        name += fmt::format(" lora r{}", s.adapter_size);
    } else if (s.adapter == AdapterKind::kOft) {
        name += fmt::format(" oft b{}", s.adapter_size);
    }
    name += s.plain > 0 ? fmt::format(" but {}", s.plain) : "";
    name += s.accumulates ? " added" : "";
    name += s.format == WeightFormat::kInt4 ? " int4" : "";
    return name + (s.compute == DType::kF32 ? " (f32)" : "");
}

Case group_case(const Group& s) {
    Random random(7);
    Case c;
    c.op = "linear_group_dx";
    c.name = name_of(s);
    const auto values = [&](const char* name, std::vector<int64_t> shape, float scale) {
        return input(name, s.compute, shape, random.normals(shape[0] * shape[1], scale));
    };
    c.inputs = {values("x", {s.rows, s.in}, 1.0f), values("before", {s.rows, s.in}, 1.0f)};
    c.outputs = {{"dx", s.compute, {s.rows, s.in}, false}};
    std::vector<QuantizedMatrix> weights;
    for (const int64_t out : s.outs) {
        const TestWeight w = make_weight(s.format, out, s.in, random);
        weights.push_back(w.shape);
        const int64_t n = std::max<int64_t>(1, s.adapter_size);
        const bool oft = s.adapter == AdapterKind::kOft;
        c.inputs.push_back(values("dy", {s.rows, out}, 1.0f));
        c.inputs.push_back(weight_input(w, s.compute == DType::kF32));
        c.inputs.push_back(raw_input("scales", w.scales, {}));
        Input first = values("first", {n, s.in}, 0.2f);  // A, or as many values of D
        if (oft) {
            first.shape = {s.in / n, n, n};
        }
        c.outputs.push_back({"d first", DType::kF32, first.shape, false});
        c.outputs.push_back({"d second", DType::kF32, {out, n}, false});
        c.inputs.push_back(std::move(first));
        c.inputs.push_back(values("second", {out, n}, 0.2f));
    }
    c.run = [s, weights](Stream& stream, const Tensors& in, const Tensors& out) {
        run(s, weights, stream, in, out);
    };
    c.reference = [s](const Values& in) { return reference(s, in); };
    c.forward_tolerance = s.compute == DType::kF32 ? 1e-5 : 2e-2;
    return c;
}

}  // namespace

void add_linear_group_cases(CaseList& cases) {
    const auto add = [&](const Group& s, bool gpu_only) {
        Case c;
        c.op = "linear_group_dx";
        c.gpu_only = gpu_only;
        c.name = name_of(s);
        c.prepare = [s, gpu_only](Case& self) {
            self = group_case(s);
            self.gpu_only = gpu_only;
        };
        cases.push_back(std::move(c));
    };
    for (const DType compute : {DType::kBF16, DType::kF32}) {
        const auto add_small = [&](Group s) {
            s.compute = compute;
            add(s, false);
        };
        add_small({40, 96, {64, 48, 32}, AdapterKind::kLora, 8, true});
        add_small({70, 96, {64, 200}, AdapterKind::kLora, 20, false, WeightFormat::kInt4});
        add_small({19, 27, {7, 33}, AdapterKind::kLora, 3, true});  // not in eights
        add_small({40, 96, {64, 48}, AdapterKind::kOft, 32, true});
        add_small({40, 96, {64, 48, 32}});
        for (const AdapterKind kind : {AdapterKind::kLora, AdapterKind::kOft}) {
            Group mixed{40, 96, {64, 48, 32}, kind, 16, true};
            mixed.plain = 2;
            add_small(mixed);
        }
    }
    // One product for all layers: more tiles than multiprocessors, several stages of ranks, a
    // contraction in one piece and in several, edges in every direction.
    add({1100, 1088, {304, 264, 256}, AdapterKind::kLora, 16, true}, true);
    add({4100, 1160, {264, 256}, AdapterKind::kLora, 40, false}, true);
    add({1030, 1032, {4160, 4104}, AdapterKind::kLora, 16, false}, true);
    add({1100, 1088, {304, 272}, AdapterKind::kNone, 0, true}, true);
    add({1100, 1088, {264, 256, 312}, AdapterKind::kLora, 4, false}, true);
    add({1100, 1088, {264, 256}, AdapterKind::kLora, 72, false}, true);  // one after the other
    add({1100, 1088, {256, 288}, AdapterKind::kLora, 16, true, WeightFormat::kInt4}, true);
    Group mixed{1100, 1088, {264, 256}, AdapterKind::kLora, 16, true};
    mixed.plain = 1;
    add(mixed, true);
    add({600, 256, {8200, 4104}, AdapterKind::kLora, 16, false}, true);  // wide ranges of columns
}

}  // namespace orbit::opcheck
