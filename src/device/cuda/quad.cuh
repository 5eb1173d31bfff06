// Exchanges among four lanes that lie side by side, a quad of the tensor cores' fragments.
#pragma once

#include "device/cuda/math.cuh"

namespace orbit::cuda {

// Four words of each of four lanes, transposed: word i of lane q and word q of lane i change
// places.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
    const int lane = threadIdx.x & 3;
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = (lane & bit) != 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if ((i & bit) == 0) {
                const uint32_t sent = upper ? words[i] : words[i + bit];
                const uint32_t got = __shfl_xor_sync(kFullWarp, sent, bit);
                words[i] = upper ? got : words[i];
                words[i + bit] = upper ? words[i + bit] : got;
            }
        }
    }
}

}  // namespace orbit::cuda
