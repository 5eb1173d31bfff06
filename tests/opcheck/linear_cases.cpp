// linear, its backward, and linear_f32_out.
#include <fmt/core.h>

#include <array>
#include <cstring>

#include "opcheck/cases.h"
#include "opcheck/weights.h"
#include "ops/activation.h"
#include "ops/dense.h"

namespace orbit::opcheck {
namespace {

struct Shape {
    WeightFormat format = WeightFormat::kBF16;
    int64_t rows = 0;  // T
    int64_t in = 0;
    int64_t out = 0;
    DType compute = DType::kBF16;
    AdapterKind adapter = AdapterKind::kNone;
    int64_t adapter_size = 0;  // rank or block size
    bool bias = false;
    bool residual = false;
};

// Places of the inputs in a case.
enum : size_t { kX, kData, kScales, kBias, kResidual, kFirst, kSecond };

constexpr float kLoraScale = 0.5f;
constexpr WeightFormat kFormats[] = {
    WeightFormat::kBF16,
    WeightFormat::kF32,
    WeightFormat::kF16,
    WeightFormat::kInt4,
    WeightFormat::kQ8_0,
    WeightFormat::kQ4_0,
    WeightFormat::kQ4_1,
    WeightFormat::kFp8,
    WeightFormat::kMxFp4,
    WeightFormat::kNvFp4,
};

const char* short_name(WeightFormat format) {
    constexpr const char* kNames[] = {
        "bf16", "f32", "f16", "int4", "q8_0", "q4_0", "q4_1", "fp8", "mxfp4", "nvfp4"};
    return kNames[static_cast<size_t>(format)];
}

std::string name_of(const Shape& s) {
    std::string name = fmt::format("{} {}x{}x{}", short_name(s.format), s.rows, s.in, s.out);
    if (s.adapter == AdapterKind::kLora) {
        name += fmt::format(" lora r{}", s.adapter_size);
    } else if (s.adapter == AdapterKind::kOft) {
        name += fmt::format(" oft b{}", s.adapter_size);
    }
    name += s.bias ? " bias" : "";
    name += s.residual ? " residual" : "";
    name += s.compute == DType::kF32 ? " (f32)" : "";
    return name;
}

// y[t][n] += sum_k x[t][k] w[n][k]
void add_product(
    const std::vector<double>& x,
    const std::vector<double>& w,
    int64_t k,
    double scale,
    std::vector<double>& y
) {
    const size_t depth = static_cast<size_t>(k);
    const size_t rows = x.size() / depth;
    const size_t width = w.size() / depth;
    for (size_t t = 0; t < rows; ++t) {
        for (size_t n = 0; n < width; ++n) {
            double sum = 0;
            for (size_t i = 0; i < depth; ++i) {
                sum += x[t * depth + i] * w[n * depth + i];
            }
            y[t * width + n] += scale * sum;
        }
    }
}

std::vector<double> rotate(
    const std::vector<double>& x, const std::vector<double>& d, const Shape& s
) {
    std::vector<double> y = x;
    const auto b = static_cast<size_t>(s.adapter_size);
    const auto in = static_cast<size_t>(s.in);
    for (size_t t = 0; t < static_cast<size_t>(s.rows); ++t) {
        for (size_t j = 0; j < in; ++j) {
            const size_t block = j / b;
            for (size_t i = 0; i < b; ++i) {
                y[t * in + j] += x[t * in + block * b + i] * d[(block * b + i) * b + j % b];
            }
        }
    }
    return y;
}

Values reference(const Shape& s, const Values& in) {
    std::vector<double> y(static_cast<size_t>(s.rows * s.out));
    const bool oft = s.adapter == AdapterKind::kOft;
    add_product(oft ? rotate(in[kX], in[kFirst], s) : in[kX], in[kData], s.in, 1.0, y);
    if (s.adapter == AdapterKind::kLora) {
        std::vector<double> u(static_cast<size_t>(s.rows * s.adapter_size));
        add_product(in[kX], in[kFirst], s.in, 1.0, u);
        add_product(u, in[kSecond], s.adapter_size, static_cast<double>(kLoraScale), y);
    }
    for (size_t i = 0; i < y.size(); ++i) {
        y[i] += s.bias ? in[kBias][i % static_cast<size_t>(s.out)] : 0.0;
        y[i] += s.residual ? in[kResidual][i] : 0.0;
    }
    return {y};
}

LinearParams params_of(const Shape& s, const QuantizedMatrix& weight, const Tensors& in) {
    LinearParams p;
    p.x = in[kX];
    p.w = at_tensors(weight, in[kData], in[kScales]);
    p.bias = s.bias ? in[kBias].as<float>() : nullptr;
    p.residual = s.residual ? in[kResidual] : Tensor{};
    p.adapter.kind = s.adapter;
    if (s.adapter == AdapterKind::kLora) {
        p.adapter.lora_a = in[kFirst];
        p.adapter.lora_b = in[kSecond];
        p.adapter.lora_scale = kLoraScale;
    } else if (s.adapter == AdapterKind::kOft) {
        p.adapter.oft_d = in[kFirst];
    }
    return p;
}

void run_backward(
    const LinearParams& p, Stream& stream, const Tensors& d_out, const Tensors& d_in
) {
    AdapterGrad grad;
    if (p.adapter.kind == AdapterKind::kLora) {
        grad.lora_a = d_in[kFirst].as<float>();
        grad.lora_b = d_in[kSecond].as<float>();
    } else if (p.adapter.kind == AdapterKind::kOft) {
        grad.oft_d = d_in[kFirst].as<float>();
    }
    linear_backward(stream, p, d_out[0], d_in[kX], false, grad);
}

void add_adapter_inputs(const Shape& s, Random& random, Case& c) {
    const int64_t n = s.adapter_size;
    if (s.adapter == AdapterKind::kLora) {
        auto a = input("lora_a", s.compute, {n, s.in}, random.normals(n * s.in, 0.2f));
        auto b = input("lora_b", s.compute, {s.out, n}, random.normals(n * s.out, 0.2f));
        c.inputs.push_back(with_grad(std::move(a), DType::kF32));
        c.inputs.push_back(with_grad(std::move(b), DType::kF32));
    } else if (s.adapter == AdapterKind::kOft) {
        auto d = input("oft_d", s.compute, {s.in / n, n, n}, random.normals(s.in * n, 0.1f));
        c.inputs.push_back(with_grad(std::move(d), DType::kF32));
    }
}

void set_costs(const Shape& s, const TestWeight& w, Case& c) {
    const auto macs = static_cast<double>(s.rows) * static_cast<double>(s.in * s.out);
    const int64_t activations = s.rows * (s.in + s.out) * dtype_bytes(s.compute);
    c.flops = 2 * macs;  // adapters not counted: they should be nearly free
    c.backward_flops = 2 * macs;
    c.bytes =
        static_cast<double>(static_cast<int64_t>(w.data.size() + w.scales.size()) + activations);
}

Case linear_case(const Shape& s, const TestWeight& w, Random& random) {
    const bool f32 = s.compute == DType::kF32;
    Case c;
    c.op = "linear";
    c.name = name_of(s);
    c.inputs = {
        with_grad(
            per_row(input("x", s.compute, {s.rows, s.in}, random.normals(s.rows * s.in))), s.compute
        ),
        weight_input(w, f32),
        raw_input("scales", w.scales, {}),
        input("bias", DType::kF32, {s.out}, random.normals(s.out)),
        per_row(input("residual", s.compute, {s.rows, s.out}, random.normals(s.rows * s.out)))};
    add_adapter_inputs(s, random, c);
    c.outputs = {{"y", s.compute, {s.rows, s.out}, true}};
    const QuantizedMatrix weight = w.shape;
    c.run = [s, weight](Stream& stream, const Tensors& in, const Tensors& out) {
        linear(stream, params_of(s, weight, in), out[0]);
    };
    c.backward = [s, weight](
                     Stream& stream, const Tensors& in, const Tensors& d_out, const Tensors& d_in
                 ) { run_backward(params_of(s, weight, in), stream, d_out, d_in); };
    c.reference = [s](const Values& in) { return reference(s, in); };
    c.forward_tolerance = f32 ? 1e-5 : 1e-2;
    c.grad_tolerance = f32 ? 1e-4 : 1e-2;
    return c;
}

// The head: bf16 (or f32) in, float32 out, and d(logits) rounded to the compute type.
Case f32_out_case(const Shape& s, Random& random) {
    const TestWeight w = make_weight(s.format, s.out, s.in, random);
    const QuantizedMatrix weight = w.shape;
    const bool f32 = s.compute == DType::kF32;
    Case c;
    c.op = "linear_f32_out";
    c.name = name_of(s);
    c.inputs = {
        with_grad(
            per_row(input("h", s.compute, {s.rows, s.in}, random.normals(s.rows * s.in))), s.compute
        ),
        weight_input(w, f32),
        raw_input("scales", w.scales, {})};
    c.outputs = {{"logits", DType::kF32, {s.rows, s.out}, true}};
    c.run = [weight](Stream& stream, const Tensors& in, const Tensors& out) {
        linear_f32_out(stream, in[kX], at_tensors(weight, in[kData], in[kScales]), out[0]);
    };
    c.backward =
        [weight](Stream& stream, const Tensors& in, const Tensors& d_out, const Tensors& d_in) {
            const QuantizedMatrix at = at_tensors(weight, in[kData], in[kScales]);
            linear_f32_out_backward(stream, d_out[0], at, d_in[kX]);
        };
    c.reference = [s](const Values& in) { return reference(s, in); };
    c.forward_tolerance = 1e-5;
    c.grad_tolerance = f32 ? 1e-4 : 1e-2;
    return c;
}

// d(x) = d(y) W, with LoRA's part, added to what d(x) holds if the shape has a residual; as an op
// of its own, so that its rows can be compared.
Case dx_case(const Shape& s, Random& random) {
    const TestWeight w = make_weight(s.format, s.out, s.in, random);
    const QuantizedMatrix weight = w.shape;
    Case c;
    c.op = "linear_dx";
    c.name = name_of(s);
    c.inputs = {
        per_row(input("dy", s.compute, {s.rows, s.out}, random.normals(s.rows * s.out))),
        weight_input(w, false),
        raw_input("scales", w.scales, {}),
        input("bias", DType::kF32, {1}, {0.0f}),  // not used
        per_row(input("before", s.compute, {s.rows, s.in}, random.normals(s.rows * s.in)))};
    add_adapter_inputs(s, random, c);
    c.outputs = {{"dx", s.compute, {s.rows, s.in}, true}};
    c.run = [s, weight](Stream& stream, const Tensors& in, const Tensors& out) {
        if (s.residual) {
            copy_on_device(
                stream, out[0].data, in[kResidual].data, static_cast<size_t>(out[0].bytes())
            );
        }
        LinearParams p = params_of(s, weight, in);
        p.x = out[0];  // not read: no gradient of the adapter is asked for
        p.residual = Tensor{};
        linear_backward(stream, p, in[0], out[0], s.residual, {});
    };
    return c;
}

// d(h) of the head from d(logits), as an op of its own: parts of the vocabulary are multiplied
// side by side.
Case head_dx_case(const Shape& s, Random& random) {
    const TestWeight w = make_weight(s.format, s.out, s.in, random);
    const QuantizedMatrix weight = w.shape;
    Case c;
    c.op = "linear_f32_out_dx";
    c.name = name_of(s);
    c.inputs = {
        per_row(input("dlogits", DType::kF32, {s.rows, s.out}, random.normals(s.rows * s.out))),
        weight_input(w, false),
        raw_input("scales", w.scales, {})};
    c.outputs = {{"dh", s.compute, {s.rows, s.in}, true}};
    c.run = [weight](Stream& stream, const Tensors& in, const Tensors& out) {
        const QuantizedMatrix at = at_tensors(weight, in[kData], in[kScales]);
        linear_f32_out_backward(stream, in[0], at, out[0]);
    };
    return c;
}

// silu(gate) up: a row alone in one launch, more by products and swiglu() apart; the same bits.
Case swiglu_case(const Shape& s, Random& random) {
    const TestWeight gate = make_weight(s.format, s.out, s.in, random);
    const TestWeight up = make_weight(s.format, s.out, s.in, random);
    Case c = linear_case(s, gate, random);
    c.op = "linear_swiglu";
    const Case other = linear_case(s, up, random);
    const auto of_gate = static_cast<int64_t>(c.inputs.size());
    c.inputs.insert(c.inputs.end(), other.inputs.begin() + kData, other.inputs.end());
    c.run = [s, gate = gate.shape, up = up.shape, of_gate](
                Stream& stream, const Tensors& in, const Tensors& out
            ) {
        Tensors of_up{in[kX]};
        of_up.insert(of_up.end(), in.begin() + of_gate, in.end());
        const std::vector<LinearParams> params{params_of(s, gate, in), params_of(s, up, of_up)};
        const ScratchScope scope(stream.scratch);
        const Tensor up_y = stream.scratch.take(out[0].dtype, {out[0].rows(), out[0].cols()});
        const Tensors y{out[0], up_y};
        if (linear_swiglu(stream, params, y) == SwigluResult::kGateAndUp) {
            swiglu(stream, out[0], up_y, out[0]);
        }
    };
    c.backward = nullptr;
    return c;
}

void add_case(CaseList& cases, const Shape& s) {
    Random random(cases.size() + 1);
    cases.push_back(linear_case(s, make_weight(s.format, s.out, s.in, random), random));
}

void add_correctness_cases(CaseList& cases) {
    for (const DType compute : {DType::kBF16, DType::kF32}) {
        const auto kind = [&](Shape s) {
            s.compute = compute;
            add_case(cases, s);
        };
        for (const WeightFormat format : kFormats) {
            kind({format, 19, 96, 160});
        }
        kind({WeightFormat::kInt4, 7, 48, 64});
        kind({WeightFormat::kNvFp4, 7, 48, 64});  // an odd number of groups
        kind({WeightFormat::kFp8, 5, 270, 200});  // partial blocks in both directions
        kind({WeightFormat::kBF16, 5, 48, 392});
        kind({WeightFormat::kBF16, 3, 33, 7});
        kind({WeightFormat::kBF16, 1, 2, 1});
        kind({.format = WeightFormat::kInt4, .rows = 15, .in = 64, .out = 96, .bias = true});
        for (const int64_t rank : {1, 4, 16}) {
            kind({WeightFormat::kInt4, 13, 96, 80, compute, AdapterKind::kLora, rank, true, true});
        }
        for (const int64_t block : {8, 16, 32, 96}) {
            kind({WeightFormat::kQ4_1, 21, 96, 64, compute, AdapterKind::kOft, block, false, true});
        }
        kind({WeightFormat::kBF16, 9, 27, 64, compute, AdapterKind::kOft, 9, true, true});
        // Longer than one packed chunk, and than one row block.
        kind({WeightFormat::kQ8_0, 2, 1312, 32});
        kind({WeightFormat::kQ4_0, 2, 32, 1312});
        kind({WeightFormat::kInt4, 300, 64, 64, compute, AdapterKind::kOft, 32});
        kind({WeightFormat::kInt4, 300, 64, 64, compute, AdapterKind::kLora, 8});
    }
}

Case full_linear_case(const Shape& s, Random& random) {
    return linear_case(s, make_weight(s.format, s.out, s.in, random), random);
}

// Compares rows only, the reference is too slow at these sizes; made just before it runs.
void add_rows_case(
    CaseList& cases, const char* op, const Shape& s, Case (*make)(const Shape&, Random&)
) {
    Case c;
    c.op = op;
    c.name = name_of(s);
    c.gpu_only = true;
    c.prepare = [s, make](Case& self) {
        Random random(1);
        self = make(s, random);
        self.gpu_only = true;
        self.reference = nullptr;
    };
    cases.push_back(std::move(c));
}

// Many rows of a bf16 weight: the kernel of pairs of blocks, in its two widths, with one segment
// and several, more tiles than multiprocessors, and edges in every direction; then the fewer rows
// that it takes of many columns.
void add_many_rows_cases(CaseList& cases) {
    const auto bf16_shape = [](int64_t rows, int64_t in, int64_t out) {
        Shape s;
        s.rows = rows;
        s.in = in;
        s.out = out;
        return s;
    };
    for (const Shape& s :
         {bf16_shape(1100, 1056, 2000),  // one segment; few tiles
          bf16_shape(2100, 1040, 9000),  // many
          bf16_shape(1300, 2336, 1003),  // four segments, columns not in eights
          bf16_shape(2500, 2080, 4104),  // four, many tiles
          bf16_shape(1025, 4320, 1160),
          bf16_shape(520, 1056, 8200),
          bf16_shape(512, 2336, 8104)}) {  // four
        add_rows_case(cases, "linear_f32_out", s, f32_out_case);
    }
    const auto with_lora = [&](Shape s, int64_t rank, bool bias, bool residual) {
        s.adapter = rank > 0 ? AdapterKind::kLora : AdapterKind::kNone;
        s.adapter_size = rank;
        s.bias = bias;
        s.residual = residual;
        return s;
    };
    for (const Shape& s :
         {with_lora(bf16_shape(1100, 1088, 2008), 16, true, true),
          with_lora(bf16_shape(2100, 1088, 6000), 16, false, true),  // many tiles
          with_lora(bf16_shape(1500, 1032, 2001), 8, true, false),
          with_lora(bf16_shape(1100, 2304, 1544), 32, false, true),
          with_lora(bf16_shape(2500, 4104, 3080), 16, true, true),  // many, four segments
          with_lora(bf16_shape(1100, 1088, 2008), 136, false, false),
          with_lora(bf16_shape(1100, 1088, 2008), 4, false, true),
          with_lora(bf16_shape(1100, 1088, 2008), 0, true, true)}) {
        add_rows_case(cases, "linear", s, full_linear_case);
    }
    for (const Shape& s :
         {with_lora(bf16_shape(1100, 2008, 1088), 16, false, false),
          with_lora(bf16_shape(2100, 6000, 1088), 40, false, true),    // many tiles
          with_lora(bf16_shape(1100, 2008, 4200), 16, false, true),    // two segments
          with_lora(bf16_shape(2500, 4104, 8264), 136, false, false),  // three, many
          with_lora(bf16_shape(1100, 2008, 1096), 0, false, true),
          with_lora(bf16_shape(600, 6600, 8264), 16, false, true)}) {  // three
        add_rows_case(cases, "linear_dx", s, dx_case);
    }
    add_rows_case(cases, "linear_f32_out_dx", bf16_shape(520, 1000, 25000), head_dx_case);
    add_rows_case(cases, "linear_f32_out_dx", bf16_shape(520, 1400, 33128), head_dx_case);
}

constexpr WeightFormat kPackedFormats[] = {
    WeightFormat::kInt4,
    WeightFormat::kQ8_0,
    WeightFormat::kQ4_0,
    WeightFormat::kQ4_1,
    WeightFormat::kFp8,
    WeightFormat::kMxFp4,
    WeightFormat::kNvFp4};

// Many rows of packed weights: decoded first. The last ones are cut into pieces.
void add_decoded_cases(CaseList& cases) {
    const auto add_all = [&](WeightFormat format, int64_t in, int64_t out) {
        Shape s{format, 1100, in, out};
        add_rows_case(cases, "linear_f32_out", s, f32_out_case);
        s.adapter = AdapterKind::kLora;
        s.adapter_size = 24;
        s.residual = true;
        add_rows_case(cases, "linear_dx", s, dx_case);
        s.bias = true;
        add_rows_case(cases, "linear", s, full_linear_case);
    };
    for (const WeightFormat format : kPackedFormats) {
        add_all(format, 1056, 2000);  // one segment
        add_all(format, 2336, 1032);  // four
    }
    for (const WeightFormat format : {WeightFormat::kInt4, WeightFormat::kFp8}) {
        add_rows_case(cases, "linear_f32_out", {format, 1100, 4128, 9000}, f32_out_case);
        Shape s{format, 1100, 9056, 4200};
        s.adapter = AdapterKind::kLora;
        s.adapter_size = 16;
        add_rows_case(cases, "linear_dx", s, dx_case);
    }
    Shape s{WeightFormat::kInt4, 1100, 4128, 9000};
    s.adapter = AdapterKind::kLora;
    s.adapter_size = 16;
    s.bias = true;
    s.residual = true;
    add_rows_case(cases, "linear", s, full_linear_case);
}

// Shapes that bring in each of the GPU's kernels: a row alone takes the decode kernel, the whole
// batch one of the tiles, with a contraction in one piece and in four. All rows must have the same
// bits.
void add_gpu_cases(CaseList& cases) {
    const auto add_linear = [&](const Shape& s) {
        add_rows_case(cases, "linear", s, full_linear_case);
    };
    const auto add_f32_out = [&](const Shape& s) {
        add_rows_case(cases, "linear_f32_out", s, f32_out_case);
    };
    const DType bf16_type = DType::kBF16;
    const auto add_all = [&](WeightFormat format) {
        add_f32_out({format, 300, 1056, 136});  // one piece
        add_f32_out({format, 150, 2336, 96});   // four
        add_f32_out({format, 13, 4320, 48});    // up to 16 rows
        add_f32_out({format, 70, 4320, 48});
        add_f32_out({format, 24, 2336, 300});     // up to 32 rows
        add_f32_out({format, 64, 1056, 8224});    // up to 64 rows, in one piece
        add_f32_out({format, 41, 4320, 200});     // in four
        add_f32_out({format, 300, 96, 8224});     // the widest tile
        add_f32_out({format, 1000, 2080, 1600});  // the same, in four
        for (const Shape& s :
             {Shape{format, 1300, 1280, 96},
              Shape{format, 300, 288, 136},
              Shape{format, 1290, 1312, 4200}}) {
            add_rows_case(cases, "linear_dx", s, dx_case);
        }
        add_f32_out({format, 6, 1792, 136});  // a row alone: whole chunks, more than the ring holds
        add_f32_out({format, 3, 7168, 56});
        add_linear({format, 5, 3072, 200, bf16_type, AdapterKind::kLora, 16, true, true});
        add_linear({format, 40, 4352, 200, bf16_type, AdapterKind::kLora, 16, true, true});
        add_linear({format, 20, 1088, 192, bf16_type, AdapterKind::kLora, 40, false, true});
        add_linear({format, 61, 2304, 320, bf16_type, AdapterKind::kLora, 16, true, true});
        add_linear({format, 200, 1088, 192, bf16_type, AdapterKind::kLora, 16, true, true});
        add_linear({format, 200, 2304, 192, bf16_type, AdapterKind::kLora, 32, false, true});
        add_linear({format, 200, 1088, 192, bf16_type, AdapterKind::kOft, 32, true, true});
        add_linear({format, 600, 2304, 192, bf16_type, AdapterKind::kOft, 128});
        for (const Shape& s :
             {Shape{format, 100, 1056, 320, bf16_type, AdapterKind::kLora, 16, true},
              Shape{format, 61, 1088, 8224},
              Shape{format, 3, 1280, 328, bf16_type, AdapterKind::kLora, 16, true},
              Shape{format, 1100, 1056, 2000},  // decoded first
              Shape{format, 27, 320, 160, bf16_type, AdapterKind::kLora, 40}}) {
            add_rows_case(cases, "linear_swiglu", s, swiglu_case);
        }
    };
    add_all(WeightFormat::kBF16);
    for (const WeightFormat format : kPackedFormats) {
        add_all(format);
    }
    add_f32_out({WeightFormat::kBF16, 64, 2080, 128});  // a router's
    add_linear({WeightFormat::kInt4, 14, 4320, 304, bf16_type, AdapterKind::kLora, 16});  // 9 to 16
    // INT4 of small scales in segments of whole stages: fewer of them than the ring holds, and
    // more.
    for (const Shape& s :
         {Shape{WeightFormat::kInt4, 61, 2048, 200, bf16_type, AdapterKind::kLora, 16, true, true},
          Shape{WeightFormat::kInt4, 33, 7168, 392, bf16_type, AdapterKind::kLora, 40, false, true},
          Shape{WeightFormat::kInt4, 64, 2304, 8200, bf16_type, AdapterKind::kLora, 16, true},
          Shape{WeightFormat::kInt4, 9, 3072, 1004, bf16_type, AdapterKind::kLora, 16, false, true},
          Shape{WeightFormat::kInt4, 50, 768, 136, bf16_type, AdapterKind::kOft, 32}}) {
        add_linear(s);
    }
    add_f32_out({WeightFormat::kInt4, 23, 4096, 300});
    for (const Shape& s :
         {Shape{WeightFormat::kInt4, 47, 1024, 8200, bf16_type, AdapterKind::kLora, 16, true},
          Shape{WeightFormat::kInt4, 64, 512, 200, bf16_type, AdapterKind::kLora, 40},
          Shape{WeightFormat::kInt4, 9, 1792, 1000},
          Shape{WeightFormat::kInt4, 20, 256, 136, bf16_type, AdapterKind::kOft, 32}}) {
        add_rows_case(cases, "linear_swiglu", s, swiglu_case);
    }
    // Rotations of few rows: two products together, columns that are no whole window.
    for (const Shape& s :
         {Shape{WeightFormat::kBF16, 50, 4320, 72, bf16_type, AdapterKind::kOft, 32},
          Shape{WeightFormat::kBF16, 20, 8512, 136, bf16_type, AdapterKind::kOft, 16},
          Shape{WeightFormat::kBF16, 7, 1280, 136, bf16_type, AdapterKind::kOft, 128},
          Shape{WeightFormat::kBF16, 40, 1088, 136, bf16_type, AdapterKind::kOft, 64}}) {
        add_rows_case(cases, "linear_swiglu", s, swiglu_case);
    }
    add_linear({WeightFormat::kBF16, 500, 4320, 304, bf16_type, AdapterKind::kLora, 20});
    // A few hundred rows: INT4 by the kernel for 64, bf16 by clusters, LoRA inside or beside.
    for (const Shape& s :
         {Shape{WeightFormat::kInt4, 130, 2048, 392, bf16_type, AdapterKind::kLora, 16, true, true},
          Shape{WeightFormat::kInt4, 300, 768, 200, bf16_type, AdapterKind::kLora, 40, false, true},
          Shape{WeightFormat::kInt4, 200, 512, 8200},
          Shape{WeightFormat::kInt4, 100, 768, 136, bf16_type, AdapterKind::kOft, 32},
          Shape{WeightFormat::kBF16, 72, 1088, 2008, bf16_type, AdapterKind::kLora, 16, true, true},
          Shape{WeightFormat::kBF16, 300, 2304, 1032, bf16_type, AdapterKind::kLora, 40},
          Shape{WeightFormat::kBF16, 520, 2304, 1032}}) {
        add_linear(s);
    }
    for (const Shape& s :
         {Shape{WeightFormat::kInt4, 130, 1024, 8200, bf16_type, AdapterKind::kLora, 16},
          Shape{WeightFormat::kBF16, 130, 1056, 2000, bf16_type, AdapterKind::kLora, 16, true},
          Shape{WeightFormat::kBF16, 250, 1088, 2000, bf16_type, AdapterKind::kLora, 16}}) {
        add_rows_case(cases, "linear_swiglu", s, swiglu_case);
    }
    // bf16 by clusters: cut contractions and others, pairs alone (last rows that fill both blocks)
    // and side by side, LoRA inside (ranks up to 16) and beside; then the head by pairs.
    for (const Shape& s :
         {Shape{WeightFormat::kBF16, 200, 2312, 1001, bf16_type, AdapterKind::kLora, 8, true, true},
          Shape{WeightFormat::kBF16, 72, 3072, 520, bf16_type, AdapterKind::kLora, 16, false, true},
          Shape{WeightFormat::kBF16, 500, 2304, 1032, bf16_type, AdapterKind::kNone, 0, true, true},
          Shape{WeightFormat::kBF16, 256, 1032, 1003, bf16_type, AdapterKind::kLora, 4, true, true},
          Shape{
              WeightFormat::kBF16, 250, 1088, 4104, bf16_type, AdapterKind::kLora, 16, false, true},
          Shape{
              WeightFormat::kBF16, 250, 1088, 2008, bf16_type, AdapterKind::kLora, 24, true, true},
          Shape{
              WeightFormat::kBF16, 90, 1056, 1500, bf16_type, AdapterKind::kNone, 0, true, true}}) {
        add_linear(s);
    }
    add_f32_out({WeightFormat::kBF16, 250, 1056, 1003});
    add_f32_out({WeightFormat::kBF16, 150, 520, 33000});
}

void add_perf_cases(CaseList& cases) {
    const auto add = [&](const Shape& s) {
        for (const int64_t rows : {1, 4, 16, 64, 256, 2048}) {
            Shape at = s;
            at.rows = rows;
            Case c;
            c.op = "linear";
            c.perf_only = true;
            c.prepare = [at](Case& self) {
                Random random(1);
                const TestWeight w = make_weight(at.format, at.out, at.in, random);
                self = linear_case(at, w, random);
                set_costs(at, w, self);
                self.perf_only = true;
            };
            cases.push_back(c);
        }
    };
    for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kInt4}) {
        add({format, 0, 256, 256});
        add({format, 0, 256, 768});
        add({format, 0, 768, 256});
    }
    for (const WeightFormat format : kFormats) {
        add({format, 0, 576, 1536});
    }
    add({WeightFormat::kQ4_1, 0, 576, 576});
    add({WeightFormat::kQ4_1, 0, 1536, 576});
    add({WeightFormat::kQ8_0, 0, 576, 49152});
    add({WeightFormat::kInt4, 0, 256, 768, DType::kBF16, AdapterKind::kOft, 32});
    add({WeightFormat::kInt4, 0, 256, 768, DType::kBF16, AdapterKind::kLora, 16});
}

