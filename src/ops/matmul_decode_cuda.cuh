// Member D: up to 16 rows of x, or tiles of so many where the weight has few rows. A warp owns 16
// rows of the weight (the M side of the instruction; x, padded to tiles of eight rows, is the N
// side: exchanging the operands leaves every bit) and one segment of the contraction. It streams
// the packed bytes through its own cp.async ring, deep enough that the memory's latency is paid
// once.
#pragma once

#include "device/cuda/check.cuh"
#include "ops/matmul_cuda.cuh"
#include "ops/matmul_tile_cuda.cuh"

namespace orbit::cuda {

constexpr int32_t kDecodeMaxRows = 16;  // of x, of a weight of many rows
// Stages of a warp's ring: four warps have to fit the 99 KiB that GPUs other than Hopper's may
// have.
template <WeightFormat kFormat>
constexpr int kDecodeStages = kFormat == WeightFormat::kQ8_0 ? 4 : 6;
constexpr int kDeepStages = 16;
constexpr int kDecodeRows = 16;  // weight rows of a warp

template <WeightFormat kFormat>
struct DecodeLayout {
    static constexpr int kBlock = BlockBytes<kFormat>::value;
    static constexpr bool kAligned = kFormat == WeightFormat::kBF16 || kScalesApart<kFormat>;
    // Columns of one stage: such that its bytes in a row are a multiple of 16, so that a row's
    // place inside a granule stays the same.
    static constexpr int kChunk = kFormat == WeightFormat::kBF16  ? 64
                                  : kFormat == WeightFormat::kFp8 ? 128
                                                                  : 256;
    static constexpr int kBytes = kChunk / 32 * kBlock;  // of one row of a stage
    static_assert(kBytes % 16 == 0);
    // 16-byte granules that cover them, wherever a row starts inside a granule.
    static constexpr int kGranules = kAligned ? kBytes / 16 : (kBytes + 14 + 15) / 16;
    static constexpr int kPerLane = (kDecodeRows * kGranules + 31) / 32;
    // Rows of 128 bytes have their granules permuted (swizzled()), so that a column of them lies in
    // different banks; rows of GGUF blocks are read in 16-bit words, wherever these lie.
    static constexpr int kStride = kGranules * 16;
    static_assert(!kAligned || kStride == 128);
    // Scales travel through the ring too, but for kFp8: one of them serves many rows.
    static constexpr bool kScalesInRing = kScalesApart<kFormat> && kFormat != WeightFormat::kFp8;
    static constexpr int kScaleStride = kScalesInRing ? 32 : 0;
    static constexpr int kStageBytes = kDecodeRows * (kStride + kScaleStride);
    static_assert(4 * kDecodeStages<kFormat> * kStageBytes <= 96 * 1024);
};

template <WeightFormat kFormat, int kStages>
constexpr int kRingBytes = kStages * DecodeLayout<kFormat>::kStageBytes;

__device__ __forceinline__ uint32_t read_u16(const char* at) {
    return *reinterpret_cast<const uint16_t*>(at);
}

// A GGUF block's 32 columns of one row as a lane of a quad takes them: pair i is columns 2q + 8i,
// 2q + 8i + 1. `block`: in shared memory.
template <WeightFormat kFormat>
__device__ __forceinline__ void decode_quad(const char* block, int q, uint32_t (&pair)[4]) {
    if constexpr (kFormat == WeightFormat::kQ8_0) {
        const float d = half_bits_to_float(read_u16(block));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t two = read_u16(block + 2 + 8 * i + 2 * q);
            pair[i] = pack_bf16(
                __fmul_rn(d, static_cast<float>(static_cast<int8_t>(two))),
                __fmul_rn(d, static_cast<float>(static_cast<int8_t>(two >> 8)))
            );
        }
    } else {
        constexpr bool kOffset = kFormat == WeightFormat::kQ4_1;
        constexpr int kQuants = kOffset ? 4 : 2;
        const float d = half_bits_to_float(read_u16(block));
        const float m = kOffset ? half_bits_to_float(read_u16(block + 2)) : 0.0f;
        // Byte j: columns j and 16 + j.
        const uint32_t bytes =
            read_u16(block + kQuants + 2 * q) | (read_u16(block + kQuants + 2 * q + 8) << 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float v[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int byte = 2 * (i & 1) + j;
                const float n = static_cast<float>((bytes >> (8 * byte + 4 * (i / 2))) & 15u);
                v[j] = kOffset ? __fadd_rn(__fmul_rn(d, n), m) : __fmul_rn(d, __fsub_rn(n, 8.0f));
            }
            pair[i] = pack_bf16(v[0], v[1]);
        }
    }
}

