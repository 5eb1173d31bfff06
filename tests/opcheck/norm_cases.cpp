// rms_norm and its backward.
#include <fmt/core.h>

#include <cmath>

#include "opcheck/cases.h"
#include "ops/norm.h"

namespace orbit::opcheck {
namespace {

constexpr float kEps = 1e-5f;

Values reference(const Values& in, int64_t width) {
    const auto n = static_cast<size_t>(width);
    std::vector<double> y(in[0].size());
    for (size_t t = 0; t < y.size(); t += n) {
        double squares = 0;
        for (size_t i = 0; i < n; ++i) {
            squares += in[0][t + i] * in[0][t + i];
        }
        const double mean = squares / static_cast<double>(width);
        const double scale = 1 / std::sqrt(mean + static_cast<double>(kEps));
        for (size_t i = 0; i < n; ++i) {
            y[t + i] = in[1][i] * in[0][t + i] * scale;
        }
    }
    return {y};
}

void add_case(CaseList& cases, int64_t rows, int64_t width, DType compute) {
    Random random(cases.size() + 1);
    const bool f32 = compute == DType::kF32;
    Case c;
    c.op = "rms_norm";
    c.name = fmt::format("{}x{}{}", rows, width, f32 ? " (f32)" : "");
    const Input x = input("x", compute, {rows, width}, random.normals(rows * width, 2.0f));
    c.inputs = {
        with_grad(per_row(x), compute),
        input("weight", DType::kF32, {width}, random.normals(width)),
    };
    c.outputs = {{"y", compute, {rows, width}, true}};
    c.run = [](Stream& stream, const Tensors& in, const Tensors& out) {
        rms_norm(stream, in[0], in[1].as<float>(), kEps, out[0]);
    };
    c.backward = [](Stream& stream, const Tensors& in, const Tensors& d_out, const Tensors& d_in) {
        // d_in starts at zero, so adding must give what overwriting gives.
        rms_norm_backward(stream, in[0], in[1].as<float>(), kEps, d_out[0], d_in[0], true);
    };
    c.reference = [width](const Values& in) { return reference(in, width); };
    c.forward_tolerance = f32 ? 1e-6 : 5e-3;
    c.grad_tolerance = f32 ? 1e-5 : 1e-2;
    c.bytes = static_cast<double>(2 * rows * width * dtype_bytes(compute));
    cases.push_back(c);
}

}  // namespace

void add_norm_cases(CaseList& cases) {
    for (const DType compute : {DType::kBF16, DType::kF32}) {
        for (const int64_t width : {2, 7, 33, 64, 256, 576}) {
            add_case(cases, 9, width, compute);
        }
    }
    add_case(cases, 2000, 256, DType::kBF16);
    add_case(cases, 5, 1500, DType::kBF16);
    add_case(cases, 5, 5130, DType::kBF16);  // more than a thread keeps in registers on a GPU
}

}  // namespace orbit::opcheck
