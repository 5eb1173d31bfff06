// How a GPU cuts the sums of adapter gradients into ranges that are formed apart and then added in
// order: fixed by the shapes alone, so that no result depends on the grid. ops/adapter_grad_cuda.cu
// and ops/oft_cuda.cu do it, run/scratch_plan.cpp counts the memory.
#pragma once

#include <cstdint>

namespace orbit {

constexpr int32_t kGradientTokens = 512;  // of a range, in sums over tokens

// Columns of a range, in LoRA's sums over an output's columns, of which all layers that run
// together have `all`: shorter where ranges would be too few to fill a GPU.
constexpr int32_t gradient_columns(int64_t all) {
    return all < 8192 ? 256 : 512;
}

}  // namespace orbit