// A warp's stream of weight bytes: 16 rows, columns [k_begin, k_end). A lane keeps the addresses
// of the granules it copies; rows past the end repeat the last one.
template <WeightFormat kFormat, int kStages>
struct WeightStream {
    using Layout = DecodeLayout<kFormat>;
    const char* from[Layout::kPerLane];
    int32_t ahead[Layout::kPerLane];  // bytes from the chunk's first in the row to this granule
    int32_t to[Layout::kPerLane];     // offset in a stage; -1: no granule
    char* ring;                       // of this warp
    uint32_t fill = 0;  // the stage that is copied next, in bytes from the ring's start
    uint32_t read = 0;  // the stage that is read
    int32_t next;       // the first column that is copied next
    int32_t end;
    int32_t shift[2];      // where the lane's rows (g, g + 8) start inside a granule
    const char* scales;    // with scales in the ring: the granule where row lane / 2's start
    uint32_t scales_into;  // and where inside it
    uint32_t lane_scales_into[2];  // of rows g, g + 8
    const char* lane_scales[2];    // of rows g, g + 8: kFp8
    // Those of two neighbouring blocks can be read in one; those of INT4 are SmallScales.
    bool scales_pair = false;

    __device__ __forceinline__
    WeightStream(const WeightView& w, int32_t row0, int32_t k_begin, int32_t k_end, char* warp_ring)
        : ring(warp_ring), next(k_begin), end(k_end) {
        const int lane = threadIdx.x & 31;
        const int64_t start = static_cast<int64_t>(k_begin >> 5) * Layout::kBlock;
        const auto row_at = [&](int row) {
            return reinterpret_cast<const char*>(
                w.data + min(row0 + row, w.rows - 1) * w.row_bytes + start
            );
        };
#pragma unroll
        for (int i = 0; i < Layout::kPerLane; ++i) {
            const int index = lane + 32 * i;
            const int row = index / Layout::kGranules;
            const int granule = index % Layout::kGranules;
            const bool exists = row < kDecodeRows;
            const char* at = row_at(exists ? row : 0);
            const int into =
                Layout::kAligned ? 0 : static_cast<int>(reinterpret_cast<uintptr_t>(at) & 15);
            from[i] = at - into + granule * 16;
            ahead[i] = granule * 16 - into;
            const int place = Layout::kAligned ? static_cast<int>(swizzled(row, granule))
                                               : row * Layout::kStride + granule * 16;
            to[i] = exists ? place : -1;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const char* at = row_at((lane >> 2) + 8 * i);
            shift[i] =
                Layout::kAligned ? 0 : static_cast<int>(reinterpret_cast<uintptr_t>(at) & 15);
        }
        if constexpr (kScalesApart<kFormat>) {
            const auto scales_at = [&](int row) {
                return reinterpret_cast<const char*>(
                    scale_row<kFormat>(w, min(row0 + row, w.rows - 1))
                );
            };
            scales = scales_at(lane >> 1);
            scales_into = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(scales) & 15);
            scales -= scales_into;
            constexpr int kPair = 2 * sizeof(ScaleWord<kFormat>);
            const auto places =
                reinterpret_cast<uintptr_t>(w.scales) | static_cast<uintptr_t>(w.scale_stride);
            scales_pair = places % kPair == 0 && (kFormat != WeightFormat::kInt4 ||
                                                  (w.group_shift == 5 && w.small_scales));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                lane_scales[i] = scales_at((lane >> 2) + 8 * i);
                lane_scales_into[i] =
                    static_cast<uint32_t>(reinterpret_cast<uintptr_t>(lane_scales[i]) & 15);
            }
        }
    }

    static __device__ __forceinline__ uint32_t after(uint32_t stage) {
        constexpr uint32_t kLast = (kStages - 1) * Layout::kStageBytes;
        return stage == kLast ? 0 : stage + Layout::kStageBytes;
    }

    __device__ __forceinline__ void issue(const MatmulArgs& a) {
        if (next < end) {
            copy_chunk(a);
        }
        copy_async_commit();
        fill = after(fill);
        next += Layout::kChunk;
    }

    // The chunk that is read now is done with.
    __device__ __forceinline__ void leave_chunk() { read = after(read); }

    __device__ __forceinline__ void copy_chunk(const MatmulArgs& a) {
        const uint32_t stage = shared_address(ring) + fill;
        const int32_t columns = end - next;
        if (Layout::kAligned && columns >= Layout::kChunk) {
#pragma unroll
            for (int i = 0; i < Layout::kPerLane; ++i) {
                copy_async_16(stage + to[i], from[i]);
            }
        } else {
            const int32_t bytes =
                kFormat == WeightFormat::kBF16 ? columns * 2 : columns / 32 * Layout::kBlock;
#pragma unroll
            for (int i = 0; i < Layout::kPerLane; ++i) {
                if (kDecodeRows * Layout::kGranules % 32 == 0 || to[i] >= 0) {
                    copy_async_16(stage + to[i], from[i], ahead[i] < bytes);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < Layout::kPerLane; ++i) {
            from[i] += Layout::kBytes;
        }
        if constexpr (Layout::kScalesInRing) {
            static_assert(2 * kDecodeRows == 32);  // two granules a row
            const int lane = threadIdx.x & 31;
            const int32_t last = next + min(columns, Layout::kChunk) - 1;
            const uint32_t granule =
                ((scale_offset<kFormat>(a.w, next) + scales_into) & ~15u) + (lane & 1) * 16;
            const uint32_t past =
                scale_offset<kFormat>(a.w, last) + kScaleBytes<kFormat> + scales_into;
            copy_async_16(
                stage + kDecodeRows * Layout::kStride + (lane >> 1) * Layout::kScaleStride +
                    (lane & 1) * 16,
                scales + granule,
                granule < past
            );
        }
    }
};

// The lane's x values of 64 columns: row g of each tile, and for each k16 step columns 2q, 2q + 1
// and 2q + 8, 2q + 9.
template <int kTiles>
struct LaneX {
    uint32_t value[kTiles][4][2];

    // `row`: at this lane's columns. `left`: columns of the segment from here on.
    __device__ __forceinline__ void load(
        const bf16* const (&row)[kTiles], int32_t at, int32_t left
    ) {
        if (left >= 64) {
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                const auto* from = reinterpret_cast<const uint32_t*>(row[t] + at);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    value[t][i / 2][i % 2] = from[4 * i];
                }
            }
            return;
        }
        const int32_t own = left - 2 * static_cast<int32_t>(threadIdx.x & 3);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            const auto* from = reinterpret_cast<const uint32_t*>(row[t] + at);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                value[t][i / 2][i % 2] = 8 * i < own ? from[4 * i] : 0u;
            }
        }
    }
};

