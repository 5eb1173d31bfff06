// The whole mixture: route, dispatch, grouped linear of gate, up and down, swiglu, combine, and
// back. One case covers what the ops promise each other: order of rows, of experts, of sums.
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "base/hash.h"
#include "opcheck/cases.h"
#include "opcheck/weights.h"
#include "ops/activation.h"
#include "ops/moe.h"

namespace orbit::opcheck {
namespace {

constexpr WeightFormat kFormats[] = {
    WeightFormat::kBF16,
    WeightFormat::kInt4,
    WeightFormat::kFp8,
    WeightFormat::kMxFp4,
    WeightFormat::kNvFp4};

// Where the router sends the tokens: by chance; 1 to expert 1, 17 to expert 2 and the rest to
// expert 3, none to the others; all to expert 2.
enum class Spread : uint8_t { kEven, kUneven, kOneExpert };

struct Shape {
    WeightFormat format = WeightFormat::kBF16;
    int64_t tokens = 0;
    int64_t width = 0;
    int64_t expert_width = 0;
    int64_t experts = 0;
    int64_t selected = 0;
    bool normalize = true;
    AdapterKind adapter = AdapterKind::kNone;
    int64_t adapter_size = 0;  // rank or block size
    DType compute = DType::kBF16;
    int64_t dequant_bytes = 0;  // > 0: experts are decoded first
    Spread spread = Spread::kEven;
};

enum Projection : size_t { kGate, kUp, kDown, kProjections };

// Places of the inputs: after the router, data and scales of each projection, then the two parts
// of each projection's adapters.
constexpr size_t kX = 0;
constexpr size_t kResidual = 1;
constexpr size_t kRouter = 2;

constexpr size_t data_at(size_t projection) {
    return 3 + 2 * projection;
}

constexpr size_t adapter_at(size_t projection) {
    return 3 + 2 * kProjections + 2 * projection;
}

constexpr float kLoraScale = 0.5f;

int64_t in_of(const Shape& s, size_t projection) {
    return projection == kDown ? s.expert_width : s.width;
}

int64_t out_of(const Shape& s, size_t projection) {
    return projection == kDown ? s.width : s.expert_width;
}

// E matrices of one projection, one after the other.
struct Experts {
    std::vector<QuantizedMatrix> shapes;
    std::vector<size_t> data_offsets;
    std::vector<size_t> scale_offsets;
    TestWeight all;
};

Experts make_experts(const Shape& s, size_t projection, Random& random) {
    Experts experts;
    const auto append = [](auto& to, const auto& from) {
        to.insert(to.end(), from.begin(), from.end());
    };
    for (int64_t e = 0; e < s.experts; ++e) {
        const TestWeight w =
            make_weight(s.format, out_of(s, projection), in_of(s, projection), random);
        experts.shapes.push_back(w.shape);
        experts.data_offsets.push_back(experts.all.data.size());
        experts.scale_offsets.push_back(experts.all.scales.size());
        append(experts.all.data, w.data);
        append(experts.all.scales, w.scales);
        append(experts.all.bf16_values, w.bf16_values);
        append(experts.all.exact_values, w.exact_values);
    }
    experts.all.shape = experts.shapes[0];  // what all of them have in common
    return experts;
}

Tensor shifted(const Tensor& t, size_t bytes) {
    Tensor moved = t;
    moved.data = static_cast<char*>(t.data) + bytes;
    return moved;
}

struct Block {
    Shape shape;
    Experts projections[kProjections];

    std::vector<QuantizedMatrix> weights(size_t projection, const Tensors& in) const {
        const Experts& experts = projections[projection];
        std::vector<QuantizedMatrix> list;
        for (size_t e = 0; e < experts.shapes.size(); ++e) {
            list.push_back(at_tensors(
                experts.shapes[e],
                shifted(in[data_at(projection)], experts.data_offsets[e]),
                shifted(in[data_at(projection) + 1], experts.scale_offsets[e])
            ));
        }
        return list;
    }

    // Part `e` of a tensor that holds one equal part per expert.
    static Tensor part(const Tensor& t, int64_t e, int64_t experts, std::vector<int64_t> shape) {
        Tensor one = shifted(t, static_cast<size_t>(t.bytes() / experts * e));
        one.rank = 0;
        for (const int64_t dim : shape) {
            one.shape[static_cast<size_t>(one.rank++)] = dim;
        }
        return one;
    }

