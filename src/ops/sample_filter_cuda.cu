// Finds the cut of a row's filter: top-k, then top-p over what is left, then min-p. Instead of
// sorting, the boundary's key is found two bits at a time from sums over the row; sums are of
// integers (counts, or weights in fixed point), so no order of addition matters.
#include "ops/logprob_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

struct Row {
    const float* logits;
    float factor;
    int32_t num_tokens;

    __device__ __forceinline__ float z(int32_t id) const { return __fmul_rn(logits[id], factor); }
};

__device__ __forceinline__ float largest_of(const Row& row, float* shared) {
    float largest = dropped();
    for (int32_t id = threadIdx.x; id < row.num_tokens; id += kThreads) {
        largest = fmaxf(largest, row.z(id));
    }
    largest = warp_max(largest);
    if ((threadIdx.x & 31) == 0) {
        shared[threadIdx.x >> 5] = largest;
    }
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) {
        largest = fmaxf(largest, shared[i]);
    }
    __syncthreads();
    return largest;
}

// e^(z - largest) in units of 2^-40.
__device__ __forceinline__ uint64_t fixed_weight(float z, float largest) {
    return static_cast<uint64_t>(__fmul_rn(exp_f32(__fsub_rn(z, largest)), 1099511627776.0f));
}

template <typename Weight>
__device__ __forceinline__ uint64_t
total_weight(const Row& row, uint32_t lowest_key, Weight weight, uint64_t* shared) {
    uint64_t sum = 0;
    for (int32_t id = threadIdx.x; id < row.num_tokens; id += kThreads) {
        const float z = row.z(id);
        sum += order_key(z) >= lowest_key ? weight(z) : 0;
    }
    return block_sum<kWarps>(sum, shared);
}

struct Boundary {
    uint32_t key;    // the key at which the sum from the top reaches `wanted`
    uint64_t above;  // weight of larger keys
    uint64_t at;     // weight of this key
};

// Walks down from the largest key (of keys >= lowest_key) until the weight reaches `wanted`, which
// must be in [1, total].
template <typename Weight>
__device__ __forceinline__ Boundary find_boundary(
    const Row& row, uint32_t lowest_key, uint64_t wanted, Weight weight, uint64_t* shared
) {
    Boundary b{0, 0, 0};
    for (int shift = 30; shift >= 0; shift -= 2) {
        uint64_t sum[4] = {0, 0, 0, 0};
        for (int32_t id = threadIdx.x; id < row.num_tokens; id += kThreads) {
            const float z = row.z(id);
            const uint32_t key = order_key(z);
            const bool inside = shift == 30 || (key >> (shift + 2)) == (b.key >> (shift + 2));
            if (inside && key >= lowest_key) {
                const uint64_t w = weight(z);
                const uint32_t digit = (key >> shift) & 3u;
#pragma unroll
                for (uint32_t d = 0; d < 4; ++d) {
                    sum[d] += digit == d ? w : 0;
                }
            }
        }
#pragma unroll
        for (int d = 0; d < 4; ++d) {
            sum[d] = block_sum<kWarps>(sum[d], shared);
        }
        bool found = false;
#pragma unroll
        for (int d = 3; d >= 0; --d) {
            if (!found) {
                if (b.above + sum[d] >= wanted) {
                    found = true;
                    b.key |= static_cast<uint32_t>(d) << shift;
                    b.at = sum[d];
                } else {
                    b.above += sum[d];
                }
            }
        }
    }
    return b;
}

// One past the id of the `count`-th id whose key is `key`; one warp. Ties are rare.
__device__ __forceinline__ int32_t end_of_ties(const Row& row, uint32_t key, uint64_t count) {
    const int lane = threadIdx.x & 31;
    uint64_t seen = 0;
    for (int32_t first = 0; first < row.num_tokens; first += 32) {
        const int32_t id = first + lane;
        const bool ties = id < row.num_tokens && order_key(row.z(id)) == key;
        unsigned mask = __ballot_sync(kFullWarp, ties);
        const auto here = static_cast<uint64_t>(__popc(mask));
        if (seen + here >= count) {
            for (uint64_t skip = seen + 1; skip < count; ++skip) {
                mask &= mask - 1;
            }
            return first + __ffs(static_cast<int>(mask));
        }
        seen += here;
    }
    return row.num_tokens;
}

