#include "quant/quantized_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "base/error.h"

namespace orbit {
namespace {

constexpr int64_t kGgufBlock = 32;

// Bytes of a mapped file have no alignment, so every value is copied out.
template <typename T>
T load(const std::byte* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

const std::byte* row_data(const QuantizedMatrix& w, int64_t row) {
    return static_cast<const std::byte*>(w.data) + row * row_bytes(w.format, w.cols);
}

template <typename T>
void decode_plain(const std::byte* row, int64_t begin, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) {
        out[i] = to_float(load<T>(row + (begin + i) * static_cast<int64_t>(sizeof(T))));
    }
}

void decode_int4(const QuantizedMatrix& w, int64_t row, int64_t begin, int64_t count, float* out) {
    const std::byte* words = row_data(w, row);
    const auto* scales = reinterpret_cast<const std::byte*>(w.scales) +
                         row * (w.cols / w.group_size) * static_cast<int64_t>(sizeof(bf16));
    for (int64_t i = 0; i < count; ++i) {
        const int64_t column = begin + i;
        const auto byte = std::to_integer<int>(words[column / 2]);
        const int q = ((column % 2 == 0 ? byte : byte >> 4) & 15) - 8;
        const float scale = to_float(load<bf16>(scales + column / w.group_size * 2));
        // The product is rounded here, so both modes and every kernel mean the same weight.
        out[i] = round_to_bf16(static_cast<float>(q) * scale);
    }
}

// The scale of a group of NVFP4; both conventions round it to float before the product.
float nvfp4_scale(const QuantizedMatrix& w, uint8_t code) {
    const float scale = e4m3_to_float(code);
    return w.global_divides ? scale / w.global_scale : scale * w.global_scale;
}

// Every product is rounded here, as that of INT4.
void decode_fp8(const QuantizedMatrix& w, int64_t row, int64_t begin, int64_t count, float* out) {
    const std::byte* codes = row_data(w, row);
    const int64_t blocks = (w.cols + kFp8Block - 1) / kFp8Block;
    const auto* scales = static_cast<const std::byte*>(w.block_scales) +
                         row / kFp8Block * blocks * int64_t{sizeof(float)};
    for (int64_t i = 0; i < count; ++i) {
        const int64_t column = begin + i;
        const float scale = load<float>(scales + column / kFp8Block * int64_t{sizeof(float)});
        out[i] = round_to_bf16(e4m3_to_float(std::to_integer<uint8_t>(codes[column])) * scale);
    }
}

void decode_fp4(const QuantizedMatrix& w, int64_t row, int64_t begin, int64_t count, float* out) {
    const std::byte* bytes = row_data(w, row);
    const bool nvfp4 = w.format == WeightFormat::kNvFp4;
    const int64_t group = nvfp4 ? kNvFp4Group : kMxFp4Group;
    const auto* scales = static_cast<const std::byte*>(w.block_scales) + row * (w.cols / group);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t column = begin + i;
        const auto byte = std::to_integer<uint32_t>(bytes[column / 2]);
        const auto code = std::to_integer<uint8_t>(scales[column / group]);
        const float scale = nvfp4 ? nvfp4_scale(w, code) : e8m0_to_float(code);
        out[i] = round_to_bf16(e2m1_to_float(column % 2 == 0 ? byte : byte >> 4) * scale);
    }
}

void decode_q8_0(const std::byte* block, float* out) {
    const float d = to_float(load<f16>(block));
    for (int64_t j = 0; j < kGgufBlock; ++j) {
        out[j] = d * static_cast<float>(load<int8_t>(block + 2 + j));
    }
}

void decode_q4_0(const std::byte* block, float* out) {
    const float d = to_float(load<f16>(block));
    for (int64_t j = 0; j < kGgufBlock / 2; ++j) {
        const auto byte = std::to_integer<int>(block[2 + j]);
        out[j] = d * static_cast<float>((byte & 15) - 8);
        out[j + kGgufBlock / 2] = d * static_cast<float>((byte >> 4) - 8);
    }
}

void decode_q4_1(const std::byte* block, float* out) {
    const float d = to_float(load<f16>(block));
    const float m = to_float(load<f16>(block + 2));
    for (int64_t j = 0; j < kGgufBlock / 2; ++j) {
        const auto byte = std::to_integer<int>(block[4 + j]);
        out[j] = d * static_cast<float>(byte & 15) + m;
        out[j + kGgufBlock / 2] = d * static_cast<float>(byte >> 4) + m;
    }
}

void decode_blocks(
    const QuantizedMatrix& w, int64_t row, int64_t begin, int64_t count, float* out
) {
    CHECK_EQ(begin % kGgufBlock, 0);
    CHECK_EQ(count % kGgufBlock, 0);
    const int64_t block_bytes = row_bytes(w.format, kGgufBlock);
    const std::byte* block = row_data(w, row) + begin / kGgufBlock * block_bytes;
    for (int64_t done = 0; done < count; done += kGgufBlock, block += block_bytes) {
        switch (w.format) {
            case WeightFormat::kQ8_0:
                decode_q8_0(block, out + done);
                break;
            case WeightFormat::kQ4_0:
                decode_q4_0(block, out + done);
                break;
            default:
                decode_q4_1(block, out + done);
                break;
        }
    }
}

}  // namespace

