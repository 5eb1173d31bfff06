// Rows of the head whose logits are in a GPU's memory at the same time: ops/logprob_cuda.cu takes
// them, run/scratch_plan.cpp counts the memory. Rows do not depend on each other, so no bit depends
// on it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace orbit {

// 512 rows of a vocabulary of 152,000 ids: enough for the matmul member of pairs of blocks.
constexpr int64_t kHeadChunkBytes = int64_t{320} << 20;

constexpr int64_t head_chunk_rows(int64_t rows, int64_t vocabulary) {
    const int64_t fit = kHeadChunkBytes / (4 * vocabulary) / 128 * 128;
    return std::min(rows, std::clamp<int64_t>(fit, 128, 16384));
}

}  // namespace orbit