// A lane's pairs of block j of two and row i of two (g and g + 8), into the M side of four k16
// steps.
__device__ __forceinline__ void place_pairs(
    const uint32_t (&pair)[4], int i, int j, uint32_t (&to)[4][4]
) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        to[2 * j + c / 2][i + 2 * (c % 2)] = pair[c];
    }
}

// One chunk of a warp's rows in shared memory, `at` bytes from the ring's start, as one lane reads
// it.
template <WeightFormat kFormat, int kStages, typename Stream = WeightStream<kFormat, kStages>>
struct ChunkRows {
    using Layout = DecodeLayout<kFormat>;
    const char* stage;
    const char* row[2];     // rows g and g + 8
    const char* scales[2];  // theirs, where they are in the ring
    const Stream* stream;
    int32_t k0;

    __device__ __forceinline__
    ChunkRows(const MatmulArgs& a, const Stream& from, uint32_t at, int32_t k)
        : stage(from.ring + at), stream(&from), k0(k) {
        const int g = (threadIdx.x & 31) >> 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            row[i] = stage + (g + 8 * i) * Layout::kStride + from.shift[i];
            if constexpr (Layout::kScalesInRing) {
                const uint32_t first = scale_offset<kFormat>(a.w, k0) + from.lane_scales_into[i];
                scales[i] = stage + kDecodeRows * Layout::kStride +
                            (g + 8 * i) * Layout::kScaleStride + (first & 15);
            }
        }
    }

    // The scale of 32 columns of row i, a ScaleWord.
    __device__ __forceinline__ uint32_t scale(const MatmulArgs& a, int i, int b) const {
        const int32_t k = k0 + 32 * b;
        if constexpr (Layout::kScalesInRing) {
            const int32_t at = scale_offset<kFormat>(a.w, k) - scale_offset<kFormat>(a.w, k0);
            return *reinterpret_cast<const ScaleWord<kFormat>*>(scales[i] + at);
        } else if constexpr (kScalesApart<kFormat>) {
            const char* at = stream->lane_scales[i] + scale_offset<kFormat>(a.w, k);
            return __ldg(reinterpret_cast<const uint32_t*>(at));
        }
        return 0;
    }

    // Those of row i's blocks b and b + 1, b even; with kPaired (scales_pair) in one load.
    template <bool kPaired>
    __device__ __forceinline__ void two_scales(
        const MatmulArgs& a, int i, int b, uint32_t (&word)[2]
    ) const {
        if constexpr (Layout::kScalesInRing && kPaired) {
            constexpr int kBytes = sizeof(ScaleWord<kFormat>);
            using Two = std::conditional_t<kBytes == 1, uint16_t, uint32_t>;
            const uint32_t two = *reinterpret_cast<const Two*>(scales[i] + b * kBytes);
            word[0] = two & (kBytes == 1 ? 0xffu : 0xffffu);
            word[1] = two >> (8 * kBytes);
            return;
        }
        word[0] = scale(a, i, b);
        word[1] = kFormat == WeightFormat::kFp8 ? word[0] : scale(a, i, b + 1);
    }

    // Blocks b and b + 1 of the chunk (b even), 32 columns each: the M side of four k16 steps.
    template <bool kPaired>
    __device__ __forceinline__ void fragments(const MatmulArgs& a, int b, uint32_t (&w)[4][4])
        const {
        const int lane = threadIdx.x & 31;
        if constexpr (kFormat == WeightFormat::kBF16) {
            static_assert(Layout::kChunk == 64);  // b is 0
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                const uint32_t from =
                    shared_address(stage) + swizzled(lane & 15, 2 * step + (lane >> 4));
                ldmatrix_x4(w[step][0], w[step][1], w[step][2], w[step][3], from);
            }
        } else if constexpr (kFormat == WeightFormat::kInt4 && kPaired) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const SmallScales<> small(*reinterpret_cast<const uint32_t*>(scales[i] + 2 * b));
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    uint32_t pair[4];
                    small.decode(code_word(i, b + j), j, pair);
                    place_pairs(pair, i, j, w);
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                uint32_t words[2] = {};
                if constexpr (kScalesApart<kFormat>) {
                    two_scales<kPaired>(a, i, b, words);
                }
                decode_two(a.w, i, b, words, w);
            }
        }
    }

    // Row i's part of them. `words`: the blocks' ScaleWords.
    __device__ __forceinline__ void decode_two(
        const WeightView& w, int i, int b, const uint32_t (&words)[2], uint32_t (&to)[4][4]
    ) const {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            uint32_t pair[4];
            decode_block(w, i, b + j, words[j], pair);
            place_pairs(pair, i, j, to);
        }
    }

    // Granule `index` of row i.
    __device__ __forceinline__ const char* granule(int i, int index) const {
        return row[i] + ((index ^ (static_cast<int>(threadIdx.x & 31) >> 2)) << 4);
    }

    // The lane's word of 4-bit codes in block b of row i.
    __device__ __forceinline__ uint32_t code_word(int i, int b) const {
        return *reinterpret_cast<const uint32_t*>(granule(i, b) + 4 * (threadIdx.x & 3));
    }

    // Block b of row i: pair c is columns 2q + 8c, 2q + 8c + 1. `scale_word`: its ScaleWord.
    __device__ __forceinline__ void decode_block(
        const WeightView& w, int i, int b, uint32_t scale_word, uint32_t (&pair)[4]
    ) const {
        const int q = static_cast<int>(threadIdx.x & 3);
        if constexpr (kFormat == WeightFormat::kFp8) {
            const PairScale<kFormat> s(w, scale_word, 0);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                pair[c] = s.pair(read_u16(granule(i, 2 * b + c / 2) + 8 * (c % 2) + 2 * q));
            }
        } else if constexpr (kScalesApart<kFormat>) {
            decode_word<kFormat>(w, code_word(i, b), scale_word, pair);
        } else {
            decode_quad<kFormat>(row[i] + b * Layout::kBlock, q, pair);
        }
    }
};