// Random bits of a kind that repeats: a large matrix is made fast.
std::vector<uint8_t> repeated(const std::vector<uint8_t>& block, int64_t bytes) {
    std::vector<uint8_t> all(static_cast<size_t>(bytes));
    for (size_t at = 0; at < all.size(); at += block.size()) {
        std::memcpy(&all[at], block.data(), std::min(block.size(), all.size() - at));
    }
    return all;
}

std::vector<uint8_t> random_bf16(int64_t count, Random& random) {
    constexpr int64_t kPeriod = 1048573;  // a prime: neighbouring rows differ
    std::vector<uint8_t> block;
    for (const float value : random.normals(kPeriod)) {
        const bf16 rounded = to_bf16(value);
        block.resize(block.size() + sizeof rounded);
        std::memcpy(&block[block.size() - sizeof rounded], &rounded, sizeof rounded);
    }
    return repeated(block, count * int64_t{sizeof(bf16)});
}

Tensor as_bf16(const Tensor& bytes, int64_t rows, int64_t cols) {
    Tensor t = bytes;
    t.dtype = DType::kBF16;
    t.rank = 2;
    t.shape = {rows, cols};
    return t;
}

// Products at training's row counts, several a run, so that launches hide behind each other.
Case rate_case(const std::string& name, const Shape& s, bool backward) {
    constexpr int kProducts = 8;
    Random random(1);
    const TestWeight pattern = make_weight(s.format, 64, 16416, random);
    QuantizedMatrix shape = pattern.shape;
    shape.rows = s.out;
    shape.cols = s.in;
    Case c;
    c.op = "linear_rate";
    c.name = fmt::format("{} {}{}", name, name_of(s), backward ? " dgrad" : "");
    const int64_t from = backward ? s.out : s.in;
    const int64_t to = backward ? s.in : s.out;
    c.inputs = {
        raw_input("x", random_bf16(s.rows * from, random), {}),
        raw_input("w", repeated(pattern.data, row_bytes(s.format, s.in) * s.out), {}),
        raw_input(
            "scales", repeated(pattern.scales, std::max<int64_t>(1, shape.scale_bytes())), {}
        )};
    c.outputs = {{"y", DType::kBF16, {s.rows, to}, false}};
    c.run = [s, shape, from, backward](Stream& stream, const Tensors& in, const Tensors& out) {
        LinearParams p;
        p.w = at_tensors(shape, in[1], in[2]);
        p.x = backward ? out[0] : as_bf16(in[0], s.rows, from);
        for (int i = 0; i < kProducts; ++i) {
            if (backward) {
                linear_backward(stream, p, as_bf16(in[0], s.rows, from), out[0], false, {});
            } else {
                linear(stream, p, out[0]);
            }
        }
    };
    c.flops = 2.0 * kProducts * static_cast<double>(s.rows) * static_cast<double>(s.in * s.out);
    return c;
}

