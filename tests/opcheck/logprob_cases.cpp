// The head: token_logprobs with its backward, and sample_tokens.
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "base/philox.h"
#include "opcheck/cases.h"
#include "opcheck/weights.h"
#include "ops/logprob.h"

namespace orbit::opcheck {
namespace {

struct Shape {
    int64_t rows;
    int64_t vocabulary;
    int64_t width;
    int32_t padding;  // ids at the end that are never drawn
    SamplingFilter filter;
    DType compute;
};

enum : size_t { kH, kW, kScales, kTargets };

int64_t tokens_of(const Shape& s) {
    return s.vocabulary - s.padding;
}

// Tempered logits of one row; -infinity where the filter drops the id.
std::vector<double> filtered(const Shape& s, const Values& in, size_t row) {
    const auto width = static_cast<size_t>(s.width);
    const auto count = static_cast<size_t>(s.vocabulary);
    const SamplingFilter& f = s.filter;
    std::vector<double> z(count);
    for (size_t v = 0; v < count; ++v) {
        for (size_t i = 0; i < width; ++i) {
            z[v] += in[kH][row * width + i] * in[kW][v * width + i];
        }
        z[v] /= f.temperature > 0 ? static_cast<double>(f.temperature) : 1.0;
    }
    if (f.plain()) {
        return z;
    }
    std::vector<size_t> order(static_cast<size_t>(tokens_of(s)));
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return z[a] > z[b]; });
    if (f.top_k > 0) {
        order.resize(std::min(order.size(), static_cast<size_t>(f.top_k)));
    }
    const auto weight = [&](size_t id) { return std::exp(z[id] - z[order[0]]); };
    double total = 0;
    for (const size_t id : order) {
        total += weight(id);
    }
    double sum = 0;
    std::vector<double> kept(count, -INFINITY);
    for (const size_t id : order) {
        if (f.top_p < 1.0f && sum >= static_cast<double>(f.top_p) * total) {
            break;
        }
        sum += weight(id);
        if (weight(id) >= static_cast<double>(f.min_p)) {
            kept[id] = z[id];
        }
    }
    return kept;
}

double lse_of(const std::vector<double>& z) {
    const double largest = *std::max_element(z.begin(), z.end());
    double total = 0;
    for (const double value : z) {
        total += std::exp(value - largest);
    }
    return largest + std::log(total);
}

Values logprob_reference(const Shape& s, const Values& in) {
    const auto rows = in[kTargets].size();
    std::vector<double> logprob(rows);
    std::vector<double> entropy(rows);
    for (size_t row = 0; row < rows; ++row) {
        const std::vector<double> z = filtered(s, in, row);
        const double lse = lse_of(z);
        logprob[row] = z[static_cast<size_t>(in[kTargets][row])] - lse;
        for (const double value : z) {
            entropy[row] -= std::isfinite(value) ? std::exp(value - lse) * (value - lse) : 0.0;
        }
    }
    return {logprob, entropy};
}

HeadParams params_of(const Shape& s, const QuantizedMatrix& w, const Tensors& in) {
    HeadParams p;
    p.h = in[kH];
    p.w = at_tensors(w, in[kW], in[kScales]);
    p.num_tokens = static_cast<int32_t>(tokens_of(s));
    return p;
}

std::string name_of(const Shape& s) {
    std::string name = fmt::format("{}x{}x{}", s.rows, s.vocabulary, s.width);
    const SamplingFilter& f = s.filter;
    name += f.temperature != 1.0f ? fmt::format(" t{:.1f}", f.temperature) : "";
    name += f.top_k > 0 ? fmt::format(" k{}", f.top_k) : "";
    name += f.top_p < 1.0f ? fmt::format(" p{:.2f}", f.top_p) : "";
    name += f.min_p > 0.0f ? fmt::format(" min-p{:.2f}", f.min_p) : "";
    return name + (s.compute == DType::kF32 ? " (f32)" : "");
}