template <WeightFormat kFormat, int kStages, int kTiles>
__device__ __forceinline__ void multiply_segment(
    const MatmulArgs& a,
    WeightStream<kFormat, kStages>& stream,
    int32_t m0,
    int32_t k_begin,
    int32_t k_end,
    float (&acc)[kTiles][4]
) {
    using Layout = DecodeLayout<kFormat>;
    const int lane = threadIdx.x & 31;
    // Rows past the end repeat the last one; what they give is not stored.
    const bf16* x_row[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        x_row[t] = a.x + min(m0 + (lane >> 2) + 8 * t, a.m - 1) * a.ldx + 2 * (lane & 3);
    }
    // x comes from L2, whose latency is that of a few steps of 64 columns.
    constexpr int kAhead = 4;
    constexpr int kChunkSteps = Layout::kChunk / 64;
    static_assert(kAhead % kChunkSteps == 0);
    LaneX<kTiles> x[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
        x[i].load(x_row, k_begin + 64 * i, k_end - k_begin - 64 * i);
    }
    // `inside`: these 64 columns and those kAhead steps on are inside the segment, and scales are
    // read in pairs.
    const auto multiply_64 =
        [&](const ChunkRows<kFormat, kStages>& rows, int sub, LaneX<kTiles>& v, auto inside) {
            const int32_t k = rows.k0 + sub * 64;
            uint32_t w[4][4];
            rows.template fragments<inside.value>(a, 2 * sub, w);
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                // Past the segment's end scales may be anything.
                if (inside.value || k + 16 * step < k_end) {
#pragma unroll
                    for (int t = 0; t < kTiles; ++t) {
                        mma_16816(acc[t], w[step], v.value[t][step][0], v.value[t][step][1]);
                    }
                }
            }
            v.load(x_row, k + 64 * kAhead, inside.value ? 64 : k_end - k - 64 * kAhead);
        };
    const int32_t steps = (k_end - k_begin + 63) / 64;
    const auto multiply_ahead = [&](int32_t first, auto inside) {
#pragma unroll
        for (int chunk = 0; chunk < kAhead / kChunkSteps; ++chunk) {
            const int32_t c = first / kChunkSteps + chunk;
            if (!inside.value && c * kChunkSteps >= steps) {
                break;
            }
            copy_async_wait<kStages - 2>();
            __syncwarp();  // Every lane's bytes are there, and every lane left the stage of c - 1.
            stream.issue(a);
            const ChunkRows<kFormat, kStages> rows(
                a, stream, stream.read, k_begin + c * Layout::kChunk
            );
#pragma unroll
            for (int sub = 0; sub < kChunkSteps; ++sub) {
                if (inside.value || c * kChunkSteps + sub < steps) {
                    multiply_64(rows, sub, x[chunk * kChunkSteps + sub], inside);
                }
            }
            stream.leave_chunk();
        }
    };
    const bool pairs = !Layout::kScalesInRing || stream.scales_pair;
    int32_t first = 0;
