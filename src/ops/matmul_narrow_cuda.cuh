// Member N, Hopper only: few rows of x, up to 64 (of most INT4 weights:
// matmul_narrow_int4_cuda.cuh). The weight is the M side of wgmma, decoded into registers by the
// warp that multiplies it; x is the N side, which tensor copies bring to shared memory. A warp
// group owns 64 rows of the weight and one segment, a block a segment, whose x its warp groups
// share. The segments of a contraction are the blocks of a cluster; they are added in ascending
// order at the end.
#pragma once

#include "device/cuda/tma.cuh"
#include "device/cuda/wgmma.cuh"
#include "ops/matmul_decode_cuda.cuh"
#include "ops/norm_cuda.cuh"

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
    static constexpr int kXBytes = kTokens * kTileK * 2;  // of a step of 64 columns
    static constexpr int kXRing = kNarrowXStages * 2 * kXBytes;
    static constexpr int kWeightRing = kNarrowStages<kFormat> * DecodeLayout<kFormat>::kStageBytes;

    static int shared_bytes(int groups) { return kXRing + groups * 4 * kWeightRing; }
};

// A stage of a ring, and the parity of the phase that ends when its barrier's bytes are there.
struct RingPlace {
    uint32_t stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance(uint32_t stages) {
        const bool last = stage == stages - 1;
        stage = last ? 0 : stage + 1;
        parity ^= last ? 1 : 0;
    }
};

// The x of a block's segment, for all its warp groups. A stage is full when its copies have landed,
// and empty when every warp has multiplied with it.
template <int kXBytes>
struct NarrowX {
    const CUtensorMap& map;
    uint32_t ring;  // shared address
    uint32_t full;  // of stage 0's barrier, 8 bytes each
    uint32_t empty;
    int32_t k_begin;
    int32_t steps;

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
        const auto parity = static_cast<uint32_t>(pair / kNarrowXStages) & 1;
        const int32_t column = k_begin + 2 * pair * kTileK;
        const uint32_t to = ring + stage * 2 * kXBytes;
        mbarrier_wait(empty + 8 * stage, parity ^ 1);
        mbarrier_expect(full + 8 * stage, 2 * kXBytes);
        copy_box(to, map, 0, column, full + 8 * stage);
        copy_box(to + kXBytes, map, 0, column + kTileK, full + 8 * stage);
    }

    __device__ __forceinline__ void wait(const RingPlace& at) const {
        mbarrier_wait(full + 8 * at.stage, at.parity);
    }

    __device__ __forceinline__ bool is_there(const RingPlace& at) const {
        return mbarrier_ended(full + 8 * at.stage, at.parity);
    }

    // One lane of a warp: it has multiplied with this stage.
    __device__ __forceinline__ void leave(uint32_t stage) const {
        mbarrier_arrive(empty + 8 * stage);
    }
};

// acc = W x^T for the warp's 16 rows of the weight and a segment of the contraction. The matrix
// unit works on one step while the next step's weights are decoded. `leads`: this thread loads x.
// Integer instructions are what limits it, so nothing is computed again that can be carried along.
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
    constexpr int kChunkSteps = DecodeLayout<kFormat>::kChunk / kTileK;
    const int32_t columns = stream.end - x.k_begin;
    const int32_t ragged = columns % kTileK == 0 ? -1 : x.steps - 1;  // a step of fewer columns
    ChunkRows<kFormat, kStages> rows(a, stream, stream.read, x.k_begin);
    // `sub`: the step's number inside its chunk.
    const auto decode = [&](int32_t step, int sub, uint32_t(&w)[4][4]) {
        if (sub == 0) {
            copy_async_wait<kStages - 2>();
            __syncwarp();  // Every lane's bytes are there, and every lane left the last chunk.
            stream.issue(a);
            rows = {a, stream, stream.read, x.k_begin + step * kTileK};
        }
        rows.template fragments<kPaired>(a, sub * 2, w);
        if (step == ragged) {  // past the segment's end scales may be anything
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                w[i / 4][i % 4] = i / 4 * 16 < columns % kTileK ? w[i / 4][i % 4] : 0u;
            }
        }
        if (sub == kChunkSteps - 1) {
            stream.leave_chunk();
        }
        pin_registers(w);
    };
    const uint64_t first_columns = descriptor_along_k(x.ring);
    RingPlace at;       // stage p % kNarrowXStages of x takes steps 2p and 2p + 1
    uint32_t left = 0;  // the stage before that
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
            if (i % 2 == 0 && !ready) {
                x.wait(at);
            }
            const uint64_t columns_of_step =
                further_along(first_columns, at.stage * (2 * kXBytes) + i % 2 * kXBytes);
            wgmma_begin();
