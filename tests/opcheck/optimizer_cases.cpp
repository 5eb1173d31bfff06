// adamw and global_norm.
#include <fmt/core.h>

#include <cmath>

#include "opcheck/cases.h"
#include "ops/optimizer.h"

namespace orbit::opcheck {
namespace {

AdamWParams params_at(int64_t step) {
    AdamWParams params;
    params.lr = 3e-3;
    params.beta2 = 0.98;
    params.weight_decay = 0.05;
    params.step = step;
    params.grad_scale = 0.3;
    return params;
}

Values adamw_reference(const AdamWParams& k, const Values& in) {
    Values out(3, std::vector<double>(in[0].size()));
    const auto step = static_cast<double>(k.step);
    for (size_t i = 0; i < in[0].size(); ++i) {
        const double g = in[3][i] * k.grad_scale;
        const double m = k.beta1 * in[1][i] + (1 - k.beta1) * g;
        const double v = k.beta2 * in[2][i] + (1 - k.beta2) * g * g;
        const double m_hat = m / (1 - std::pow(k.beta1, step));
        const double v_hat = v / (1 - std::pow(k.beta2, step));
        const double decayed = in[0][i] * (1 - k.lr * k.weight_decay);
        out[0][i] = decayed - k.lr * m_hat / (std::sqrt(v_hat) + k.eps);
        out[1][i] = m;
        out[2][i] = v;
    }
    return out;
}

void add_adamw_case(CaseList& cases, int64_t count, int64_t step) {
    Random random(cases.size() + 1);
    const AdamWParams params = params_at(step);
    Case c;
    c.op = "adamw";
    c.name = fmt::format("{} step {}", count, step);
    std::vector<float> v = random.normals(count, 0.01f);
    for (float& value : v) {
        value *= value;
    }
    c.inputs = {
        per_row(input("p", DType::kF32, {count}, random.normals(count))),
        per_row(input("m", DType::kF32, {count}, random.normals(count, 0.01f))),
        per_row(input("v", DType::kF32, {count}, v)),
        per_row(input("g", DType::kF32, {count}, random.normals(count, 0.02f))),
    };
    c.outputs = {
        {"p", DType::kF32, {count}, true},
        {"m", DType::kF32, {count}, true},
        {"v", DType::kF32, {count}, true},
    };
    c.run = [params](Stream& stream, const Tensors& in, const Tensors& out) {
        for (size_t i = 0; i < 3; ++i) {
            const auto bytes = static_cast<size_t>(in[i].bytes());
            copy_on_device(stream, out[i].data, in[i].data, bytes);
        }
        adamw(
            stream,
            params,
            out[0].as<float>(),
            out[1].as<float>(),
            out[2].as<float>(),
            in[3].as<float>(),
            in[3].numel()
        );
    };
    c.reference = [params](const Values& in) { return adamw_reference(params, in); };
    c.forward_tolerance = 1e-6;
    c.bytes = static_cast<double>(28 * count);
    cases.push_back(c);
}

void add_norm_case(CaseList& cases, int64_t count) {
    Random random(cases.size() + 1);
    Case c;
    c.op = "global_norm";
    c.name = fmt::format("{}", count);
    c.inputs = {input("g", DType::kF32, {count}, random.normals(count, 1e-4f))};
    c.outputs = {{"norm", DType::kF32, {1}, false}};
    c.run = [](Stream& stream, const Tensors& in, const Tensors& out) {
        const auto norm = static_cast<float>(global_norm(stream, in[0].as<float>(), in[0].numel()));
        copy_to_device(stream, out[0].data, &norm, sizeof(norm));
    };
    c.reference = [](const Values& in) {
        double sum = 0;
        for (const double g : in[0]) {
            sum += g * g;
        }
        return Values{{std::sqrt(sum)}};
    };
    c.forward_tolerance = 1e-7;
    c.bytes = static_cast<double>(4 * count);
    cases.push_back(c);
}

}  // namespace

void add_optimizer_cases(CaseList& cases) {
    for (const int64_t count : {1, 19, 40'000}) {
        add_adamw_case(cases, count, 1);
        add_adamw_case(cases, count, 700);
        add_norm_case(cases, count);
    }
    add_norm_case(cases, 4096);
}

}  // namespace orbit::opcheck
