// Packed experts from page-locked host memory to the device, chosen by the device: a kernel that
// reads over the link itself. Copy engines would need the host to know the experts.
#include "device/cuda/check.cuh"
#include "ops/cuda_ops.h"

namespace orbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 8;  // of 16 bytes, in flight at once by every thread
constexpr int64_t kBlockBytes = int64_t{kThreads} * kLoads * 16;

struct StageArgs {
    ExpertArray arrays[kExpertArraysMax];
    int32_t blocks[kExpertArraysMax];  // of kBlockBytes, in one expert's part of the array
    int32_t count;
    const int32_t* offsets;
};

// Block (piece of an expert's arrays, expert). It does not release its successor, which therefore
// starts when all pieces are there; the fence makes them seen by a successor that does not wait.
__global__ void __launch_bounds__(kThreads)
    stage_experts_kernel(const __grid_constant__ StageArgs args) {
    const int64_t expert = blockIdx.y;
    if (args.offsets[expert] == args.offsets[expert + 1]) {
        return;
    }
    auto piece = static_cast<int32_t>(blockIdx.x);
    int32_t array = 0;
    while (array + 1 < args.count && piece >= args.blocks[array]) {
        piece -= args.blocks[array];
        ++array;
    }
    const ExpertArray& a = args.arrays[array];
    const auto* from = reinterpret_cast<const uint4*>(a.from + expert * a.from_distance);
    auto* to = reinterpret_cast<uint4*>(a.to + expert * a.to_distance);
    const int64_t count = (a.bytes + 15) / 16;
    const int64_t first = piece * (kBlockBytes / 16) + threadIdx.x;
    uint4 words[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int64_t at = first + i * kThreads;
        if (at < count) {
            words[i] = __ldcs(from + at);
        }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int64_t at = first + i * kThreads;
        if (at < count) {
            to[at] = words[i];
        }
    }
    __threadfence();
}

}  // namespace

void stage_experts(
    Stream& stream, const int32_t* offsets, int32_t num_experts, std::span<const ExpertArray> arrays
) {
    StageArgs args{};
    args.offsets = offsets;
    int64_t blocks = 0;
    for (const ExpertArray& a : arrays) {
        const int64_t pieces = ceil_div(a.bytes, kBlockBytes);
        args.blocks[args.count] = static_cast<int32_t>(pieces);
        args.arrays[args.count++] = a;
        blocks += pieces;
    }
    const dim3 grid(grid_dim(blocks), grid_dim_yz(num_experts));
    stage_experts_kernel<<<grid, kThreads, 0, queue_of(stream)>>>(args);
    LAUNCH_CHECK();
}

}  // namespace orbit::cuda