    std::vector<AdapterView> adapters(size_t projection, const Tensors& in) const {
        std::vector<AdapterView> views;
        if (shape.adapter == AdapterKind::kNone) {
            return views;
        }
        const int64_t n = shape.adapter_size;
        const int64_t width = in_of(shape, projection);
        const Tensor& first = in[adapter_at(projection)];
        for (int64_t e = 0; e < shape.experts; ++e) {
            AdapterView view;
            view.kind = shape.adapter;
            view.lora_scale = kLoraScale;
            if (shape.adapter == AdapterKind::kLora) {
                const Tensor& second = in[adapter_at(projection) + 1];
                view.lora_a = part(first, e, shape.experts, {n, width});
                view.lora_b = part(second, e, shape.experts, {out_of(shape, projection), n});
            } else {
                view.oft_d = part(first, e, shape.experts, {width / n, n, n});
            }
            views.push_back(view);
        }
        return views;
    }

    std::vector<AdapterGrad> grads(size_t projection, const Tensors& d_in) const {
        std::vector<AdapterGrad> list;
        if (shape.adapter == AdapterKind::kNone) {
            return list;
        }
        const bool lora = shape.adapter == AdapterKind::kLora;
        const Tensor& first = d_in[adapter_at(projection)];
        for (int64_t e = 0; e < shape.experts; ++e) {
            AdapterGrad grad;
            float* at = first.as<float>() + first.numel() / shape.experts * e;
            (lora ? grad.lora_a : grad.oft_d) = at;
            if (lora) {
                const Tensor& second = d_in[adapter_at(projection) + 1];
                grad.lora_b = second.as<float>() + second.numel() / shape.experts * e;
            }
            list.push_back(grad);
        }
        return list;
    }
};

// What forward leaves for backward.
struct Activations {
    RouterParams router;
    Routing routing;
    Tensor rows, gate, up, hidden, out;
    std::optional<DequantBuffer> dequant;

