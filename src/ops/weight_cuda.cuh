// Reading packed weights on the GPU: the value of one element, and units of 32 columns fetched raw
// into registers and decoded to bf16 (performance.md 3.4: scale folded in, one rounding).
//
// Block formats are only 2-byte aligned (18 and 34 bytes), so they are read as 16-bit words.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "device/cuda/check.cuh"
#include "device/cuda/mma.cuh"
#include "quant/arrange.h"
#include "quant/quantized_matrix.h"

namespace orbit::cuda {

struct WeightView {
    const uint8_t* data;
    const uint8_t* scales;  // kInt4: bf16; kFp8: float, one row of them for 128 rows; codes
    int64_t row_bytes;
    int32_t rows;
    int32_t cols;
    int32_t group_shift;   // kInt4: log2 of the group size
    int32_t scale_stride;  // bytes of a row of scales
    // kNvFp4. The inverse is 0 where the global scale multiplies.
    float global_scale;
    float global_inverse;
    bool small_scales;  // kInt4: SmallScales may be used
};

template <WeightFormat kFormat>
struct BlockBytes;  // bytes of 32 columns

template <>
struct BlockBytes<WeightFormat::kBF16> {
    static constexpr int value = 64;
};

template <>
struct BlockBytes<WeightFormat::kInt4> {
    static constexpr int value = 16;
};

template <>
struct BlockBytes<WeightFormat::kFp8> {
    static constexpr int value = 32;
};

template <>
struct BlockBytes<WeightFormat::kMxFp4> {
    static constexpr int value = 16;
};

template <>
struct BlockBytes<WeightFormat::kNvFp4> {
    static constexpr int value = 16;
};

template <>
struct BlockBytes<WeightFormat::kQ8_0> {
    static constexpr int value = 34;
};

template <>
struct BlockBytes<WeightFormat::kQ4_0> {
    static constexpr int value = 18;
};

template <>
struct BlockBytes<WeightFormat::kQ4_1> {
    static constexpr int value = 20;
};

// Bytes of one scale, in the formats whose scales lie apart from the data.
template <WeightFormat kFormat>
constexpr int kScaleBytes = kFormat == WeightFormat::kInt4    ? 2
                            : kFormat == WeightFormat::kFp8   ? 4
                            : kFormat == WeightFormat::kMxFp4 ? 1
                            : kFormat == WeightFormat::kNvFp4 ? 1
                                                              : 0;

template <WeightFormat kFormat>
constexpr bool kScalesApart = kScaleBytes<kFormat> > 0;

// Rows that share one row of scales, as a shift.
template <WeightFormat kFormat>
constexpr int kScaleRowShift = kFormat == WeightFormat::kFp8 ? 7 : 0;

template <WeightFormat kFormat>
__device__ __forceinline__ const uint8_t* scale_row(const WeightView& w, int64_t row) {
    return w.scales + (row >> kScaleRowShift<kFormat>)*w.scale_stride;
}

// Bytes from the start of a row of scales to a column's.
template <WeightFormat kFormat>
__device__ __forceinline__ int32_t scale_offset(const WeightView& w, int32_t col) {
    if constexpr (kFormat == WeightFormat::kInt4) {
        return 2 * (col >> w.group_shift);
    } else if constexpr (kFormat == WeightFormat::kFp8) {
        return 4 * (col >> 7);
    } else {
        return col >> (kFormat == WeightFormat::kMxFp4 ? 5 : 4);
    }
}

// The scales of 32 columns as they are stored: kNvFp4 has two, in the low 16 bits.
template <WeightFormat kFormat>
using ScaleWord = std::conditional_t<
    kFormat == WeightFormat::kFp8,
    uint32_t,
    std::conditional_t<kFormat == WeightFormat::kMxFp4, uint8_t, uint16_t>>;

__device__ __forceinline__ float half_bits_to_float(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
}

// {128 + n, 128 + m} in bf16 from nibbles in bits 0-3 and 16-19, minus 136, times the scale: two
// exact steps and one rounding.
__device__ __forceinline__ uint32_t int4_pair(uint32_t nibbles, __nv_bfloat162 scale) {
    uint32_t biased;  // (nibbles & 0x000f000f) | 0x43004300, which the compiler makes two of
    asm("lop3.b32 %0, %1, %2, %3, 0xea;"
        : "=r"(biased)
        : "r"(nibbles), "r"(0x000f000fu), "r"(0x43004300u));
    __nv_bfloat162 pair;
    memcpy(&pair, &biased, 4);
    const __nv_bfloat162 offset = __halves2bfloat162(
        __ushort_as_bfloat16(0x4308), __ushort_as_bfloat16(0x4308)  // 136
    );
    pair = __hmul2_rn(__hsub2_rn(pair, offset), scale);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

__device__ __forceinline__ __nv_bfloat162 both_halves(uint32_t bits) {
    const __nv_bfloat16 s = __ushort_as_bfloat16(static_cast<uint16_t>(bits));
    return __halves2bfloat162(s, s);
}

// E2M1 codes in bits 0-3 and 16-19, moved to the places of sign, exponent and mantissa of a 16-bit
// float that has `kShift` mantissa bits more; the exponent's bias is still to be made up for.
template <int kShift>
__device__ __forceinline__ uint32_t spread_e2m1(uint32_t codes) {
    constexpr uint32_t kMagnitude = (7u << kShift) * 0x00010001u;
    return ((codes << kShift) & kMagnitude) | ((codes << 12) & 0x80008000u);
}

// 2^(code - 127) in bf16; 0 is a subnormal and 255 is NaN.
__device__ __forceinline__ uint32_t e8m0_bits(uint32_t code) {
    return code == 0u ? 0x0040u : code == 255u ? 0x7fc0u : code << 7;
}

// Two codes times an E8M0 scale: 2^126 makes up for the bias, both products are exact.
__device__ __forceinline__ uint32_t mxfp4_pair(uint32_t codes, __nv_bfloat162 scale) {
    const uint32_t spread = spread_e2m1<6>(codes);
    __nv_bfloat162 pair;
    memcpy(&pair, &spread, 4);
    pair = __hmul2_rn(__hmul2_rn(pair, both_halves(0x7e80u)), scale);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

__device__ __forceinline__ uint32_t scaled_halves(uint32_t halves, float scale) {
    return pack_bf16(
        __fmul_rn(half_bits_to_float(halves & 0xffffu), scale),
        __fmul_rn(half_bits_to_float(halves >> 16), scale)
    );
}

// Two codes times a float scale that was multiplied by 2^14, the bias (an exact step).
__device__ __forceinline__ uint32_t nvfp4_pair(uint32_t codes, float scale) {
    return scaled_halves(spread_e2m1<9>(codes), scale);
}

// Two E4M3 codes, in bits 0-7 and 8-15, times the scale.
__device__ __forceinline__ uint32_t fp8_pair(uint32_t codes, float scale) {
#if __CUDA_ARCH__ >= 890
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(codes)));
    return scaled_halves(halves, scale);
#else
    return pack_bf16(
        __fmul_rn(e4m3_to_float(static_cast<uint8_t>(codes)), scale),
        __fmul_rn(e4m3_to_float(static_cast<uint8_t>(codes >> 8)), scale)
    );
#endif
}

// code / global or code * global, rounded once. A product with the rounded inverse and one
// correction give the quotient's bits: a code has four significant bits, and all 8 x 2^23 pairs of
// mantissas were tried.
__device__ __forceinline__ float nvfp4_scale(const WeightView& w, uint32_t code) {
    const float scale = e4m3_to_float(static_cast<uint8_t>(code));
    if (w.global_inverse == 0.0f) {
        return __fmul_rn(scale, w.global_scale);
    }
    const float quotient = __fmul_rn(scale, w.global_inverse);
    const float rest = __fmaf_rn(-quotient, w.global_scale, scale);
    return __fmaf_rn(rest, w.global_inverse, quotient);
}

// The 4-bit code of a column; rows of whole blocks are arranged (quant/arrange.h).
__device__ __forceinline__ uint32_t
nibble_at(const WeightView& w, const uint8_t* row, int32_t col) {
    if (!is_arranged(w.cols)) {
        return (row[col >> 1] >> (4 * (col & 1))) & 15u;
    }
    const auto* words = reinterpret_cast<const uint32_t*>(row);
    return (words[4 * (col >> 5) + arranged_word(col)] >> arranged_shift(col)) & 15u;
}

// One element, rounded to bf16; for gathers and the plain kernels.
template <WeightFormat kFormat>
__device__ __forceinline__ bf16 weight_value(const WeightView& w, int64_t row, int64_t col) {
    const uint8_t* bytes = w.data + row * w.row_bytes;
    [[maybe_unused]] const auto column = static_cast<int32_t>(col);
    if constexpr (kFormat == WeightFormat::kBF16) {
        return reinterpret_cast<const bf16*>(bytes)[col];
    } else if constexpr (kFormat == WeightFormat::kInt4) {
        const int q = static_cast<int>(nibble_at(w, bytes, column)) - 8;
        const auto* at = scale_row<kFormat>(w, row) + scale_offset<kFormat>(w, column);
        const float scale = to_float(*reinterpret_cast<const bf16*>(at));
        return round_bf16(__fmul_rn(static_cast<float>(q), scale));
    } else if constexpr (kFormat == WeightFormat::kFp8) {
        const auto* at = scale_row<kFormat>(w, row) + scale_offset<kFormat>(w, column);
        const float scale = *reinterpret_cast<const float*>(at);
        return round_bf16(__fmul_rn(e4m3_to_float(bytes[col]), scale));
    } else if constexpr (kScalesApart<kFormat>) {
        const uint32_t code = *(scale_row<kFormat>(w, row) + scale_offset<kFormat>(w, column));
        const float scale = kFormat == WeightFormat::kNvFp4
                                ? nvfp4_scale(w, code)
                                : e8m0_to_float(static_cast<uint8_t>(code));
        return round_bf16(__fmul_rn(e2m1_to_float(nibble_at(w, bytes, column)), scale));
    } else {
        const uint8_t* block = bytes + (col >> 5) * BlockBytes<kFormat>::value;
        const auto* half_words = reinterpret_cast<const uint16_t*>(block);
        const float d = half_bits_to_float(half_words[0]);
        const int j = static_cast<int>(col & 31);
        if constexpr (kFormat == WeightFormat::kQ8_0) {
            const auto q = static_cast<int8_t>(block[2 + j]);
            return round_bf16(__fmul_rn(d, static_cast<float>(q)));
        } else if constexpr (kFormat == WeightFormat::kQ4_0) {
            const int q = ((block[2 + (j & 15)] >> (j >= 16 ? 4 : 0)) & 15) - 8;
            return round_bf16(__fmul_rn(d, static_cast<float>(q)));
        } else {
            const float m = half_bits_to_float(half_words[1]);
            const int q = (block[4 + (j & 15)] >> (j >= 16 ? 4 : 0)) & 15;
            return round_bf16(__fadd_rn(__fmul_rn(d, static_cast<float>(q)), m));
        }
    }
}

// Raw registers of one row's 32 columns.
template <WeightFormat kFormat>
struct RawUnit {
    static constexpr int kWords = (BlockBytes<kFormat>::value + 3) / 4;
    uint32_t word[kWords];
    uint32_t scale;  // a ScaleWord, in formats with scales apart
};

// `block`: the 32 columns' bytes. `scale`: theirs, in formats with scales apart.
template <WeightFormat kFormat>
__device__ __forceinline__ void fetch_unit(
    RawUnit<kFormat>& raw, const uint8_t* block, const uint8_t* scale
) {
    if constexpr (kScalesApart<kFormat>) {
#pragma unroll
        for (int i = 0; i < RawUnit<kFormat>::kWords / 4; ++i) {
            const uint4 v = __ldg(reinterpret_cast<const uint4*>(block) + i);
            raw.word[4 * i] = v.x;
            raw.word[4 * i + 1] = v.y;
            raw.word[4 * i + 2] = v.z;
            raw.word[4 * i + 3] = v.w;
        }
        raw.scale = __ldg(reinterpret_cast<const ScaleWord<kFormat>*>(scale));
    } else if constexpr (kFormat == WeightFormat::kQ4_1) {
        const auto* from = reinterpret_cast<const uint32_t*>(block);
#pragma unroll
        for (int i = 0; i < RawUnit<kFormat>::kWords; ++i) {
            raw.word[i] = __ldg(from + i);
        }
    } else {
        const auto* from = reinterpret_cast<const uint16_t*>(block);
        // Word 0 holds the scale alone, then two 16-bit words of quants each.
        raw.word[0] = __ldg(from);
#pragma unroll
        for (int i = 1; i < RawUnit<kFormat>::kWords; ++i) {
            raw.word[i] =
                __ldg(from + 2 * i - 1) | (static_cast<uint32_t>(__ldg(from + 2 * i)) << 16);
        }
    }
}

template <WeightFormat kFormat>
__device__ __forceinline__ void zero_unit(RawUnit<kFormat>& raw) {
    // Scale 0, or d = 0, or codes 0: zeros after decoding.
#pragma unroll
    for (int i = 0; i < RawUnit<kFormat>::kWords; ++i) {
        raw.word[i] = 0;
    }
    raw.scale = 0;
}

__device__ __forceinline__ float nibble_float(uint32_t word, int i) {
    return static_cast<float>((word >> (4 * i)) & 15u);
}

// What a pair of codes is multiplied by, made from a ScaleWord: of 16 columns, in formats with
// scales apart.
template <WeightFormat kFormat>
struct PairScale {
    static constexpr bool kIsPair =
        kFormat == WeightFormat::kInt4 || kFormat == WeightFormat::kMxFp4;
    std::conditional_t<kIsPair, __nv_bfloat162, float> value;

