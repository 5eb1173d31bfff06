// Member D: up to 16 rows of x. The operands trade places: 16 rows of the weight are the M side of
// the instruction, the rows of x its N side. A warp owns 16 weight rows and one segment of the
// contraction, and streams the packed bytes through its own cp.async ring.
//
// Inside a k16 step the columns are permuted: lane q of a quad takes columns 4q..4q+3, for both
// operands. A step has no inner order, so this is neutral (performance.md 3.1, item 3).
#pragma once

#include "device/cuda/check.cuh"
#include "ops/matmul_cuda.cuh"

namespace orbit::cuda {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeStages = 4;
constexpr int kDecodeRows = 16;

template <WeightFormat kFormat>
struct DecodeLayout {
    static constexpr int kBlock = BlockBytes<kFormat>::value;
    static constexpr bool kAligned =
        kFormat == WeightFormat::kBF16 || kFormat == WeightFormat::kInt4;
    // Columns of one stage.
    static constexpr int kChunk = kFormat == WeightFormat::kBF16   ? 64
                                  : kFormat == WeightFormat::kQ8_0 ? 128
                                                                   : 256;
    static constexpr int kBytes = kChunk / 32 * kBlock;  // of one row of a stage
    // 16-byte granules that cover them, wherever a row starts inside a granule.
    static constexpr int kGranules = kAligned ? kBytes / 16 : (kBytes + 14 + 15) / 16;
    static constexpr int kStride = kFormat == WeightFormat::kBF16   ? 160
                                   : kFormat == WeightFormat::kInt4 ? 144
                                                                    : kGranules * 16;
    static constexpr int kScaleStride = kFormat == WeightFormat::kInt4 ? 32 : 0;
    static constexpr int kStageBytes = kDecodeRows * (kStride + kScaleStride);
};

__device__ __forceinline__ uint32_t read_u16(const char* at) {
    return *reinterpret_cast<const uint16_t*>(at);
}

// One row's 32 columns as four pairs: columns 4q, 4q + 1 and 4q + 2, 4q + 3 of the first 16, then
// of the second 16. `block` points at the block in shared memory.
template <WeightFormat kFormat>
__device__ __forceinline__ void decode_quad(
    const char* block, bf16 scale, int q, uint32_t (&pair)[4]
) {
    if constexpr (kFormat == WeightFormat::kBF16) {
        const auto low = *reinterpret_cast<const uint2*>(block + 8 * q);
        const auto high = *reinterpret_cast<const uint2*>(block + 32 + 8 * q);
        pair[0] = low.x;
        pair[1] = low.y;
        pair[2] = high.x;
        pair[3] = high.y;
    } else if constexpr (kFormat == WeightFormat::kInt4) {
        const __nv_bfloat162 s = both_halves(scale);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t nibbles = read_u16(block + 8 * half + 2 * q);
            nibbles |= nibbles << 12;
            pair[2 * half] = int4_pair(nibbles, s);
            pair[2 * half + 1] = int4_pair(nibbles >> 8, s);
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

// A warp's stream of weight bytes: 16 rows, columns [k_begin, k_end).
template <WeightFormat kFormat>
struct WeightStream {
    using Layout = DecodeLayout<kFormat>;
    const WeightView& w;
    int32_t row0;
    int32_t k_begin;
    int32_t k_end;
    char* ring;  // of this warp

    __device__ __forceinline__ const uint8_t* row_start(int row, int32_t k) const {
        const int64_t at = min(row0 + row, w.rows - 1);
        return w.data + at * w.row_bytes + static_cast<int64_t>(k >> 5) * Layout::kBlock;
    }

    __device__ __forceinline__ const uint8_t* scale_start(int row, int32_t k) const {
        const int64_t at = min(row0 + row, w.rows - 1);
        return reinterpret_cast<const uint8_t*>(
            w.scales + at * w.scale_stride + (k >> w.group_shift)
        );
    }

    __device__ __forceinline__ void issue(int32_t chunk) const {
        const int32_t k = k_begin + chunk * Layout::kChunk;
        if (k < k_end) {
            const int lane = threadIdx.x & 31;
            char* stage = ring + chunk % kDecodeStages * Layout::kStageBytes;
            const int32_t columns = min(Layout::kChunk, k_end - k);
            // bf16 rows end at any multiple of eight columns, blocks at a multiple of 32.
            const int bytes =
                kFormat == WeightFormat::kBF16 ? columns * 2 : columns / 32 * Layout::kBlock;
            for (int i = lane; i < kDecodeRows * Layout::kGranules; i += 32) {
                const int row = i / Layout::kGranules;
                const int granule = i % Layout::kGranules;
                copy(stage + row * Layout::kStride, row_start(row, k), bytes, granule);
            }
            if constexpr (kFormat == WeightFormat::kInt4) {
                const int32_t groups =
                    ((k + columns - 1) >> w.group_shift) - (k >> w.group_shift) + 1;
                char* scales = stage + kDecodeRows * Layout::kStride;
                const int row = lane >> 1;
                copy(
                    scales + row * Layout::kScaleStride, scale_start(row, k), groups * 2, lane & 1
                );
            }
        }
        copy_async_commit();
    }

    // Granule `granule` of the aligned 16-byte granules that cover [from, from + bytes).
    static __device__ __forceinline__ void copy(
        char* to, const uint8_t* from, int bytes, int granule
    ) {
        const uintptr_t start = reinterpret_cast<uintptr_t>(from) & ~uintptr_t{15};
        const uintptr_t at = start + static_cast<uintptr_t>(granule) * 16;
        const bool valid = at < reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes);
        copy_async_16(
            shared_address(to + granule * 16),
            reinterpret_cast<const void*>(valid ? at : start),
            valid
        );
    }
};

// Where the lane's two rows of a stage begin in shared memory.
template <WeightFormat kFormat>
struct StageRows {
    const char* block[2];
    const char* scale[2];

    __device__ __forceinline__ StageRows(const WeightStream<kFormat>& s, int32_t chunk, int g) {
        using Layout = DecodeLayout<kFormat>;
        const int32_t k = s.k_begin + chunk * Layout::kChunk;
        const char* stage = s.ring + chunk % kDecodeStages * Layout::kStageBytes;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = g + 8 * i;
            const auto shift =
                Layout::kAligned ? 0 : reinterpret_cast<uintptr_t>(s.row_start(row, k)) & 15;
            block[i] = stage + row * Layout::kStride + shift;
            scale[i] = nullptr;
            if constexpr (kFormat == WeightFormat::kInt4) {
                scale[i] = stage + kDecodeRows * Layout::kStride + row * Layout::kScaleStride +
                           (reinterpret_cast<uintptr_t>(s.scale_start(row, k)) & 15);
            }
        }
    }
};

// The lane's x values of 64 columns from k on: [k16 step][row of x], two pairs each.
template <int kRowTiles>
struct QuadX {
    uint2 v[4][kRowTiles];