// The inputs but the targets.
std::vector<Input> inputs_of(const Shape& s, const TestWeight& w, Random& random) {
    const bool f32 = s.compute == DType::kF32;
    const Input h = input("h", s.compute, {s.rows, s.width}, random.normals(s.rows * s.width));
    return {
        per_row(h),
        weight_input(w, f32),
        raw_input("scales", w.scales, {}),
    };
}

void add_logprob_case(CaseList& cases, const Shape& s) {
    Random random(cases.size() + 1);
    const TestWeight w = make_weight(WeightFormat::kBF16, s.vocabulary, s.width, random);
    const QuantizedMatrix weight = w.shape;
    Case c;
    c.op = "token_logprobs";
    c.name = name_of(s);
    c.inputs = inputs_of(s, w, random);
    c.inputs[kH] = with_grad(c.inputs[kH], s.compute);
    Values values;
    for (const Input& in : c.inputs) {
        values.emplace_back(in.values.begin(), in.values.end());
    }
    std::vector<float> targets;
    for (int64_t row = 0; row < s.rows; ++row) {
        const std::vector<double> z = filtered(s, values, static_cast<size_t>(row));
        int64_t target = random.below(tokens_of(s));
        while (!std::isfinite(z[static_cast<size_t>(target)])) {  // a kept id
            target = (target + 1) % tokens_of(s);
        }
        targets.push_back(static_cast<float>(target));
    }
    c.inputs.push_back(per_row(input("targets", DType::kI32, {s.rows}, targets)));
    c.outputs = {
        {"logprob", DType::kF32, {s.rows}, true}, {"entropy", DType::kF32, {s.rows}, true}};
    c.run = [s, weight](Stream& stream, const Tensors& in, const Tensors& out) {
        const HeadParams p = params_of(s, weight, in);
        const auto* ids = in[kTargets].as<int32_t>();
        token_logprobs(stream, p, ids, s.filter, out[0].as<float>(), out[1].as<float>());
    };
    c.backward =
        [s, weight](Stream& stream, const Tensors& in, const Tensors& d_out, const Tensors& d_in) {
            const HeadParams p = params_of(s, weight, in);
            const auto* ids = in[kTargets].as<int32_t>();
            const auto* d_logprob = d_out[0].as<float>();
            const auto* d_entropy = d_out[1].as<float>();
            token_logprobs_backward(stream, p, ids, s.filter, d_logprob, d_entropy, d_in[kH]);
        };
    c.reference = [s](const Values& in) { return logprob_reference(s, in); };
    c.forward_tolerance = 1e-5;
    c.grad_tolerance = s.compute == DType::kF32 ? 1e-4 : 1e-2;
    c.flops = 2.0 * static_cast<double>(s.rows * s.vocabulary * s.width);
    cases.push_back(c);
}

// -log E in float64, as algorithms.md 5.3.
double gumbel(const SampleRow& row, uint32_t id) {
    const PhiloxWords words = philox(
        id >> 2,
        static_cast<uint32_t>(row.position),
        static_cast<uint32_t>(row.request),
        static_cast<uint32_t>(row.request >> 32),
        static_cast<uint32_t>(row.seed),
        static_cast<uint32_t>(row.seed >> 32)
    );
    return -std::log(-std::log1p(-(static_cast<double>(words.word[id & 3]) + 0.5) * 0x1p-32));
}

Values sample_reference(const Shape& s, const std::vector<SampleRow>& rows, const Values& in) {
    std::vector<double> tokens;
    std::vector<double> logprob;
    for (size_t row = 0; row < rows.size(); ++row) {
        const std::vector<double> z = filtered(s, in, row);
        size_t best = 0;
        double best_score = -INFINITY;
        for (size_t id = 0; id < static_cast<size_t>(tokens_of(s)); ++id) {
            const bool greedy = s.filter.temperature <= 0.0f;
            const double noise = greedy ? 0.0 : gumbel(rows[row], static_cast<uint32_t>(id));
            if (z[id] + noise > best_score) {
                best_score = z[id] + noise;
                best = id;
            }
        }
        best = rows[row].forced >= 0 ? static_cast<size_t>(rows[row].forced) : best;
        tokens.push_back(static_cast<double>(best));
        logprob.push_back(z[best] - lse_of(z));
    }
    return {tokens, logprob};
}

