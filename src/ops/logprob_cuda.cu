// The head on the GPU: float32 logits of a chunk of rows by the matmul family, then per row a cut
// (what the filter keeps), statistics and the race per tile of 1024 ids (one warp each), and a
// merge over tiles in ascending order. Trainer and sampler run the same kernels.
#include <algorithm>

#include "base/philox.h"
#include "device/cuda/check.cuh"
#include "device/cuda/math.cuh"
#include "device/cuda/rows.cuh"
#include "ops/cuda_ops.h"
#include "ops/head_chunk.h"
#include "ops/logprob_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int kTileIds = 1024;
constexpr int kTileWarps = 4;  // tiles of one thread block
constexpr int kMergeThreads = 128;
constexpr float kLowest = -100.0f;  // exp is 0 there, and 0 * x stays finite

struct TileStats {
    float largest;
    float sum;       // of e^(z - largest)
    float weighted;  // of e^(z - largest) (z - largest)
    float score;     // of the race's winner
    int32_t winner;
};

struct RowSummary {
    float lse;
    float entropy;
};

struct TileArgs {
    const float* logits;       // [rows, vocabulary]
    const RowCut* cuts;        // [rows]
    const SampleRow* samples;  // [rows]; null: no race
    TileStats* stats;          // [rows, tiles]
    int32_t vocabulary;
    int32_t num_tokens;
    int32_t tiles;
};

struct MergeArgs {
    const float* logits;
    const RowCut* cuts;
    const TileStats* stats;
    const SampleRow* samples;  // null: targets are given
    const int32_t* targets;
    int32_t* tokens;
    float* logprob;       // or null
    float* entropy;       // or null
    RowSummary* summary;  // or null
    int32_t vocabulary;
    int32_t tiles;
};

__device__ __forceinline__ bool beats(float score, int32_t id, float other, int32_t other_id) {
    return score > other || (score == other && id < other_id);
}

// Exponential race (algorithms.md 5.3): the score of one id from its random word.
__device__ __forceinline__ float race_score(float z, uint32_t word) {
    const float exponential = -log1pf(-uniform_from_word(word));
    return __fsub_rn(z, logf(exponential));
}

// z of four neighbouring ids; what is outside the row or dropped is -infinity.
__device__ __forceinline__ void load_tempered(
    float (&z)[4], const TileArgs& a, const RowCut& cut, const float* row, int32_t id
) {
    const bool vector = (a.vocabulary & 3) == 0;
    if (vector && id < a.vocabulary) {
        const auto v = *reinterpret_cast<const float4*>(row + id);
        z[0] = v.x;
        z[1] = v.y;
        z[2] = v.z;
        z[3] = v.w;
    } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            z[j] = id + j < a.vocabulary ? row[id + j] : 0.0f;
        }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float tempered = __fmul_rn(z[j], cut.factor);
        const bool kept = id + j < a.vocabulary && keeps(cut, tempered, id + j);
        z[j] = kept ? tempered : dropped();
    }
}

// race_score() to within 2e-4 and rounding, by the special function unit.
__device__ __forceinline__ float near_score(float z, uint32_t word) {
    const float u = uniform_from_word(word);
    // -log(1 - u) = u + u^2 / 2 + ...
    const float exponential = u < 0.015625f ? __fmaf_rn(0.5f * u, u, u) : -__logf(1.0f - u);
    return z - __logf(exponential);
}

// The largest of the warp's values, which are no NaN.
__device__ __forceinline__ float largest_of_warp(float v) {
    const uint32_t key = __reduce_max_sync(kFullWarp, order_key(v));
    return __uint_as_float((key & 0x80000000u) != 0 ? key ^ 0x80000000u : ~key);
}

