// Packing float32 weights into the published low-precision formats (models.md 10), for orbit
// quantize. Rounding is to nearest, ties to even, everywhere.
#pragma once

#include <cstdint>

namespace orbit {

// The nearest E4M3 code; beyond 448 the largest one. NaN is not allowed.
uint8_t to_e4m3(float value);
// The nearest E2M1 code, 0 to 15; beyond 6 the largest one.
uint8_t to_e2m1(float value);

// One block of at most 128 x 128, rows `stride` apart: returns the bf16 scale (as float) and writes
// the codes, rows `stride` apart too. scale = bf16(max|w| / 448), code = e4m3(w / scale).
float encode_fp8_block(
    const float* block, int64_t rows, int64_t cols, int64_t stride, uint8_t* codes
);

// One row. MXFP4: the scale of 32 columns is the smallest power of two with max|w| <= 6 scale, so
// nothing is cut off.
void encode_mxfp4(const float* row, int64_t cols, uint8_t* nibbles, uint8_t* scales);

// 448 * 6 / max|w| of the whole tensor; 1 when all are 0.
float nvfp4_global_scale(float largest);
// One row. NVFP4: the scale of 16 columns is e4m3(global * max|w| / 6), and the value of a code
// is e2m1 * scale / global.
void encode_nvfp4(const float* row, int64_t cols, float global, uint8_t* nibbles, uint8_t* scales);

}  // namespace orbit
