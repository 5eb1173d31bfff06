// BatchView: a ragged batch. Prefill, decode, scoring and training are four fillings of it. All
// pointers are device memory. Sequence s owns tokens [sequence_begin[s], sequence_begin[s+1]); its
// first one stands at position sequence_position[s]; position p of it lives in page block_table[s *
// max_blocks + p / kPageTokens], row p % kPageTokens.
#pragma once

#include <cstdint>

#include "device/tensor.h"

namespace orbit {

constexpr int32_t kPageTokens = 16;

// Pages that hold `tokens` positions.
constexpr int64_t pages_for(int64_t tokens) {
    return (tokens + kPageTokens - 1) / kPageTokens;
}

struct BatchView {
    int32_t num_tokens = 0;
    int32_t num_sequences = 0;
    int32_t max_blocks = 0;  // columns of block_table
    int32_t max_positions =
        0;  // upper bound (exclusive) on any position in the batch, for grid sizes
    const int32_t* ids = nullptr;                // [num_tokens]
    const int32_t* positions = nullptr;          // [num_tokens]
    const int32_t* sequence_of = nullptr;        // [num_tokens] index of the token's sequence
    const int32_t* sequence_begin = nullptr;     // [num_sequences + 1]
    const int32_t* sequence_position = nullptr;  // [num_sequences]
    const int32_t* block_table = nullptr;        // [num_sequences, max_blocks]
};

// Key and value pages of one layer: [num_pages, num_kv_heads, kPageTokens, head_dim] each, in the
// compute type.
struct KvView {
    Tensor k_pages;
    Tensor v_pages;
};

}  // namespace orbit
