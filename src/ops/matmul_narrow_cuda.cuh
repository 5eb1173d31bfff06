// Member N, Hopper only: 17 to 64 rows of x. The weight is the M side of wgmma, decoded into
// registers by the warp that multiplies it; x is the N side, which tensor copies bring to shared
// memory. A warp group owns 64 rows of the weight and one segment; the warp groups of a block that
// share a segment share its x. Segments are spread over the blocks of a cluster and added in
// ascending order at the end.
#pragma once

#include "device/cuda/tma.cuh"
#include "device/cuda/wgmma.cuh"
#include "ops/matmul_decode_cuda.cuh"
#include "ops/matmul_tile_cuda.cuh"

namespace orbit::cuda {

constexpr int kNarrowRows = 64;      // of the weight, of a warp group
constexpr int kNarrowXStages = 3;    // of x, 128 columns each
constexpr int kNarrowXAhead = 2;     // stages that are loaded
constexpr int kNarrowMaxGroups = 4;  // warp groups of a block

// Of a warp's packed weights, whose stages hold 256 columns, and of others.
template <WeightFormat kFormat>
constexpr int kNarrowStages = DecodeLayout<kFormat>::kChunk == 256 ? 3 : 5;

template <WeightFormat kFormat>
using NarrowStream = WeightStream<kFormat, kNarrowStages<kFormat>>;

struct NarrowGroup {
    MatmulGroup products;
    CUtensorMap x[kMaxGroup];
};

template <WeightFormat kFormat, int kTokens>
struct NarrowLayout {
    // What a warp group gives: tokens x weight rows.
    using Output = TileShape<kTokens, kNarrowRows, kTokens / 16, 64 / kTokens, 1>;
    static_assert(Output::kThreads == 128);
    static constexpr int kXBytes = kTokens * kTileK * 2;  // of a step of 64 columns
    static constexpr int kXRing = kNarrowXStages * 2 * kXBytes;
    static constexpr int kWeightRing = kNarrowStages<kFormat> * DecodeLayout<kFormat>::kStageBytes;
    static constexpr int kOutputFloats = Output::kOutputBytes / 4;

    // `segments`: of one block.
    static int shared_bytes(int groups, int segments) {
        const int rings = segments * kXRing + groups * 4 * kWeightRing;
        const int outputs = (groups + groups / segments) * Output::kOutputBytes;  // LoRA's too
        return std::max(rings, outputs);
    }
};

// The x of one segment, for all warp groups that multiply with it: stage p % kNarrowXStages holds
// steps 2p and 2p + 1. A stage is full when its copies have landed, and empty when every warp has
// multiplied with it.
template <int kXBytes>
struct NarrowX {
    const CUtensorMap& map;
    uint32_t ring;  // shared address
    uint32_t full;  // of stage 0's barrier, 8 bytes each
    uint32_t empty;
    int32_t k_begin;
    int32_t steps;

    static __device__ __forceinline__ uint32_t parity(int32_t pair) {
        return static_cast<uint32_t>(pair / kNarrowXStages) & 1;
    }

    __device__ __forceinline__ uint32_t at(int32_t pair) const {
        return ring + pair % kNarrowXStages * 2 * kXBytes;
    }

    __device__ __forceinline__ void init(int warps) const {
        for (int s = 0; s < kNarrowXStages; ++s) {
            mbarrier_init(full + 8 * s, 1);
            mbarrier_init(empty + 8 * s, static_cast<uint32_t>(warps));
        }
    }

    // One thread of all that share it. What lies past the segment is copied, and not multiplied.
    __device__ __forceinline__ void load(int32_t pair) const {
        if (2 * pair >= steps) {
            return;
        }
        const int32_t stage = pair % kNarrowXStages;
        const int32_t column = k_begin + 2 * pair * kTileK;
        mbarrier_wait(empty + 8 * stage, parity(pair) ^ 1);
        mbarrier_expect(full + 8 * stage, 2 * kXBytes);
        copy_box(at(pair), map, 0, column, full + 8 * stage);
        copy_box(at(pair) + kXBytes, map, 0, column + kTileK, full + 8 * stage);
    }

    __device__ __forceinline__ void wait(int32_t pair) const {
        mbarrier_wait(full + 8 * (pair % kNarrowXStages), parity(pair));
    }

    __device__ __forceinline__ bool is_there(int32_t pair) const {
        return mbarrier_ended(full + 8 * (pair % kNarrowXStages), parity(pair));
    }