// Four neighbouring ids enter the race; all lanes. `leader`: the warp's best near_score() so far.
// Exact scores are formed only of ids that come near it: any other has lost already.
__device__ __forceinline__ void race_four(
    float& score,
    int32_t& winner,
    float& leader,
    const float (&z)[4],
    const SampleRow& row,
    int32_t id,
    int32_t num_tokens
) {
    const bool random = row.filter.temperature > 0.0f;
    PhiloxWords words{};
    if (random) {
        words = philox(
            static_cast<uint32_t>(id >> 2),
            static_cast<uint32_t>(row.position),
            static_cast<uint32_t>(row.request),
            static_cast<uint32_t>(row.request >> 32),
            static_cast<uint32_t>(row.seed),
            static_cast<uint32_t>(row.seed >> 32)
        );
    }
    float near[4];
    float nearest = dropped();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const bool enters = id + j < num_tokens && z[j] > dropped();
        const float value = random ? near_score(z[j], words.word[j]) : z[j];
        near[j] = enters ? value : dropped();
        nearest = fmaxf(nearest, near[j]);
    }
    leader = fmaxf(leader, largest_of_warp(nearest));
    const float least = leader - __fmaf_rn(1e-6f, fabsf(leader), 0.01f);  // NaN: leader is infinite
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if (near[j] > dropped() && !(near[j] < least)) {
            const float s = random ? race_score(z[j], words.word[j]) : z[j];
            if (beats(s, id + j, score, winner)) {
                score = s;
                winner = id + j;
            }
        }
    }
}

__global__ void __launch_bounds__(32 * kTileWarps) tile_kernel(TileArgs a) {
    const int lane = threadIdx.x & 31;
    const int32_t tile =
        static_cast<int32_t>(blockIdx.y) * kTileWarps + static_cast<int32_t>(threadIdx.x >> 5);
    const int64_t row = blockIdx.x;
    if (tile >= a.tiles) {
        return;
    }
    const RowCut cut = a.cuts[row];
    const float* logits = a.logits + row * a.vocabulary;
    const bool draws = a.samples != nullptr && a.samples[row].forced < 0;
    float z[8][4];
    float largest = dropped();
    float score = dropped();
    float leader = dropped();
    int32_t winner = 0x7fffffff;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int32_t id = tile * kTileIds + 4 * (lane + 32 * i);
        load_tempered(z[i], a, cut, logits, id);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            largest = fmaxf(largest, z[i][j]);
        }
        if (draws) {
            race_four(score, winner, leader, z[i], a.samples[row], id, a.num_tokens);
        }
    }
    largest = warp_max(largest);
    const float base = largest == dropped() ? 0.0f : largest;
    float sum = 0.0f;
    float weighted = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float x = fmaxf(__fsub_rn(z[i][j], base), kLowest);
            const float e = exp_f32(x);
            sum = __fadd_rn(sum, e);
            weighted = __fmaf_rn(e, x, weighted);
        }
    }
    sum = warp_sum(sum);
    weighted = warp_sum(weighted);
    if (draws) {
#pragma unroll
        for (int offset = 16; offset > 0; offset >>= 1) {
            const float other = __shfl_xor_sync(kFullWarp, score, offset);
            const int32_t other_id = __shfl_xor_sync(kFullWarp, winner, offset);
            if (beats(other, other_id, score, winner)) {
                score = other;
                winner = other_id;
            }
        }
    }
    if (lane == 0) {
        a.stats[row * a.tiles + tile] = TileStats{largest, sum, weighted, score, winner};
    }
}

// The largest value and the race's winner of all tiles, in every thread.
__device__ __forceinline__ void best_of_tiles(
    const TileStats* stats, int32_t tiles, float& largest, int32_t& winner
) {
    __shared__ float shared_largest[kMergeThreads / 32];
    __shared__ float shared_score[kMergeThreads / 32];
    __shared__ int32_t shared_winner[kMergeThreads / 32];
    float score = dropped();
    largest = dropped();
    winner = 0x7fffffff;
    for (int32_t t = threadIdx.x; t < tiles; t += kMergeThreads) {
        largest = fmaxf(largest, stats[t].largest);
        if (beats(stats[t].score, stats[t].winner, score, winner)) {
            score = stats[t].score;
            winner = stats[t].winner;
        }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, offset));
        const float other = __shfl_xor_sync(kFullWarp, score, offset);
        const int32_t other_id = __shfl_xor_sync(kFullWarp, winner, offset);
        if (beats(other, other_id, score, winner)) {
            score = other;
            winner = other_id;
        }
    }
    const int warp = threadIdx.x >> 5;
    if ((threadIdx.x & 31) == 0) {
        shared_largest[warp] = largest;
        shared_score[warp] = score;
        shared_winner[warp] = winner;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kMergeThreads / 32; ++i) {
        largest = fmaxf(largest, shared_largest[i]);
        if (beats(shared_score[i], shared_winner[i], score, winner)) {
            score = shared_score[i];
            winner = shared_winner[i];
        }
    }
}

