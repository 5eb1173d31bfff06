// Member N, Hopper only: 17 to 64 rows of x. The weight is the M side of wgmma, decoded into
// registers by the warp that multiplies it; x is the N side, in shared memory, where all warp
// groups of a block that share a segment of the contraction read it. A warp group owns 64 rows of
// the weight and one segment; segments are added in ascending order at the end.
#pragma once

#include "device/cuda/wgmma.cuh"
#include "ops/matmul_decode_cuda.cuh"
#include "ops/matmul_tile_cuda.cuh"

namespace orbit::cuda {

constexpr int kNarrowRows = 64;      // of the weight, of a warp group
constexpr int kNarrowStages = 3;     // of x, and of a warp's packed weights
constexpr int kNarrowMaxGroups = 4;  // warp groups of a block

template <WeightFormat kFormat, int kTokens>
struct NarrowLayout {
    // What a warp group gives: tokens x weight rows.
    using Output = TileShape<kTokens, kNarrowRows, kTokens / 16, 64 / kTokens, 1>;
    static_assert(Output::kThreads == 128);
    static constexpr int kXBytes = kTokens * kTileK * 2;
    static constexpr int kXRing = kNarrowStages * kXBytes;
    static constexpr int kWeightRing = kNarrowStages * DecodeLayout<kFormat>::kStageBytes;
    static constexpr int kOutputFloats = Output::kOutputBytes / 4;

    static int shared_bytes(int groups, int segments) {
        const int rings = segments * kXRing + groups * 4 * kWeightRing;
        const int outputs = (groups + groups / segments) * Output::kOutputBytes;  // LoRA's too
        return std::max(rings, outputs);
    }
};

// x for a team, the warp groups of one segment: kTokens rows, 64 columns a step.
template <int kTokens>
struct NarrowX {
    static constexpr int kMost = kTokens * 8 / 128;  // granules of a thread, when it is alone
    const bf16* from[kMost];
    uint32_t to[kMost];
    int32_t column[kMost];

    // `thread` of `threads` in the team. Rows past the end repeat the last one.
    __device__ __forceinline__ NarrowX(const MatmulArgs& a, int thread, int threads) {
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const int at = thread + i * threads;
            const int row = at / 8;
            column[i] = row < kTokens ? at % 8 * 8 : -1;
            from[i] = a.x + min(row, a.m - 1) * a.ldx + at % 8 * 8;
            to[i] = swizzled(row, at % 8);
        }
    }

    __device__ __forceinline__ void load(uint32_t stage, int32_t k, int32_t k_end) const {
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            if (column[i] >= 0) {
                const bool inside = k + column[i] < k_end;
                copy_async_16(stage + to[i], inside ? from[i] + k : from[i], inside);
            }
        }
    }
};

// acc = W x^T for the warp's 16 rows of the weight and a segment of the contraction. The team's
// warps walk in step.
template <WeightFormat kFormat, int kTokens>
__device__ __forceinline__ void multiply_narrow(
    const MatmulArgs& a,
    WeightStream<kFormat, kNarrowStages>& stream,
    const NarrowX<kTokens>& x,
    uint32_t x_ring,
    int32_t k_begin,
    int32_t k_end,
    int barrier,
    int threads,
    float (&acc)[kTokens / 8][4]
) {
    using Layout = NarrowLayout<kFormat, kTokens>;
    constexpr int kChunk = DecodeLayout<kFormat>::kChunk;
    constexpr int kChunkSteps = kChunk / kTileK;
    const auto load_x = [&](int32_t step) {
        const int32_t k = k_begin + step * kTileK;
        if (k < k_end) {
            x.load(x_ring + step % kNarrowStages * Layout::kXBytes, k, k_end);
        }
        copy_async_commit();
    };
#pragma unroll
    for (int s = 0; s < kNarrowStages - 1; ++s) {
        load_x(s);  // the first of these groups holds the first weights too
    }
    const int32_t steps = (k_end - k_begin + kTileK - 1) / kTileK;
#pragma unroll 1
    for (int32_t step = 0; step < steps; ++step) {
        copy_async_wait<kNarrowStages - 2>();
        fence_for_wgmma();
        barrier_sync(barrier, threads);  // this step is there, and nobody reads the last one's
        if (step % kChunkSteps == 0) {
            stream.copy_next(a, k_begin, k_end);
        }
        load_x(step + kNarrowStages - 1);
        const int32_t chunk = step / kChunkSteps;
        const ChunkRows<kFormat, kNarrowStages> rows(a, stream, chunk, k_begin + chunk * kChunk);
        const uint32_t x_stage = x_ring + step % kNarrowStages * Layout::kXBytes;
        uint32_t w[4][4];
        rows.fragments(a, step % kChunkSteps * 2, w);
        const int32_t left = k_end - k_begin - step * kTileK;
        if (left < kTileK) {  // past the segment's end scales may be anything
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                w[i / 4][i % 4] = i / 4 * 16 < left ? w[i / 4][i % 4] : 0u;
            }
        }
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < kTileK / 16; ++i) {
            wgmma_registers<kTokens, false>(acc, w[i], descriptor_along_k(x_stage + i * 32));
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin_registers(w);
        pin_registers(acc);
    }
}

