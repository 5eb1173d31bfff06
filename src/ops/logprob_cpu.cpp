#include <algorithm>
#include <limits>

#include "ops/compute_type.h"
#include "ops/cuda_ops.h"
#include "ops/dense.h"
#include "ops/logprob.h"
#include "ops/logprob_kernels.h"

namespace orbit {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int64_t kChunkBytes = int64_t{32} << 20;
constexpr int64_t kPreferredChunkBytes = int64_t{2} << 20;  // stays in the cache
constexpr int64_t kPreferredRows = 128;

// Rows of one chunk of logits. Rows do not depend on each other, so this changes no bits.
int64_t chunk_rows(int64_t vocabulary) {
    const int64_t row = vocabulary * 4;
    return std::max<int64_t>(
        1, std::min(kChunkBytes / row, std::max(kPreferredRows, kPreferredChunkBytes / row))
    );
}

// Temperature 0 is greedy: its log-probs are those of temperature 1, unfiltered.
SamplingFilter distribution_of(SamplingFilter filter) {
    return filter.temperature > 0.0f ? filter : SamplingFilter{};
}

// A key that sorts by logit, then by lower id.
uint64_t order_key(float z, int32_t id) {
    const uint32_t bits = float_bits(z + 0.0f);  // -0 counts as 0
    const uint32_t ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
    return (static_cast<uint64_t>(ordered) << 32) | (0xffffffffu - static_cast<uint32_t>(id));
}

int32_t id_of(uint64_t key) {
    return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}

// Temporary memory of one thread's row.
struct RowWork {
    uint64_t* keys;  // [V]
    float* weights;  // [V]
};

// Keeps the k largest and whatever ties with the last of them.
void keep_top_k(float* z, int64_t count, int64_t k, float* work) {
    std::copy(z, z + count, work);
    std::nth_element(work, work + k - 1, work + count, std::greater<>());
    const float last = work[k - 1];
    for (int64_t i = 0; i < count; ++i) {
        z[i] = z[i] >= last ? z[i] : kNever;
    }
}

// Keeps the shortest prefix, in descending order, that holds `top_p` of the kept weight. Sorts only
// as much as that prefix needs.
void keep_top_p(CpuIsa isa, float* z, int64_t count, float top_p, const RowWork& work) {
    const RowStats stats = ORBIT_CALL_KERNEL(isa, row_stats, (z, count));
    ORBIT_CALL_KERNEL(isa, exp_row, (z, count, stats.largest, work.weights));
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (z[i] > kNever) {
            work.keys[kept++] = order_key(z[i], static_cast<int32_t>(i));
        }
    }
    const float wanted = top_p * stats.sum;
    float sum = 0;
    int64_t sorted = 0;
    int64_t end = 0;  // the prefix
    bool crossed = false;
    while (end < kept && !crossed) {
        if (end == sorted) {
            sorted = std::min(kept, std::max<int64_t>(64, sorted * 4));
            if (sorted < kept) {
                std::nth_element(
                    work.keys + end, work.keys + sorted, work.keys + kept, std::greater<>()
                );
            }
            std::sort(work.keys + end, work.keys + sorted, std::greater<>());
        }
        sum += work.weights[id_of(work.keys[end++])];
        crossed = sum >= wanted;
    }
    for (int64_t i = end; i < kept; ++i) {
        z[id_of(work.keys[i])] = kNever;
    }
}

// p_j >= min_p * p_max, which is e^(z_j - largest) >= min_p.
void keep_min_p(CpuIsa isa, float* z, int64_t count, float min_p, float* weights) {
    const float largest = ORBIT_CALL_KERNEL(isa, largest_of_row, (z, count));
    ORBIT_CALL_KERNEL(isa, exp_row, (z, count, largest, weights));
    for (int64_t i = 0; i < count; ++i) {
        z[i] = weights[i] >= min_p ? z[i] : kNever;
    }
}

