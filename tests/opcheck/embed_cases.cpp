// embed in every format; gather_rows with scatter_rows as its adjoint.
#include <fmt/core.h>

#include "opcheck/cases.h"
#include "opcheck/weights.h"
#include "ops/embed.h"

namespace orbit::opcheck {
namespace {

void add_embed_case(CaseList& cases, WeightFormat format, DType compute) {
    constexpr int64_t kRows = 50;
    constexpr int64_t kWidth = 96;
    constexpr int64_t kTokens = 23;
    Random random(cases.size() + 1);
    const TestWeight w = make_weight(format, kRows, kWidth, random);
    std::vector<float> ids;
    for (int64_t t = 0; t < kTokens; ++t) {
        ids.push_back(static_cast<float>(random.below(kRows)));
    }
    const bool f32 = compute == DType::kF32;
    Case c;
    c.op = "embed";
    c.name = fmt::format("{}{}", format_name(format), f32 ? " (f32)" : "");
    c.inputs = {
        per_row(input("ids", DType::kI32, {kTokens}, ids)),
        weight_input(w, f32),
        raw_input("scales", w.scales, {}),
    };
    c.outputs = {{"y", compute, {kTokens, kWidth}, true}};
    const QuantizedMatrix shape = w.shape;
    c.run = [shape](Stream& stream, const Tensors& in, const Tensors& out) {
        embed(stream, at_tensors(shape, in[1], in[2]), in[0].as<int32_t>(), out[0]);
    };
    c.reference = [](const Values& in) {
        std::vector<double> y;
        for (const double id : in[0]) {
            const auto from = in[1].begin() + static_cast<int64_t>(id) * kWidth;
            y.insert(y.end(), from, from + kWidth);
        }
        return Values{y};
    };
    c.forward_tolerance = 0;
    cases.push_back(c);
}

void add_gather_case(CaseList& cases, DType compute) {
    constexpr int64_t kRows = 40;
    constexpr int64_t kPicked = 13;
    constexpr int64_t kWidth = 33;
    Random random(cases.size() + 1);
    std::vector<float> index;
    for (int64_t i = 0; i < kPicked; ++i) {
        index.push_back(static_cast<float>((i * 7 + 3) % kRows));  // distinct
    }
    Case c;
    c.op = "gather_rows";
    c.name = compute == DType::kF32 ? "f32" : "bf16";
    const Input x = input("x", compute, {kRows, kWidth}, random.normals(kRows * kWidth));
    c.inputs = {with_grad(x, compute), per_row(input("index", DType::kI32, {kPicked}, index))};
    c.outputs = {{"y", compute, {kPicked, kWidth}, true}};
    c.run = [](Stream& stream, const Tensors& in, const Tensors& out) {
        gather_rows(stream, in[0], in[1].as<int32_t>(), out[0]);
    };
    c.backward = [](Stream& stream, const Tensors& in, const Tensors& d_out, const Tensors& d_in) {
        scatter_rows(stream, d_out[0], in[1].as<int32_t>(), d_in[0]);
    };
    c.reference = [](const Values& in) {
        std::vector<double> y;
        for (const double row : in[1]) {
            const auto from = in[0].begin() + static_cast<int64_t>(row) * kWidth;
            y.insert(y.end(), from, from + kWidth);
        }
        return Values{y};
    };
    c.forward_tolerance = 0;
    c.grad_tolerance = 1e-6;
    cases.push_back(c);
}

}  // namespace

void add_embed_cases(CaseList& cases) {
    constexpr WeightFormat kFormats[] = {
        WeightFormat::kBF16,
        WeightFormat::kF32,
        WeightFormat::kF16,
        WeightFormat::kInt4,
        WeightFormat::kQ8_0,
        WeightFormat::kQ4_0,
        WeightFormat::kQ4_1,
    };
    for (const DType compute : {DType::kBF16, DType::kF32}) {
        for (const WeightFormat format : kFormats) {
            add_embed_case(cases, format, compute);
        }
        add_gather_case(cases, compute);
    }
}

}  // namespace orbit::opcheck
