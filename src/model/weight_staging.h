// Turns a weight as stored into the host matrix that goes to its final place: checks every value,
// restores the row order, rounds or quantises. At most one tensor is staged at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "base/thread_pool.h"
#include "model/checkpoint.h"

namespace orbit {

struct StagingOptions {
    bool quantize_int4 = false;  // BF16, F16 and F32 become INT4 group 32
    bool keep_f32 = false;       // F16 and F32 stay float32 instead of being rounded to bf16
};

struct StagedWeight {
    QuantizedMatrix matrix;             // points into the mapped file, or into the buffers below
    double largest_rounding_error = 0;  // |stored - bf16| where F16 or F32 were rounded
    std::vector<std::byte> data;
    std::vector<bf16> scales;         // kInt4
    std::vector<float> block_scales;  // kFp8
};

// UserError names the file and the tensor: a value that is not finite, or one that its new format
// cannot hold.
StagedWeight stage_matrix(
    ThreadPool& threads, const StoredWeight& weight, const StagingOptions& options
);

// A norm weight or a bias.
std::vector<float> stage_vector(const StoredWeight& weight);

// The stored bytes as a matrix ([n] counts as one row), unaligned.
QuantizedMatrix stored_matrix(const StoredWeight& weight);

// UserError when a value, or a scale that a block's values come from, is NaN or infinite.
void check_finite(ThreadPool& threads, const StoredWeight& weight);

}  // namespace orbit