// Warp group g of a block: segment g % segments of the block's 64-row part g / segments.
template <WeightFormat kFormat, int kTokens>
__global__ void __launch_bounds__(128 * kNarrowMaxGroups)
    matmul_narrow_kernel(const __grid_constant__ MatmulGroup group) {
    extern __shared__ __align__(1024) char shared[];
    using Layout = NarrowLayout<kFormat, kTokens>;
    using Output = typename Layout::Output;
    int32_t block = 0;
    const MatmulArgs& a = product_of_block(group, block);
    const int groups = static_cast<int>(blockDim.x) / 128;
    const int32_t segments = (a.k + a.segment - 1) / a.segment;
    const int32_t segment = static_cast<int>(threadIdx.x) / 128 % segments;
    const int32_t part = static_cast<int>(threadIdx.x) / 128 / segments;
    const int32_t parts = groups / segments;
    const int32_t block_row = block * parts * kNarrowRows;
    const int32_t row0 = block_row + part * kNarrowRows;
    const int32_t k_begin = segment * a.segment;
    const int32_t k_end = min(a.k, k_begin + a.segment);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (!a.releases_late) {
        release_successor();
    }
    WeightStream<kFormat, kNarrowStages> stream(
        a.w,
        row0 + warp % 4 * kDecodeRows,
        k_begin,
        k_end,
        shared + segments * Layout::kXRing + warp * Layout::kWeightRing
    );
    // The weights are constant: their loads need not wait.
#pragma unroll 1
    for (int c = 0; c < kNarrowStages - 1; ++c) {
        stream.copy_next(a, k_begin, k_end);
    }
    const NarrowX<kTokens> x(a, part * 128 + static_cast<int>(threadIdx.x) % 128, parts * 128);
    float acc[kTokens / 8][4] = {};
    if (!a.x_is_ready) {
        wait_for_predecessor();
    }
    if (a.releases_late) {
        release_successor();
    }
    multiply_narrow<kFormat, kTokens>(
        a,
        stream,
        x,
        shared_address(shared) + segment * Layout::kXRing,
        k_begin,
        k_end,
        1 + segment,
        parts * 128,
        acc
    );
    if (a.x_is_ready) {
        wait_for_predecessor();
    }
    copy_async_wait<0>();
    __syncthreads();  // Nobody reads the rings any more; they take the output now.
    auto* tiles = reinterpret_cast<float*>(shared);
    float* own = tiles + (part * segments + segment) * Layout::kOutputFloats;
    float* lora_tiles = tiles + groups * Layout::kOutputFloats;
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int token = 8 * j + 2 * (lane & 3) + (c & 1);
            const int row = warp % 4 * kDecodeRows + (lane >> 2) + 8 * (c >> 1);
            own[token * Output::kRowFloats + row] = acc[j][c];
        }
    }
    const bool has_lora = a.epilogue.lora_u != nullptr;
    if (has_lora && segment == 0) {
        stage_lora<Output, false>(a, lora_tiles + part * Layout::kOutputFloats, 0, row0);
    }
    __syncthreads();
#pragma unroll 1
    for (int p = 0; p < parts; ++p) {
        store_output<Output>(
            a,
            tiles + p * segments * Layout::kOutputFloats,
            segments,
            Layout::kOutputFloats,
            has_lora ? lora_tiles + p * Layout::kOutputFloats : nullptr,
            0,
            block_row + p * kNarrowRows
        );
    }
}

// Numbers the blocks for `groups` warp groups a block; returns how many there are.
inline int64_t number_narrow_blocks(MatmulGroup& group, int groups) {
    int64_t blocks = 0;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        group.first_block[i] = static_cast<int32_t>(blocks);
        const int parts = groups / num_segments(a.k, a.segment);
        blocks += ceil_div(a.epilogue.columns, int64_t{kNarrowRows} * parts);
    }
    group.first_block[group.count] = static_cast<int32_t>(blocks);
    return blocks;
}

// Bytes of shared memory for `groups` warp groups a block.
template <WeightFormat kFormat, int kTokens>
int narrow_shared_bytes(const MatmulGroup& group, int groups) {
    int bytes = 0;
    for (int32_t i = 0; i < group.count; ++i) {
        const int segments = num_segments(group.args[i].k, group.args[i].segment);
        bytes = std::max(bytes, NarrowLayout<kFormat, kTokens>::shared_bytes(groups, segments));
    }
    return bytes;
}

// False, and nothing done, where the rings do not fit (long contractions of the larger GGUF
// blocks).
template <WeightFormat kFormat, int kTokens>
bool launch_narrow(cudaStream_t queue, MatmulGroup& group) {
    constexpr int64_t kMultiprocessors = 132;
    constexpr int kSharedBytes = 227 * 1024;
    int most = 1;
    for (int32_t i = 0; i < group.count; ++i) {
        const int32_t segments = num_segments(group.args[i].k, group.args[i].segment);
        CHECK(segments == 1 || segments == 2 || segments == 4);
        most = std::max(most, segments);
    }
    // A wave costs its warp groups' multiplications, and about one more for reading x.
    int best = 0;
    int64_t least_cost = 0;
    for (int groups = most; groups <= kNarrowMaxGroups; groups += most) {
        const int64_t waves = ceil_div(number_narrow_blocks(group, groups), kMultiprocessors);
        const int64_t cost = waves * (groups + 1);
        const bool fits = narrow_shared_bytes<kFormat, kTokens>(group, groups) <= kSharedBytes;
        if (fits && (best == 0 || cost < least_cost)) {
            least_cost = cost;
            best = groups;
        }
    }
    if (best == 0) {
        return false;
    }
    const int64_t blocks = number_narrow_blocks(group, best);
    const auto shared = static_cast<size_t>(narrow_shared_bytes<kFormat, kTokens>(group, best));
    const auto kernel = matmul_narrow_kernel<kFormat, kTokens>;
    allow_shared_memory(kernel, shared);
    launch_early(
        kernel, dim3(grid_dim(blocks)), static_cast<unsigned>(best) * 128, shared, queue, group
    );
    return true;
}

}  // namespace orbit::cuda
