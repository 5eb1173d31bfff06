// swiglu, its backward, and add.
#include <fmt/core.h>

#include <cmath>

#include "opcheck/cases.h"
#include "ops/activation.h"

namespace orbit::opcheck {
namespace {

Case two_inputs(const char* op, int64_t rows, int64_t width, DType compute, float scale) {
    Random random(static_cast<uint64_t>(rows * width));
    Case c;
    c.op = op;
    c.name = fmt::format("{}x{}{}", rows, width, compute == DType::kF32 ? " (f32)" : "");
    for (const char* name : {"a", "b"}) {
        const Input in = input(name, compute, {rows, width}, random.normals(rows * width, scale));
        c.inputs.push_back(per_row(in));
    }
    c.outputs = {{"y", compute, {rows, width}, true}};
    c.forward_tolerance = compute == DType::kF32 ? 1e-6 : 5e-3;
    c.grad_tolerance = compute == DType::kF32 ? 1e-5 : 1e-2;
    c.bytes = static_cast<double>(3 * rows * width * dtype_bytes(compute));
    return c;
}

Values swiglu_reference(const Values& in) {
    std::vector<double> y(in[0].size());
    for (size_t i = 0; i < y.size(); ++i) {
        y[i] = in[0][i] / (1 + std::exp(-in[0][i])) * in[1][i];
    }
    return {y};
}

Values add_reference(const Values& in) {
    std::vector<double> y(in[0].size());
    for (size_t i = 0; i < y.size(); ++i) {
        y[i] = in[0][i] + in[1][i];
    }
    return {y};
}

void add_shape(CaseList& cases, int64_t rows, int64_t width, DType compute) {
    Case gated = two_inputs("swiglu", rows, width, compute, 3.0f);
    for (Input& in : gated.inputs) {
        in = with_grad(in, compute);
    }
    gated.run = [](Stream& stream, const Tensors& in, const Tensors& out) {
        swiglu(stream, in[0], in[1], out[0]);
    };
    gated.backward = [](Stream& stream, const Tensors& in, const Tensors& d_out, const Tensors& d_in
                     ) { swiglu_backward(stream, in[0], in[1], d_out[0], d_in[0], d_in[1]); };
    gated.reference = swiglu_reference;
    cases.push_back(gated);

    Case sum = two_inputs("add", rows, width, compute, 1.0f);
    sum.run = [](Stream& stream, const Tensors& in, const Tensors& out) {
        add(stream, in[0], in[1], out[0]);
    };
    sum.reference = add_reference;
    cases.push_back(sum);
}

}  // namespace

void add_activation_cases(CaseList& cases) {
    for (const DType compute : {DType::kBF16, DType::kF32}) {
        add_shape(cases, 1, 1, compute);
        add_shape(cases, 5, 37, compute);
        add_shape(cases, 70, 704, compute);
    }
}

}  // namespace orbit::opcheck
