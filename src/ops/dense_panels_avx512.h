// Packing pair panels with AVX-512: one reader per format gives 32 columns of a row as bf16 values
// in order; both orientations are built on it. Same values as the plain packers, except that the
// instructions flush bf16 denormals, which the pair multiply would flush anyway.
#pragma once

// GCC 12 takes the intrinsics' own "undefined" placeholders for uninitialised variables.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "ops/dense_panels.h"

namespace orbit::ORBIT_ISA {

constexpr int64_t kGroup = 16;  // output columns of one vector

inline __m512i round_pair(__m512 low, __m512 high) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

inline __m512 broadcast_half(const char* from) {
    return _mm512_cvtph_ps(_mm256_set1_epi16(load_as<int16_t>(from)));
}

// 0, 1, ... 15.
inline __m512 sixteen_codes() {
    return _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}

struct Bf16Reader {
    const char* data;
    int64_t stride;

    explicit Bf16Reader(const QuantizedMatrix& w)
        : data(static_cast<const char*>(w.data)), stride(w.cols * 2) {}

    __m512i read(int64_t row, int64_t column, __mmask32 mask) const {
        return _mm512_maskz_loadu_epi16(mask, data + row * stride + column * 2);
    }
};

struct F32Reader {
    const char* data;
    int64_t stride;

    explicit F32Reader(const QuantizedMatrix& w)
        : data(static_cast<const char*>(w.data)), stride(w.cols * 4) {}

    __m512i read(int64_t row, int64_t column, __mmask32 mask) const {
        const char* from = data + row * stride + column * 4;
        const auto low = static_cast<__mmask16>(mask);
        const auto high = static_cast<__mmask16>(mask >> 16);
        return round_pair(_mm512_maskz_loadu_ps(low, from), _mm512_maskz_loadu_ps(high, from + 64));
    }
};

struct F16Reader {
    const char* data;
    int64_t stride;

    explicit F16Reader(const QuantizedMatrix& w)
        : data(static_cast<const char*>(w.data)), stride(w.cols * 2) {}

    __m512i read(int64_t row, int64_t column, __mmask32 mask) const {
        const __m512i halves = _mm512_maskz_loadu_epi16(mask, data + row * stride + column * 2);
        return round_pair(
            _mm512_cvtph_ps(_mm512_castsi512_si256(halves)),
            _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))
        );
    }
};

// Four-bit formats look their value up in the block's table of sixteen rounded values; the table
// stands twice in its register, so the index's fifth bit does not matter.
struct Int4Reader {
    const char* data;
    const bf16* scales;
    int64_t stride;
    int64_t groups;
    int64_t group_size;

    explicit Int4Reader(const QuantizedMatrix& w)
        : data(static_cast<const char*>(w.data)),
          scales(w.scales),
          stride(w.cols / 2),
          groups(w.cols / w.group_size),
          group_size(w.group_size) {}

    __m512i read(int64_t row, int64_t column, __mmask32) const {
        const float scale = to_float(scales[row * groups + column / group_size]);
        const __m512 codes = _mm512_sub_ps(sixteen_codes(), _mm512_set1_ps(8.0f));
        const __m512 values = _mm512_mul_ps(codes, _mm512_set1_ps(scale));
        const char* from = data + row * stride + column / 2;
        const __m512i bytes = _mm512_cvtepu8_epi32(load_as<__m128i>(from));
        // Low word: the low nibble (even column); high word: the high nibble.
        const __m512i index = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
        return _mm512_permutexvar_epi16(index, round_pair(values, values));
    }
};

struct Fp8Reader {
    const char* data;
    const float* scales;
    int64_t stride;
    int64_t blocks;

    explicit Fp8Reader(const QuantizedMatrix& w)
        : data(static_cast<const char*>(w.data)),
          scales(static_cast<const float*>(w.block_scales)),
          stride(w.cols),
          blocks((w.cols + kFp8Block - 1) / kFp8Block) {}