    // `half`: 0 or 1, of the 32 columns.
    __device__ __forceinline__ PairScale(const WeightView& w, uint32_t word, int half) {
        if constexpr (kFormat == WeightFormat::kInt4) {
            value = both_halves(word);
        } else if constexpr (kFormat == WeightFormat::kMxFp4) {
            value = both_halves(e8m0_bits(word));
        } else if constexpr (kFormat == WeightFormat::kFp8) {
            value = __uint_as_float(word);
        } else {
            value = __fmul_rn(nvfp4_scale(w, (word >> (8 * half)) & 0xffu), 16384.0f);
        }
    }

    // Two 4-bit codes in bits 0-3 and 16-19, other bits anything; or two bytes.
    __device__ __forceinline__ uint32_t pair(uint32_t codes) const {
        if constexpr (kFormat == WeightFormat::kInt4) {
            return int4_pair(codes, value);
        } else if constexpr (kFormat == WeightFormat::kMxFp4) {
            return mxfp4_pair(codes, value);
        } else if constexpr (kFormat == WeightFormat::kFp8) {
            return fp8_pair(codes, value);
        } else {
            return nvfp4_pair(codes, value);
        }
    }
};

// Word q of 32 columns of 4-bit codes (quant/arrange.h): pair i is columns 2q + 8i, 2q + 8i + 1.
// `scale`: a ScaleWord.
template <WeightFormat kFormat>
__device__ __forceinline__ void decode_word(
    const WeightView& w, uint32_t word, uint32_t scale, uint32_t (&pair)[4]
) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const PairScale<kFormat> s(w, scale, half);
        pair[2 * half] = s.pair(word >> (8 * half));
        pair[2 * half + 1] = s.pair(word >> (8 * half + 4));
    }
}

