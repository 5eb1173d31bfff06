#include <algorithm>
#include <cstring>
#include <vector>

#include "base/exact_math.h"
#include "ops/activation.h"
#include "ops/cuda_ops.h"
#include "ops/moe.h"

namespace orbit {
namespace {

template <typename Body>
void for_tokens(Stream& stream, int64_t count, const Body& body) {
    stream.threads().parallel_for(count, 16, [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
            body(t);
        }
    });
}

// Softmax of one row of logits in place, fp32, ascending.
void softmax(float* row, int64_t count) {
    const float top = *std::max_element(row, row + count);
    float sum = 0;
    for (int64_t e = 0; e < count; ++e) {
        row[e] = exact_exp(row[e] - top);
        sum += row[e];
    }
    for (int64_t e = 0; e < count; ++e) {
        row[e] /= sum;
    }
}

// The K largest scores, ties to the lower expert, then in ascending expert order.
void select(const float* scores, int32_t experts, int32_t selected, int32_t* expert) {
    std::vector<int32_t> order(static_cast<size_t>(experts));
    for (int32_t e = 0; e < experts; ++e) {
        order[static_cast<size_t>(e)] = e;
    }
    std::partial_sort(
        order.begin(),
        order.begin() + selected,
        order.end(),
        [&](int32_t a, int32_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; }
    );
    std::copy(order.begin(), order.begin() + selected, expert);
    std::sort(expert, expert + selected);
}

// Where the ids of token `t` lie.
char* record_place(const RouterParams& p, const RoutingPages& pages, int64_t t) {
    const int64_t position = p.batch.positions[t];
    const int64_t row = int64_t{p.batch.sequence_of[t]} * p.batch.max_blocks;
    const int64_t page = p.batch.block_table[row + position / kPageTokens];
    const int64_t token = page * kPageTokens + position % kPageTokens;
    return static_cast<char*>(pages.ids) + (token * pages.layers + p.layer) * pages.layer_bytes();
}

template <typename Id>
void write_ids(const int32_t* expert, int32_t count, char* to) {
    for (int32_t k = 0; k < count; ++k) {
        const auto id = static_cast<Id>(expert[k]);
        std::memcpy(to + static_cast<size_t>(k) * sizeof id, &id, sizeof id);
    }
}

template <typename Id>
void read_ids(const char* from, int32_t count, int32_t* expert) {
    for (int32_t k = 0; k < count; ++k) {
        Id id;
        std::memcpy(&id, from + static_cast<size_t>(k) * sizeof id, sizeof id);
        expert[k] = id;
    }
}

void record_or_replay(const RouterParams& p, int64_t t, int32_t* expert) {
    if (p.record.defined()) {
        (p.record.wide ? write_ids<uint16_t>
                       : write_ids<uint8_t>)(expert, p.num_selected, record_place(p, p.record, t));
    }
    if (p.replay.defined()) {
        (p.replay.wide ? read_ids<uint16_t>
                       : read_ids<uint8_t>)(record_place(p, p.replay, t), p.num_selected, expert);
    }
}

void sort_rows(const Routing& r) {
    std::fill_n(r.offsets, r.num_experts + 1, 0);
    const int64_t rows = static_cast<int64_t>(r.num_tokens) * r.num_selected;
    for (int64_t i = 0; i < rows; ++i) {
        ++r.offsets[r.expert[i] + 1];
    }
    for (int32_t e = 0; e < r.num_experts; ++e) {
        r.offsets[e + 1] += r.offsets[e];
    }
    std::vector<int32_t> next(r.offsets, r.offsets + r.num_experts);
    for (int64_t i = 0; i < rows; ++i) {
        const int32_t row = next[static_cast<size_t>(r.expert[i])]++;
        r.row_of[i] = row;
        r.token_of[row] = static_cast<int32_t>(i / r.num_selected);
    }
}

template <typename T>
void combine(Stream& stream, const Routing& r, Tensor x, Tensor residual, Tensor y) {
    const int64_t D = y.cols();
    for_tokens(stream, r.num_tokens, [&](int64_t t) {
        std::vector<float> sum(static_cast<size_t>(D), 0.0f);
        for (int32_t k = 0; k < r.num_selected; ++k) {
            const float weight = r.weight[t * r.num_selected + k];
            const T* row = x.as<T>() + r.row_of[t * r.num_selected + k] * D;
            for (int64_t d = 0; d < D; ++d) {
                sum[static_cast<size_t>(d)] += weight * to_float(row[d]);
            }
        }
        for (int64_t d = 0; d < D; ++d) {
            const float base = residual.defined() ? to_float(residual.as<T>()[t * D + d]) : 0.0f;
            store(y.as<T>() + t * D + d, sum[static_cast<size_t>(d)] + base);
        }
    });
}

template <typename T>
void combine_backward(
    Stream& stream, const Routing& r, Tensor x, Tensor dy, Tensor dx, float* d_weight
) {
    const int64_t D = dy.cols();
    for_tokens(stream, r.num_tokens, [&](int64_t t) {
        const T* g = dy.as<T>() + t * D;
        for (int32_t k = 0; k < r.num_selected; ++k) {
            const int64_t at = t * r.num_selected + k;
            const int64_t row = r.row_of[at];
            float dot = 0;
            for (int64_t d = 0; d < D; ++d) {
                dot += to_float(g[d]) * to_float(x.as<T>()[row * D + d]);
                store(dx.as<T>() + row * D + d, r.weight[at] * to_float(g[d]));
            }
            d_weight[at] = dot;
        }
    });
}

template <typename T>
void dispatch(Stream& stream, const Routing& r, Tensor x, Tensor y) {
    const int64_t D = x.cols();
    for_tokens(stream, static_cast<int64_t>(r.num_tokens) * r.num_selected, [&](int64_t row) {
        std::copy_n(x.as<T>() + r.token_of[row] * D, D, y.as<T>() + row * D);
    });
}

template <typename T>
void dispatch_backward(Stream& stream, const Routing& r, Tensor dy, Tensor dx, bool accumulate) {
    const int64_t D = dx.cols();
    for_tokens(stream, r.num_tokens, [&](int64_t t) {
        for (int64_t d = 0; d < D; ++d) {
            float sum = accumulate ? to_float(dx.as<T>()[t * D + d]) : 0.0f;
            for (int32_t k = 0; k < r.num_selected; ++k) {
                sum += to_float(dy.as<T>()[r.row_of[t * r.num_selected + k] * D + d]);
            }
            store(dx.as<T>() + t * D + d, sum);
        }
    });
}

}  // namespace

