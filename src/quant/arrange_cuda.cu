#include "device/cuda/check.cuh"
#include "quant/arrange.h"

namespace orbit::cuda {

namespace {

constexpr int kThreads = 256;

// A block of 32 codes a thread.
__global__ void __launch_bounds__(kThreads) arrange_kernel(uint4* blocks, int64_t count) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (at >= count) {
        return;
    }
    const uint4 stored = blocks[at];
    const uint32_t from[4] = {stored.x, stored.y, stored.z, stored.w};
    uint32_t to[4] = {};
#pragma unroll
    for (int col = 0; col < 32; ++col) {
        const uint32_t code = (from[col / 8] >> (4 * (col % 8))) & 15u;
        to[arranged_word(col)] |= code << arranged_shift(col);
    }
    blocks[at] = uint4{to[0], to[1], to[2], to[3]};
}

}  // namespace

void arrange_codes(Stream& stream, void* data, size_t bytes) {
    const auto count = static_cast<int64_t>(bytes / sizeof(uint4));
    arrange_kernel<<<grid_dim(ceil_div(count, kThreads)), kThreads, 0, queue_of(stream)>>>(
        static_cast<uint4*>(data), count
    );
    LAUNCH_CHECK();
}

}  // namespace orbit::cuda