// decode_word() of INT4 in 11 instead of 15 instructions, where has_small_scales(), of two
// neighbouring blocks side by side in `two`. A code in the low bits of a bf16 is a subnormal
// number, so that one multiply-add with a scale as much larger, and with -8 scales, gives the
// code's value rounded once. Larger scales would pass bf16's range. A value of 0 is +0 where
// decode_word() may give -0, which no product can tell apart.
//
// kShrunk: values are 2^-6 as large, which takes a multiplication less. Whoever multiplies with
// them has sums 2^-6 as large, to the bit, and makes up for it in the end (kShrunkBack).
constexpr float kShrunkBack = 64.0f;

template <bool kShrunk = false>
struct SmallScales {
    __nv_bfloat162 low;     // 2^133 scale: for codes in bits 0-3
    __nv_bfloat162 high;    // 2^129 scale: for codes in bits 4-7
    __nv_bfloat162 offset;  // -8 scale

    explicit __device__ __forceinline__ SmallScales(uint32_t two) {
        __nv_bfloat162 scales;
        memcpy(&scales, &two, 4);
        if constexpr (kShrunk) {
            low = __hmul2_rn(scales, both_halves(0x7f00u));     // 2^127
            high = __hmul2_rn(scales, both_halves(0x7d00u));    // 2^123
            offset = __hmul2_rn(scales, both_halves(0xbe00u));  // -2^-3
        } else {
            high = __hmul2_rn(__hmul2_rn(scales, both_halves(0x7f00u)), both_halves(0x4080u));
            low = __hmul2_rn(high, both_halves(0x4180u));
            offset = __hmul2_rn(scales, both_halves(0xc100u));
        }
    }

