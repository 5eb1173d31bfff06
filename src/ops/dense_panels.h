// Packing a weight into panels: kPanelWidth output columns wide, the contraction downwards.
//   float panel  [k][64]        one float a cell
//   pair panel   [k / 2][64]    two bf16 a cell, the even k in the low half
// Columns past the width and an odd last k are zero. Included once per instruction set.
#pragma once

#include <algorithm>
#include <cstring>

#include "ops/dense_matmul.h"

namespace orbit::ORBIT_ISA {

constexpr int64_t kBlock = 32;  // columns of a quantised block

// Bytes of a weight have no alignment.
template <typename T>
inline T load_as(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline const char* weight_row(const QuantizedMatrix& w, int64_t row, int64_t bytes) {
    return static_cast<const char*>(w.data) + row * bytes;
}

template <typename T>
inline void decode_plain(const char* row, int64_t begin, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) {
        out[i] = to_float(load_as<T>(row + (begin + i) * static_cast<int64_t>(sizeof(T))));
    }
}

inline void decode_int4(
    const QuantizedMatrix& w, int64_t row, int64_t begin, int64_t count, float* out
) {
    const char* words = weight_row(w, row, w.cols / 2);
    const bf16* scales = w.scales + row * (w.cols / w.group_size);
    // Runs inside one scale group, so that the loop over nibbles has nothing to look up.
    for (int64_t i = 0; i < count;) {
        const int64_t group = (begin + i) / w.group_size;
        const float scale = to_float(scales[group]);
        const char* bytes = words + (begin + i) / 2;
        const int64_t run = std::min(count - i, (group + 1) * w.group_size - begin - i);
        for (int64_t j = 0; j < run / 2; ++j) {
            const int byte = static_cast<uint8_t>(bytes[j]);
            out[i + 2 * j] = static_cast<float>((byte & 15) - 8) * scale;
            out[i + 2 * j + 1] = static_cast<float>((byte >> 4) - 8) * scale;
        }
        i += run;
    }
}

// The scale of a group of NVFP4; both conventions round it to float before the product.
inline float nvfp4_scale(const QuantizedMatrix& w, uint8_t code) {
    const float scale = e4m3_to_float(code);
    return w.global_divides ? scale / w.global_scale : scale * w.global_scale;
}

inline void decode_fp8(
    const QuantizedMatrix& w, int64_t row, int64_t begin, int64_t count, float* out
) {
    const char* codes = weight_row(w, row, w.cols) + begin;
    const int64_t blocks = (w.cols + kFp8Block - 1) / kFp8Block;
    const auto* scales = static_cast<const float*>(w.block_scales) + row / kFp8Block * blocks;
    for (int64_t i = 0; i < count;) {
        const int64_t block = (begin + i) / kFp8Block;
        const float scale = scales[block];
        const int64_t run = std::min(count - i, (block + 1) * kFp8Block - begin - i);
        for (int64_t j = 0; j < run; ++j) {
            // Sign, exponent and mantissa moved to float's places; the factor corrects the bias
            // and makes subnormal codes normal. NaN codes were refused at load.
            const uint32_t code = static_cast<uint8_t>(codes[i + j]);
            const uint32_t bits = ((code & 0x80u) << 24) | ((code & 0x7fu) << 20);
            out[i + j] = float_from_bits(bits) * 0x1p120f * scale;
        }
        i += run;
    }
}

// MXFP4 and NVFP4: groups of E2M1 nibbles with a scale each.
inline void decode_fp4(
    const QuantizedMatrix& w, int64_t row, int64_t begin, int64_t count, float* out
) {
    constexpr float kValues[16] = {
        0.0f,
        0.5f,
        1.0f,
        1.5f,
        2.0f,
        3.0f,
        4.0f,
        6.0f,
        -0.0f,
        -0.5f,
        -1.0f,
        -1.5f,
        -2.0f,
        -3.0f,
        -4.0f,
        -6.0f};
    const bool nvfp4 = w.format == WeightFormat::kNvFp4;
    const int64_t group = nvfp4 ? kNvFp4Group : kMxFp4Group;
    const char* nibbles = weight_row(w, row, w.cols / 2);
    const auto* scales = static_cast<const uint8_t*>(w.block_scales) + row * (w.cols / group);
    for (int64_t i = 0; i < count;) {
        const int64_t at = (begin + i) / group;
        const float scale = nvfp4 ? nvfp4_scale(w, scales[at]) : e8m0_to_float(scales[at]);
        const char* bytes = nibbles + (begin + i) / 2;
        const int64_t run = std::min(count - i, (at + 1) * group - begin - i);
        for (int64_t j = 0; j < run / 2; ++j) {
            const auto byte = static_cast<uint8_t>(bytes[j]);
            out[i + 2 * j] = kValues[byte & 15] * scale;
            out[i + 2 * j + 1] = kValues[byte >> 4] * scale;
        }
        i += run;
    }
}

inline void decode_q8_0(const char* block, float* out) {
    const float d = to_float(load_as<f16>(block));
    for (int64_t j = 0; j < kBlock; ++j) {
        out[j] = d * static_cast<float>(static_cast<int8_t>(block[2 + j]));
    }
}

inline void decode_q4(const char* nibbles, float d, float m, int offset, float* out) {
    for (int64_t j = 0; j < kBlock / 2; ++j) {
        const int byte = static_cast<uint8_t>(nibbles[j]);
        out[j] = d * static_cast<float>((byte & 15) - offset) + m;
        out[j + kBlock / 2] = d * static_cast<float>((byte >> 4) - offset) + m;
    }
}

constexpr int64_t block_bytes_of(WeightFormat format) {
    return format == WeightFormat::kQ8_0 ? 34 : format == WeightFormat::kQ4_0 ? 18 : 20;
}

inline void decode_blocks(
    const QuantizedMatrix& w, int64_t row, int64_t begin, int64_t count, float* out
) {
    const int64_t bytes = block_bytes_of(w.format);
    const char* block = weight_row(w, row, w.cols / kBlock * bytes) + begin / kBlock * bytes;
    for (int64_t done = 0; done < count; done += kBlock, block += bytes) {
        if (w.format == WeightFormat::kQ8_0) {
            decode_q8_0(block, out + done);
        } else if (w.format == WeightFormat::kQ4_0) {
            decode_q4(block + 2, to_float(load_as<f16>(block)), 0.0f, 8, out + done);
        } else {
            const float m = to_float(load_as<f16>(block + 2));
            decode_q4(block + 4, to_float(load_as<f16>(block)), m, 0, out + done);
        }
    }
}

// Columns [begin, begin + count) of one row: decode_bf16's values, or decode_f32's when exact.
inline void decode_row(
    const QuantizedMatrix& w, int64_t row, int64_t begin, int64_t count, bool exact, float* out
) {
    switch (w.format) {
        case WeightFormat::kBF16:
            decode_plain<bf16>(weight_row(w, row, w.cols * 2), begin, count, out);
            return;
        case WeightFormat::kF32:
            decode_plain<float>(weight_row(w, row, w.cols * 4), begin, count, out);
            break;
        case WeightFormat::kF16:
            decode_plain<f16>(weight_row(w, row, w.cols * 2), begin, count, out);
            break;
        case WeightFormat::kInt4:
            decode_int4(w, row, begin, count, out);
            exact = false;  // the check mode rounds these products too
            break;
        case WeightFormat::kFp8:
            decode_fp8(w, row, begin, count, out);
            exact = false;
            break;
        case WeightFormat::kMxFp4:
        case WeightFormat::kNvFp4:
            decode_fp4(w, row, begin, count, out);
            exact = false;
            break;
        default:
            decode_blocks(w, row, begin, count, out);
            break;
    }
    if (!exact) {
        for (int64_t i = 0; i < count; ++i) {
            out[i] = round_to_bf16(out[i]);
        }
    }
}

inline uint32_t bf16_bits(float exact_bf16) {
    return float_bits(exact_bf16) >> 16;
}

inline uint32_t pair_cell(float even, float odd) {
    return bf16_bits(even) | (bf16_bits(odd) << 16);
}

constexpr int64_t kDecodeRun = 64;  // columns decoded at a time
constexpr int64_t kDecodeRows = 8;  // rows decoded at a time

// from [8 rows][kDecodeRun] to columns [0, 8) of `count` panel rows.
inline void transpose_rows(const float* from, int64_t count, bool pairs, uint32_t* cells) {
    if (pairs) {
        for (int64_t k = 0; k < count; k += 2) {
            for (int64_t i = 0; i < kDecodeRows; ++i) {
                const float* pair = from + i * kDecodeRun + k;
                cells[k / 2 * kPanelWidth + i] = pair_cell(pair[0], pair[1]);
            }
        }
        return;
    }
    for (int64_t k = 0; k < count; ++k) {
        for (int64_t i = 0; i < kDecodeRows; ++i) {
            cells[k * kPanelWidth + i] = float_bits(from[i * kDecodeRun + k]);
        }
    }
}

// Contraction over w's columns: panel column j is w's row n0 + j.
inline void pack_forward_plain(
    const Product& p, int64_t n0, int64_t width, int64_t k0, int64_t depth, uint32_t* cells
) {
    // Pairs come with even depths only, so a pair never reaches past the decoded columns.
    float rows[kDecodeRows * kDecodeRun];
    for (int64_t j = 0; j < kPanelWidth; j += kDecodeRows) {
        for (int64_t k = 0; k < depth; k += kDecodeRun) {
            const int64_t count = std::min(kDecodeRun, depth - k);
            for (int64_t i = 0; i < kDecodeRows; ++i) {
                float* row = rows + i * kDecodeRun;
                if (j + i < width) {
                    decode_row(p.w, n0 + j + i, k0 + k, count, p.exact_values, row);
                } else {
                    std::fill_n(row, count, 0.0f);
                }
            }
            transpose_rows(rows, count, p.pairs, cells + k / (p.pairs ? 2 : 1) * kPanelWidth + j);
        }
    }
}

// Contraction over w's rows: panel column j is w's column n0 + j.
inline void pack_transposed_plain(
    const Product& p, int64_t n0, int64_t width, int64_t k0, int64_t depth, uint32_t* cells
) {
    float even[kPanelWidth] = {};
    float odd[kPanelWidth] = {};
    const int64_t step = p.pairs ? 2 : 1;
    for (int64_t k = 0; k < depth; k += step) {
        uint32_t* row = cells + k / step * kPanelWidth;
        decode_row(p.w, k0 + k, n0, width, p.exact_values, even);
        if (!p.pairs) {
            std::memcpy(row, even, sizeof even);
            continue;
        }
        decode_row(p.w, k0 + k + 1, n0, width, p.exact_values, odd);
        for (int64_t j = 0; j < kPanelWidth; ++j) {
            row[j] = pair_cell(even[j], odd[j]);
        }
    }
}

// Packs w's part for output columns [n0, n0 + width) and k in [k0, k0 + depth).
inline void pack_panel(
    const Product& p, int64_t n0, int64_t width, int64_t k0, int64_t depth, uint32_t* cells
) {
    if (p.transposed) {
        pack_transposed_plain(p, n0, width, k0, depth, cells);
    } else {
        pack_forward_plain(p, n0, width, k0, depth, cells);
    }
}

}  // namespace orbit::ORBIT_ISA
