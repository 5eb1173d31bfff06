// Packed weights of dense products with many rows, on the GPUs whose quickest matmul member takes
// bf16: decoded to scratch memory and multiplied from there, with the bits of decoding inside the
// product. ops/matmul_decoded_cuda.cu does it, run/scratch_plan.cpp counts the memory.
#pragma once

#include <algorithm>

#include "device/device.h"

namespace orbit {

// Decoding costs the time of about 250 rows.
constexpr int64_t kDecodeFirstRows = 1024;
constexpr int64_t kDecodedBytes = int64_t{64} << 20;  // at a time, at the most

// Room for products that run together: `elements` of all their weights.
constexpr int64_t decoded_bytes(int64_t elements) {
    return std::min(kDecodedBytes, 2 * elements);
}

namespace cuda {

bool decodes_first(const Device& device);

}

}  // namespace orbit