    // One lane of a warp: it has multiplied with this stage.
    __device__ __forceinline__ void leave(int32_t pair) const {
        mbarrier_arrive(empty + 8 * (pair % kNarrowXStages));
    }
};

// acc = W x^T for the warp's 16 rows of the weight and a segment of the contraction. The matrix
// unit works on one step while the next step's weights are decoded. `leads`: this thread loads x.
template <WeightFormat kFormat, int kTokens, bool kPaired>
__device__ __forceinline__ void multiply_narrow(
    const MatmulArgs& a,
    NarrowStream<kFormat>& stream,
    const NarrowX<NarrowLayout<kFormat, kTokens>::kXBytes>& x,
    bool leads,
    float (&acc)[kTokens / 8][4]
) {
    constexpr int kXBytes = NarrowLayout<kFormat, kTokens>::kXBytes;
    constexpr int kStages = kNarrowStages<kFormat>;
    constexpr int kChunk = DecodeLayout<kFormat>::kChunk;
    constexpr int kChunkSteps = kChunk / kTileK;
    // `sub`: the step's number inside its chunk.
    const auto decode = [&](int32_t step, int sub, uint32_t(&w)[4][4]) {
        if (sub == 0) {
            copy_async_wait<kStages - 2>();
            __syncwarp();  // Every lane's bytes are there, and every lane left the last chunk.
            stream.issue(a);
        }
        const int32_t k = x.k_begin + (step - sub) * kTileK;
        const ChunkRows<kFormat, kStages> rows(a, stream, stream.read, k);
        rows.template fragments<kPaired>(a, sub * 2, w);
        const int32_t left = stream.end - k - sub * kTileK;
        if (left < kTileK) {  // past the segment's end scales may be anything
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                w[i / 4][i % 4] = i / 4 * 16 < left ? w[i / 4][i % 4] : 0u;
            }
        }
        if (sub == kChunkSteps - 1) {
            stream.leave_chunk();
        }
        pin_registers(w);
    };
    uint32_t w[2][4][4] = {};
    decode(0, 0, w[0]);
    bool ready = false;
    constexpr int kUnroll = kChunkSteps == 1 ? 2 : kChunkSteps;
#pragma unroll 1
    for (int32_t first = 0; first < x.steps; first += kUnroll) {
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int32_t step = first + i;
            if (step >= x.steps) {
                break;
            }
            const int32_t pair = step / 2;
            if (i % 2 == 0 && !ready) {
                x.wait(pair);
            }
            wgmma_begin();
#pragma unroll
            for (int j = 0; j < kTileK / 16; ++j) {
                const uint32_t columns = x.at(pair) + i % 2 * kXBytes + j * 32;
                wgmma_registers<kTokens, false>(acc, w[i % 2][j], descriptor_along_k(columns));
            }
            wgmma_commit();
            wgmma_wait<1>();
            pin_registers(w[(i + 1) % 2]);  // the step before has read them
            if (i % 2 == 0 && step > 0 && (threadIdx.x & 31) == 0) {
                x.leave(pair - 1);
            }
            if (i % 2 == 1) {  // late enough for the other warps to have left that stage
                if (leads) {
                    x.load(pair + kNarrowXAhead);
                }
                __syncwarp();
                ready = x.is_there(pair + 1);  // asked early: the answer takes a while
            }
            if (step + 1 < x.steps) {
                decode(step + 1, (i + 1) % kChunkSteps, w[(i + 1) % 2]);
            }
        }
    }
    wgmma_wait<0>();
    pin_registers(w[0]);
    pin_registers(w[1]);
    pin_registers(acc);
}

// Of a block's warp groups: `segments` of the `all` segments from block_in_cluster() * segments on,
// times the 64-row parts.
struct NarrowPlace {
    int32_t all;       // segments of the contraction
    int32_t segments;  // of this block
    int32_t parts;     // of 64 rows, of this block
    int32_t segment;   // this warp group's, of the block's
    int32_t part;      // this warp group's
    int32_t block_row;

    __device__ __forceinline__ NarrowPlace(const MatmulArgs& a, int32_t block, int32_t cluster) {
        const int32_t group = static_cast<int32_t>(threadIdx.x) / 128;
        all = (a.k + a.segment - 1) / a.segment;
        segments = all / cluster;
        parts = static_cast<int32_t>(blockDim.x) / 128 / segments;
        segment = group % segments;
        part = group / segments;
        block_row = block / cluster * parts * kNarrowRows;
    }
};