#pragma unroll 1
    for (; pairs && (first + 2 * kAhead) * 64 <= k_end - k_begin; first += kAhead) {
        multiply_ahead(first, std::true_type{});
    }
#pragma unroll 1
    for (; first < steps; first += kAhead) {
        multiply_ahead(first, std::false_type{});
    }
}

// Rows g of u's tiles and rows g, g + 8 of lora_b: 16 of the rank.
template <int kTiles>
struct LoraOperands {
    uint32_t b[4];
    uint32_t u[kTiles][2];

    __device__ __forceinline__ void load_b(const MatmulArgs& a, int32_t row0, int32_t k) {
        const int lane = threadIdx.x & 31;
        const int32_t row = row0 + (lane >> 2);
        const int32_t at = k + 2 * (lane & 3);
        b[0] = lora_b_pair<false>(a.epilogue, row, a.n, at);
        b[1] = lora_b_pair<false>(a.epilogue, row + 8, a.n, at);
        b[2] = lora_b_pair<false>(a.epilogue, row, a.n, at + 8);
        b[3] = lora_b_pair<false>(a.epilogue, row + 8, a.n, at + 8);
    }

    __device__ __forceinline__ void load_u(const MatmulArgs& a, int32_t m0, int32_t k) {
        const int lane = threadIdx.x & 31;
        const Epilogue& e = a.epilogue;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            const int64_t row = min(m0 + (lane >> 2) + 8 * t, a.m - 1);
            const bf16* from = e.lora_u + row * e.ldu + k + 2 * (lane & 3);
            u[t][0] = *reinterpret_cast<const uint32_t*>(from);
            u[t][1] = *reinterpret_cast<const uint32_t*>(from + 8);
        }
    }
};