void add_rate_cases(CaseList& cases) {
    struct Layer {
        const char* name;
        int64_t in, out;
    };

    constexpr Layer kLayers[] = {
        {"0.6B q", 1024, 2048},
        {"0.6B o", 2048, 1024},
        {"0.6B gate", 1024, 3072},
        {"0.6B down", 3072, 1024},
        {"4B q", 2560, 4096},
        {"4B o", 4096, 2560},
        {"4B gate", 2560, 9728},
        {"4B down", 9728, 2560},
        {"8B q", 4096, 4096},
        {"8B gate", 4096, 12288},
        {"8B down", 12288, 4096},
    };
    for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kInt4}) {
        for (const Layer& layer : kLayers) {
            for (const auto& [rows, backward] :
                 {std::pair{2048, false}, std::pair{8192, false}, std::pair{8192, true}}) {
                Case c;
                c.op = "linear_rate";
                c.perf_only = true;
                c.gpu_only = true;
                c.prepare = [=](Case& self) {
                    self = rate_case(layer.name, {format, rows, layer.in, layer.out}, backward);
                    self.perf_only = true;
                };
                cases.push_back(c);
            }
        }
    }
}

}  // namespace

void add_linear_cases(CaseList& cases) {
    add_correctness_cases(cases);
    // float32 outputs see a weight value that is off by one bit; bf16 outputs would not.
    for (const DType compute : {DType::kBF16, DType::kF32}) {
        const auto add = [&](const Shape& s) {
            Random random(cases.size() + 1);
            cases.push_back(f32_out_case(s, random));
        };
        add({WeightFormat::kBF16, 6, 48, 392, compute});
        add({WeightFormat::kNvFp4, 6, 48, 64, compute});
        add({WeightFormat::kFp8, 3, 270, 200, compute});
        for (const WeightFormat format : kFormats) {
            add({format, 17, 96, 99, compute});
        }
    }
    add_gpu_cases(cases);
    add_many_rows_cases(cases);
    add_decoded_cases(cases);
    add_perf_cases(cases);
    add_rate_cases(cases);
}

}  // namespace orbit::opcheck