// y of the block's share of the tokens. Tiles of part p and the block's segment s lie at number
// p segments + s of its shared memory.
template <typename Output>
__device__ __forceinline__ void store_narrow(
    const MatmulArgs& a, const NarrowPlace& at, const float* tiles, const float* lora, int cluster
) {
    constexpr int kFloats = Output::kOutputBytes / 4;
    const int rows = Output::kM / cluster;
    const int first_row = static_cast<int>(block_in_cluster()) * rows;
#pragma unroll 1
    for (int p = 0; p < at.parts; ++p) {
        const float* own = tiles + p * at.segments * kFloats;
        store_output<Output>(
            a,
            [&](int s) {
                return in_block_of_cluster(own, s / at.segments) + s % at.segments * kFloats;
            },
            at.all,
            lora == nullptr ? nullptr : lora + p * kFloats,
            0,
            at.block_row + p * kNarrowRows,
            first_row,
            first_row + rows
        );
    }
}

template <WeightFormat kFormat, int kTokens>
__global__ void __launch_bounds__(128 * kNarrowMaxGroups)
    matmul_narrow_kernel(const __grid_constant__ NarrowGroup group, int32_t cluster) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ uint64_t barriers[kNarrowMaxGroups][2][kNarrowXStages];
    using Layout = NarrowLayout<kFormat, kTokens>;
    using Output = typename Layout::Output;
    int32_t block = 0;
    const MatmulArgs& a = product_of_block(group.products, block);
    const NarrowPlace at(a, block, cluster);
    const int32_t row0 = at.block_row + at.part * kNarrowRows;
    const int32_t k_begin =
        (static_cast<int32_t>(block_in_cluster()) * at.segments + at.segment) * a.segment;
    const int32_t k_end = min(a.k, k_begin + a.segment);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const NarrowX<Layout::kXBytes> x{
        group.x[&a - group.products.args],
        shared_address(shared) + at.segment * Layout::kXRing,
        shared_address(barriers[at.segment][0]),
        shared_address(barriers[at.segment][1]),
        k_begin,
        (k_end - k_begin + kTileK - 1) / kTileK};
    const bool leads = at.part == 0 && threadIdx.x % 128 == 0;
    if (leads) {
        x.init(at.parts * 4);
        mbarrier_init_fence();
    }
    if (!a.releases_late) {
        release_successor();
    }
    NarrowStream<kFormat> stream(
        a.w,
        row0 + warp % 4 * kDecodeRows,
        k_begin,
        k_end,
        shared + at.segments * Layout::kXRing + warp * Layout::kWeightRing
    );
    // The weights are constant: their loads need not wait.
#pragma unroll 1
    for (int c = 0; c < kNarrowStages<kFormat> - 1; ++c) {
        stream.issue(a);
    }
    const bool has_lora = a.epilogue.lora_u != nullptr;
    if (has_lora && at.segment == 0 && threadIdx.x % 128 < kNarrowRows) {
        const int32_t row = min(row0 + static_cast<int32_t>(threadIdx.x % 128), a.n - 1);
        prefetch_to_l2(a.epilogue.lora_b + static_cast<int64_t>(row) * a.epilogue.ldb);
    }
    float acc[kTokens / 8][4] = {};
    if (!a.x_is_ready) {
        wait_for_predecessor();
    }
    if (a.releases_late) {
        release_successor();
    }
    __syncthreads();  // The barriers are made.
    if (leads) {
        for (int s = 0; s < kNarrowXAhead; ++s) {
            x.load(s);
        }
    }
    __syncwarp();
    if (stream.scales_pair) {
        multiply_narrow<kFormat, kTokens, true>(a, stream, x, leads, acc);
    } else {
        multiply_narrow<kFormat, kTokens, false>(a, stream, x, leads, acc);
    }
    if (a.x_is_ready) {
        wait_for_predecessor();
    }
    copy_async_wait<0>();
    __syncthreads();  // Nobody reads the rings any more; they take the output now.
    auto* tiles = reinterpret_cast<float*>(shared);
    float* own = tiles + (at.part * at.segments + at.segment) * Layout::kOutputFloats;
    float* lora = tiles + at.parts * at.segments * Layout::kOutputFloats;
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
    if (has_lora && at.segment == 0) {
        stage_lora<Output, false>(a, lora + at.part * Layout::kOutputFloats, 0, row0);
    }
    if (cluster > 1) {
        cluster_sync();
    } else {
        __syncthreads();
    }
    store_narrow<Output>(a, at, tiles, has_lora ? lora : nullptr, cluster);
    if (cluster > 1) {  // The other blocks read this one's tiles.
        cluster_arrive();
        cluster_wait();
    }
}