Routing make_routing(Stream& stream, int64_t tokens, int64_t experts, int64_t selected) {
    Routing r;
    r.num_tokens = static_cast<int32_t>(tokens);
    r.num_experts = static_cast<int32_t>(experts);
    r.num_selected = static_cast<int32_t>(selected);
    r.scores = stream.scratch.take(DType::kF32, {tokens, experts}).as<float>();
    r.weight = stream.scratch.take(DType::kF32, {tokens, selected}).as<float>();
    r.expert = stream.scratch.take(DType::kI32, {tokens, selected}).as<int32_t>();
    r.row_of = stream.scratch.take(DType::kI32, {tokens, selected}).as<int32_t>();
    r.token_of = stream.scratch.take(DType::kI32, {tokens, selected}).as<int32_t>();
    r.offsets = stream.scratch.take(DType::kI32, {experts + 1}).as<int32_t>();
    return r;
}

void route(Stream& stream, const RouterParams& p, const Routing& r) {
    for (const RoutingPages* pages : {&p.record, &p.replay}) {
        CHECK(!pages->defined() || pages->selected == p.num_selected);
        CHECK(!pages->defined() || pages->wide == (r.num_experts > 256));
    }
    if (!stream.is_cpu()) {
        cuda::route(stream, p, r);
        return;
    }
    linear_f32_out(
        stream, p.x, p.weight, make_tensor(r.scores, DType::kF32, {r.num_tokens, r.num_experts})
    );
    for_tokens(stream, r.num_tokens, [&](int64_t t) {
        float* scores = r.scores + t * r.num_experts;
        int32_t* expert = r.expert + t * r.num_selected;
        float* weight = r.weight + t * r.num_selected;
        softmax(scores, r.num_experts);
        select(scores, r.num_experts, r.num_selected, expert);
        record_or_replay(p, t, expert);
        float sum = 0;
        for (int32_t k = 0; k < r.num_selected; ++k) {
            sum += scores[expert[k]];
        }
        for (int32_t k = 0; k < r.num_selected; ++k) {
            weight[k] = p.normalize ? scores[expert[k]] / sum : scores[expert[k]];
        }
    });
    sort_rows(r);
}