    __device__ __forceinline__ void load(const MatmulArgs& a, int32_t k, int32_t k_end) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const int32_t col = k + 16 * step + 4 * (lane & 3);
#pragma unroll
            for (int j = 0; j < kRowTiles; ++j) {
                const int32_t m = 8 * j + (lane >> 2);
                v[step][j] = m < a.m && col < k_end
                                 ? *reinterpret_cast<const uint2*>(a.x + m * a.ldx + col)
                                 : uint2{0, 0};
            }
        }
    }
};

template <WeightFormat kFormat, int kRowTiles>
__device__ __forceinline__ void multiply_segment(
    const MatmulArgs& a, const WeightStream<kFormat>& stream, float (&acc)[kRowTiles][4]
) {
    using Layout = DecodeLayout<kFormat>;
    const int lane = threadIdx.x & 31;
    const int g = lane >> 2;
    const int q = lane & 3;
    const int32_t chunks = (stream.k_end - stream.k_begin + Layout::kChunk - 1) / Layout::kChunk;
#pragma unroll
    for (int c = 0; c < kDecodeStages - 1; ++c) {
        stream.issue(c);
    }
    QuadX<kRowTiles> next;
    next.load(a, stream.k_begin, stream.k_end);
    for (int32_t c = 0; c < chunks; ++c) {
        copy_async_wait<kDecodeStages - 2>();
        __syncwarp();  // Every lane's bytes are there, and every lane left the stage of c - 1.
        stream.issue(c + kDecodeStages - 1);
        const StageRows<kFormat> rows(stream, c, g);
#pragma unroll
        for (int sub = 0; sub < Layout::kChunk / 64; ++sub) {
            const int32_t k = stream.k_begin + c * Layout::kChunk + sub * 64;
            if (k >= stream.k_end) {
                break;
            }
            const QuadX<kRowTiles> x = next;
            next.load(a, k + 64, stream.k_end);
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                if (k + 32 * b >= stream.k_end) {
                    break;
                }
                uint32_t pair[2][4];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    bf16 scale{};
                    if constexpr (kFormat == WeightFormat::kInt4) {
                        const int32_t k0 = stream.k_begin + c * Layout::kChunk;
                        const int group =
                            ((k + 32 * b) >> a.w.group_shift) - (k0 >> a.w.group_shift);
                        scale.bits = static_cast<uint16_t>(read_u16(rows.scale[i] + 2 * group));
                    }
                    decode_quad<kFormat>(
                        rows.block[i] + (2 * sub + b) * Layout::kBlock, scale, q, pair[i]
                    );
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t w[4] = {
                        pair[0][2 * half],
                        pair[1][2 * half],
                        pair[0][2 * half + 1],
                        pair[1][2 * half + 1]};
#pragma unroll
                    for (int j = 0; j < kRowTiles; ++j) {
                        const uint2 v = x.v[2 * b + half][j];
                        mma_16816(acc[j], w, v.x, v.y);
                    }
                }
            }
        }
    }
}