#pragma unroll
            for (int j = 0; j < kTileK / 16; ++j) {
                wgmma_registers<kTokens, false>(
                    acc, w[i % 2][j], further_along(columns_of_step, j * 32)
                );
            }
            wgmma_commit();
            wgmma_wait<1>();
            pin_registers(w[(i + 1) % 2]);  // the step before has read them
            if (i % 2 == 0 && step > 0 && (threadIdx.x & 31) == 0) {
                x.leave(left);
            }
            if (i % 2 == 1) {  // late enough for the other warps to have left that stage
                if (leads) {
                    x.load(step / 2 + kNarrowXAhead);
                }
                __syncwarp();
                left = at.stage;
                at.advance(kNarrowXStages);
                ready = x.is_there(at);  // asked early: the answer takes a while
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

// Shared memory of a warp group for the end of its product: the sums of a segment for the other
// blocks of the cluster, then y on its way from fragments to rows, [tokens, kNarrowRows] in fp32.
template <int kTokens>
struct NarrowRoom {
    static constexpr int kFragments = kTokens / 8;
    static constexpr int kShare = kFragments / kSegments;  // of a block of a cluster
    static constexpr int kSumBytes =
        kFragments * 32 * static_cast<int>(sizeof(float4));  // a warp's
    static constexpr int kStride = kNarrowRows + 4;  // four tokens of eight rows in all banks
    static constexpr int kRowBytes = kStride * static_cast<int>(sizeof(float));
    static constexpr int kBytes =
        std::max(4 * kSumBytes + kShare * 8 * kRowBytes, kTokens* kRowBytes);
};

// All warps of a group, of which each has its own barrier.
__device__ __forceinline__ void wait_for_group() {
    barrier_sync(1 + static_cast<int>(threadIdx.x) / 128, 128);
}

// v = scale v + lora_scale (u b^T), of a warp's 16 rows of the weight from row0 on and kCount
// fragments of eight tokens from m0 on; then v to `tile`, whose first row is that of token m0.
template <int kCount>
__device__ __forceinline__ void put_fragments(
    const MatmulArgs& a,
    const float (&v)[kCount][4],
    const LoraOperands<kCount>& first,
    int32_t row0,
    int32_t m0,
    float* tile
) {
    constexpr int kStride = NarrowRoom<8>::kStride;
    float low_rank[kCount][4] = {};
    multiply_low_rank(a, first, row0, m0, low_rank);
    const int lane = threadIdx.x & 31;
    const int row = static_cast<int>(threadIdx.x) / 32 % 4 * kDecodeRows + lane / 4;
#pragma unroll
    for (int i = 0; i < 4 * kCount; ++i) {
        const int token = 8 * (i / 4) + 2 * (lane & 3) + i % 2;
        tile[token * kStride + row + 8 * (i % 4 / 2)] =
            add_lora(a.epilogue, v[i / 4][i % 4], low_rank[i / 4][i % 4]);
    }
}

// Epilogue::squares of a piece, whose eight lanes come here together; v: of columns n.., not yet
// rounded.
__device__ __forceinline__ void leave_squares(
    const Epilogue& e, const float (&v)[8], int32_t m, int32_t n
) {
    Eight rounded;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        rounded.v[i] = to_float(round_bf16(v[i]));
    }
    const float sum = sum_of_piece(add_squares(rounded, 0.0f), 0xffu << (threadIdx.x & 24));
    if (threadIdx.x % 8 == 0) {
        e.squares[static_cast<int64_t>(m) * (e.columns / kSquaresPiece) + n / kSquaresPiece] = sum;
    }
}

