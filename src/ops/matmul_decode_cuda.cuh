// Member D: up to 16 rows of x. A warp owns eight rows of the weight (the N side of the
// instruction; x, padded to 16 rows, is the M side) and one segment of the contraction. It streams
// the packed bytes through its own cp.async ring, deep enough that the memory's latency is paid
// once.
//
// Inside a k16 step the columns are permuted: lane q of a quad takes columns 4q..4q+3, for both
// operands. A step has no inner order, so this is neutral (performance.md 3.1, item 3).
#pragma once

#include "device/cuda/check.cuh"
#include "ops/matmul_cuda.cuh"

namespace orbit::cuda {

constexpr int32_t kDecodeMaxRows = 16;  // of x
constexpr int kDecodeStages = 8;
constexpr int kDecodeRows = 8;  // weight rows of a warp

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
    static constexpr int kStride = kFormat == WeightFormat::kBF16 ? 160
                                   : kScalesApart<kFormat>        ? 144
                                                                  : kGranules * 16;
    // Scales travel through the ring too, but for kFp8: one of them serves many rows.
    static constexpr bool kScalesInRing = kScalesApart<kFormat> && kFormat != WeightFormat::kFp8;
    static constexpr int kScaleStride = kScalesInRing ? 32 : 0;
    static constexpr int kStageBytes = kDecodeRows * (kStride + kScaleStride);
    static constexpr int kRingBytes = kDecodeStages * kStageBytes;
};

__device__ __forceinline__ uint32_t read_u16(const char* at) {
    return *reinterpret_cast<const uint16_t*>(at);
}

// One row's 32 columns as four pairs: columns 4q, 4q + 1 and 4q + 2, 4q + 3 of the first 16, then
// of the second 16. `block` points at the block in shared memory; `scale`: a ScaleWord.
template <WeightFormat kFormat>
__device__ __forceinline__ void decode_quad(
    const WeightView& w, const char* block, uint32_t scale, int q, uint32_t (&pair)[4]
) {
    if constexpr (kFormat == WeightFormat::kBF16) {
        const auto low = *reinterpret_cast<const uint2*>(block + 8 * q);
        const auto high = *reinterpret_cast<const uint2*>(block + 32 + 8 * q);
        pair[0] = low.x;
        pair[1] = low.y;
        pair[2] = high.x;
        pair[3] = high.y;
    } else if constexpr (kScalesApart<kFormat>) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const PairScale<kFormat> s(w, scale, half);
            if constexpr (kFormat == WeightFormat::kFp8) {
                const auto codes = *reinterpret_cast<const uint32_t*>(block + 16 * half + 4 * q);
                pair[2 * half] = s.pair(codes & 0xffffu);
                pair[2 * half + 1] = s.pair(codes >> 16);
            } else {
                uint32_t nibbles = read_u16(block + 8 * half + 2 * q);
                nibbles |= nibbles << 12;
                pair[2 * half] = s.pair(nibbles);
                pair[2 * half + 1] = s.pair(nibbles >> 8);
            }
        }
    } else if constexpr (kFormat == WeightFormat::kQ8_0) {
        const float d = half_bits_to_float(read_u16(block));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t two = read_u16(block + 2 + 16 * (i / 2) + 4 * q + 2 * (i & 1));
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
        const uint32_t bytes =
            read_u16(block + kQuants + 4 * q) | (read_u16(block + kQuants + 4 * q + 2) << 16);
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

// A warp's stream of weight bytes: eight rows, columns [k_begin, k_end). A lane keeps the addresses
// of the granules it copies; rows past the end repeat the last one.
template <WeightFormat kFormat>
struct WeightStream {
    using Layout = DecodeLayout<kFormat>;
    const char* from[Layout::kPerLane];
    int32_t left[Layout::kPerLane];  // bytes of the row's segment from this granule on
    int32_t to[Layout::kPerLane];    // offset in a stage; -1: no granule
    char* ring;                      // of this warp
    int32_t chunk = 0;               // the next to copy
    int32_t shift;                   // where the lane's row (g) starts inside a granule
    const char* scales;              // with scales apart: of row lane / 2 (copied)
    const char* lane_scales;         // of row g (read)

    __device__ __forceinline__
    WeightStream(const WeightView& w, int32_t row0, int32_t k_begin, int32_t k_end, char* warp_ring)
        : ring(warp_ring) {
        const int lane = threadIdx.x & 31;
        const int64_t start = static_cast<int64_t>(k_begin >> 5) * Layout::kBlock;
        const int32_t columns = k_end - k_begin;
        const int32_t bytes =
            kFormat == WeightFormat::kBF16 ? columns * 2 : columns / 32 * Layout::kBlock;
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
            const int into = static_cast<int>(reinterpret_cast<uintptr_t>(at) & 15);
            from[i] = at - into + granule * 16;
            left[i] = bytes + into - granule * 16;
            to[i] = exists ? row * Layout::kStride + granule * 16 : -1;
        }
        shift = static_cast<int>(reinterpret_cast<uintptr_t>(row_at(lane >> 2)) & 15);
        scales = nullptr;
        lane_scales = nullptr;
        if constexpr (kScalesApart<kFormat>) {
            const auto scales_at = [&](int row) {
                return reinterpret_cast<const char*>(
                    scale_row<kFormat>(w, min(row0 + row, w.rows - 1))
                );
            };
            scales = scales_at((lane >> 1) & 7);
            lane_scales = scales_at(lane >> 2);
        }
    }

    // Copies the next chunk; nothing past the segment's end.
    __device__ __forceinline__ void issue(const MatmulArgs& a, int32_t k_begin, int32_t k_end) {
        const int32_t k = k_begin + chunk * Layout::kChunk;
        if (k < k_end) {
            const uint32_t stage =
                shared_address(ring + chunk % kDecodeStages * Layout::kStageBytes);
#pragma unroll
            for (int i = 0; i < Layout::kPerLane; ++i) {
                if (kDecodeRows * Layout::kGranules % 32 == 0 || to[i] >= 0) {
                    copy_async_16(stage + to[i], from[i], left[i] > 0);
                }
                from[i] += Layout::kBytes;
                left[i] -= Layout::kBytes;
            }
            if constexpr (Layout::kScalesInRing) {
                const int lane = threadIdx.x & 31;
                if (lane < 2 * kDecodeRows) {
                    const int32_t last = min(k + Layout::kChunk, k_end) - 1;
                    const char* first_byte = scales + scale_offset<kFormat>(a.w, k);
                    const char* end =
                        scales + scale_offset<kFormat>(a.w, last) + kScaleBytes<kFormat>;
                    const char* at = first_byte - (reinterpret_cast<uintptr_t>(first_byte) & 15) +
                                     (lane & 1) * 16;
                    copy_async_16(
                        stage + kDecodeRows * Layout::kStride + (lane >> 1) * Layout::kScaleStride +
                            (lane & 1) * 16,
                        at,
                        at < end
                    );
                }
            }
        }
        ++chunk;
        copy_async_commit();
    }
};