    __m512i read(int64_t row, int64_t column, __mmask32 mask) const {
        const float scale = scales[row / kFp8Block * blocks + column / kFp8Block];
        const __m256i codes = _mm256_maskz_loadu_epi8(mask, data + row * stride + column);
        const __m512i words = _mm512_cvtepu8_epi16(codes);
        // As f16, E4M3 differs by the exponent's bias alone: a factor of 2^8, exact.
        const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(words, _mm512_set1_epi16(0x80)), 8);
        const __m512i rest = _mm512_slli_epi16(_mm512_and_si512(words, _mm512_set1_epi16(0x7f)), 7);
        const __m512i halves = _mm512_or_si512(sign, rest);
        const __m512 factor = _mm512_set1_ps(256.0f);
        const __m512 scales16 = _mm512_set1_ps(scale);
        const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
        const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
        return round_pair(
            _mm512_mul_ps(_mm512_mul_ps(low, factor), scales16),
            _mm512_mul_ps(_mm512_mul_ps(high, factor), scales16)
        );
    }
};

inline __m512 e2m1_values() {
    return _mm512_set_ps(
        -6.0f,
        -4.0f,
        -3.0f,
        -2.0f,
        -1.5f,
        -1.0f,
        -0.5f,
        -0.0f,
        6.0f,
        4.0f,
        3.0f,
        2.0f,
        1.5f,
        1.0f,
        0.5f,
        0.0f
    );
}

// MXFP4 has one scale for 32 columns and NVFP4 two, so the table's halves differ for NVFP4.
template <WeightFormat kFormat>
struct Fp4Reader {
    static constexpr bool kNvidia = kFormat == WeightFormat::kNvFp4;
    static constexpr int64_t kScaleGroup = kNvidia ? kNvFp4Group : kMxFp4Group;
    QuantizedMatrix w;

    explicit Fp4Reader(const QuantizedMatrix& weight) : w(weight) {}

    __m512i read(int64_t row, int64_t column, __mmask32 mask) const {
        const auto* scales = static_cast<const uint8_t*>(w.block_scales) +
                             row * (w.cols / kScaleGroup) + column / kScaleGroup;
        const char* from = static_cast<const char*>(w.data) + (row * w.cols + column) / 2;
        __m128i loaded;
        __m512 low = e2m1_values();
        __m512 high = low;
        if constexpr (kNvidia) {
            // A row may end after a group of 16.
            const bool both = (mask >> 16) != 0;
            loaded = _mm_maskz_loadu_epi8(both ? 0xffff : 0x00ff, from);
            low = _mm512_mul_ps(low, _mm512_set1_ps(nvfp4_scale(w, scales[0])));
            high = _mm512_mul_ps(high, _mm512_set1_ps(both ? nvfp4_scale(w, scales[1]) : 0.0f));
        } else {
            loaded = load_as<__m128i>(from);
            low = _mm512_mul_ps(low, _mm512_set1_ps(e8m0_to_float(scales[0])));
            high = low;
        }
        const __m512i bytes = _mm512_cvtepu8_epi32(loaded);
        // Columns 16 to 31, the upper eight cells, look into the table's upper half.
        const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
        const __m512i nibbles = _mm512_and_si512(
            _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), _mm512_set1_epi16(15)
        );
        return _mm512_permutexvar_epi16(_mm512_or_si512(nibbles, half), round_pair(low, high));
    }
};

// Low nibbles are columns 0 to 15 of the block, high nibbles 16 to 31.
inline __m512i look_up_block(const char* nibbles, __m512 values) {
    const __m256i words = _mm256_cvtepu8_epi16(load_as<__m128i>(nibbles));
    const __m512i index =
        _mm512_inserti64x4(_mm512_castsi256_si512(words), _mm256_srli_epi16(words, 4), 1);
    return _mm512_permutexvar_epi16(index, round_pair(values, values));
}

template <WeightFormat kFormat>
struct BlockReader {
    static constexpr int64_t kBytes = block_bytes_of(kFormat);
    const char* data;
    int64_t stride;