// The rest of the epilogue and y, of `tokens` tokens from m0 on and the group's rows of the weight
// from row0 on; eight neighbours a thread, so that y is written in whole lines.
__device__ __forceinline__ void store_tile(
    const MatmulArgs& a, const float* tile, int32_t row0, int32_t m0, int tokens
) {
    const Epilogue& e = a.epilogue;
    for (int i = static_cast<int>(threadIdx.x) % 128; i < tokens * 8; i += 128) {
        const int32_t m = m0 + i / 8;
        const int32_t n = row0 + i % 8 * 8;
        if (m >= a.m || n >= e.columns) {
            continue;
        }
        const float* from = tile + i / 8 * NarrowRoom<8>::kStride + i % 8 * 8;
        if (n + 8 <= min(e.columns, a.n) && e.ldy % 8 == 0) {
            float v[8];
            load_eight(v, from);
            finish_eight(e, v, m, n);
            if (e.squares != nullptr) {
                leave_squares(e, v, m, n);
            }
        } else {
#pragma unroll 1
            for (int c = 0; c < 8; ++c) {
                finish_one(e, from[c], m, n + c, a.n);
            }
        }
    }
}

// put_fragments() of a warp's sums, which are of the only segment.
template <int kTokens>
__device__ __forceinline__ void put_whole(
    const MatmulArgs& a, int32_t row0, const float (&acc)[kTokens / 8][4], float* tile
) {
    constexpr int kCount = 4;  // fragments whose operands are loaded at once
    if (a.x_is_ready) {
        wait_for_predecessor();
    }
#pragma unroll
    for (int first = 0; first < kTokens / 8; first += kCount) {
        LoraOperands<kCount> lora = {};
        if (a.epilogue.lora_u != nullptr) {
            lora.load_b(a, row0, 0);
            lora.load_u(a, first * 8, 0);
        }
        float v[kCount][4];
#pragma unroll
        for (int i = 0; i < 4 * kCount; ++i) {
            v[i / 4][i % 4] = acc[first + i / 4][i % 4];
        }
        put_fragments<kCount>(
            a, v, lora, row0, first * 8, tile + first * 8 * NarrowRoom<8>::kStride
        );
    }
}

// y of a warp group's rows, from the only segment. All warps have come here.
template <int kTokens>
__device__ __forceinline__ void store_whole(
    const MatmulArgs& a, int32_t row0, const float (&acc)[kTokens / 8][4], char* room
) {
    auto* tile = reinterpret_cast<float*>(room);
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
    put_whole<kTokens>(a, row0 + warp * kDecodeRows, acc, tile);
    wait_for_group();
    store_tile(a, tile, row0, 0, kTokens);
}

// The same from kSegments blocks of a cluster, whose warps of the same number have the same rows:
// each finishes its share of the tokens.
template <int kTokens>
__device__ __forceinline__ void store_segments(
    const MatmulArgs& a, int32_t row0, const float (&acc)[kTokens / 8][4], char* room
) {
    using Room = NarrowRoom<kTokens>;
    constexpr int kCount = Room::kShare;
    const int lane = threadIdx.x & 31;
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
    const int first = static_cast<int>(block_in_cluster()) * kCount;
    const int32_t warp_row0 = row0 + warp * kDecodeRows;
    auto* sums = reinterpret_cast<float4*>(room + warp * Room::kSumBytes);
    LoraOperands<kCount> lora = {};
    if (a.epilogue.lora_u != nullptr) {
        lora.load_b(a, warp_row0, 0);
    }
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
        sums[32 * j + lane] = float4{acc[j][0], acc[j][1], acc[j][2], acc[j][3]};
    }
    cluster_publish();
    if (a.x_is_ready) {
        wait_for_predecessor();
    }
    if (a.epilogue.lora_u != nullptr) {
        lora.load_u(a, first * 8, 0);
    }
    cluster_wait();
    float4 part[kSegments][kCount];
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
        const float4* of_segment = in_block_of_cluster(sums + 32 * first + lane, s);
