#include <algorithm>
#include <cstring>

#include "ops/attention.h"
#include "ops/attention_kernels.h"
#include "ops/compute_type.h"
#include "ops/cuda_ops.h"

namespace orbit {
namespace {

// Tokens of one unit of work; long sequences are cut so that every thread has some.
constexpr int64_t kTokensPerUnit = 64;

void check_shapes(const AttentionParams& p, const Tensor& o) {
    CHECK_EQ(p.q.rank, 3);
    CHECK_EQ(p.k.rank, 3);
    CHECK_EQ(p.q.shape[2], p.k.shape[2]);
    CHECK_EQ(p.q.shape[1] % p.k.shape[1], 0);
    CHECK_EQ(p.k.numel(), p.v.numel());
    CHECK_EQ(p.q.numel(), o.numel());
    CHECK_LE(p.batch.num_tokens, p.q.shape[0]);
    CHECK(p.q.dtype == p.k.dtype && p.q.dtype == p.v.dtype && p.q.dtype == o.dtype);
}

int64_t tokens_of(const BatchView& batch, int32_t sequence) {
    return batch.sequence_begin[sequence + 1] - batch.sequence_begin[sequence];
}

int64_t keys_of(const BatchView& batch, int32_t sequence) {
    return batch.sequence_position[sequence] + tokens_of(batch, sequence);
}

int64_t most_keys(const BatchView& batch) {
    int64_t most = 1;
    for (int32_t s = 0; s < batch.num_sequences; ++s) {
        most = std::max(most, keys_of(batch, s));
    }
    return most;
}

template <typename T>
AttentionItem<T> item_of(const AttentionParams& p, int32_t sequence, int64_t kv_head) {
    AttentionItem<T> item{};
    const int64_t first = p.batch.sequence_begin[sequence];
    item.heads = p.q.shape[1];
    item.kv_heads = p.k.shape[1];
    item.d = p.q.shape[2];
    item.q = p.q.as<T>() + first * item.heads * item.d;
    item.k = p.k.as<T>() + first * item.kv_heads * item.d;
    item.v = p.v.as<T>() + first * item.kv_heads * item.d;
    item.tokens = tokens_of(p.batch, sequence);
    item.position = p.batch.sequence_position[sequence];
    item.kv_head = kv_head;
    item.scale = p.scale;
    return item;
}

// Writes the batch's keys and values into their pages.
template <typename T>
void append(Stream& stream, const AttentionParams& p) {
    const int64_t heads = p.k.shape[1];
    const int64_t d = p.k.shape[2];
    CHECK_EQ(p.kv.k_pages.shape[2], kPageTokens);
    T* k_pages = p.kv.k_pages.as<T>();
    T* v_pages = p.kv.v_pages.as<T>();
    const T* k = p.k.as<T>();
    const T* v = p.v.as<T>();
    const auto write = [&](int64_t token, int32_t sequence, int64_t position) {
        const int64_t column = position / kPageTokens;
        CHECK_LT(column, p.batch.max_blocks);
        const int64_t page = p.batch.block_table[int64_t{sequence} * p.batch.max_blocks + column];
        CHECK(page >= 0 && page < p.kv.k_pages.shape[0], "(page outside the pool)");
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t to = ((page * heads + h) * kPageTokens + position % kPageTokens) * d;
            const int64_t from = (token * heads + h) * d;
            std::memcpy(k_pages + to, k + from, static_cast<size_t>(d) * sizeof(T));
            std::memcpy(v_pages + to, v + from, static_cast<size_t>(d) * sizeof(T));
        }
    };
    stream.threads().parallel_for(p.batch.num_tokens, 64, [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
            write(t, p.batch.sequence_of[t], p.batch.positions[t]);
        }
    });
}

// A piece of one (sequence, KV head).
struct Unit {
    int32_t sequence;
    int32_t kv_head;
    int32_t begin;  // tokens of the sequence
    int32_t end;
    int64_t cost_before;  // of all earlier units
};

// About the work of tokens [begin, end): products with each key, and the conversion of the keys.
int64_t cost_of(int64_t position, int64_t begin, int64_t end) {
    return (end - begin + 1) * (position + (begin + end) / 2 + 4);
}

struct Plan {
    Unit* units = nullptr;
    int64_t count = 0;
    int64_t cost = 0;
};

Plan make_plan(Stream& stream, const BatchView& batch, int64_t kv_heads, int64_t unit_tokens) {
    Plan plan;
    for (int32_t s = 0; s < batch.num_sequences; ++s) {
        plan.count += (tokens_of(batch, s) + unit_tokens - 1) / unit_tokens * kv_heads;
    }
    plan.units =
        static_cast<Unit*>(stream.scratch.take_bytes(static_cast<size_t>(plan.count) * sizeof(Unit))
        );
    Unit* next = plan.units;
    for (int32_t s = 0; s < batch.num_sequences; ++s) {
        for (int32_t h = 0; h < kv_heads; ++h) {
            for (int64_t t = 0; t < tokens_of(batch, s); t += unit_tokens) {
                const int64_t end = std::min(t + unit_tokens, tokens_of(batch, s));
                *next++ = {s, h, static_cast<int32_t>(t), static_cast<int32_t>(end), plan.cost};
                plan.cost += cost_of(batch.sequence_position[s], t, end);
            }
        }
    }
    return plan;
}