    // A word of block 0 or 1.
    __device__ __forceinline__ void decode(uint32_t word, int block, uint32_t (&pair)[4]) const {
        const auto of_block = [&](__nv_bfloat162 two) {
            return block == 0 ? __low2bfloat162(two) : __high2bfloat162(two);
        };
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t bits =
                (i < 2 ? word : word >> 8) & (i % 2 == 0 ? 0x000f000fu : 0x00f000f0u);
            __nv_bfloat162 code;
            memcpy(&code, &bits, 4);
            code = __hfma2(code, of_block(i % 2 == 0 ? low : high), of_block(offset));
            memcpy(&pair[i], &code, 4);
        }
    }
};

// Decodes to 16 packed pairs: out[i] = columns 2i, 2i + 1.
template <WeightFormat kFormat>
__device__ __forceinline__ void decode_unit(
    const WeightView& w, const RawUnit<kFormat>& raw, uint32_t (&out)[16]
) {
    if constexpr (kFormat == WeightFormat::kFp8) {
        const PairScale<kFormat> scale(w, raw.scale, 0);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            out[i] = scale.pair((raw.word[i / 2] >> (16 * (i & 1))) & 0xffffu);
        }
    } else if constexpr (kScalesApart<kFormat>) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            uint32_t pair[4];
            decode_word<kFormat>(w, raw.word[q], raw.scale, pair);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                out[q + 4 * i] = pair[i];
            }
        }
    } else if constexpr (kFormat == WeightFormat::kQ8_0) {
        const float d = half_bits_to_float(raw.word[0]);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t w = raw.word[1 + i];
            float v[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                v[j] = __fmul_rn(d, static_cast<float>(static_cast<int8_t>(w >> (8 * j))));
            }
            out[2 * i] = pack_bf16(v[0], v[1]);
            out[2 * i + 1] = pack_bf16(v[2], v[3]);
        }
    } else {
        constexpr bool kOffset = kFormat == WeightFormat::kQ4_1;
        const float d = half_bits_to_float(raw.word[0] & 0xffffu);
        const float m = kOffset ? half_bits_to_float(raw.word[0] >> 16) : 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // two bytes: columns 2i, 2i + 1 and 16 + 2i, 17 + 2i
            const uint32_t w = raw.word[1 + i / 2] >> (16 * (i & 1));
            float v[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float q = nibble_float(w, j);
                v[j] = kOffset ? __fadd_rn(__fmul_rn(d, q), m) : __fmul_rn(d, __fsub_rn(q, 8.0f));
            }
            out[i] = pack_bf16(v[0], v[2]);
            out[8 + i] = pack_bf16(v[1], v[3]);
        }
    }
}

WeightView weight_view(const QuantizedMatrix& w);

}  // namespace orbit::cuda
