// Reading packed weights on the GPU: the value of one element, and units of 32 columns fetched raw
// into registers and decoded to bf16 (performance.md 3.4: scale folded in, one rounding).
//
// Block formats are only 2-byte aligned (18 and 34 bytes), so they are read as 16-bit words.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/cuda/check.cuh"
#include "device/cuda/mma.cuh"
#include "quant/quantized_matrix.h"

namespace orbit::cuda {

struct WeightView {
    const uint8_t* data;
    const bf16* scales;
    int64_t row_bytes;
    int32_t rows;
    int32_t cols;
    int32_t group_shift;   // kInt4: log2 of the group size
    int32_t scale_stride;  // kInt4: scales in a row
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

__device__ __forceinline__ float half_bits_to_float(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
}

// {128 + n, 128 + m} in bf16 from nibbles in bits 0-3 and 16-19, minus 136, times the scale: two
// exact steps and one rounding.
__device__ __forceinline__ uint32_t int4_pair(uint32_t nibbles, __nv_bfloat162 scale) {
    const uint32_t biased = (nibbles & 0x000f000fu) | 0x43004300u;
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

__device__ __forceinline__ __nv_bfloat162 both_halves(bf16 scale) {
    const __nv_bfloat16 s = __ushort_as_bfloat16(scale.bits);
    return __halves2bfloat162(s, s);
}

// One element, rounded to bf16; for gathers and the plain kernels.
template <WeightFormat kFormat>
__device__ __forceinline__ bf16 weight_value(const WeightView& w, int64_t row, int64_t col) {
    const uint8_t* bytes = w.data + row * w.row_bytes;
    if constexpr (kFormat == WeightFormat::kBF16) {
        return reinterpret_cast<const bf16*>(bytes)[col];
    } else if constexpr (kFormat == WeightFormat::kInt4) {
        const uint32_t word = reinterpret_cast<const uint32_t*>(bytes)[col >> 3];
        const int q = static_cast<int>((word >> (4 * (col & 7))) & 15u) - 8;
        const float scale = to_float(w.scales[row * w.scale_stride + (col >> w.group_shift)]);
        return round_bf16(__fmul_rn(static_cast<float>(q), scale));
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
    bf16 scale;  // kInt4
};

// `block`: the 32 columns' bytes. `scale`: their group's, for kInt4.
template <WeightFormat kFormat>
__device__ __forceinline__ void fetch_unit(
    RawUnit<kFormat>& raw, const uint8_t* block, const bf16* scale
) {
    if constexpr (kFormat == WeightFormat::kInt4) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(block));
        raw.word[0] = v.x;
        raw.word[1] = v.y;
        raw.word[2] = v.z;
        raw.word[3] = v.w;
        raw.scale.bits = __ldg(&scale->bits);
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
    // All nibbles 8 with scale 0, or all bytes 0 with d = 0: zeros after decoding.
#pragma unroll
    for (int i = 0; i < RawUnit<kFormat>::kWords; ++i) {
        raw.word[i] = 0;
    }
    raw.scale.bits = 0;
}

__device__ __forceinline__ float nibble_float(uint32_t word, int i) {
    return static_cast<float>((word >> (4 * i)) & 15u);
}

// Decodes to 16 packed pairs: out[i] = columns 2i, 2i + 1.
template <WeightFormat kFormat>
__device__ __forceinline__ void decode_unit(const RawUnit<kFormat>& raw, uint32_t (&out)[16]) {
    if constexpr (kFormat == WeightFormat::kInt4) {
        const __nv_bfloat162 scale = both_halves(raw.scale);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Column k and k + 1 of a word: bits 0-3 and 4-7; the second moves up to bit 16.
            const uint32_t w = raw.word[i];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const uint32_t byte = (w >> (8 * j)) & 0xffu;
                out[4 * i + j] = int4_pair(byte | (byte << 12), scale);
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