#pragma unroll
        for (int t = 0; t < kCount; ++t) {
            part[s][t] = of_segment[32 * t];
        }
    }
    float v[kCount][4] = {};
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
#pragma unroll
        for (int s = 0; s < kSegments; ++s) {
            v[t][0] = __fadd_rn(v[t][0], part[s][t].x);
            v[t][1] = __fadd_rn(v[t][1], part[s][t].y);
            v[t][2] = __fadd_rn(v[t][2], part[s][t].z);
            v[t][3] = __fadd_rn(v[t][3], part[s][t].w);
        }
    }
    auto* tile = reinterpret_cast<float*>(room + 4 * Room::kSumBytes);
    put_fragments<kCount>(a, v, lora, warp_row0, first * 8, tile);
    wait_for_group();
    store_tile(a, tile, row0, first * 8, kCount * 8);
    cluster_arrive();  // This one has read, and used, the other blocks' sums.
    cluster_wait();
}

template <WeightFormat kFormat, int kTokens>
__global__ void __launch_bounds__(128 * kNarrowMaxGroups)
    matmul_narrow_kernel(const __grid_constant__ NarrowGroup group, int32_t segments) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ uint64_t barriers[2][kNarrowXStages];
    using Layout = NarrowLayout<kFormat, kTokens>;
    int32_t block = 0;
    const MatmulArgs& a = product_of_block(group.products, block);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int part = warp / 4;
    const int parts = static_cast<int>(blockDim.x) / 128;
    const int32_t row0 = (block / segments * parts + part) * kNarrowRows;
    const int32_t k_begin = static_cast<int32_t>(block_in_cluster()) * a.segment;
    const int32_t k_end = min(a.k, k_begin + a.segment);
    const NarrowX<Layout::kXBytes> x{
        group.x[&a - group.products.args],
        shared_address(shared),
        shared_address(barriers[0]),
        shared_address(barriers[1]),
        k_begin,
        (k_end - k_begin + kTileK - 1) / kTileK};
    const bool leads = threadIdx.x == 0;
    if (leads) {
        x.init(parts * 4);
        mbarrier_init_fence();
    }
    if (!a.releases_late) {
        release_successor();
    }
    const int32_t warp_row0 = row0 + warp % 4 * kDecodeRows;
    char* warp_ring = shared + Layout::kXRing + warp * Layout::kWeightRing;
    NarrowStream<kFormat> stream(a.w, warp_row0, k_begin, k_end, warp_ring);
    // The weights are constant: their loads need not wait.
#pragma unroll 1
    for (int c = 0; c < kNarrowStages<kFormat> - 1; ++c) {
        stream.issue(a);
    }
    if (a.epilogue.lora_u != nullptr && threadIdx.x % 128 < kNarrowRows) {
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
    copy_async_wait<0>();
    wait_for_group();  // Nobody reads the group's rings any more; they take the sums now.
    static_assert(NarrowRoom<kTokens>::kBytes <= 4 * Layout::kWeightRing);
    char* room = shared + Layout::kXRing + part * 4 * Layout::kWeightRing;
    if (segments > 1) {
        store_segments<kTokens>(a, row0, acc, room);
    } else {
        store_whole<kTokens>(a, row0, acc, room);
    }
}

