// norm_rope and its backward: with and without the norm, both layouts, partial rotation.
#include <fmt/core.h>

#include <cmath>

#include "opcheck/cases.h"
#include "ops/rope.h"

namespace orbit::opcheck {
namespace {

constexpr float kEps = 1e-6f;
constexpr int32_t kMaxPositions = 300;

struct Shape {
    int64_t tokens;
    int64_t heads;
    int64_t d;
    int32_t rotary;
    bool interleaved;
    bool norm;
    DType compute;
};

enum : size_t { kX, kWeight, kCosine, kSine, kPositions };

std::vector<double> norm_head(const Shape& s, const Values& in, size_t at) {
    const auto d = static_cast<size_t>(s.d);
    std::vector<double> head(d);
    double squares = 0;
    for (size_t i = 0; i < d; ++i) {
        head[i] = in[kX][at + i];
        squares += head[i] * head[i];
    }
    const double mean = squares / static_cast<double>(d);
    const double scale = 1 / std::sqrt(mean + static_cast<double>(kEps));
    for (size_t i = 0; i < d && s.norm; ++i) {
        head[i] *= scale * in[kWeight][i];
    }
    return head;
}

Values reference(const Shape& s, const Values& in) {
    const auto d = static_cast<size_t>(s.d);
    const auto half = static_cast<size_t>(s.rotary / 2);
    std::vector<double> y(in[kX].size());
    for (size_t at = 0; at < y.size(); at += d) {
        const std::vector<double> head = norm_head(s, in, at);
        const auto token = at / (d * static_cast<size_t>(s.heads));
        const auto position = static_cast<size_t>(in[kPositions][token]);
        std::copy(head.begin(), head.end(), y.begin() + static_cast<int64_t>(at));
        for (size_t i = 0; i < half; ++i) {
            const size_t first = s.interleaved ? 2 * i : i;
            const size_t second = s.interleaved ? 2 * i + 1 : i + half;
            const double cosine = in[kCosine][position * half + i];
            const double sine = in[kSine][position * half + i];
            y[at + first] = head[first] * cosine - head[second] * sine;
            y[at + second] = head[first] * sine + head[second] * cosine;
        }
    }
    return {y};
}

NormRopeParams params_of(const Shape& s, const Tensors& in) {
    NormRopeParams p;
    p.x = in[kX];
    p.norm_weight = s.norm ? in[kWeight].as<float>() : nullptr;
    p.eps = kEps;
    p.rope.cosine = in[kCosine].as<float>();
    p.rope.sine = in[kSine].as<float>();
    p.rope.rotary_dim = s.rotary;
    p.rope.max_positions = kMaxPositions;
    p.rope.interleaved = s.interleaved;
    p.positions = in[kPositions].as<int32_t>();
    return p;
}

void add_case(CaseList& cases, const Shape& s) {
    Random random(cases.size() + 1);
    const int64_t half = s.rotary / 2;
    std::vector<float> cosine;
    std::vector<float> sine;
    for (int64_t i = 0; i < kMaxPositions * half; ++i) {
        const double frequency =
            std::pow(1e4, -static_cast<double>(i % half) / static_cast<double>(half));
        const double angle = static_cast<double>(i / half) * frequency;
        cosine.push_back(static_cast<float>(std::cos(angle)));
        sine.push_back(static_cast<float>(std::sin(angle)));
    }
    std::vector<float> positions;
    for (int64_t t = 0; t < s.tokens; ++t) {
        positions.push_back(static_cast<float>(random.below(kMaxPositions)));
    }
    const bool f32 = s.compute == DType::kF32;
    Case c;
    c.op = "norm_rope";
    c.name = fmt::format(
        "{}x{}x{} rotary {}{}{}{}",
        s.tokens,
        s.heads,
        s.d,
        s.rotary,
        s.interleaved ? " interleaved" : "",
        s.norm ? " norm" : "",
        f32 ? " (f32)" : ""
    );
    const int64_t count = s.tokens * s.heads * s.d;
    const Input x = input("x", s.compute, {s.tokens, s.heads, s.d}, random.normals(count));
    c.inputs = {
        with_grad(per_row(x), s.compute),
        input("weight", DType::kF32, {s.d}, random.normals(s.d)),
        input("cosine", DType::kF32, {kMaxPositions, half}, cosine),
        input("sine", DType::kF32, {kMaxPositions, half}, sine),
        per_row(input("positions", DType::kI32, {s.tokens}, positions)),
    };
    c.outputs = {{"y", s.compute, {s.tokens, s.heads, s.d}, true}};
    c.run = [s](Stream& stream, const Tensors& in, const Tensors& out) {
        norm_rope(stream, params_of(s, in), out[0]);
    };
    c.backward = [s](Stream& stream, const Tensors& in, const Tensors& d_out, const Tensors& d_in) {
        norm_rope_backward(stream, params_of(s, in), d_out[0], d_in[kX]);
    };
    c.reference = [s](const Values& in) { return reference(s, in); };
    c.forward_tolerance = f32 ? 1e-6 : 5e-3;
    c.grad_tolerance = f32 ? 1e-5 : 1e-2;
    c.bytes = static_cast<double>(2 * count * dtype_bytes(s.compute));
    cases.push_back(c);
}

}  // namespace

void add_rope_cases(CaseList& cases) {
    for (const DType compute : {DType::kBF16, DType::kF32}) {
        for (const bool norm : {false, true}) {
            add_case(cases, {7, 3, 64, 64, false, norm, compute});
            add_case(cases, {5, 2, 32, 16, false, norm, compute});
            add_case(cases, {5, 2, 48, 48, true, norm, compute});
            add_case(cases, {4, 1, 10, 6, true, norm, compute});
            add_case(cases, {6, 2, 128, 128, false, norm, compute});
        }
    }
}

}  // namespace orbit::opcheck
