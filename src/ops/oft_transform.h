// OFT's transforms on a GPU, for the series of degree 4 (PEFT's default: D = 2Q + 2S + S (2Q + S),
// S = Q Q, algorithms.md 1.3 and 1.4); what else there is, and the CPU, is done by
// adapter/oft_math.h, with the same bits.
#pragma once

#include <span>

#include "base/number_formats.h"
#include "device/device.h"

namespace orbit {

constexpr int32_t kOftDeviceBlockMax = 64;

// One row of packed skew values and the rotations made of it. Offsets count elements.
struct OftRow {
    int64_t v;       // of the b (b - 1) / 2 values
    int64_t copy;    // of the first [b, b] rotation, and of its gradient
    int32_t copies;  // rotations that share the row, side by side
    int32_t block;   // b
};

struct OftRowBound {
    double squares;            // ||Q||_F^2
    double squares_of_square;  // ||Q Q||_F^2
};

namespace cuda {

// copies = bf16(D). bounds: host memory, one per row.
void oft_derive_rows(
    Stream& stream,
    std::span<const OftRow> rows,
    const float* masters,
    bf16* copies,
    std::span<OftRowBound> bounds
);

// gradients += dL/dv from deltas = dL/dD; a shared row gets the sum in ascending order.
void oft_gradient_rows(
    Stream& stream,
    std::span<const OftRow> rows,
    const float* masters,
    const float* deltas,
    float* gradients
);

}  // namespace cuda
}  // namespace orbit