    DequantBuffer* buffer() { return dequant ? &*dequant : nullptr; }
};

Tensor scratch(Stream& stream, const Shape& s, int64_t rows, int64_t cols) {
    return stream.scratch.take(s.compute, {rows, cols});
}

Activations routed(const Shape& s, Stream& stream, const Tensors& in) {
    Activations a;
    a.router.x = in[kX];
    a.router.weight.rows = s.experts;
    a.router.weight.cols = s.width;
    a.router.weight.data = in[kRouter].data;
    a.router.num_selected = static_cast<int32_t>(s.selected);
    a.router.normalize = s.normalize;
    a.routing = make_routing(stream, in[kX].rows(), s.experts, s.selected);
    route(stream, a.router, a.routing);
    return a;
}

Activations forward(const Block& block, Stream& stream, const Tensors& in, const Tensor& y) {
    const Shape& s = block.shape;
    const int64_t rows = in[kX].rows() * s.selected;
    Activations a = routed(s, stream, in);
    if (s.dequant_bytes > 0) {
        a.dequant.emplace(stream, s.dequant_bytes);
    }
    a.rows = scratch(stream, s, rows, s.width);
    dispatch_rows(stream, a.routing, in[kX], a.rows);
    const auto project = [&](std::initializer_list<Projection> projections, const Tensor& x) {
        std::vector<std::vector<QuantizedMatrix>> weights;
        std::vector<std::vector<AdapterView>> adapters;
        std::vector<GroupedLinearParams> params;
        std::vector<Tensor> out;
        for (const Projection projection : projections) {
            weights.push_back(block.weights(projection, in));
            adapters.push_back(block.adapters(projection, in));
            out.push_back(scratch(stream, s, rows, out_of(s, projection)));
        }
        for (size_t i = 0; i < out.size(); ++i) {
            params.push_back({x, weights[i], adapters[i], a.routing.offsets, a.buffer()});
        }
        grouped_linear_group(stream, params, out);
        return out;
    };
    const std::vector<Tensor> gate_up = project({kGate, kUp}, a.rows);
    a.gate = gate_up[0];
    a.up = gate_up[1];
    a.hidden = scratch(stream, s, rows, s.expert_width);
    swiglu(stream, a.gate, a.up, a.hidden);
    a.out = project({kDown}, a.hidden)[0];
    combine_rows(stream, a.routing, a.out, in[kResidual], y);
    return a;
}

void backward(
    const Block& block, Stream& stream, const Tensors& in, const Tensor& dy, const Tensors& d_in
) {
    const Shape& s = block.shape;
    const ScratchScope scope(stream.scratch);
    const Tensor y = scratch(stream, s, in[kX].rows(), s.width);
    Activations a = forward(block, stream, in, y);
    const auto like = [&](const Tensor& t) { return scratch(stream, s, t.rows(), t.cols()); };
    const Tensor d_out = like(a.out);
    const Tensor d_weight = stream.scratch.take(DType::kF32, {in[kX].rows(), s.selected});
    combine_rows_backward(stream, a.routing, a.out, dy, d_out, d_weight.as<float>());
    const auto project_back = [&](Projection projection,
                                  const Tensor& x,
                                  const Tensor& d_projected,
                                  const Tensor& dx,
                                  bool accumulate) {
        const auto weights = block.weights(projection, in);
        const auto adapters = block.adapters(projection, in);
        const auto grads = block.grads(projection, d_in);
        const GroupedLinearParams p{x, weights, adapters, a.routing.offsets, a.buffer()};
        grouped_linear_backward(stream, p, d_projected, dx, accumulate, grads);
    };
    const Tensor d_hidden = like(a.hidden);
    project_back(kDown, a.hidden, d_out, d_hidden, false);
    const Tensor d_gate = like(a.gate);
    const Tensor d_up = like(a.up);
    swiglu_backward(stream, a.gate, a.up, d_hidden, d_gate, d_up);
    const Tensor d_rows = like(a.rows);
    project_back(kUp, a.rows, d_up, d_rows, false);
    project_back(kGate, a.rows, d_gate, d_rows, true);
    dispatch_rows_backward(stream, a.routing, d_rows, d_in[kX], false);
    route_backward(stream, a.router, a.routing, d_weight.as<float>(), d_in[kX]);
    synchronize(stream);
}

// One row through expert e of a projection, in double.
std::vector<double> project(
    const Shape& s,
    size_t projection,
    int64_t expert,
    const std::vector<double>& x,
    const Values& in
) {
    const auto width = static_cast<size_t>(in_of(s, projection));
    const auto out = static_cast<size_t>(out_of(s, projection));
    const auto e = static_cast<size_t>(expert);
    const auto n = static_cast<size_t>(s.adapter_size);
    std::vector<double> rotated = x;
    if (s.adapter == AdapterKind::kOft) {
        const double* d = in[adapter_at(projection)].data() + e * width * n;
        for (size_t j = 0; j < width; ++j) {
            for (size_t i = 0; i < n; ++i) {
                rotated[j] += x[j / n * n + i] * d[(j / n * n + i) * n + j % n];
            }
        }
    }
    const double* w = in[data_at(projection)].data() + e * width * out;
    std::vector<double> y(out);
    for (size_t o = 0; o < out; ++o) {
        for (size_t k = 0; k < width; ++k) {
            y[o] += rotated[k] * w[o * width + k];
        }
    }
    if (s.adapter == AdapterKind::kLora) {
        const double* a = in[adapter_at(projection)].data() + e * n * width;
        const double* b = in[adapter_at(projection) + 1].data() + e * n * out;
        for (size_t r = 0; r < n; ++r) {
            double u = 0;
            for (size_t k = 0; k < width; ++k) {
                u += x[k] * a[r * width + k];
            }
            for (size_t o = 0; o < out; ++o) {
                y[o] += static_cast<double>(kLoraScale) * u * b[o * n + r];
            }
        }
    }
    return y;
}

// Softmax over all experts, and the chosen ones in ascending order with their weights.
std::vector<std::pair<int64_t, double>> choose(
    const Shape& s, const std::vector<double>& x, const Values& in
) {
    std::vector<double> score(static_cast<size_t>(s.experts));
    double total = 0;
    for (size_t e = 0; e < score.size(); ++e) {
        for (size_t k = 0; k < x.size(); ++k) {
            score[e] += x[k] * in[kRouter][e * x.size() + k];
        }
        score[e] = std::exp(score[e]);
        total += score[e];
    }
    std::vector<int64_t> order(score.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return score[static_cast<size_t>(a)] > score[static_cast<size_t>(b)];
    });
    order.resize(static_cast<size_t>(s.selected));
    std::sort(order.begin(), order.end());
    double chosen = 0;
    for (const int64_t e : order) {
        chosen += score[static_cast<size_t>(e)];
    }
    std::vector<std::pair<int64_t, double>> list;
    for (const int64_t e : order) {
        list.emplace_back(e, score[static_cast<size_t>(e)] / (s.normalize ? chosen : total));
    }
    return list;
}

Values reference(const Shape& s, const Values& in) {
    const auto width = static_cast<size_t>(s.width);
    std::vector<double> y = in[kResidual];
    for (size_t t = 0; t < static_cast<size_t>(s.tokens); ++t) {
        const auto first = in[kX].begin() + static_cast<std::ptrdiff_t>(t * width);
        const std::vector<double> x(first, first + static_cast<std::ptrdiff_t>(width));
        for (const auto& [expert, weight] : choose(s, x, in)) {
            const auto gate = project(s, kGate, expert, x, in);
            auto hidden = project(s, kUp, expert, x, in);
            for (size_t i = 0; i < hidden.size(); ++i) {
                hidden[i] *= gate[i] / (1 + std::exp(-gate[i]));
            }
            const auto out = project(s, kDown, expert, hidden, in);
            for (size_t d = 0; d < width; ++d) {
                y[t * width + d] += weight * out[d];
            }
        }
    }
    return {y};
}

// The first E values of a token and the diagonal of the router's first E columns decide, where the
// spread is not by chance.
void steer(const Shape& s, std::vector<float>& x, std::vector<float>& router) {
    if (s.spread == Spread::kEven) {
        return;
    }
    for (int64_t e = 0; e < s.experts; ++e) {
        router[static_cast<size_t>(e * s.width + e)] = 1.0f;
    }
    for (int64_t t = 0; t < s.tokens; ++t) {
        const bool all = s.spread == Spread::kOneExpert;
        const int64_t expert = all ? 2 : t < 1 ? 1 : t < 18 ? 2 : 3;
        x[static_cast<size_t>(t * s.width + expert)] = 16.0f;
    }
}

const char* spread_name(Spread spread) {
    return spread == Spread::kUneven ? " uneven" : spread == Spread::kOneExpert ? " to one" : "";
}

const char* adapter_name(AdapterKind kind) {
    return kind == AdapterKind::kLora ? " lora" : kind == AdapterKind::kOft ? " oft" : "";
}

void add_adapters(const Shape& s, Random& random, Case& c) {
    const int64_t n = s.adapter_size;
    for (size_t projection = 0; projection < kProjections; ++projection) {
        const int64_t in = in_of(s, projection);
        const int64_t out = out_of(s, projection);
        const auto add = [&](const char* name, std::vector<int64_t> shape, float scale) {
            int64_t count = 1;
            for (const int64_t dim : shape) {
                count *= dim;
            }
            c.inputs.push_back(with_grad(
                input(name, s.compute, std::move(shape), random.normals(count, scale)), DType::kF32
            ));
        };
        if (s.adapter == AdapterKind::kLora) {
            add("lora_a", {s.experts * n, in}, 0.2f);
            add("lora_b", {s.experts * out, n}, 0.2f);
        } else if (s.adapter == AdapterKind::kOft) {
            add("oft_d", {s.experts * in / n, n, n}, 0.1f);
            c.inputs.push_back(raw_input("none", {0}, {}));
        }
    }
}

std::string name_of(const Shape& s) {
    return fmt::format(
        "{} {}x{}x{} {} of {}{}{}{}{}{}",
        format_name(s.format),
        s.tokens,
        s.width,
        s.expert_width,
        s.selected,
        s.experts,
        s.normalize ? "" : " raw",
        adapter_name(s.adapter),
        spread_name(s.spread),
        s.dequant_bytes > 0 ? fmt::format(" decoded {}", s.dequant_bytes) : "",
        s.compute == DType::kF32 ? " (f32)" : ""
    );
}

// Fills in the block's projections too.
Case make_case(const Shape& s, Random& random, Block& block) {
    const bool f32 = s.compute == DType::kF32;
    Case c;
    c.op = "moe";
    c.name = name_of(s);
    const int64_t count = s.tokens * s.width;
    std::vector<float> x = random.normals(count);
    const std::vector<float> residual = random.normals(count);
    std::vector<float> router =
        random.normals(s.experts * s.width, s.spread == Spread::kEven ? 0.2f : 0.05f);
    steer(s, x, router);
    c.inputs = {
        with_grad(per_row(input("x", s.compute, {s.tokens, s.width}, x)), s.compute),
        per_row(input("residual", s.compute, {s.tokens, s.width}, residual)),
        input("router", DType::kBF16, {s.experts, s.width}, router)};
    for (size_t projection = 0; projection < kProjections; ++projection) {
        Experts& experts = block.projections[projection];
        experts = make_experts(s, projection, random);
        c.inputs.push_back(weight_input(experts.all, f32));
        c.inputs.push_back(raw_input("scales", experts.all.scales, {}));
    }
    add_adapters(s, random, c);
    c.outputs = {{"y", s.compute, {s.tokens, s.width}, true}};
    c.run = [block](Stream& stream, const Tensors& in, const Tensors& out) {
        const ScratchScope scope(stream.scratch);
        forward(block, stream, in, out[0]);
        synchronize(stream);
    };
    c.backward = [block](
                     Stream& stream, const Tensors& in, const Tensors& d_out, const Tensors& d_in
                 ) { backward(block, stream, in, d_out[0], d_in); };
    c.reference = [s](const Values& in) { return reference(s, in); };
    c.forward_tolerance = f32 ? 2e-5 : 3e-2;
    c.grad_tolerance = f32 ? 1e-4 : 2e-2;
    return c;
}

// Its numbers are the case's own: another case before it does not change them.
void add_case(CaseList& cases, const Shape& s) {
    const std::string name = name_of(s);
    Random random(hash64(name.data(), name.size()));
    Block block;
    block.shape = s;
    cases.push_back(make_case(s, random, block));
}

// The gradient that reaches a token through the gate projections of its experts, as an op of its
// own: a token alone and all of them take different kernels, and must give the same bits.
void run_dx(const Block& block, Stream& stream, const Tensors& in, const Tensor& out) {
    const Shape& s = block.shape;
    const ScratchScope scope(stream.scratch);
    const Routing routing = routed(s, stream, in).routing;
    const int64_t rows = in[kX].rows() * s.selected;
    const Tensor x = scratch(stream, s, rows, s.width);
    const Tensor dy = scratch(stream, s, rows, s.expert_width);
    const Tensor dx = scratch(stream, s, rows, s.width);
    dispatch_rows(stream, routing, in[kX], x);
    dispatch_rows(stream, routing, in[kResidual], dy);
    std::optional<DequantBuffer> dequant;
    if (s.dequant_bytes > 0) {
        dequant.emplace(stream, s.dequant_bytes);
    }
    const auto weights = block.weights(kGate, in);
    const auto adapters = block.adapters(kGate, in);
    const GroupedLinearParams p{
        x, weights, adapters, routing.offsets, dequant ? &*dequant : nullptr};
    grouped_linear_backward(stream, p, dy, dx, false, {});
    dispatch_rows_backward(stream, routing, dx, out, false);
    synchronize(stream);
}

Case make_dx_case(const Shape& s) {
    Random random(2);
    Block block;
    block.shape = s;
    Case c = make_case(s, random, block);
    c.inputs[kX].grad = false;
    c.inputs[kResidual] = per_row(input(
        "dy", s.compute, {s.tokens, s.expert_width}, random.normals(s.tokens * s.expert_width)
    ));
    c.outputs = {{"dx", s.compute, {s.tokens, s.width}, true}};
    c.run = [block](Stream& stream, const Tensors& in, const Tensors& out) {
        run_dx(block, stream, in, out[0]);
    };
    c.backward = nullptr;
    return c;
}

// Compares rows only, the reference is too slow; made just before it runs.
void add_gpu_case(CaseList& cases, const char* op, const Shape& s, bool dx) {
    Case c;
    c.op = op;
    c.gpu_only = true;
    c.prepare = [s, dx](Case& self) {
        const std::string name = self.op;
        Random random(1);
        Block block;
        block.shape = s;
        self = dx ? make_dx_case(s) : make_case(s, random, block);
        self.op = name;
        self.reference = nullptr;
    };
    cases.push_back(c);
}

// Shapes that bring in each of the GPU's kernels: tokens alone the decode kernel, all of them the
// middle or the large tile, with weights decoded inside or before.
void add_gpu_cases(CaseList& cases) {
    const auto add = [&](const Shape& s) {
        add_gpu_case(cases, "moe", s, false);
        add_gpu_case(cases, "moe_dx", s, true);
    };
    for (const WeightFormat format : kFormats) {
        add({format, 30, 256, 160, 8, 3});   // 11 rows an expert
        add({format, 100, 256, 160, 8, 3});  // 37
        Shape many{format, 700, 256, 160, 6, 2};
        add(many);
        many.dequant_bytes = 4 * 256 * 160 * 2;  // four experts, then two
        add(many);
        many.adapter = AdapterKind::kLora;
        many.adapter_size = 16;
        add(many);
        many.adapter = AdapterKind::kOft;
        many.adapter_size = 32;
        many.dequant_bytes = 0;
        add(many);
        Shape skewed{format, 300, 256, 160, 8, 1};
        skewed.spread = Spread::kUneven;
        add(skewed);
        skewed.spread = Spread::kOneExpert;
        add(skewed);
    }
    for (const WeightFormat format : kFormats) {
        for (const int64_t rank : {0, 8, 16, 32}) {  // gate and up in one launch, as their A
            Shape few{format, 33, 320, 160, 40, 4};  // 3 rows an expert; none for some
            few.adapter = rank == 0 ? AdapterKind::kNone : AdapterKind::kLora;
            few.adapter_size = rank;
            add(few);
        }
        Shape few{format, 24, 256, 160, 8, 1, true, AdapterKind::kLora, 16};
        few.spread = Spread::kUneven;  // 17 rows of one expert in tiles of eight
        add(few);
    }
    // More experts than a warp looks through at once, and a warp that takes one item after another.
    add({WeightFormat::kInt4, 40, 64, 32, 150, 4, true, AdapterKind::kLora, 16});
    add({WeightFormat::kInt4, 64, 256, 512, 128, 8, true, AdapterKind::kLora, 16});
    add({WeightFormat::kFp8, 64, 128, 512, 128, 8});
    Shape wide{WeightFormat::kInt4, 64, 2048, 256, 24, 8};  // a long contraction
    add(wide);
    wide.adapter = AdapterKind::kLora;
    wide.adapter_size = 16;
    add(wide);
}

}  // namespace

