// Packed weights to bf16 in memory, rows of a multiple of 32 columns. A thread takes eight
// neighbouring columns, four threads that lie side by side a block of 32.
#pragma once

#include "device/cuda/quad.cuh"
#include "ops/weight_cuda.cuh"

namespace orbit::cuda {

constexpr int kUnpackThreads = 256;
constexpr int kUnpackPerThread = 4;
constexpr int kUnpackEights = kUnpackThreads * kUnpackPerThread;  // of a thread block

// Eight columns as they are stored. With 4-bit codes in the order of quant/arrange.h, word[0] is
// the thread's word of the block instead.
struct RawEight {
    uint32_t word[2];
    uint32_t scale;  // a ScaleWord; of GGUF's blocks d, and m above it
};

// Columns [8 eight, 8 eight + 8) of a row; eight % 4 is the thread's place among its four.
template <WeightFormat kFormat>
__device__ __forceinline__ void fetch_eight(
    RawEight& raw, const WeightView& w, int32_t row, int32_t eight
) {
    const uint8_t* bytes = w.data + row * w.row_bytes;
    if constexpr (kScalesApart<kFormat>) {
        const uint8_t* scale =
            scale_row<kFormat>(w, row) + scale_offset<kFormat>(w, eight / 4 * 32);
        raw.scale = __ldg(reinterpret_cast<const ScaleWord<kFormat>*>(scale));
        if constexpr (kFormat == WeightFormat::kFp8) {
            const uint2 codes = __ldg(reinterpret_cast<const uint2*>(bytes) + eight);
            raw.word[0] = codes.x;
            raw.word[1] = codes.y;
        } else {
            raw.word[0] = __ldg(reinterpret_cast<const uint32_t*>(bytes) + eight);
        }
    } else {
        bytes += eight / 4 * BlockBytes<kFormat>::value;
        const int32_t part = kFormat == WeightFormat::kQ8_0 ? eight & 3 : eight & 1;
        if constexpr (kFormat == WeightFormat::kQ4_1) {
            const auto* words = reinterpret_cast<const uint32_t*>(bytes);
            raw.scale = __ldg(words);
            raw.word[0] = __ldg(words + 1 + 2 * part);
            raw.word[1] = __ldg(words + 2 + 2 * part);
        } else {
            const auto* halves = reinterpret_cast<const uint16_t*>(bytes);
            raw.scale = __ldg(halves);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint16_t* at = halves + 1 + 4 * part + 2 * i;
                raw.word[i] = __ldg(at) | (static_cast<uint32_t>(__ldg(at + 1)) << 16);
            }
        }
    }
}

// Of a block of 32 columns in GGUF's order: codes 0 to 15 in the low halves of 16 bytes.
template <WeightFormat kFormat>
__device__ __forceinline__ uint4 decode_gguf_eight(const RawEight& raw) {
    const float d = half_bits_to_float(raw.scale & 0xffffu);
    [[maybe_unused]] const float m = half_bits_to_float(raw.scale >> 16);
    [[maybe_unused]] const int shift = (threadIdx.x & 2) != 0 ? 4 : 0;
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const uint32_t byte = raw.word[j / 4] >> (8 * (j % 4));
        [[maybe_unused]] const auto q = static_cast<float>((byte >> shift) & 15u);
        if constexpr (kFormat == WeightFormat::kQ8_0) {
            v[j] = __fmul_rn(d, static_cast<float>(static_cast<int8_t>(byte)));
        } else if constexpr (kFormat == WeightFormat::kQ4_0) {
            v[j] = __fmul_rn(d, __fsub_rn(q, 8.0f));
        } else {
            v[j] = __fadd_rn(__fmul_rn(d, q), m);
        }
    }
    return uint4{
        pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
}

// All threads of the warp, with their blocks' columns in order.
template <WeightFormat kFormat>
__device__ __forceinline__ uint4 decode_eight(const WeightView& w, const RawEight& raw) {
    if constexpr (!kScalesApart<kFormat>) {
        return decode_gguf_eight<kFormat>(raw);
    } else {
        uint32_t pair[4];
        if constexpr (kFormat == WeightFormat::kFp8) {
            const PairScale<kFormat> s(w, raw.scale, 0);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                pair[i] = s.pair((raw.word[i / 2] >> (16 * (i % 2))) & 0xffffu);
            }
        } else {
            decode_word<kFormat>(w, raw.word[0], raw.scale, pair);
            transpose_quad(pair);
        }
        return uint4{pair[0], pair[1], pair[2], pair[3]};
    }
}

// Share `block` of columns [8 first, 8 (first + row_eights)) of every row of w, to rows side by
// side; both are multiples of four.
template <WeightFormat kFormat>
__device__ __forceinline__ void decode_share(
    const WeightView& w, int32_t first, int32_t row_eights, int32_t block, bf16* to
) {
    const int32_t eights = w.rows * row_eights;
    const int32_t begin = block * kUnpackEights + static_cast<int32_t>(threadIdx.x);
    const int32_t step_rows = kUnpackThreads / row_eights;
    const int32_t step_eights = kUnpackThreads % row_eights;
    int32_t row = begin / row_eights;
    int32_t eight = begin % row_eights;
    RawEight raw[kUnpackPerThread];
#pragma unroll
    for (int i = 0; i < kUnpackPerThread; ++i) {
        const bool inside = begin + i * kUnpackThreads < eights;  // or read the first row again
        fetch_eight<kFormat>(raw[i], w, inside ? row : 0, first + (inside ? eight : eight % 4));
        row += step_rows;
        eight += step_eights;
        if (eight >= row_eights) {
            eight -= row_eights;
            ++row;
        }
    }
#pragma unroll
    for (int i = 0; i < kUnpackPerThread; ++i) {
        const uint4 values = decode_eight<kFormat>(w, raw[i]);
        if (begin + i * kUnpackThreads < eights) {
            reinterpret_cast<uint4*>(to)[begin + i * kUnpackThreads] = values;
        }
    }
}

}  // namespace orbit::cuda
