#include "ops/attention.h"
#include "ops/compute_type.h"
#include "ops/cuda_ops.h"
#include "ops/rope.h"
#include "ops/rope_kernels.h"

namespace orbit {
namespace {

constexpr int64_t kValuesPerRange = 8192;

// The token's part of the parameters.
NormRopeHead head_of(const NormRopeParams& p, int64_t token) {
    const int32_t position = p.positions[token];
    CHECK(position >= 0 && position < p.rope.max_positions, "(position outside the rope table)");
    const int64_t half = p.rope.rotary_dim / 2;
    NormRopeHead head{};
    head.norm_weight = p.norm_weight;
    head.eps = p.eps;
    head.cosine = p.rope.cosine + position * half;
    head.sine = p.rope.sine + position * half;
    head.rotary_dim = p.rope.rotary_dim;
    head.head_dim = static_cast<int32_t>(p.x.cols());
    head.interleaved = p.rope.interleaved;
    return head;
}

void check_shapes(const NormRopeParams& p) {
    CHECK_EQ(p.x.rank, 3);
    CHECK_LE(p.x.cols(), kMaxHeadDim);
    CHECK_LE(p.rope.rotary_dim, p.x.cols());
}

// body(head, offset of the token's first value) for the tokens of each range.
template <typename Body>
void for_tokens(Stream& stream, const NormRopeParams& p, const Body& body) {
    const int64_t width = p.x.shape[1] * p.x.shape[2];
    stream.threads().parallel_for(
        p.x.shape[0],
        kValuesPerRange / width + 1,
        [&](int64_t begin, int64_t end, int) {
            for (int64_t t = begin; t < end; ++t) {
                const NormRopeHead head = head_of(p, t);
                for (int64_t h = 0; h < p.x.shape[1]; ++h) {
                    body(head, t * width + h * p.x.shape[2]);
                }
            }
        }
    );
}

}  // namespace

void norm_rope(Stream& stream, const NormRopeParams& p, Tensor y) {
    if (!stream.is_cpu()) {
        return cuda::norm_rope(stream, p, y);
    }
    check_shapes(p);
    CHECK_EQ(p.x.numel(), y.numel());
    with_compute_type(p.x.dtype, [&](auto type) {
        using T = decltype(type);
        const T* x = p.x.as<T>();
        T* to = y.as<T>();
        for_tokens(stream, p, [&](const NormRopeHead& head, int64_t at) {
            ORBIT_CALL_KERNEL(stream.device.isa, norm_rope_head, (head, x + at, to + at));
        });
    });
}

void norm_rope_append(Stream& stream, const RopeAppendParams& p, Tensor q, Tensor k) {
    CHECK(p.q.positions == p.batch.positions && p.k.positions == p.batch.positions);
    CHECK(p.q.eps == p.k.eps && p.q.rope.cosine == p.k.rope.cosine);
    CHECK_EQ(p.q.x.shape[2], p.k.x.shape[2]);
    CHECK_EQ(p.k.x.numel(), p.v.numel());
    if (!stream.is_cpu()) {
        return cuda::norm_rope_append(stream, p, q, k);
    }
    norm_rope(stream, p.q, q);
    norm_rope(stream, p.k, k);
    AttentionParams rows;
    rows.k = k;
    rows.v = p.v;
    rows.kv = p.kv;
    rows.batch = p.batch;
    append_kv(stream, rows);
}

void norm_rope_backward(Stream& stream, const NormRopeParams& p, Tensor dy, Tensor dx) {
    if (!stream.is_cpu()) {
        return cuda::norm_rope_backward(stream, p, dy, dx);
    }
    check_shapes(p);
    CHECK_EQ(p.x.numel(), dy.numel());
    CHECK_EQ(p.x.numel(), dx.numel());
    with_compute_type(p.x.dtype, [&](auto type) {
        using T = decltype(type);
        const T* x = p.x.as<T>();
        const T* from = dy.as<T>();
        T* to = dx.as<T>();
        for_tokens(stream, p, [&](const NormRopeHead& head, int64_t at) {
            ORBIT_CALL_KERNEL(
                stream.device.isa, norm_rope_head_backward, (head, x + at, from + at, to + at)
            );
        });
    });
}

}  // namespace orbit
