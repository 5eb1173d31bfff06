// The order of 4-bit codes that the GPU's kernels read. Files hold the 32 columns of a 16-byte
// block in ascending order; lane q of a tensor core's quad takes columns 2q, 2q + 1, 2q + 8, 2q + 9
// of each of the block's two k16 steps, and decodes pairs whose codes lie 16 bits apart. So word q
// of an arranged block holds, in bits 0-3, 4-7, 8-11, 12-15, columns 2q, 2q + 8, 2q + 16, 2q + 24,
// and their right neighbours 16 bits above. The values, the size and the place of every block stay.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/device.h"

namespace orbit {

// Rows of whole blocks only; others stay as they are.
constexpr bool is_arranged(int64_t cols) {
    return cols % 32 == 0;
}

// A column's code: the word of its block, and the bit where it starts.
constexpr int arranged_word(int32_t col) {
    return (col >> 1) & 3;
}

constexpr int arranged_shift(int32_t col) {
    return 4 * ((col >> 3) & 3) + 16 * (col & 1);
}

namespace cuda {

void arrange_codes(Stream& stream, void* data, size_t bytes);

}

}  // namespace orbit