// One block a row: every tile's sums brought to the row's maximum, added in ascending order.
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(MergeArgs a) {
    extern __shared__ float terms[];  // [2][tiles]
    const int64_t row = blockIdx.x;
    const TileStats* stats = a.stats + row * a.tiles;
    float largest = 0.0f;
    int32_t winner = 0;
    best_of_tiles(stats, a.tiles, largest, winner);
    for (int32_t t = threadIdx.x; t < a.tiles; t += kMergeThreads) {
        const bool empty = stats[t].largest == dropped();
        const float shift = empty ? kLowest : fmaxf(__fsub_rn(stats[t].largest, largest), kLowest);
        const float factor = empty ? 0.0f : exp_f32(shift);
        const float sum = empty ? 0.0f : stats[t].sum;
        const float weighted = empty ? 0.0f : stats[t].weighted;
        terms[t] = __fmul_rn(factor, sum);
        terms[a.tiles + t] = __fmul_rn(factor, __fmaf_rn(shift, sum, weighted));
    }
    __syncthreads();
    if (threadIdx.x != 0) {
        return;
    }
    float sum = 0.0f;
    float weighted = 0.0f;
    for (int32_t t = 0; t < a.tiles; ++t) {
        sum = __fadd_rn(sum, terms[t]);
        weighted = __fadd_rn(weighted, terms[a.tiles + t]);
    }
    const float log_sum = log_f32(sum);
    const RowSummary summary{
        __fadd_rn(largest, log_sum), __fsub_rn(log_sum, __fdiv_rn(weighted, sum))};
    int32_t token = winner;
    if (a.samples == nullptr) {
        token = a.targets[row];
    } else if (a.samples[row].forced >= 0) {
        token = a.samples[row].forced;
    }
    if (a.tokens != nullptr) {
        a.tokens[row] = token;
    }
    if (a.logprob != nullptr) {
        // An id past the row can only come from NaN logits; it gets no log-prob.
        const bool valid = token >= 0 && token < a.vocabulary;
        const RowCut cut = a.cuts[row];
        const float z =
            valid ? __fmul_rn(a.logits[row * a.vocabulary + token], cut.factor) : dropped();
        a.logprob[row] = valid && keeps(cut, z, token) ? __fsub_rn(z, summary.lse) : dropped();
        if (!valid && a.tokens != nullptr) {
            a.tokens[row] = 0;
        }
    }
    if (a.entropy != nullptr) {
        a.entropy[row] = summary.entropy;
    }
    if (a.summary != nullptr) {
        a.summary[row] = summary;
    }
}

struct GradientArgs {
    const float* logits;
    const RowCut* cuts;
    const RowSummary* summary;
    const int32_t* targets;
    const float* d_logprob;
    const float* d_entropy;  // or null
    bf16* gradient;          // [rows, vocabulary]
    int32_t vocabulary;
};