    explicit BlockReader(const QuantizedMatrix& w)
        : data(static_cast<const char*>(w.data)), stride(w.cols / kBlock * kBytes) {}

    __m512i read(int64_t row, int64_t column, __mmask32) const {
        const char* block = data + row * stride + column / kBlock * kBytes;
        const __m512 d = broadcast_half(block);
        if constexpr (kFormat == WeightFormat::kQ8_0) {
            const __m128i low = load_as<__m128i>(block + 2);
            const __m128i high = load_as<__m128i>(block + 18);
            return round_pair(
                _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low))),
                _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high)))
            );
        } else if constexpr (kFormat == WeightFormat::kQ4_0) {
            const __m512 codes = _mm512_sub_ps(sixteen_codes(), _mm512_set1_ps(8.0f));
            return look_up_block(block + 2, _mm512_mul_ps(d, codes));
        } else {
            // d * q is exact in float, so the fused form rounds like multiply then add.
            const __m512 m = broadcast_half(block + 2);
            return look_up_block(block + 4, _mm512_fmadd_ps(d, sixteen_codes(), m));
        }
    }
};

// rows[i] holds sixteen 32-bit cells; afterwards rows[s] holds cell s of all sixteen.
inline void transpose_cells(__m512i rows[16]) {
    __m512i a[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // Lane L of b[4q + c]: cell 4L + c of rows 4q .. 4q + 3.
    __m512i b[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        // Lanes (0, 2) and (1, 3) of two quarters side by side, then of all four.
        const __m512i even_low = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
        rows[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        rows[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        rows[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        rows[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

inline __mmask32 first_lanes(int64_t count) {
    return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

// Sixteen rows by 32 columns of w, to sixteen steps of one panel column group.
template <typename Reader>
inline void pack_forward_tile(
    const Reader& reader, int64_t row, int64_t rows, int64_t k, __mmask32 mask, uint32_t* cells
) {
    __m512i tile[16];
    if (rows >= kGroup && mask == ~__mmask32{0}) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            tile[i] = reader.read(row + i, k, ~__mmask32{0});
        }
    } else {
        for (int i = 0; i < 16; ++i) {
            tile[i] = i < rows ? reader.read(row + i, k, mask) : _mm512_setzero_si512();
        }
    }
    transpose_cells(tile);
    const int steps = (__builtin_popcount(mask) + 1) / 2;
    if (steps == 16) {
#pragma GCC unroll 16
        for (int s = 0; s < 16; ++s) {
            _mm512_storeu_si512(cells + s * kPanelWidth, tile[s]);
        }
    } else {
        for (int s = 0; s < steps; ++s) {
            _mm512_storeu_si512(cells + s * kPanelWidth, tile[s]);
        }
    }
}

template <typename Reader>
void pack_forward(
    const QuantizedMatrix& w, int64_t n0, int64_t width, int64_t k0, int64_t depth, uint32_t* cells
) {
    const Reader reader(w);
    for (int64_t j = 0; j < width; j += kGroup) {
        for (int64_t k = 0; k < depth; k += kBlock) {
            pack_forward_tile(
                reader,
                n0 + j,
                width - j,
                k0 + k,
                first_lanes(depth - k),
                cells + k / 2 * kPanelWidth + j
            );
        }
    }
}

template <typename Reader>
void pack_transposed(
    const QuantizedMatrix& w, int64_t n0, int64_t width, int64_t k0, int64_t depth, uint32_t* cells
) {
    const Reader reader(w);
    alignas(64) uint16_t order[64];
    for (uint16_t i = 0; i < 32; ++i) {
        order[2 * i] = i;
        order[2 * i + 1] = static_cast<uint16_t>(32 + i);
    }
    const __m512i low = _mm512_load_si512(order);
    const __m512i high = _mm512_load_si512(order + 32);
    for (int64_t k = 0; k < depth; k += 2, cells += kPanelWidth) {
        for (int64_t j = 0; j < width; j += kBlock) {
            const __mmask32 mask = first_lanes(width - j);
            const __m512i even = reader.read(k0 + k, n0 + j, mask);
            const __m512i odd = reader.read(k0 + k + 1, n0 + j, mask);
            _mm512_storeu_si512(cells + j, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(cells + j + 16, _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

template <typename Reader>
void pack_pairs(
    const Product& p, int64_t n0, int64_t width, int64_t k0, int64_t depth, uint32_t* cells
) {
    if (p.transposed) {
        pack_transposed<Reader>(p.w, n0, width, k0, depth, cells);
    } else {
        pack_forward<Reader>(p.w, n0, width, k0, depth, cells);
    }
}

template <typename Reader>
void decode_with(const DecodePart& part, int64_t begin, int64_t end) {
    const Reader reader(part.w);
    for (int64_t r = begin; r < end; ++r) {
        bf16* out = part.out + r * part.cols;
        for (int64_t c = 0; c < part.cols; c += kBlock) {
            const __mmask32 mask = first_lanes(part.cols - c);
            _mm512_mask_storeu_epi16(
                out + c, mask, reader.read(part.row + r, part.column + c, mask)
            );
        }
    }
}

// The values that pack_pair_panel packs.
inline void decode_pair_rows(const DecodePart& part, int64_t begin, int64_t end) {
    DecodePart plain = part;
    plain.pairs = false;
    switch (part.w.format) {
        case WeightFormat::kInt4:
            if (part.w.group_size % kBlock == 0) {
                return decode_with<Int4Reader>(part, begin, end);
            }
            return decode_rows(plain, begin, end);
        case WeightFormat::kFp8:
            return decode_with<Fp8Reader>(part, begin, end);
        case WeightFormat::kMxFp4:
            return decode_with<Fp4Reader<WeightFormat::kMxFp4>>(part, begin, end);
        case WeightFormat::kNvFp4:
            return decode_with<Fp4Reader<WeightFormat::kNvFp4>>(part, begin, end);
        default:
            return decode_rows(plain, begin, end);
    }
}

// pack_panel for pair panels. Column groups that lie wholly past the width are left as they are.
inline void pack_pair_panel(
    const Product& p, int64_t n0, int64_t width, int64_t k0, int64_t depth, uint32_t* cells
) {
    switch (p.w.format) {
        case WeightFormat::kBF16:
            return pack_pairs<Bf16Reader>(p, n0, width, k0, depth, cells);
        case WeightFormat::kF32:
            return pack_pairs<F32Reader>(p, n0, width, k0, depth, cells);
        case WeightFormat::kF16:
            return pack_pairs<F16Reader>(p, n0, width, k0, depth, cells);
        case WeightFormat::kInt4:
            if (p.w.group_size % kBlock == 0) {
                return pack_pairs<Int4Reader>(p, n0, width, k0, depth, cells);
            }
            return pack_panel(p, n0, width, k0, depth, cells);
        case WeightFormat::kFp8:
            return pack_pairs<Fp8Reader>(p, n0, width, k0, depth, cells);
        case WeightFormat::kMxFp4:
            return pack_pairs<Fp4Reader<WeightFormat::kMxFp4>>(p, n0, width, k0, depth, cells);
        case WeightFormat::kNvFp4:
            return pack_pairs<Fp4Reader<WeightFormat::kNvFp4>>(p, n0, width, k0, depth, cells);
        case WeightFormat::kQ8_0:
            return pack_pairs<BlockReader<WeightFormat::kQ8_0>>(p, n0, width, k0, depth, cells);
        case WeightFormat::kQ4_0:
            return pack_pairs<BlockReader<WeightFormat::kQ4_0>>(p, n0, width, k0, depth, cells);
        case WeightFormat::kQ4_1:
            return pack_pairs<BlockReader<WeightFormat::kQ4_1>>(p, n0, width, k0, depth, cells);
    }
}

}  // namespace orbit::ORBIT_ISA