__device__ __forceinline__ void cut_top_p(
    const Row& row, float top_p, RowCut& cut, uint64_t* shared, int32_t* shared_end
) {
    const auto weight = [&](float z) { return fixed_weight(z, cut.largest); };
    const uint64_t total = total_weight(row, cut.key, weight, shared);
    const double wanted = ceil(static_cast<double>(top_p) * static_cast<double>(total));
    const uint64_t target =
        min(total, max(uint64_t{1}, static_cast<uint64_t>(wanted > 0.0 ? wanted : 0.0)));
    const Boundary b = find_boundary(row, cut.key, target, weight, shared);
    // All ids of the boundary's key weigh the same.
    const uint32_t bits = (b.key & 0x80000000u) != 0 ? b.key & 0x7fffffffu : ~b.key;
    const uint64_t each = weight(__uint_as_float(bits));
    if (each == 0) {  // NaN logits only.
        return;
    }
    const uint64_t needed = (target - b.above + each - 1) / each;
    cut.key = b.key;
    if (needed * each < b.at) {
        if (threadIdx.x < 32) {
            const int32_t end = end_of_ties(row, b.key, needed);
            if (threadIdx.x == 0) {
                *shared_end = end;
            }
        }
        __syncthreads();
        cut.tie_end = *shared_end;
    }
}

__global__ void __launch_bounds__(kThreads) cut_kernel(
    const float* logits,
    int32_t vocabulary,
    int32_t num_tokens,
    const SampleRow* samples,
    SamplingFilter filter,
    RowCut* cuts
) {
    __shared__ uint64_t shared[kWarps];
    __shared__ float shared_float[kWarps];
    __shared__ int32_t shared_end;
    if (samples != nullptr) {
        filter = samples[blockIdx.x].filter;
    }
    RowCut cut{1.0f, vocabulary, 0, 0x7fffffff, 0.0f, 0.0f};
    const bool greedy = !(filter.temperature > 0.0f);  // log-probs of temperature 1, unfiltered
    if (!greedy) {
        cut.factor = filter.temperature == 1.0f ? 1.0f : __fdiv_rn(1.0f, filter.temperature);
    }
    const bool by_rank = filter.top_k > 0 && filter.top_k < num_tokens;
    const bool plain = filter.top_p >= 1.0f && filter.top_k <= 0 && filter.min_p <= 0.0f;
    if (!greedy && !plain) {
        const Row row{
            logits + static_cast<int64_t>(blockIdx.x) * vocabulary, cut.factor, num_tokens};
        cut.end = num_tokens;
        cut.largest = largest_of(row, shared_float);
        if (by_rank) {
            const auto one = [](float) { return uint64_t{1}; };
            cut.key = find_boundary(row, 0, static_cast<uint64_t>(filter.top_k), one, shared).key;
        }
        if (filter.top_p < 1.0f) {
            cut_top_p(row, filter.top_p, cut, shared, &shared_end);
        }
        cut.min_weight = fmaxf(filter.min_p, 0.0f);
    }
    if (threadIdx.x == 0) {
        cuts[blockIdx.x] = cut;
    }
}

}  // namespace

void cut_rows(
    cudaStream_t queue,
    const float* logits,
    int64_t rows,
    int32_t vocabulary,
    int32_t num_tokens,
    const SampleRow* samples,
    const SamplingFilter& filter,
    RowCut* cuts
) {
    cut_kernel<<<grid_dim(rows), kThreads, 0, queue>>>(
        logits, vocabulary, num_tokens, samples, filter, cuts
    );
    LAUNCH_CHECK();
}

}  // namespace orbit::cuda