// dL/dz_j = (c (1[j = a] - p_j) - e p_j (log p_j + H)) factor over the kept ids.
__global__ void __launch_bounds__(256) head_gradient_kernel(GradientArgs a) {
    const int64_t row = blockIdx.x;
    const int32_t id0 = (static_cast<int32_t>(blockIdx.y) * 256 + threadIdx.x) * 4;
    if (id0 >= a.vocabulary) {
        return;
    }
    const RowCut cut = a.cuts[row];
    const RowSummary summary = a.summary[row];
    const int32_t target = a.targets[row];
    const float* logits = a.logits + row * a.vocabulary;
    const bool target_kept = keeps(cut, __fmul_rn(logits[target], cut.factor), target);
    // A target that the filter dropped has no finite log-prob, hence no gradient through it.
    const float c = target_kept ? a.d_logprob[row] : 0.0f;
    const float e = a.d_entropy == nullptr ? 0.0f : a.d_entropy[row];
    float g[4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int32_t id = id0 + j;
        if (id < a.vocabulary) {
            const float z = __fmul_rn(logits[id], cut.factor);
            if (keeps(cut, z, id)) {
                const float log_p = __fsub_rn(z, summary.lse);
                const float p = exp_f32(log_p);
                const float through_entropy =
                    e == 0.0f ? 0.0f
                              : __fmul_rn(__fmul_rn(e, p), __fadd_rn(log_p, summary.entropy));
                const float hit = id == target ? __fsub_rn(1.0f, p) : -p;
                g[j] = __fmul_rn(__fsub_rn(__fmul_rn(c, hit), through_entropy), cut.factor);
            }
        }
    }
    bf16* out = a.gradient + row * a.vocabulary + id0;
    if ((a.vocabulary & 3) == 0) {
        *reinterpret_cast<uint2*>(out) = uint2{pack_bf16(g[0], g[1]), pack_bf16(g[2], g[3])};
        return;
    }
    for (int j = 0; j < 4 && id0 + j < a.vocabulary; ++j) {
        out[j] = round_bf16(g[j]);
    }
}

__global__ void __launch_bounds__(256) round_kernel(const float* x, bf16* y, int64_t count) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (i < count) {
        y[i] = round_bf16(x[i]);
    }
}

struct Head {
    int64_t rows;
    int32_t vocabulary;
    int32_t num_tokens;
    int32_t tiles;
    int64_t chunk;
};

Head head_of(const HeadParams& p) {
    Head head{};
    head.rows = p.h.rows();
    CHECK_EQ(p.h.cols(), p.w.cols);
    CHECK_LT(p.w.rows, int64_t{1} << 31);
    head.vocabulary = static_cast<int32_t>(p.w.rows);
    head.num_tokens = p.num_tokens > 0 ? p.num_tokens : head.vocabulary;
    CHECK_LE(head.num_tokens, head.vocabulary);
    head.tiles = static_cast<int32_t>(ceil_div(head.vocabulary, kTileIds));
    head.chunk = head_chunk_rows(head.rows, head.vocabulary);
    return head;
}

Tensor rows_of(const Tensor& x, int64_t begin, int64_t end) {
    return x.reshaped({x.rows(), x.cols()}).slice(begin, end);
}

// Scratch of one chunk.
struct ChunkWork {
    Tensor logits;
    RowCut* cuts;
    TileStats* stats;
    RowSummary* summary;
};

ChunkWork take_work(Stream& stream, const Head& head) {
    const auto bytes = [&](size_t each, int64_t count) {
        return stream.scratch.take_bytes(each * static_cast<size_t>(count));
    };
    ChunkWork work{};
    work.logits = stream.scratch.take(DType::kF32, {head.chunk, head.vocabulary});
    work.cuts = static_cast<RowCut*>(bytes(sizeof(RowCut), head.chunk));
    work.stats = static_cast<TileStats*>(bytes(sizeof(TileStats), head.chunk * head.tiles));
    work.summary = static_cast<RowSummary*>(bytes(sizeof(RowSummary), head.chunk));
    return work;
}

// Logits and tile statistics of rows [begin, end). `samples`: those of `begin` on, or null and the
// one filter.
void run_tiles(
    Stream& stream,
    const HeadParams& p,
    const Head& head,
    const ChunkWork& work,
    int64_t begin,
    int64_t end,
    const SampleRow* samples,
    const SamplingFilter& filter
) {
    const Tensor part = work.logits.slice(0, end - begin);
    cuda::linear_f32_out(stream, rows_of(p.h, begin, end), p.w, part);
    const cudaStream_t queue = queue_of(stream);
    cut_rows(
        queue,
        part.as<float>(),
        end - begin,
        head.vocabulary,
        head.num_tokens,
        samples,
        filter,
        work.cuts
    );
    const TileArgs args{
        part.as<float>(),
        work.cuts,
        samples,
        work.stats,
        head.vocabulary,
        head.num_tokens,
        head.tiles};
    const dim3 grid(grid_dim(end - begin), grid_dim_yz(ceil_div(head.tiles, kTileWarps)));
    tile_kernel<<<grid, 32 * kTileWarps, 0, queue>>>(args);
    LAUNCH_CHECK();
}

