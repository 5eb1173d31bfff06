// norm_rope and its backward: with and without the norm, both layouts, partial rotation; and q, k
// and v in one launch, whose last output counts the values that differ from those of the ops one by
// one.
#include <fmt/core.h>

#include <algorithm>
#include <cmath>

#include "opcheck/cases.h"
#include "ops/attention.h"
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

struct Table {
    std::vector<float> cosine;
    std::vector<float> sine;
};

Table make_table(int64_t half) {
    Table table;
    for (int64_t i = 0; i < kMaxPositions * half; ++i) {
        const double frequency =
            std::pow(1e4, -static_cast<double>(i % half) / static_cast<double>(half));
        const double angle = static_cast<double>(i / half) * frequency;
        table.cosine.push_back(static_cast<float>(std::cos(angle)));
        table.sine.push_back(static_cast<float>(std::sin(angle)));
    }
    return table;
}

std::vector<float> random_positions(int64_t tokens, Random& random) {
    std::vector<float> positions;
    for (int64_t t = 0; t < tokens; ++t) {
        positions.push_back(static_cast<float>(random.below(kMaxPositions)));
    }
    return positions;
}

void add_case(CaseList& cases, const Shape& s) {
    Random random(cases.size() + 1);
    const int64_t half = s.rotary / 2;
    const Table table = make_table(half);
    const std::vector<float> positions = random_positions(s.tokens, random);
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
        input("cosine", DType::kF32, {kMaxPositions, half}, table.cosine),
        input("sine", DType::kF32, {kMaxPositions, half}, table.sine),
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

// ---- q, k and v in one launch; every token is a sequence of its own -----------------------------

enum : size_t { kQ, kK, kV, kQWeight, kKWeight, kCosines, kSines, kPlaces };

// The inputs of norm_rope for q or k.
template <typename Array>
Array inputs_of(const Array& in, size_t x, size_t weight) {
    return {in[x], in[weight], in[kCosines], in[kSines], in[kPlaces]};
}

std::vector<uint8_t> bytes_of(Stream& stream, const Tensor& x) {
    std::vector<uint8_t> bytes(static_cast<size_t>(x.bytes()));
    copy_to_host(stream, bytes.data(), x.data, bytes.size());
    return bytes;
}

// Empty pages, and the batch whose tokens stand at these positions.
RopeAppendParams append_params(Stream& stream, const Shape& s, const Tensors& in) {
    const int64_t tokens = in[kQ].shape[0];
    const int64_t blocks = pages_for(kMaxPositions);
    std::vector<int32_t> sequences, table;
    for (int64_t t = 0; t < tokens; ++t) {
        sequences.push_back(static_cast<int32_t>(t));
    }
    for (int64_t page = tokens * blocks; page > 0; --page) {
        table.push_back(static_cast<int32_t>(page - 1));
    }
    const auto upload = [&](const std::vector<int32_t>& values) {
        const size_t bytes = values.size() * sizeof(int32_t);
        auto* at = static_cast<int32_t*>(stream.scratch.take_bytes(bytes));
        copy_to_device(stream, at, values.data(), bytes);
        return at;
    };
    const auto pages = [&] {
        const int64_t heads = in[kK].shape[1];
        const Tensor x = stream.scratch.take(s.compute, {tokens * blocks, heads, kPageTokens, s.d});
        zero_fill(stream, x.data, static_cast<size_t>(x.bytes()));
        return x;
    };
    RopeAppendParams p;
    p.q = params_of(s, inputs_of(in, kQ, kQWeight));
    p.k = params_of(s, inputs_of(in, kK, kKWeight));
    p.v = in[kV];
    p.kv = {pages(), pages()};
    p.batch.num_tokens = static_cast<int32_t>(tokens);
    p.batch.num_sequences = static_cast<int32_t>(tokens);
    p.batch.max_blocks = static_cast<int32_t>(blocks);
    p.batch.max_positions = kMaxPositions;
    p.batch.positions = p.q.positions;
    p.batch.sequence_of = upload(sequences);
    p.batch.sequence_position = p.q.positions;
    p.batch.block_table = upload(table);
    return p;
}

void run_append(Stream& stream, const Shape& s, const Tensors& in, const Tensors& out) {
    const ScratchScope scope(stream.scratch);
    const RopeAppendParams together = append_params(stream, s, in);
    norm_rope_append(stream, together, out[0], out[1]);
    const RopeAppendParams apart = append_params(stream, s, in);
    const Tensor q = stream.scratch.take(s.compute, {in[kQ].shape[0], in[kQ].shape[1], s.d});
    AttentionParams rows;
    rows.k = stream.scratch.take(s.compute, {in[kK].shape[0], in[kK].shape[1], s.d});
    rows.v = apart.v;
    rows.kv = apart.kv;
    rows.batch = apart.batch;
    norm_rope(stream, apart.q, q);
    norm_rope(stream, apart.k, rows.k);
    append_kv(stream, rows);
    int64_t count = 0;
    const auto compare = [&](const Tensor& got, const Tensor& want) {
        const std::vector<uint8_t> g = bytes_of(stream, got);
        const std::vector<uint8_t> w = bytes_of(stream, want);
        for (size_t i = 0; i < g.size(); ++i) {
            count += g[i] != w[i] ? 1 : 0;
        }
    };
    compare(out[0], q);
    compare(out[1], rows.k);
    compare(together.kv.k_pages, apart.kv.k_pages);
    compare(together.kv.v_pages, apart.kv.v_pages);
    const auto result = static_cast<float>(count);
    copy_to_device(stream, out[2].data, &result, sizeof(result));
    synchronize(stream);
}

// s: of q.
void add_append_case(CaseList& cases, const Shape& s, int64_t kv_heads) {
    Random random(cases.size() + 1);
    const int64_t half = s.rotary / 2;
    const Table table = make_table(half);
    const std::vector<float> positions = random_positions(s.tokens, random);
    const auto heads = [&](const char* name, int64_t count) {
        const int64_t values = s.tokens * count * s.d;
        return per_row(input(name, s.compute, {s.tokens, count, s.d}, random.normals(values)));
    };
    Shape of_k = s;
    of_k.heads = kv_heads;
    const bool f32 = s.compute == DType::kF32;
    Case c;
    c.op = "norm_rope";
    c.name = fmt::format(
        "append {}x{}+{}x{} rotary {}{}{}",
        s.tokens,
        s.heads,
        kv_heads,
        s.d,
        s.rotary,
        s.norm ? " norm" : "",
        f32 ? " (f32)" : ""
    );
    c.inputs = {
        heads("q", s.heads),
        heads("k", kv_heads),
        heads("v", kv_heads),
        input("q weight", DType::kF32, {s.d}, random.normals(s.d)),
        input("k weight", DType::kF32, {s.d}, random.normals(s.d)),
        input("cosine", DType::kF32, {kMaxPositions, half}, table.cosine),
        input("sine", DType::kF32, {kMaxPositions, half}, table.sine),
        per_row(input("positions", DType::kI32, {s.tokens}, positions)),
    };
    c.outputs = {
        {"q", s.compute, {s.tokens, s.heads, s.d}, true},
        {"k", s.compute, {s.tokens, kv_heads, s.d}, true},
        {"values with other bits one by one", DType::kF32, {1}, false},
    };
    c.run = [s](Stream& stream, const Tensors& in, const Tensors& out) {
        run_append(stream, s, in, out);
    };
    c.reference = [s, of_k](const Values& in) {
        return Values{
            reference(s, inputs_of(in, kQ, kQWeight))[0],
            reference(of_k, inputs_of(in, kK, kKWeight))[0],
            {0.0}};
    };
    c.forward_tolerance = f32 ? 1e-6 : 5e-3;
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
    for (const bool norm : {false, true}) {
        add_append_case(cases, {1, 32, 128, 128, false, norm, DType::kBF16}, 8);
        add_append_case(cases, {9, 5, 128, 128, false, norm, DType::kBF16}, 1);
        add_append_case(cases, {7, 6, 64, 64, false, norm, DType::kBF16}, 2);
        add_append_case(cases, {5, 3, 128, 64, false, norm, DType::kBF16}, 3);
        add_append_case(cases, {5, 4, 48, 48, true, norm, DType::kF32}, 2);
    }
    // Enough rows for the GPU's four a warp.
    add_append_case(cases, {90, 33, 128, 128, false, true, DType::kBF16}, 7);
    cases.back().gpu_only = true;
}

}  // namespace orbit::opcheck