// lora = u b^T, for 16 rows of the weight from row0 on and eight tokens a tile from m0 on; zero
// without LoRA. `first`: the rank's first 16, loaded ahead.
template <int kTiles>
__device__ __forceinline__ void multiply_low_rank(
    const MatmulArgs& a,
    const LoraOperands<kTiles>& first,
    int32_t row0,
    int32_t m0,
    float (&lora)[kTiles][4]
) {
    if (a.epilogue.lora_u == nullptr) {
        return;
    }
    LoraOperands<kTiles> operands = first;
    for (int32_t k = 16;; k += 16) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            mma_16816(lora[t], operands.b, operands.u[t][0], operands.u[t][1]);
        }
        if (k >= a.epilogue.ldu) {
            break;
        }
        operands.load_b(a, row0, k);
        operands.load_u(a, m0, k);
    }
}

template <int kTiles>
__device__ __forceinline__ void store_decode(
    const MatmulArgs& a,
    const float (&acc)[kTiles][4],
    const LoraOperands<kTiles>& first,
    int32_t row0,
    int32_t m0
) {
    const int lane = threadIdx.x & 31;
    const Epilogue& e = a.epilogue;
    float lora[kTiles][4] = {};
    multiply_low_rank(a, first, row0, m0, lora);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int32_t m = m0 + 8 * t + 2 * (lane & 3) + (c & 1);
            if (m < a.m) {
                const int32_t n = row0 + (lane >> 2) + 8 * (c >> 1);
                finish_one(e, add_lora(e, acc[t][c], lora[t][c]), m, n, a.n);
            }
        }
    }
}

// `segments` warps side by side share 16 weight rows.
template <WeightFormat kFormat, int kTiles, int kStages>
__global__ void __launch_bounds__(128)
    matmul_decode_kernel(const __grid_constant__ MatmulGroup group) {
    extern __shared__ __align__(1024) char shared[];
    using Layout = DecodeLayout<kFormat>;
    int32_t block = 0;
    const MatmulArgs& a = product_of_block(group, block);
    const int warp = threadIdx.x >> 5;
    const int lane = threadIdx.x & 31;
    const int num_warps = static_cast<int>(blockDim.x) >> 5;
    const int32_t segments = (a.k + a.segment - 1) / a.segment;
    const int32_t segment = warp % segments;
    const int32_t row0 = (block * (num_warps / segments) + warp / segments) * kDecodeRows;
    const int32_t m0 = static_cast<int32_t>(blockIdx.y) * 8 * kTiles;
    const int32_t k_begin = segment * a.segment;
    const int32_t k_end = min(a.k, k_begin + a.segment);
    float acc[kTiles][4] = {};
    LoraOperands<kTiles> lora = {};
    if (!a.releases_late) {
        release_successor();
    }
    const auto wait = [&] {
        wait_for_predecessor();
        if (a.x_flag != nullptr && blockIdx.x + blockIdx.y + threadIdx.x == 0) {
            set_flag(a.x_flag);
        }
        if (a.releases_late) {
            release_successor();
        }
    };
    const bool stores = row0 < a.epilogue.columns && segment == 0;
    const bool has_lora = stores && a.epilogue.lora_u != nullptr;
    if (row0 < a.epilogue.columns) {
        WeightStream<kFormat, kStages>
            stream(a.w, row0, k_begin, k_end, shared + warp * kRingBytes<kFormat, kStages>);
        // The weights are constant: their loads need not wait.
#pragma unroll 1
        for (int c = 0; c < kStages - 1; ++c) {
            stream.issue(a);
        }
        if (!a.x_is_ready) {
            wait();
        }
        if (has_lora) {
            lora.load_b(a, row0, 0);
        }
        multiply_segment(a, stream, m0, k_begin, k_end, acc);
    }
    if (a.x_is_ready || row0 >= a.epilogue.columns) {
        wait();
    }
    if (has_lora) {
        lora.load_u(a, m0, 0);
    }
    if (segments > 1) {
        auto* partial = reinterpret_cast<float*>(shared + num_warps * kRingBytes<kFormat, kStages>);
        const auto at = [&](int of_warp, int t, int c) -> float& {
            return partial[((of_warp * kTiles + t) * 4 + c) * 32 + lane];
        };
#pragma unroll
        for (int i = 0; i < kTiles * 4; ++i) {
            at(warp, i / 4, i % 4) = acc[i / 4][i % 4];
        }
        __syncthreads();
        if (segment != 0) {
            return;
        }
#pragma unroll
        for (int i = 0; i < kTiles * 4; ++i) {
            float sum = 0.0f;
            for (int s = 0; s < segments; ++s) {
                sum = __fadd_rn(sum, at(warp + s, i / 4, i % 4));
            }
            acc[i / 4][i % 4] = sum;
        }
    }
    if (row0 < a.epilogue.columns) {
        store_decode(a, acc, lora, row0, m0);
    }
}