// Numbers the blocks of a launch whose blocks have `groups` warp groups; returns how many there
// are.
inline int64_t number_narrow_blocks(MatmulGroup& group, int groups, int segments) {
    int64_t blocks = 0;
    for (int32_t i = 0; i < group.count; ++i) {
        group.first_block[i] = static_cast<int32_t>(blocks);
        blocks += ceil_div(group.args[i].epilogue.columns, kNarrowRows * groups) * segments;
    }
    group.first_block[group.count] = static_cast<int32_t>(blocks);
    return blocks;
}

// How many clusters of `segments` blocks, of so many threads and bytes of shared memory, the GPU
// runs at once.
template <typename Kernel>
int64_t clusters_at_once(Kernel* kernel, int threads, int segments, int bytes) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(segments);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(segments * device_limits().multiprocessors));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    CHECK_GT(clusters, 0);
    return clusters;
}

constexpr int kNarrowSharedBytes = 226 * 1024;

// What a launch of so many clusters costs, in quarters of the time of one warp group alone: the
// warp groups of the busiest multiprocessor, two more for what each wave begins and ends with, and
// a share for x, which every block reads. Clusters do not fill a GPU whose parts they do not
// divide: the blocks that are left over go where others are.
template <WeightFormat kFormat, int kTokens>
int64_t narrow_cost(int64_t clusters, int groups, int segments) {
    static int64_t known[kSegments + 1][kNarrowMaxGroups + 1][2] = {};  // asked once for each cut
    int64_t(&at_once)[2] = known[segments][groups];
    if (at_once[0] == 0) {
        const auto kernel = matmul_narrow_kernel<kFormat, kTokens>;
        const int bytes = NarrowLayout<kFormat, kTokens>::shared_bytes(groups);
        at_once[0] = clusters_at_once(kernel, groups * 128, segments, kNarrowSharedBytes);
        at_once[1] = clusters_at_once(kernel, groups * 128, segments, bytes);
    }
    const int64_t load = ceil_div(clusters, at_once[0]) * groups;
    return 8 * ceil_div(clusters, at_once[1]) + 4 * load + 4 / groups;
}

// False, and nothing done, where the rings do not fit (the larger GGUF blocks) or the products
// differ in segments.
template <WeightFormat kFormat, int kTokens>
bool launch_narrow(cudaStream_t queue, MatmulGroup& group) {
    const auto kernel = matmul_narrow_kernel<kFormat, kTokens>;
    const int32_t segments = num_segments(group.args[0].k, group.args[0].segment);
    CHECK(segments == 1 || segments == kSegments);
    for (int32_t i = 1; i < group.count; ++i) {
        if (num_segments(group.args[i].k, group.args[i].segment) != segments) {
            return false;
        }
    }
    allow_shared_memory(kernel, kNarrowSharedBytes);
    int best = 0;
    int64_t least_cost = 0;
    for (int groups = 1; groups <= kNarrowMaxGroups; ++groups) {
        if (NarrowLayout<kFormat, kTokens>::shared_bytes(groups) > kNarrowSharedBytes) {
            break;
        }
        const int64_t clusters = number_narrow_blocks(group, groups, segments) / segments;
        const int64_t cost = narrow_cost<kFormat, kTokens>(clusters, groups, segments);
        if (best == 0 || cost < least_cost) {
            least_cost = cost;
            best = groups;
        }
    }
    if (best == 0) {
        return false;
    }
    const int64_t blocks = number_narrow_blocks(group, best, segments);
    NarrowGroup narrow{group, {}};
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        narrow.x[i] = tensor_map(a.x, a.m, a.k, a.ldx * 2, kTokens);
    }
    launch_clusters_early(
        static_cast<unsigned>(segments),
        kernel,
        dim3(grid_dim(blocks)),
        static_cast<unsigned>(best) * 128,
        static_cast<size_t>(NarrowLayout<kFormat, kTokens>::shared_bytes(best)),
        queue,
        narrow,
        segments
    );
    group.squares_left = group.args[0].epilogue.squares != nullptr;
    return true;
}

}  // namespace orbit::cuda