// A way to cut the products of a launch: `segments` of a contraction and `groups` warp groups a
// block, clusters of `cluster` blocks.
struct NarrowCut {
    int cluster = 1;
    int segments = 1;  // the most of one block
    int groups = 0;
};

// Numbers the blocks; returns how many there are.
inline int64_t number_narrow_blocks(MatmulGroup& group, const NarrowCut& cut) {
    int64_t blocks = 0;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        group.first_block[i] = static_cast<int32_t>(blocks);
        const int parts = cut.groups * cut.cluster / num_segments(a.k, a.segment);
        blocks += ceil_div(a.epilogue.columns, int64_t{kNarrowRows} * parts) * cut.cluster;
    }
    group.first_block[group.count] = static_cast<int32_t>(blocks);
    return blocks;
}

// How many clusters the GPU runs at once; it is asked once for each cut.
template <WeightFormat kFormat, int kTokens>
int64_t clusters_at_once(const NarrowCut& cut, int shared_bytes) {
    static int known[5][kNarrowMaxGroups + 1] = {};
    int& clusters = known[cut.cluster][cut.groups];
    if (clusters == 0) {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(cut.cluster);
        attribute.val.clusterDim.y = 1;
        attribute.val.clusterDim.z = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(cut.cluster * device_limits().multiprocessors));
        config.blockDim = dim3(static_cast<unsigned>(cut.groups) * 128);
        config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
        config.attrs = &attribute;
        config.numAttrs = 1;
        const auto kernel = matmul_narrow_kernel<kFormat, kTokens>;
        CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
        CHECK_GT(clusters, 0);
    }
    return clusters;
}

// False, and nothing done, where the rings do not fit (long contractions of the larger GGUF
// blocks).
template <WeightFormat kFormat, int kTokens>
bool launch_narrow(cudaStream_t queue, MatmulGroup& group) {
    const int64_t multiprocessors = device_limits().multiprocessors;
    constexpr int kSharedBytes = 226 * 1024;
    const auto kernel = matmul_narrow_kernel<kFormat, kTokens>;
    int most = 1;
    bool alike = true;
    for (int32_t i = 0; i < group.count; ++i) {
        const int32_t segments = num_segments(group.args[i].k, group.args[i].segment);
        CHECK(segments == 1 || segments == 2 || segments == 4);
        most = std::max(most, segments);
        alike = alike && segments == num_segments(group.args[0].k, group.args[0].segment);
    }
    allow_shared_memory(kernel, kSharedBytes);
    NarrowCut cut;
    cut.cluster = alike ? most : 1;
    cut.segments = most / cut.cluster;
    // The warp groups that a multiprocessor runs, and about two more for what a wave begins and
    // ends with.
    int best = 0;
    int64_t least_cost = 0;
    for (cut.groups = cut.segments; cut.groups <= kNarrowMaxGroups; cut.groups += cut.segments) {
        const int bytes = NarrowLayout<kFormat, kTokens>::shared_bytes(cut.groups, cut.segments);
        if (bytes > kSharedBytes) {
            break;
        }
        const int64_t blocks = number_narrow_blocks(group, cut);
        const int64_t at_once = clusters_at_once<kFormat, kTokens>(cut, bytes);
        const int64_t waves = ceil_div(blocks / cut.cluster, at_once);
        const int64_t cost = 2 * waves + ceil_div(blocks, multiprocessors) * cut.groups;
        if (best == 0 || cost < least_cost) {
            least_cost = cost;
            best = cut.groups;
        }
    }
    if (best == 0) {
        return false;
    }
    cut.groups = best;
    const int64_t blocks = number_narrow_blocks(group, cut);
    NarrowGroup narrow{group, {}};
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        narrow.x[i] = tensor_map(a.x, a.m, a.k, a.ldx * 2, kTokens);
    }
    launch_clusters_early(
        static_cast<unsigned>(cut.cluster),
        kernel,
        dim3(grid_dim(blocks)),
        static_cast<unsigned>(best) * 128,
        static_cast<size_t>(NarrowLayout<kFormat, kTokens>::shared_bytes(best, cut.segments)),
        queue,
        narrow,
        cut.cluster
    );
    return true;
}

}  // namespace orbit::cuda