void add_sample_case(CaseList& cases, const Shape& s) {
    Random random(cases.size() + 1);
    const TestWeight w = make_weight(WeightFormat::kBF16, s.vocabulary, s.width, random);
    const QuantizedMatrix weight = w.shape;
    std::vector<SampleRow> rows(static_cast<size_t>(s.rows));
    for (size_t i = 0; i < rows.size(); ++i) {
        rows[i].filter = s.filter;
        rows[i].seed = 0x123456789abcull + i % 2;
        rows[i].request = 0xfedcba9876543210ull + i / 3;
        rows[i].position = static_cast<int32_t>(i);
        rows[i].forced = i == 2 && s.filter.plain() ? 1 : -1;
    }
    Case c;
    c.op = "sample_tokens";
    c.name = name_of(s);
    c.inputs = inputs_of(s, w, random);
    Input raw = raw_input("rows", std::vector<uint8_t>(rows.size() * sizeof(SampleRow)), {});
    std::memcpy(raw.bytes.data(), rows.data(), raw.bytes.size());
    raw.shape = {s.rows, sizeof(SampleRow)};
    c.inputs.push_back(per_row(raw));
    c.outputs = {{"token", DType::kI32, {s.rows}, true}, {"logprob", DType::kF32, {s.rows}, true}};
    c.run = [s, weight](Stream& stream, const Tensors& in, const Tensors& out) {
        const auto* at = static_cast<const SampleRow*>(in[kTargets].data);
        const HeadParams p = params_of(s, weight, in);
        sample_tokens(stream, p, at, out[0].as<int32_t>(), out[1].as<float>());
    };
    c.reference = [s, rows](const Values& in) { return sample_reference(s, rows, in); };
    c.forward_tolerance = 1e-5;
    cases.push_back(c);
}

}  // namespace

void add_logprob_cases(CaseList& cases) {
    const std::vector<SamplingFilter> filters = {
        {1.0f, 1.0f, 0, 0.0f},
        {0.7f, 1.0f, 0, 0.0f},
        {1.0f, 1.0f, 20, 0.0f},
        {1.3f, 0.9f, 0, 0.0f},
        {1.0f, 1.0f, 0, 0.003f},
        {0.8f, 0.95f, 60, 0.001f},
    };
    for (const DType compute : {DType::kBF16, DType::kF32}) {
        for (const SamplingFilter& filter : filters) {
            add_logprob_case(cases, {11, 448, 64, 5, filter, compute});
            add_sample_case(cases, {11, 448, 64, 5, filter, compute});
        }
        add_logprob_case(cases, {1, 1, 32, 0, {}, compute});
        add_logprob_case(cases, {3, 2100, 32, 0, {}, compute});
        add_sample_case(cases, {3, 2100, 32, 40, {}, compute});
        add_sample_case(cases, {7, 100, 32, 3, {0.0f, 1.0f, 0, 0.0f}, compute});
    }
    add_logprob_case(cases, {300, 448, 64, 0, {}, DType::kBF16});
    // A vocabulary of many tiles, with and without filters.
    for (const SamplingFilter& filter :
         {SamplingFilter{}, SamplingFilter{0.8f, 0.95f, 60, 0.001f}}) {
        add_logprob_case(cases, {5, 20004, 32, 4, filter, DType::kBF16});
        cases.back().gpu_only = true;
        add_sample_case(cases, {40, 20004, 32, 4, filter, DType::kBF16});
        cases.back().gpu_only = true;
    }
}

}  // namespace orbit::opcheck