// The lane's x values of 64 columns: rows g and (kTall) g + 8, two pairs for each k16 step.
template <bool kTall>
struct QuadX {
    uint2 low[4];
    uint2 high[kTall ? 4 : 1];

    // `row_low`, `row_high`: at this lane's columns. `left`: columns of the segment from here on.
    __device__ __forceinline__ void load(const bf16* row_low, const bf16* row_high, int32_t left) {
        const int32_t own = left - 4 * static_cast<int32_t>(threadIdx.x & 3);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const bool inside = 16 * step < own;
            low[step] = inside ? *reinterpret_cast<const uint2*>(row_low + 16 * step) : uint2{0, 0};
            if constexpr (kTall) {
                high[step] =
                    inside ? *reinterpret_cast<const uint2*>(row_high + 16 * step) : uint2{0, 0};
            }
        }
    }
};

template <WeightFormat kFormat, bool kTall>
__device__ __forceinline__ void multiply_segment(
    const MatmulArgs& a,
    WeightStream<kFormat>& stream,
    int32_t k_begin,
    int32_t k_end,
    float (&acc)[4]
) {
    using Layout = DecodeLayout<kFormat>;
    const int lane = threadIdx.x & 31;
    const int g = lane >> 2;
    const int q = lane & 3;
    // Rows past the end repeat the last one; what they give is not stored.
    const bf16* row_low = a.x + min(g, a.m - 1) * a.ldx + k_begin + 4 * q;
    const bf16* row_high = a.x + min(g + 8, a.m - 1) * a.ldx + k_begin + 4 * q;
    const auto load = [&](QuadX<kTall>& x, int32_t k) {
        x.load(row_low + (k - k_begin), row_high + (k - k_begin), k_end - k);
    };
    QuadX<kTall> next;
    QuadX<kTall> after;
    load(next, k_begin);
    load(after, k_begin + 64);
    const int32_t chunks = (k_end - k_begin + Layout::kChunk - 1) / Layout::kChunk;
#pragma unroll 1
    for (int32_t c = 0; c < chunks; ++c) {
        copy_async_wait<kDecodeStages - 2>();
        __syncwarp();  // Every lane's bytes are there, and every lane left the stage of c - 1.
        stream.issue(a, k_begin, k_end);
        const int32_t k0 = k_begin + c * Layout::kChunk;
        const char* stage = stream.ring + c % kDecodeStages * Layout::kStageBytes;
        const char* row = stage + g * Layout::kStride + stream.shift;
        const char* scale_row = nullptr;
        if constexpr (Layout::kScalesInRing) {
            const char* first = stream.lane_scales + scale_offset<kFormat>(a.w, k0);
            scale_row = stage + kDecodeRows * Layout::kStride + g * Layout::kScaleStride +
                        (reinterpret_cast<uintptr_t>(first) & 15);
        }
#pragma unroll
        for (int sub = 0; sub < Layout::kChunk / 64; ++sub) {
            const int32_t k = k0 + sub * 64;
            if (k >= k_end) {
                break;
            }
            const QuadX<kTall> x = next;
            next = after;
            load(after, k + 128);
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                if (k + 32 * b >= k_end) {
                    break;
                }
                uint32_t scale = 0;
                if constexpr (Layout::kScalesInRing) {
                    const int32_t at =
                        scale_offset<kFormat>(a.w, k + 32 * b) - scale_offset<kFormat>(a.w, k0);
                    scale = *reinterpret_cast<const ScaleWord<kFormat>*>(scale_row + at);
                } else if constexpr (kScalesApart<kFormat>) {
                    scale = __ldg(reinterpret_cast<const uint32_t*>(
                        stream.lane_scales + scale_offset<kFormat>(a.w, k)
                    ));
                }
                uint32_t pair[4];
                decode_quad<kFormat>(a.w, row + (2 * sub + b) * Layout::kBlock, scale, q, pair);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int step = 2 * b + half;
                    const uint32_t m[4] = {
                        x.low[step].x,
                        kTall ? x.high[kTall ? step : 0].x : 0u,
                        x.low[step].y,
                        kTall ? x.high[kTall ? step : 0].y : 0u};
                    mma_16816(acc, m, pair[2 * half], pair[2 * half + 1]);
                }
            }
        }
    }
}