const char* format_name(WeightFormat format) {
    switch (format) {
        case WeightFormat::kBF16:
            return "BF16";
        case WeightFormat::kF32:
            return "F32";
        case WeightFormat::kF16:
            return "F16";
        case WeightFormat::kInt4:
            return "INT4";
        case WeightFormat::kQ8_0:
            return "Q8_0";
        case WeightFormat::kQ4_0:
            return "Q4_0";
        case WeightFormat::kQ4_1:
            return "Q4_1";
        case WeightFormat::kFp8:
            return "FP8";
        case WeightFormat::kMxFp4:
            return "MXFP4";
        case WeightFormat::kNvFp4:
            return "NVFP4";
    }
    return "?";
}

int64_t row_bytes(WeightFormat format, int64_t cols) {
    switch (format) {
        case WeightFormat::kBF16:
        case WeightFormat::kF16:
            return 2 * cols;
        case WeightFormat::kF32:
            return 4 * cols;
        case WeightFormat::kInt4:
        case WeightFormat::kMxFp4:
        case WeightFormat::kNvFp4:
            return cols / 2;
        case WeightFormat::kFp8:
            return cols;
        case WeightFormat::kQ8_0:
            return cols / kGgufBlock * 34;
        case WeightFormat::kQ4_0:
            return cols / kGgufBlock * 18;
        case WeightFormat::kQ4_1:
            return cols / kGgufBlock * 20;
    }
    return 0;
}

int64_t QuantizedMatrix::scale_bytes() const {
    switch (format) {
        case WeightFormat::kInt4:
            return rows * (cols / group_size) * int64_t{sizeof(bf16)};
        case WeightFormat::kFp8:
            return (rows + kFp8Block - 1) / kFp8Block * ((cols + kFp8Block - 1) / kFp8Block) *
                   int64_t{sizeof(float)};
        case WeightFormat::kMxFp4:
            return rows * (cols / kMxFp4Group);
        case WeightFormat::kNvFp4:
            return rows * (cols / kNvFp4Group);
        default:
            return 0;
    }
}

int64_t QuantizedMatrix::bytes() const {
    return rows * row_bytes(format, cols) + scale_bytes();
}

void decode_f32(const QuantizedMatrix& w, int64_t row, int64_t begin, int64_t count, float* out) {
    CHECK_LT(row, w.rows);
    CHECK_LE(begin + count, w.cols);
    switch (w.format) {
        case WeightFormat::kBF16:
            return decode_plain<bf16>(row_data(w, row), begin, count, out);
        case WeightFormat::kF32:
            return decode_plain<float>(row_data(w, row), begin, count, out);
        case WeightFormat::kF16:
            return decode_plain<f16>(row_data(w, row), begin, count, out);
        case WeightFormat::kInt4:
            return decode_int4(w, row, begin, count, out);
        case WeightFormat::kFp8:
            return decode_fp8(w, row, begin, count, out);
        case WeightFormat::kMxFp4:
        case WeightFormat::kNvFp4:
            return decode_fp4(w, row, begin, count, out);
        case WeightFormat::kQ8_0:
        case WeightFormat::kQ4_0:
        case WeightFormat::kQ4_1:
            return decode_blocks(w, row, begin, count, out);
    }
}

void decode_bf16(const QuantizedMatrix& w, int64_t row, int64_t begin, int64_t count, bf16* out) {
    constexpr int64_t kChunk = 256;
    float values[kChunk];
    for (int64_t done = 0; done < count; done += kChunk) {
        const int64_t n = std::min(kChunk, count - done);
        decode_f32(w, row, begin + done, n, values);
        for (int64_t i = 0; i < n; ++i) {
            out[done + i] = to_bf16(values[i]);
        }
    }
}

bool has_small_scales(const QuantizedMatrix& w) {
    CHECK(w.format == WeightFormat::kInt4);
    const auto* bytes = reinterpret_cast<const std::byte*>(w.scales);
    const int least = to_bf16(kTinyScale).bits;
    const int limit = to_bf16(kSmallScale).bits;
    for (int64_t at = 0; at < w.scale_bytes(); at += 2) {
        uint16_t bits = 0;
        std::memcpy(&bits, bytes + at, sizeof bits);
        const int magnitude = bits & 0x7fff;
        if (magnitude >= limit || (magnitude != 0 && magnitude < least)) {
            return false;
        }
    }
    return true;
}

void encode_int4(
    const float* row, int64_t cols, int32_t group_size, uint32_t* words, bf16* scales
) {
    CHECK_EQ(cols % group_size, 0);
    CHECK_EQ(group_size % 8, 0);
    for (int64_t group = 0; group < cols / group_size; ++group) {
        const float* w = row + group * group_size;
        float largest = 0;
        for (int32_t i = 0; i < group_size; ++i) {
            largest = std::max(largest, std::abs(w[i]));
        }
        scales[group] = to_bf16(largest / 7.0f);
        const float scale = to_float(scales[group]);
        for (int32_t word = 0; word < group_size / 8; ++word) {
            uint32_t packed = 0;
            for (int32_t k = 0; k < 8; ++k) {
                // Ties go to even (the default rounding mode), as torch.round does.
                const float q = scale == 0 ? 0.0f : std::nearbyint(w[word * 8 + k] / scale);
                const auto code = static_cast<int32_t>(std::clamp(q, -7.0f, 7.0f)) + 8;
                packed |= static_cast<uint32_t>(code) << (4 * k);
            }
            words[(group * group_size) / 8 + word] = packed;
        }
    }
}

}  // namespace orbit