// Epilogue with the roles exchanged: rows of the fragment are weight rows, columns rows of x.
template <int kRowTiles>
__device__ __forceinline__ void store_decode(
    const MatmulArgs& a, const float (&acc)[kRowTiles][4], int32_t row0
) {
    const int lane = threadIdx.x & 31;
    const int q2 = 2 * (lane & 3);
    const int32_t n = row0 + (lane >> 2);
    const Epilogue& e = a.epilogue;
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
        float lora[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (e.lora_u != nullptr) {
            for (int k = 0; k < e.ldu; k += 16) {
                const uint32_t b[4] = {
                    lora_b_pair(e, n, a.n, k + q2),
                    lora_b_pair(e, n + 8, a.n, k + q2),
                    lora_b_pair(e, n, a.n, k + q2 + 8),
                    lora_b_pair(e, n + 8, a.n, k + q2 + 8)};
                const int32_t m = 8 * j + (lane >> 2);
                mma_16816(
                    lora, b, lora_u_pair(e, m, a.m, k + q2), lora_u_pair(e, m, a.m, k + q2 + 8)
                );
            }
        }
        const int32_t m = 8 * j + q2;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            if (m + (c & 1) < a.m) {
                store_one(e, acc[j][c], lora[c], m + (c & 1), n + 8 * (c >> 1), a.n);
            }
        }
    }
}

template <WeightFormat kFormat, int kRowTiles>
__global__ void __launch_bounds__(32 * kDecodeWarps)
    matmul_decode_kernel(MatmulArgs a, int32_t segments) {
    extern __shared__ __align__(128) char shared[];
    using Layout = DecodeLayout<kFormat>;
    const int warp = threadIdx.x >> 5;
    const int lane = threadIdx.x & 31;
    const int32_t segment = warp % segments;
    const int32_t tile =
        static_cast<int32_t>(blockIdx.x) * (kDecodeWarps / segments) + warp / segments;
    const int32_t row0 = tile * kDecodeRows;
    const int32_t k_begin = segment * a.segment;
    char* ring = shared + warp * (kDecodeStages * Layout::kStageBytes);

    float acc[kRowTiles][4] = {};
    if (row0 < a.w.rows) {
        const WeightStream<kFormat> stream{a.w, row0, k_begin, min(a.k, k_begin + a.segment), ring};
        multiply_segment<kFormat, kRowTiles>(a, stream, acc);
    }
    if (segments > 1) {
        auto* partial =
            reinterpret_cast<float*>(shared + kDecodeWarps * kDecodeStages * Layout::kStageBytes);
        constexpr int kWarpFloats = kRowTiles * 4 * 32;
#pragma unroll
        for (int i = 0; i < kRowTiles * 4; ++i) {
            partial[warp * kWarpFloats + i * 32 + lane] = acc[i / 4][i % 4];
        }
        __syncthreads();
        if (segment != 0) {
            return;
        }
#pragma unroll
        for (int i = 0; i < kRowTiles * 4; ++i) {
            float sum = 0.0f;
            for (int s = 0; s < segments; ++s) {
                sum = __fadd_rn(sum, partial[(warp + s) * kWarpFloats + i * 32 + lane]);
            }
            acc[i / 4][i % 4] = sum;
        }
    }
    if (row0 < a.epilogue.columns) {
        store_decode<kRowTiles>(a, acc, row0);
    }
}

template <WeightFormat kFormat, int kRowTiles>
void launch_decode_tiles(cudaStream_t queue, const MatmulArgs& a) {
    using Layout = DecodeLayout<kFormat>;
    const int32_t segments = num_segments(a.k, a.segment);
    CHECK(segments == 1 || segments == 2 || segments == 4);
    const auto kernel = matmul_decode_kernel<kFormat, kRowTiles>;
    constexpr size_t kShared = size_t{kDecodeWarps} * kDecodeStages * Layout::kStageBytes +
                               size_t{kDecodeWarps} * kRowTiles * 4 * 32 * sizeof(float);
    allow_shared_memory(kernel, kShared);
    const int64_t tiles = ceil_div(a.epilogue.columns, kDecodeRows);
    const int64_t blocks = ceil_div(tiles, kDecodeWarps / segments);
    kernel<<<grid_dim(blocks), 32 * kDecodeWarps, kShared, queue>>>(a, segments);
    LAUNCH_CHECK();
}

template <WeightFormat kFormat>
void launch_decode(cudaStream_t queue, const MatmulArgs& a) {
    if (a.m <= 8) {
        launch_decode_tiles<kFormat, 1>(queue, a);
    } else {
        launch_decode_tiles<kFormat, 2>(queue, a);
    }
}

constexpr int32_t kDecodeMaxRows = 16;

}  // namespace orbit::cuda
