// Grouped matmul: rows sorted by expert, each expert's rows times its own weight. The counts stay
// on the device: the grid covers the most tiles that any counts could need, and a block finds its
// expert from the offsets. Experts' weights lie at one distance from each other (loader.cpp).
//
// The contraction is one segment, whatever its length: there are experts enough to fill a GPU.
#pragma once

#include "ops/matmul_cuda.cuh"

namespace orbit::cuda {

constexpr int32_t kExpertsMax = 512;

// One weight for every expert: what expert e takes lies e distances further.
struct GroupedProduct {
    MatmulArgs one;               // pointers of row 0 and expert 0; m is not used
    int64_t weight_distance = 0;  // bytes from an expert to the next
    int64_t scale_distance = 0;   // bytes
    int64_t lora_b_distance = 0;  // elements
};

// Products of one launch (gate and up): of the same rows, shape and format.
constexpr int kMaxGrouped = 2;

// Passed to kernels by value, so that a launch can be captured in a graph.
struct GroupedArgs {
    GroupedProduct products[kMaxGrouped];
    int32_t count = 1;  // of products
    const int32_t* offsets = nullptr;
    int32_t experts = 0;
    int32_t rows = 0;                       // of all experts, no fewer than the offsets cover
    float global_scales[kExpertsMax] = {};  // kNvFp4; those of product p from p * experts on
};

// Rows [first, first + count) of all, which are those of `expert` from some tile on to its last.
struct ExpertRows {
    int32_t expert = 0;
    int32_t first = 0;
    int32_t count = 0;
};

// The m-tile number `tile`, counting tiles of kM rows from expert 0 on. False past the last one.
// Every warp of the block calls it.
template <int kM>
__device__ __forceinline__ bool find_tile(
    const int32_t* offsets, int32_t experts, int32_t tile, ExpertRows& found
) {
    constexpr int kRun = 4;  // experts of a lane
    const int lane = threadIdx.x & 31;
    const auto tiles_of = [](int32_t rows) {
        return static_cast<int32_t>((static_cast<uint32_t>(rows) + kM - 1) / kM);
    };
    for (int32_t base = 0; base < experts; base += 32 * kRun) {
        int32_t at[kRun + 1];
#pragma unroll
        for (int i = 0; i <= kRun; ++i) {
            at[i] = __ldcg(offsets + min(base + lane * kRun + i, experts));
        }
        int32_t tiles = 0;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            tiles += tiles_of(at[i + 1] - at[i]);
        }
        int32_t end = tiles;
#pragma unroll
        for (int distance = 1; distance < 32; distance <<= 1) {
            const int32_t below = __shfl_up_sync(0xffffffffu, end, distance);
            end += lane >= distance ? below : 0;
        }
        const int32_t all = __shfl_sync(0xffffffffu, end, 31);
        if (tile >= all) {
            tile -= all;
            continue;
        }
        int32_t left = tile - (end - tiles);
        const uint32_t owner = __ballot_sync(0xffffffffu, left >= 0 && left < tiles);
        bool searching = true;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            const int32_t own = tiles_of(at[i + 1] - at[i]);
            if (searching && left < own) {
                searching = false;
                found.expert = base + lane * kRun + i;
                found.first = at[i] + left * kM;
                found.count = at[i + 1] - found.first;
            }
            left -= own;
        }
        const int source = __ffs(static_cast<int>(owner)) - 1;
        found.expert = __shfl_sync(0xffffffffu, found.expert, source);
        found.first = __shfl_sync(0xffffffffu, found.first, source);
        found.count = __shfl_sync(0xffffffffu, found.count, source);
        return true;
    }
    return false;
}

// The matmul of product `product` for these rows of an expert.
__device__ __forceinline__ MatmulArgs
args_of_expert(const GroupedArgs& g, int32_t product, const ExpertRows& rows) {
    const GroupedProduct& p = g.products[product];
    MatmulArgs a = p.one;
    const int64_t first = rows.first;
    a.m = rows.count;
    a.x += first * a.ldx;
    a.w.data += rows.expert * p.weight_distance;
    a.w.scales += rows.expert * p.scale_distance;
    a.w.global_scale = g.global_scales[product * g.experts + rows.expert];
    a.w.global_inverse = a.w.global_inverse == 0.0f ? 0.0f : __frcp_rn(a.w.global_scale);
    Epilogue& e = a.epilogue;
    e.y = static_cast<bf16*>(e.y) + first * e.ldy;
    e.residual = e.residual == nullptr ? nullptr : e.residual + first * e.ldy;
    e.lora_u = e.lora_u == nullptr ? nullptr : e.lora_u + first * e.ldu;
    e.lora_b += rows.expert * p.lora_b_distance;
    return a;
}

// Product i of a launch of several.
inline GroupedArgs product_alone(const GroupedArgs& g, int32_t i) {
    GroupedArgs alone = g;
    alone.products[0] = g.products[i];
    alone.count = 1;
    for (int32_t e = 0; i > 0 && e < g.experts; ++e) {
        alone.global_scales[e] = g.global_scales[i * g.experts + e];
    }
    return alone;
}

// Runs the products of one launch, or one after the other where the member that suits takes one
// alone. Returns whether the last launch lets its successor start only once the rows and offsets
// are there, as `releases_late` asks (MatmulArgs): a member may ignore that.
bool grouped_matmul(
    cudaStream_t queue, WeightFormat format, Direction direction, const GroupedArgs& args
);

template <WeightFormat kFormat>
bool grouped_matmul_format(cudaStream_t queue, Direction direction, const GroupedArgs& args);

// to[e] = the weight of expert first + e in bf16, rows side by side, of the `count` experts from
// `first` on that have rows; the others are left as they are. Of a single product.
void decode_experts(
    cudaStream_t queue,
    WeightFormat format,
    const GroupedArgs& args,
    int32_t first,
    int32_t count,
    bf16* to
);

template <WeightFormat kFormat>
void decode_experts(
    cudaStream_t queue, const GroupedArgs& args, int32_t first, int32_t count, bf16* to
);

}  // namespace orbit::cuda