__device__ __forceinline__ void store_decode(
    const MatmulArgs& a, const float (&acc)[4], int32_t row0
) {
    const int lane = threadIdx.x & 31;
    const int32_t m = lane >> 2;
    const Epilogue& e = a.epilogue;
    float lora[4] = {};
    if (e.lora_u != nullptr) {
        uint32_t u[4];
        lora_u_fragment(u, e, m, a.m, 0);
        lora_fragment<false>(lora, e, u, m, a.m, row0, a.n);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const int32_t row = m + 8 * (c >> 1);
        if (row < a.m) {
            finish_one(e, add_lora(e, acc[c], lora[c]), row, row0 + 2 * (lane & 3) + (c & 1), a.n);
        }
    }
}

// `segments` warps side by side share eight weight rows.
template <WeightFormat kFormat, bool kTall>
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
    const int32_t k_begin = segment * a.segment;
    const int32_t k_end = min(a.k, k_begin + a.segment);
    float acc[4] = {};
    release_successor();
    if (row0 < a.epilogue.columns) {
        WeightStream<kFormat> stream(a.w, row0, k_begin, k_end, shared + warp * Layout::kRingBytes);
        // The weights are constant: their loads need not wait.
#pragma unroll 1
        for (int c = 0; c < kDecodeStages - 1; ++c) {
            stream.issue(a, k_begin, k_end);
        }
        wait_for_predecessor();
        multiply_segment<kFormat, kTall>(a, stream, k_begin, k_end, acc);
    } else {
        wait_for_predecessor();
    }
    if (segments > 1) {
        auto* partial = reinterpret_cast<float*>(shared + num_warps * Layout::kRingBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            partial[(warp * 4 + i) * 32 + lane] = acc[i];
        }
        __syncthreads();
        if (segment != 0) {
            return;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float sum = 0.0f;
            for (int s = 0; s < segments; ++s) {
                sum = __fadd_rn(sum, partial[((warp + s) * 4 + i) * 32 + lane]);
            }
            acc[i] = sum;
        }
    }
    if (row0 < a.epilogue.columns) {
        store_decode(a, acc, row0);
    }
}

template <WeightFormat kFormat>
void launch_decode(cudaStream_t queue, MatmulGroup& group) {
    using Layout = DecodeLayout<kFormat>;
    // Two warps a block spread few rows over more multiprocessors; four share more of x.
    int64_t all_warps = 0;
    int32_t most_segments = 1;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        const int32_t segments = num_segments(a.k, a.segment);
        CHECK(segments == 1 || segments == 2 || segments == 4);
        most_segments = std::max(most_segments, segments);
        all_warps += ceil_div(a.epilogue.columns, kDecodeRows) * segments;
    }
    const int num_warps = all_warps < 4 * 132 && most_segments <= 2 ? 2 : 4;
    int64_t blocks = 0;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        group.first_block[i] = static_cast<int32_t>(blocks);
        blocks += ceil_div(
            ceil_div(a.epilogue.columns, kDecodeRows), num_warps / num_segments(a.k, a.segment)
        );
    }
    group.first_block[group.count] = static_cast<int32_t>(blocks);
    const auto kernel = group.args[0].m <= 8 ? matmul_decode_kernel<kFormat, false>
                                             : matmul_decode_kernel<kFormat, true>;
    const size_t shared =
        static_cast<size_t>(num_warps) * (Layout::kRingBytes + 4 * 32 * sizeof(float));
    allow_shared_memory(kernel, shared);
    launch_early(
        kernel, dim3(grid_dim(blocks)), static_cast<unsigned>(num_warps) * 32, shared, queue, group
    );
}

}  // namespace orbit::cuda