void run_merge(Stream& stream, const MergeArgs& args, int64_t rows) {
    const size_t shared = 2 * static_cast<size_t>(args.tiles) * sizeof(float);
    CHECK_LE(shared, size_t{48} * 1024);
    merge_kernel<<<grid_dim(rows), kMergeThreads, shared, queue_of(stream)>>>(args);
    LAUNCH_CHECK();
}

MergeArgs merge_args(const Head& head, const ChunkWork& work) {
    MergeArgs args{};
    args.logits = work.logits.as<float>();
    args.cuts = work.cuts;
    args.stats = work.stats;
    args.vocabulary = head.vocabulary;
    args.tiles = head.tiles;
    return args;
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
    const Head head = head_of(p);
    if (head.rows == 0) {
        return;
    }
    const ScratchScope scope(stream.scratch);
    const ChunkWork work = take_work(stream, head);
    for (int64_t begin = 0; begin < head.rows; begin += head.chunk) {
        const int64_t end = std::min(begin + head.chunk, head.rows);
        run_tiles(stream, p, head, work, begin, end, nullptr, filter);
        MergeArgs args = merge_args(head, work);
        args.targets = targets + begin;
        args.logprob = logprob + begin;
        args.entropy = entropy == nullptr ? nullptr : entropy + begin;
        run_merge(stream, args, end - begin);
    }
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
    const Head head = head_of(p);
    if (head.rows == 0) {
        return;
    }
    const ScratchScope scope(stream.scratch);
    const ChunkWork work = take_work(stream, head);
    const Tensor gradient = stream.scratch.take(DType::kBF16, {head.chunk, head.vocabulary});
    for (int64_t begin = 0; begin < head.rows; begin += head.chunk) {
        const int64_t end = std::min(begin + head.chunk, head.rows);
        run_tiles(stream, p, head, work, begin, end, nullptr, filter);
        MergeArgs args = merge_args(head, work);
        args.targets = targets + begin;
        args.summary = work.summary;
        run_merge(stream, args, end - begin);
        const GradientArgs g{
            work.logits.as<float>(),
            work.cuts,
            work.summary,
            targets + begin,
            d_logprob + begin,
            d_entropy == nullptr ? nullptr : d_entropy + begin,
            activations(gradient),
            head.vocabulary};
        const dim3 grid(
            grid_dim(end - begin), grid_dim_yz(ceil_div(ceil_div(head.vocabulary, 4), 256))
        );
        head_gradient_kernel<<<grid, 256, 0, queue_of(stream)>>>(g);
        LAUNCH_CHECK();
        head_backward(stream, gradient.slice(0, end - begin), p.w, rows_of(dh, begin, end));
    }
}

void sample_tokens(
    Stream& stream, const HeadParams& p, const SampleRow* rows, int32_t* tokens, float* logprob
) {
    const Head head = head_of(p);
    if (head.rows == 0) {
        return;
    }
    const ScratchScope scope(stream.scratch);
    const ChunkWork work = take_work(stream, head);
    for (int64_t begin = 0; begin < head.rows; begin += head.chunk) {
        const int64_t end = std::min(begin + head.chunk, head.rows);
        run_tiles(stream, p, head, work, begin, end, rows + begin, SamplingFilter{});
        MergeArgs args = merge_args(head, work);
        args.samples = rows + begin;
        args.tokens = tokens + begin;
        args.logprob = logprob + begin;
        run_merge(stream, args, end - begin);
    }
}

void linear_f32_out_backward(Stream& stream, Tensor dlogits, const QuantizedMatrix& w, Tensor dh) {
    if (dlogits.rows() == 0) {
        return;
    }
    const ScratchScope scope(stream.scratch);
    const Tensor rounded = stream.scratch.take(DType::kBF16, {dlogits.rows(), dlogits.cols()});
    const int64_t count = dlogits.numel();
    round_kernel<<<grid_dim(ceil_div(count, 256)), 256, 0, queue_of(stream)>>>(
        dlogits.as<float>(), activations(rounded), count
    );
    LAUNCH_CHECK();
    head_backward(stream, rounded, w, dh);
}

}  // namespace orbit::cuda