void route_backward(
    Stream& stream, const RouterParams& p, const Routing& r, const float* d_weight, Tensor dx
) {
    if (!stream.is_cpu()) {
        cuda::route_backward(stream, p, r, d_weight, dx);
        return;
    }
    const ScratchScope scope(stream.scratch);
    const Tensor dz = stream.scratch.take(DType::kF32, {r.num_tokens, r.num_experts});
    for_tokens(stream, r.num_tokens, [&](int64_t t) {
        const float* s = r.scores + t * r.num_experts;
        const float* dw = d_weight + t * r.num_selected;
        const int32_t* expert = r.expert + t * r.num_selected;
        float* row = dz.as<float>() + t * r.num_experts;
        float sum = 0;
        float dot = 0;  // sum_j dw_j s_j over the chosen
        for (int32_t k = 0; k < r.num_selected; ++k) {
            sum += s[expert[k]];
            dot += dw[k] * s[expert[k]];
        }
        std::fill_n(row, r.num_experts, 0.0f);
        float through = 0;  // sum_j ds_j s_j over all
        for (int32_t k = 0; k < r.num_selected; ++k) {
            row[expert[k]] = p.normalize ? (dw[k] - dot / sum) / sum : dw[k];
            through += row[expert[k]] * s[expert[k]];
        }
        for (int32_t e = 0; e < r.num_experts; ++e) {
            row[e] = s[e] * (row[e] - through);
        }
    });
    Tensor from_router = dx;
    from_router.data = stream.scratch.take_bytes(static_cast<size_t>(dx.bytes()));
    linear_f32_out_backward(stream, dz, p.weight, from_router);
    add(stream, dx, from_router, dx);
}

void dispatch_rows(Stream& stream, const Routing& r, Tensor x, Tensor y) {
    if (!stream.is_cpu()) {
        cuda::dispatch_rows(stream, r, x, y);
    } else if (x.dtype == DType::kF32) {
        dispatch<float>(stream, r, x, y);
    } else {
        dispatch<bf16>(stream, r, x, y);
    }
}

void dispatch_rows_backward(
    Stream& stream, const Routing& r, Tensor dy, Tensor dx, bool accumulate
) {
    if (!stream.is_cpu()) {
        cuda::dispatch_rows_backward(stream, r, dy, dx, accumulate);
    } else if (dx.dtype == DType::kF32) {
        dispatch_backward<float>(stream, r, dy, dx, accumulate);
    } else {
        dispatch_backward<bf16>(stream, r, dy, dx, accumulate);
    }
}

void combine_rows(Stream& stream, const Routing& r, Tensor x, Tensor residual, Tensor y) {
    if (!stream.is_cpu()) {
        cuda::combine_rows(stream, r, x, residual, y);
    } else if (x.dtype == DType::kF32) {
        combine<float>(stream, r, x, residual, y);
    } else {
        combine<bf16>(stream, r, x, residual, y);
    }
}

void combine_rows_backward(
    Stream& stream, const Routing& r, Tensor x, Tensor dy, Tensor dx, float* d_weight
) {
    if (!stream.is_cpu()) {
        cuda::combine_rows_backward(stream, r, x, dy, dx, d_weight);
    } else if (x.dtype == DType::kF32) {
        combine_backward<float>(stream, r, x, dy, dx, d_weight);
    } else {
        combine_backward<bf16>(stream, r, x, dy, dx, d_weight);
    }
}

}  // namespace orbit