// Logits -> tempered logits in place, with -infinity for ids that the filter drops. A filter sees
// the ids below num_tokens only and drops the padding rows; without one they stay in the sum.
void temper_and_filter(
    CpuIsa isa,
    const SamplingFilter& filter,
    int64_t num_tokens,
    int64_t vocabulary,
    float* z,
    const RowWork& work
) {
    if (filter.temperature != 1.0f) {
        ORBIT_CALL_KERNEL(isa, scale_row, (z, vocabulary, 1.0f / filter.temperature));
    }
    if (filter.plain()) {
        return;
    }
    std::fill(z + num_tokens, z + vocabulary, kNever);
    if (filter.top_k > 0 && filter.top_k < num_tokens) {
        keep_top_k(z, num_tokens, filter.top_k, work.weights);
    }
    if (filter.top_p < 1.0f) {
        keep_top_p(isa, z, num_tokens, filter.top_p, work);
    }
    if (filter.min_p > 0.0f) {
        keep_min_p(isa, z, num_tokens, filter.min_p, work.weights);
    }
}

// What is recorded of a row: the one function behind sampler and trainer.
struct RowResult {
    float lse;
    float log_sum;
    float entropy;
};

RowResult summarise(CpuIsa isa, const float* z, int64_t vocabulary) {
    const RowStats stats = ORBIT_CALL_KERNEL(isa, row_stats, (z, vocabulary));
    RowResult r{};
    r.log_sum = ORBIT_CALL_KERNEL(isa, log_of, (stats.sum));
    r.lse = stats.largest + r.log_sum;
    r.entropy = r.log_sum - stats.weighted / stats.sum;
    return r;
}

struct Head {
    int64_t rows;
    int64_t width;
    int64_t vocabulary;
    int64_t num_tokens;
};

Head head_of(const HeadParams& p) {
    Head head{};
    head.rows = p.h.rows();
    head.width = p.h.cols();
    head.vocabulary = p.w.rows;
    head.num_tokens = p.num_tokens > 0 ? p.num_tokens : p.w.rows;
    CHECK_EQ(head.width, p.w.cols);
    CHECK_LE(head.num_tokens, head.vocabulary);
    return head;
}

// Rows [begin, end) of a two-dimensional view.
Tensor rows_of(const Tensor& x, int64_t begin, int64_t end) {
    return x.reshaped({x.rows(), x.cols()}).slice(begin, end);
}

// body(row, logits of the row, working memory) for every row, chunk by chunk; then
// after(begin, end, logits) for the chunk.
template <typename Body, typename After>
void for_logits(
    Stream& stream, const HeadParams& p, bool filtered, const Body& body, const After& after
) {
    const Head head = head_of(p);
    const ScratchScope scope(stream.scratch);
    const int64_t chunk = std::min(chunk_rows(head.vocabulary), head.rows);
    const Tensor logits = stream.scratch.take(DType::kF32, {chunk, head.vocabulary});
    const int64_t threads = filtered ? stream.threads().num_threads() : 0;
    const Tensor keys = stream.scratch.take(DType::kI64, {threads, head.vocabulary});
    const Tensor weights = stream.scratch.take(DType::kF32, {threads, head.vocabulary});
    for (int64_t begin = 0; begin < head.rows; begin += chunk) {
        const int64_t end = std::min(begin + chunk, head.rows);
        const Tensor part = logits.slice(0, end - begin);
        linear_f32_out(stream, rows_of(p.h, begin, end), p.w, part);
        float* z = part.as<float>();
        const int64_t grain = 4096 / head.vocabulary + 1;
        stream.threads().parallel_for(end - begin, grain, [&](int64_t first, int64_t last, int at) {
            RowWork work{};
            if (filtered) {
                work.keys = reinterpret_cast<uint64_t*>(keys.as<int64_t>()) + at * head.vocabulary;
                work.weights = weights.as<float>() + at * head.vocabulary;
            }
            for (int64_t i = first; i < last; ++i) {
                body(begin + i, z + i * head.vocabulary, work);
            }
        });
        after(begin, end, part);
    }
}

void nothing_after(int64_t, int64_t, const Tensor&) {}

DrawKey key_of(const SampleRow& row) {
    DrawKey key{};
    key.seed_low = static_cast<uint32_t>(row.seed);
    key.seed_high = static_cast<uint32_t>(row.seed >> 32);
    key.position = static_cast<uint32_t>(row.position);
    key.request_low = static_cast<uint32_t>(row.request);
    key.request_high = static_cast<uint32_t>(row.request >> 32);
    return key;
}

}  // namespace

