// Grouped matmul: rows sorted by expert, each expert's rows times its own weight. The counts stay
// on the device: the grid covers the most tiles that any counts could need, and a block finds its
// expert from the offsets. Experts' weights lie at one distance from each other (loader.cpp).
//
// The contraction is one segment, whatever its length: there are experts enough to fill a GPU.
#pragma once

#include "ops/matmul_cuda.cuh"

namespace orbit::cuda {

constexpr int32_t kExpertsMax = 512;

// Passed to kernels by value, so that a launch can be captured in a graph.
struct GroupedArgs {
    MatmulArgs one;  // pointers of row 0 and expert 0; m is not used
    const int32_t* offsets = nullptr;
    int32_t experts = 0;
    int32_t rows = 0;                       // of all experts, no fewer than the offsets cover
    int64_t weight_distance = 0;            // bytes from an expert to the next
    int64_t scale_distance = 0;             // bytes
    int64_t lora_b_distance = 0;            // elements
    float global_scales[kExpertsMax] = {};  // kNvFp4
};

// The expert whose m-tile number `tile` is, counting tiles of kM rows from expert 0 on, and the
// tile's first row in it. False past the last one. Every warp of the block calls it.
template <int kM>
__device__ __forceinline__ bool find_tile(
    const int32_t* offsets, int32_t experts, int32_t tile, int32_t& expert, int32_t& row
) {
    const auto tiles_of = [](int32_t rows) {
        return static_cast<int32_t>((static_cast<uint32_t>(rows) + kM - 1) / kM);
    };
    // A lane takes a run of experts.
    const int lane = threadIdx.x & 31;
    const int32_t run = (experts + 31) / 32;
    const int32_t first = min(lane * run, experts);
    const int32_t last = min(first + run, experts);
    int32_t tiles = 0;
    int32_t at = offsets[first];
#pragma unroll 4
    for (int32_t e = first; e < last; ++e) {
        const int32_t next = offsets[e + 1];
        tiles += tiles_of(next - at);
        at = next;
    }
    int32_t before = tiles;
#pragma unroll
    for (int distance = 1; distance < 32; distance <<= 1) {
        const int32_t below = __shfl_up_sync(0xffffffffu, before, distance);
        before += lane >= distance ? below : 0;
    }
    before -= tiles;
    const bool mine = tile >= before && tile < before + tiles;
    const uint32_t owner = __ballot_sync(0xffffffffu, mine);
    if (owner == 0u) {
        return false;
    }
    int32_t e = first;
    int32_t left = tile - before;
    if (mine) {
        while (true) {
            const int32_t own = tiles_of(offsets[e + 1] - offsets[e]);
            if (left < own) {
                break;
            }
            left -= own;
            ++e;
        }
    }
    const int source = __ffs(static_cast<int>(owner)) - 1;
    expert = __shfl_sync(0xffffffffu, e, source);
    row = __shfl_sync(0xffffffffu, left * kM, source);
    return true;
}

// The matmul of one expert's rows from `row` on.
__device__ __forceinline__ MatmulArgs
args_of_expert(const GroupedArgs& g, int32_t expert, int32_t row) {
    MatmulArgs a = g.one;
    const int64_t first = g.offsets[expert] + row;
    a.m = g.offsets[expert + 1] - static_cast<int32_t>(first);
    a.x += first * a.ldx;
    a.w.data += expert * g.weight_distance;
    a.w.scales += expert * g.scale_distance;
    a.w.global_scale = g.global_scales[expert];
    a.w.global_inverse = a.w.global_inverse == 0.0f ? 0.0f : __frcp_rn(a.w.global_scale);
    Epilogue& e = a.epilogue;
    e.y = static_cast<bf16*>(e.y) + first * e.ldy;
    e.residual = e.residual == nullptr ? nullptr : e.residual + first * e.ldy;
    e.lora_u = e.lora_u == nullptr ? nullptr : e.lora_u + first * e.ldu;
    e.lora_b += expert * g.lora_b_distance;
    return a;
}

void grouped_matmul(
    cudaStream_t queue, WeightFormat format, Direction direction, const GroupedArgs& args
);

template <WeightFormat kFormat>
void grouped_matmul_format(cudaStream_t queue, Direction direction, const GroupedArgs& args);

// to[e] = the weight of expert first + e in bf16, rows side by side, of the `count` experts from
// `first` on that have rows; the others are left as they are.
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