void add_moe_cases(CaseList& cases) {
    for (const DType compute : {DType::kBF16, DType::kF32}) {
        const auto add = [&](Shape s) {
            s.compute = compute;
            add_case(cases, s);
        };
        for (const WeightFormat format : kFormats) {
            add({format, 9, 64, 32, 8, 3});
            add({format, 9, 64, 32, 8, 3, true, AdapterKind::kLora, 4});
            add({format, 9, 64, 32, 8, 3, true, AdapterKind::kOft, 16});
        }
        add({WeightFormat::kBF16, 13, 48, 40, 5, 2, false});
        add({WeightFormat::kBF16, 3, 32, 8, 1, 1});
        add({WeightFormat::kBF16, 4, 32, 8, 6, 6, false, AdapterKind::kLora, 2});
        add({WeightFormat::kInt4, 70, 64, 96, 16, 4});
        for (const Spread spread : {Spread::kUneven, Spread::kOneExpert}) {
            for (const AdapterKind kind :
                 {AdapterKind::kNone, AdapterKind::kLora, AdapterKind::kOft}) {
                Shape s{WeightFormat::kInt4, 150, 64, 32, 6, 1, false, kind, 16};
                s.spread = spread;
                add(s);
            }
        }
        const auto add_decoded = [&](WeightFormat format, AdapterKind adapter, int64_t bytes) {
            Shape s{format, 40, 64, 96, 4, 2, true, adapter, 16};
            s.dequant_bytes = bytes;
            add(s);
        };
        constexpr int64_t kMatrix = 64 * 96 * 2;
        add_decoded(WeightFormat::kInt4, AdapterKind::kLora, 3 * kMatrix);
        add_decoded(WeightFormat::kMxFp4, AdapterKind::kOft, kMatrix / 2);
        add_decoded(WeightFormat::kNvFp4, AdapterKind::kLora, kMatrix / 2);
        add_decoded(WeightFormat::kFp8, AdapterKind::kNone, kMatrix);
    }
    add_gpu_cases(cases);
}

}  // namespace orbit::opcheck