void token_logprobs(
    Stream& stream,
    const HeadParams& p,
    const int32_t* targets,
    const SamplingFilter& filter,
    float* logprob,
    float* entropy
) {
    if (!stream.is_cpu()) {
        return cuda::token_logprobs(stream, p, targets, filter, logprob, entropy);
    }
    const Head head = head_of(p);
    const SamplingFilter used = distribution_of(filter);
    const CpuIsa isa = stream.device.isa;
    const auto row = [&](int64_t i, float* z, const RowWork& work) {
        CHECK(targets[i] >= 0 && targets[i] < head.vocabulary, "(target outside the vocabulary)");
        temper_and_filter(isa, used, head.num_tokens, head.vocabulary, z, work);
        const RowResult result = summarise(isa, z, head.vocabulary);
        logprob[i] = z[targets[i]] - result.lse;
        if (entropy != nullptr) {
            entropy[i] = result.entropy;
        }
    };
    for_logits(stream, p, !used.plain(), row, nothing_after);
}

void token_logprobs_backward(
    Stream& stream,
    const HeadParams& p,
    const int32_t* targets,
    const SamplingFilter& filter,
    const float* d_logprob,
    const float* d_entropy,
    Tensor dh
) {
    if (!stream.is_cpu()) {
        return cuda::token_logprobs_backward(stream, p, targets, filter, d_logprob, d_entropy, dh);
    }
    CHECK_EQ(dh.numel(), p.h.numel());
    const Head head = head_of(p);
    const SamplingFilter used = distribution_of(filter);
    const CpuIsa isa = stream.device.isa;
    const auto row = [&](int64_t i, float* z, const RowWork& work) {
        temper_and_filter(isa, used, head.num_tokens, head.vocabulary, z, work);
        const RowResult result = summarise(isa, z, head.vocabulary);
        HeadGradient g{};
        g.target = targets[i];
        // A target that the filter dropped has no finite log-prob, hence no gradient through it.
        g.c = z[targets[i]] > kNever ? d_logprob[i] : 0.0f;
        g.e = d_entropy == nullptr ? 0.0f : d_entropy[i];
        g.lse = result.lse;
        g.entropy = result.entropy;
        g.factor = used.temperature == 1.0f ? 1.0f : 1.0f / used.temperature;
        ORBIT_CALL_KERNEL(isa, head_gradient_row, (g, z, head.vocabulary));
    };
    for_logits(
        stream,
        p,
        !used.plain(),
        row,
        [&](int64_t begin, int64_t end, const Tensor& gradient) {
            linear_f32_out_backward(stream, gradient, p.w, rows_of(dh, begin, end));
        }
    );
}

void sample_tokens(
    Stream& stream, const HeadParams& p, const SampleRow* rows, int32_t* tokens, float* logprob
) {
    if (!stream.is_cpu()) {
        return cuda::sample_tokens(stream, p, rows, tokens, logprob);
    }
    const Head head = head_of(p);
    const CpuIsa isa = stream.device.isa;
    bool filtered = false;
    for (int64_t i = 0; i < head.rows; ++i) {
        filtered = filtered || !distribution_of(rows[i].filter).plain();
    }
    const auto draw = [&](int64_t i, float* z, const RowWork& work) {
        const SampleRow& row = rows[i];
        temper_and_filter(
            isa, distribution_of(row.filter), head.num_tokens, head.vocabulary, z, work
        );
        if (row.forced >= 0) {
            CHECK_LT(row.forced, head.vocabulary);
            tokens[i] = row.forced;
        } else if (row.filter.temperature > 0.0f) {
            tokens[i] = ORBIT_CALL_KERNEL(isa, race_row, (z, head.num_tokens, key_of(row)));
        } else {
            tokens[i] = ORBIT_CALL_KERNEL(isa, argmax_of_row, (z, head.num_tokens));
        }
        logprob[i] = z[tokens[i]] - summarise(isa, z, head.vocabulary).lse;
    };
    for_logits(stream, p, filtered, draw, nothing_after);
}

}  // namespace orbit