// Gives each thread a contiguous run of units of about equal cost; body(unit, thread).
template <typename Body>
void for_units(Stream& stream, const Plan& plan, const Body& body) {
    const int64_t parts = std::min<int64_t>(stream.threads().num_threads(), plan.count);
    const auto first_of = [&](int64_t part) {
        const int64_t target = plan.cost * part / parts;
        return std::lower_bound(
            plan.units,
            plan.units + plan.count,
            target,
            [](const Unit& unit, int64_t cost) { return unit.cost_before < cost; }
        );
    };
    stream.threads().parallel_for(parts, 1, [&](int64_t begin, int64_t end, int thread) {
        const Unit* last = end == parts ? plan.units + plan.count : first_of(end);
        for (const Unit* unit = first_of(begin); unit != last; ++unit) {
            body(*unit, thread);
        }
    });
}

float* thread_workspaces(Stream& stream, int64_t floats) {
    return static_cast<float*>(stream.scratch.take_bytes(
        static_cast<size_t>(floats * stream.threads().num_threads()) * sizeof(float)
    ));
}

template <typename T>
void forward(Stream& stream, const AttentionParams& p, Tensor o, float* lse) {
    const ScratchScope scope(stream.scratch);
    const int64_t heads = p.q.shape[1];
    const int64_t d = p.q.shape[2];
    const int64_t floats = attention_workspace(most_keys(p.batch), d);
    float* workspaces = thread_workspaces(stream, floats);
    const Plan plan = make_plan(stream, p.batch, p.k.shape[1], kTokensPerUnit);
    for_units(stream, plan, [&](const Unit& unit, int thread) {
        AttentionItem<T> item = item_of<T>(p, unit.sequence, unit.kv_head);
        const int64_t first = p.batch.sequence_begin[unit.sequence];
        item.o = o.as<T>() + first * heads * d;
        item.lse = lse == nullptr ? nullptr : lse + first * heads;
        item.k_pages = p.kv.k_pages.as<T>();
        item.v_pages = p.kv.v_pages.as<T>();
        item.pages = p.batch.block_table + int64_t{unit.sequence} * p.batch.max_blocks;
        float* workspace = workspaces + thread * floats;
        const int64_t keys = item.position + unit.end;
        ORBIT_CALL_KERNEL(stream.device.isa, attention_load, (item, keys, workspace));
        ORBIT_CALL_KERNEL(
            stream.device.isa, attention_tokens, (item, unit.begin, unit.end, keys, workspace)
        );
    });
}

}  // namespace

void append_kv(Stream& stream, const AttentionParams& p) {
    if (!stream.is_cpu()) {
        return cuda::append_kv(stream, p);
    }
    CHECK_EQ(p.k.rank, 3);
    CHECK_EQ(p.k.numel(), p.v.numel());
    CHECK_LE(p.batch.num_tokens, p.k.shape[0]);
    CHECK(p.k.dtype == p.v.dtype && p.k.dtype == p.kv.k_pages.dtype);
    with_compute_type(p.k.dtype, [&](auto type) { append<decltype(type)>(stream, p); });
}

bool attention(Stream& stream, const AttentionParams& p, Tensor o, float* lse) {
    if (!stream.is_cpu()) {
        return cuda::attention(stream, p, o, lse);
    }
    check_shapes(p, o);
    with_compute_type(p.q.dtype, [&](auto type) { forward<decltype(type)>(stream, p, o, lse); });
    return false;
}

void attention_backward(
    Stream& stream,
    const AttentionParams& p,
    Tensor o,
    const float* lse,
    Tensor d_o,
    Tensor dq,
    Tensor dk,
    Tensor dv
) {
    if (!stream.is_cpu()) {
        return cuda::attention_backward(stream, p, o, lse, d_o, dq, dk, dv);
    }
    check_shapes(p, o);
    CHECK_EQ(p.q.numel(), dq.numel());
    CHECK_EQ(p.k.numel(), dk.numel());
    CHECK_EQ(p.k.numel(), dv.numel());
    const int64_t heads = p.q.shape[1];
    const int64_t kv_heads = p.k.shape[1];
    const int64_t d = p.q.shape[2];
    const int64_t keys = most_keys(p.batch);
    const ScratchScope scope(stream.scratch);
    const int64_t floats = attention_backward_workspace(keys, d);
    float* workspaces = thread_workspaces(stream, floats);
    const Plan plan = make_plan(stream, p.batch, kv_heads, keys);
    with_compute_type(p.q.dtype, [&](auto type) {
        using T = decltype(type);
        for_units(stream, plan, [&](const Unit& unit, int thread) {
            AttentionItem<T> item = item_of<T>(p, unit.sequence, unit.kv_head);
            CHECK_EQ(item.position, 0);
            const int64_t first = p.batch.sequence_begin[unit.sequence];
            item.o = o.as<T>() + first * heads * d;
            item.d_o = d_o.as<T>() + first * heads * d;
            item.lse_in = lse + first * heads;
            item.dq = dq.as<T>() + first * heads * d;
            item.dk = dk.as<T>() + first * kv_heads * d;
            item.dv = dv.as<T>() + first * kv_heads * d;
            ORBIT_CALL_KERNEL(
                stream.device.isa,
                attention_item_backward,
                (item, keys, workspaces + thread * floats)
            );
        });
    });
}

}  // namespace orbit
