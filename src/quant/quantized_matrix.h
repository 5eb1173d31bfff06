// QuantizedMatrix: an immutable view of one frozen weight [rows (out), cols (in)] in the bytes it
// was published in. The same bytes serve decode, prefill, forward and dgrad. y = x W^T.
//
// Layouts, row-major, rows one after the other:
//   kBF16     bf16[cols]
//   kF32      float[cols]                       (check mode and norm-like weights only)
//   kInt4     data: uint32[cols / 8], nibble k of word w is column 8w + k, value nibble - 8;
//             scales: bf16[cols / group_size]   (compressed-tensors pack-quantized, symmetric)
//   kFp8      data: E4M3 codes [cols]; block_scales: float [ceil(rows / 128), ceil(cols / 128)]
//             (F32, BF16 and E8M0 scales of the files are all exact in float)
//   kMxFp4    data: E2M1 nibbles, column 2b in the low half of byte b; block_scales: E8M0 codes
//             [cols / 32]   (DeepSeek-V4's FP4 experts, compressed-tensors mxfp4-pack-quantized)
//   kNvFp4    data: as kMxFp4; block_scales: E4M3 codes [cols / 16]; the group's scale is
//             fp32(code / global_scale) or fp32(code * global_scale)
//   kQ8_0, kQ4_0, kQ4_1   GGUF blocks of 32 columns: 34, 18, 20 bytes (models.md 10.8)
// The value used everywhere is the bf16 of performance.md 3.4; the f32 check mode uses the same
// except that GGUF files keep their float32 value (F16 and F32 tensors of safetensors are rounded
// at load in both).
#pragma once

#include <cstdint>
#include <string_view>

#include "device/tensor.h"

namespace orbit {

enum class WeightFormat : uint8_t {
    kBF16,
    kF32,
    kF16,
    kInt4,
    kQ8_0,
    kQ4_0,
    kQ4_1,
    kFp8,
    kMxFp4,
    kNvFp4
};

constexpr int64_t kFp8Block = 128;  // rows and columns of one FP8 scale
constexpr int64_t kMxFp4Group = 32;
constexpr int64_t kNvFp4Group = 16;
// Scales that allow quicker decoding (ops/weight_cuda.cuh): below 2^-5, and 0 or at least 2^-100.
constexpr float kSmallScale = 0x1p-5f;
constexpr float kTinyScale = 0x1p-100f;

const char* format_name(WeightFormat format);
int64_t row_bytes(WeightFormat format, int64_t cols);  // bytes of `data` in one row

struct QuantizedMatrix {
    WeightFormat format = WeightFormat::kBF16;
    int64_t rows = 0;
    int64_t cols = 0;
    int32_t group_size = 32;  // kInt4
    const void* data = nullptr;
    const bf16* scales = nullptr;  // kInt4: [rows, cols / group_size]
    bool small_scales = false;     // kInt4 on a GPU, no stack: has_small_scales()

    const void* block_scales = nullptr;  // kFp8, kMxFp4, kNvFp4
    float global_scale = 1;              // kNvFp4
    bool global_divides = false;         // kNvFp4: compressed-tensors divides, ModelOpt multiplies

    bool defined() const { return data != nullptr; }

    int64_t scale_bytes() const;

    int64_t bytes() const;  // data and scales
};

// Plain host decoders: columns [begin, begin + count) of one row (begin and count multiples of 32
// in block formats). `decode_bf16` gives the value every kernel uses; `decode_f32` is the check
// mode's.
void decode_bf16(const QuantizedMatrix& w, int64_t row, int64_t begin, int64_t count, bf16* out);
void decode_f32(const QuantizedMatrix& w, int64_t row, int64_t begin, int64_t count, float* out);

// Whether all of an INT4 matrix's scales, in host memory at any address, are less than kSmallScale
// in magnitude, and none but 0 is less than kTinyScale.
bool has_small_scales(const QuantizedMatrix& w);

// Packs one float32 row into INT4 groups: s = bf16(max|w| / 7), q = clamp(round(w / s), -7, 7); 0
// when all are 0.
void encode_int4(const float* row, int64_t cols, int32_t group_size, uint32_t* words, bf16* scales);

}  // namespace orbit