struct DecodeGrid {
    int64_t blocks = 0;     // of the weights
    int64_t row_tiles = 1;  // of x: of eight rows with one_tile, else of 16
    bool one_tile = true;
    int num_warps = 4;
};

template <WeightFormat kFormat, int kStages>
void launch_decode_blocks(cudaStream_t queue, const MatmulGroup& group, const DecodeGrid& grid) {
    const auto kernel = grid.one_tile ? matmul_decode_kernel<kFormat, 1, kStages>
                                      : matmul_decode_kernel<kFormat, 2, kStages>;
    const size_t partial_bytes = (grid.one_tile ? 4 : 8) * 32 * sizeof(float);
    const size_t shared =
        static_cast<size_t>(grid.num_warps) * (kRingBytes<kFormat, kStages> + partial_bytes);
    allow_shared_memory(kernel, shared);
    launch_early(
        kernel,
        dim3(grid_dim(grid.blocks), grid_dim_yz(grid.row_tiles)),
        static_cast<unsigned>(grid.num_warps) * 32,
        shared,
        queue,
        group
    );
}

template <WeightFormat kFormat>
void launch_decode(cudaStream_t queue, MatmulGroup& group) {
    // Two warps a block spread few rows over more multiprocessors; four share more of x.
    const int64_t multiprocessors = device_limits().multiprocessors;
    const int64_t m = group.args[0].m;
    int64_t all_warps = 0;
    int32_t most_segments = 1;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        const int32_t segments = num_segments(a.k, a.segment);
        CHECK(segments == 1 || segments == kSegments);
        most_segments = std::max(most_segments, segments);
        all_warps += ceil_div(a.epilogue.columns, kDecodeRows) * segments;
    }
    DecodeGrid grid;
    grid.num_warps = all_warps < 4 * multiprocessors && most_segments == 1 ? 2 : 4;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        group.first_block[i] = static_cast<int32_t>(grid.blocks);
        grid.blocks += ceil_div(
            ceil_div(a.epilogue.columns, kDecodeRows), grid.num_warps / num_segments(a.k, a.segment)
        );
    }
    group.first_block[group.count] = static_cast<int32_t>(grid.blocks);
    grid.one_tile =
        m <= 8 || (m > kDecodeMaxRows && grid.blocks * ceil_div(m, 8) <= multiprocessors);
    grid.row_tiles = ceil_div(m, grid.one_tile ? 8 : 16);
    // A block that is alone on its multiprocessor (LoRA's narrow side) hides the memory's latency
    // by a deeper ring alone.
    if constexpr (kFormat == WeightFormat::kBF16) {
        if (grid.blocks * grid.row_tiles <= multiprocessors && has_wgmma()) {
            return launch_decode_blocks<kFormat, kDeepStages>(queue, group, grid);
        }
    }
    launch_decode_blocks<kFormat, kDecodeStages<kFormat>>(queue, group, grid);
}

}  // namespace orbit::cuda
