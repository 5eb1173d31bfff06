// Member N for INT4 in SmallScales and segments of whole stages: x, codes and scales all come by
// tensor copies that a warp of its own issues, so that the warps that multiply do little else than
// decode. With twice as many instructions a step of 64 columns took as long as if each cost the
// matrix unit a cycle; now it has 66, and fewer change nothing at 64 rows (docs/PERFORMANCE.md).
//
// With MatmulGroup::swiglu a warp group has 32 rows of gate and the same 32 of up: its first two
// warps' are gate's, and a stage's codes and scales are all of gate's rows, then all of up's. Where
// the two have inputs of their own (swiglu_apart()), one block of a cluster of two has gate's rows
// and the other the same of up; each ends half of the tokens.
#pragma once

#include "device/cuda/math.cuh"
#include "ops/matmul_narrow_swiglu_cuda.cuh"

namespace orbit::cuda {

constexpr int kInt4Chunk = 256;  // columns of a stage: of a row 128 bytes of codes and 16 of scales
constexpr int kInt4Steps = kInt4Chunk / kTileK;
constexpr int kInt4MaxProducts = 4;  // of a launch
constexpr int kInt4MaxStages = 6;

struct NarrowInt4Group {
    MatmulGroup products;
    CUtensorMap x[kInt4MaxProducts];
    CUtensorMap codes[kInt4MaxProducts];   // boxes of a block's rows of the product
    CUtensorMap scales[kInt4MaxProducts];  // the same
};

// A stage: x in kInt4Steps boxes of 64 columns, then the codes of all warp groups, then the scales.
template <int kTokens>
struct NarrowInt4Layout {
    static constexpr int kXBytes = kTokens * kTileK * 2;             // of a box
    static constexpr int kCodes = kInt4Steps * kXBytes;              // where they start
    static constexpr int kCodeBytes = kNarrowRows * kInt4Chunk / 2;  // of a warp group
    static constexpr int kScaleBytes = kNarrowRows * kInt4Chunk / 32 * 2;
    // What the products end in is in the ring, which has two stages at least.
    static_assert(NarrowRoom<kTokens>::kBytes * 4 <= 2 * (kCodes + 4 * (kCodeBytes + kScaleBytes)));
    static_assert(NarrowRoom<kTokens>::kBytes <= kCodes + kCodeBytes);
    static_assert(SwigluApartRoom<kTokens>::kBytes * 4 <= 2 * (kCodes + 4 * kCodeBytes));

    static constexpr __host__ __device__ int stage_bytes(int groups) {
        return kCodes + groups * (kCodeBytes + kScaleBytes);
    }

    static int stages(int groups) {
        return std::min(kInt4MaxStages, kNarrowSharedBytes / stage_bytes(groups));
    }
};

// The stages of a block, and the one that is next. A stage is full when its copies have landed, and
// empty when every warp has multiplied with it.
struct NarrowInt4Ring {
    uint32_t base;   // shared address
    uint32_t full;   // of stage 0's barrier, 8 bytes each
    uint32_t empty;  // the same
    uint32_t bytes;  // of a stage
    uint32_t stages;
    RingPlace at = {};

    // Bytes from the ring's start.
    __device__ __forceinline__ uint32_t offset() const { return at.stage * bytes; }

    __device__ __forceinline__ uint32_t place() const { return base + offset(); }

    __device__ __forceinline__ uint32_t full_barrier() const { return full + 8 * at.stage; }

    __device__ __forceinline__ uint32_t empty_barrier() const { return empty + 8 * at.stage; }

    __device__ __forceinline__ void advance() { at.advance(stages); }
};

// What a block copies: `chunks` stages from column k_begin on of its rows of one product or, with
// swiglu, of two, from row0 on.
template <int kTokens>
struct NarrowInt4Loads {
    using Layout = NarrowInt4Layout<kTokens>;
    const NarrowInt4Group& group;
    int32_t product;
    int32_t row0;
    int32_t k_begin;
    int32_t chunks;
    int groups;
    bool swiglu;  // rows of both products

    __device__ __forceinline__ void load_weights(const NarrowInt4Ring& ring, int32_t chunk) const {
        const int32_t column = k_begin + chunk * kInt4Chunk;
        const uint32_t codes = ring.place() + Layout::kCodes;
        const uint32_t scales = codes + groups * Layout::kCodeBytes;
        const uint32_t barrier = ring.full_barrier();
        mbarrier_expect(barrier, ring.bytes);
        // The maps' elements have two bytes: four codes, or a scale.
        copy_box(codes, group.codes[product], row0, column / 4, barrier);
        copy_box(scales, group.scales[product], row0, column / 32, barrier);
        if (swiglu) {
            const uint32_t up_codes = codes + groups * (Layout::kCodeBytes / 2);
            const uint32_t up_scales = scales + groups * (Layout::kScaleBytes / 2);
            copy_box(up_codes, group.codes[1], row0, column / 4, barrier);
            copy_box(up_scales, group.scales[1], row0, column / 32, barrier);
        }
    }

    __device__ __forceinline__ void load_x(const NarrowInt4Ring& ring, int32_t chunk) const {
#pragma unroll
        for (int i = 0; i < kInt4Steps; ++i) {
            const int32_t column = k_begin + chunk * kInt4Chunk + i * kTileK;
            copy_box(
                ring.place() + i * Layout::kXBytes, group.x[product], 0, column, ring.full_barrier()
            );
        }
    }

    // Until x is there.
    __device__ __forceinline__ void wait_for_x(const MatmulArgs& a) const {
        if (!a.x_is_ready) {
            return wait_for_predecessor();
        }
        if (a.x_flag != nullptr) {
            wait_for_flag(a.x_flag);
            fence_for_copies();
        }
    }

    // One thread. Weights are constant: those of the first stages need not wait as x does. Beside
    // LoRA's narrow product, more than one would take memory from it.
    __device__ __forceinline__ void run(NarrowInt4Ring ring, const MatmulArgs& a) const {
        const int32_t early = a.x_is_ready ? 1 : min(chunks, static_cast<int32_t>(ring.stages));
        for (int32_t chunk = 0; chunk < early; ++chunk) {
            load_weights(ring, chunk);
            ring.advance();
        }
        wait_for_x(a);
        ring.at = {};
        for (int32_t chunk = 0; chunk < chunks; ++chunk) {
            mbarrier_wait(ring.empty_barrier(), ring.at.parity ^ 1);
            if (chunk >= early) {
                load_weights(ring, chunk);
            }
            load_x(ring, chunk);
            ring.advance();
        }
        if (a.x_flag != nullptr) {  // Only now, when nothing is held up by the answer.
            clear_after_last(a.x_flag, count_waiter(a.x_flag));
        }
    }
};

// Where a warp of a block finds its 16 rows.
struct NarrowInt4Rows {
    int32_t product;
    int32_t row;       // of the product, the first
    int32_t in_stage;  // the same

    __device__ __forceinline__
    NarrowInt4Rows(bool swiglu, int32_t of_block, int32_t block_row0, int groups) {
        const int warp = static_cast<int>(threadIdx.x) / 32;
        if (swiglu) {
            const int32_t in_product = warp / 4 * kSwigluRows + warp % 2 * kDecodeRows;
            product = warp % 4 / 2;
            row = block_row0 + in_product;
            in_stage = product * groups * kSwigluRows + in_product;
        } else {
            product = of_block;
            in_stage = warp * kDecodeRows;
            row = block_row0 + in_stage;
        }
    }
};

// A warp's 16 rows of a stage's weights.
template <int kTokens>
struct NarrowInt4Weights {
    using Layout = NarrowInt4Layout<kTokens>;
    const char* shared;   // where the ring starts
    uint32_t codes;       // what the lane names to the matrix loads, from a stage's start
    uint32_t scales;      // of row g, the same
    uint32_t here = 0;    // shared address of `codes` in the current stage
    uint4 scale[2] = {};  // of rows g and g + 8: of eight blocks, two in each word

    __device__ __forceinline__ NarrowInt4Weights(const char* ring, int groups, int32_t warp_row)
        : shared(ring) {
        const int lane = threadIdx.x & 31;
        // Granule b of rows of 128 bytes is block b's codes, a word for each lane of a quad, as
        // matrix loads give them; it lies at b ^ row % 8, which is at `codes` ^ 16 b. Lanes 16 and
        // above name the next block.
        const int32_t row = warp_row + (lane & 15);
        codes = Layout::kCodes + row * 128 + (((lane & 7) ^ (lane >> 4)) << 4);
        scales = Layout::kCodes + groups * Layout::kCodeBytes + (warp_row + (lane >> 2)) * 16;
    }

    __device__ __forceinline__ void enter(uint32_t stage) {
        here = shared_address(shared) + stage + codes;
        scale[0] = *reinterpret_cast<const uint4*>(shared + stage + scales);
        scale[1] = *reinterpret_cast<const uint4*>(shared + stage + scales + 8 * 16);
    }

    // 64 columns: the M side of four k16 steps.
    __device__ __forceinline__ void decode(int step, uint32_t (&w)[4][4]) const {
        uint32_t word[2][2];  // of blocks 2 step and 2 step + 1, and of rows g and g + 8
        const uint32_t at = here ^ static_cast<uint32_t>(step << 5);
        ldmatrix_x4(word[0][0], word[0][1], word[1][0], word[1][1], at);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t two[4] = {scale[i].x, scale[i].y, scale[i].z, scale[i].w};
            const SmallScales<true> small(two[step]);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                uint32_t pair[4];
                small.decode(word[j][i], j, pair);
                place_pairs(pair, i, j, w);
            }
        }
        pin_registers(w);
    }
};

// acc = W x^T for the warp's 16 rows of the weight and the block's segment. The matrix unit works
// on one step while the next step's weights are decoded.
template <int kTokens>
__device__ __forceinline__ void multiply_int4(
    NarrowInt4Ring ring,
    NarrowInt4Weights<kTokens> weights,
    int32_t chunks,
    float (&acc)[kTokens / 8][4]
) {
    using Layout = NarrowInt4Layout<kTokens>;
    const auto enter = [&] {
        mbarrier_wait(ring.full_barrier(), ring.at.parity);
        weights.enter(ring.offset());
    };
    uint32_t w[2][4][4];
    enter();
    weights.decode(0, w[0]);
    uint32_t left = 0;  // the barrier of the stage before
#pragma unroll 1
    for (int32_t chunk = 0; chunk < chunks; ++chunk) {
        // The same for all lanes, which the compiler cannot know.
        const uint64_t x = descriptor_along_k(__shfl_sync(0xffffffffu, ring.place(), 0));
        const uint32_t barrier = ring.empty_barrier();
#pragma unroll
        for (int step = 0; step < kInt4Steps; ++step) {
            wgmma_begin();
#pragma unroll
            for (int j = 0; j < kTileK / 16; ++j) {
                wgmma_registers<kTokens, false>(
                    acc, w[step % 2][j], further_along(x, step * Layout::kXBytes + j * 32)
                );
            }
            wgmma_commit();
            wgmma_wait<1>();
            pin_registers(w[(step + 1) % 2]);  // the step before has read them
            if (step == 0 && chunk > 0 && (threadIdx.x & 31) == 0) {
                mbarrier_arrive(left);
            }
            if (step + 1 < kInt4Steps) {
                weights.decode(step + 1, w[(step + 1) % 2]);
            } else if (chunk + 1 < chunks) {
                left = barrier;
                ring.advance();
                enter();
                weights.decode(0, w[0]);
            }
        }
    }
    wgmma_wait<0>();
    pin_registers(w[0]);
    pin_registers(w[1]);
    pin_registers(acc);
}

// All warp groups of the block, but not the warp that loads.
__device__ __forceinline__ void wait_for_groups(int groups) {
    constexpr int kBarrier = 1 + kNarrowMaxGroups;  // the first are those of wait_for_group()
    barrier_sync(kBarrier, groups * 128);
}

// As many registers as 17 warps may have.
template <int kTokens>
__global__ void __maxnreg__(112) matmul_narrow_int4_kernel(
    const __grid_constant__ NarrowInt4Group group, int32_t segments, int32_t stages
) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ uint64_t barriers[2][kInt4MaxStages];
    using Layout = NarrowInt4Layout<kTokens>;
    int32_t block = 0;
    const bool apart = swiglu_apart(group.products);  // then `segments` is 2
    const MatmulArgs& of_block = product_of_block(group.products, block);
    const MatmulArgs& a = apart ? group.products.args[block_in_cluster()] : of_block;
    const auto product = static_cast<int32_t>(&a - group.products.args);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int groups = static_cast<int>(blockDim.x) / 128;
    const bool swiglu = group.products.swiglu != nullptr && !apart;
    const int32_t row0 = block / segments * groups * (swiglu ? kSwigluRows : kNarrowRows);
    const int32_t k_begin = apart ? 0 : static_cast<int32_t>(block_in_cluster()) * a.segment;
    const int32_t chunks = min(a.segment, a.k - k_begin) / kInt4Chunk;
    const NarrowInt4Ring ring{
        shared_address(shared),
        shared_address(barriers[0]),
        shared_address(barriers[1]),
        static_cast<uint32_t>(Layout::stage_bytes(groups)),
        static_cast<uint32_t>(stages)};
    if (threadIdx.x == 0) {
        for (int s = 0; s < stages; ++s) {
            mbarrier_init(ring.full + 8 * s, 1);
            mbarrier_init(ring.empty + 8 * s, static_cast<uint32_t>(groups) * 4);
        }
        mbarrier_init_fence();
    }
    release_successor();
    __syncthreads();  // The barriers are made.
    if (warp == groups * 4) {
        if (threadIdx.x % 32 == 0) {
            const NarrowInt4Loads<kTokens> loads{
                group, product, row0, k_begin, chunks, groups, swiglu};
            loads.run(ring, a);
        }
        __syncwarp();
        if (segments > 1) {  // the cluster's barriers in the end
            cluster_sync();
            cluster_sync();
        }
        return;
    }
    const NarrowInt4Rows rows(swiglu, product, row0, groups);
    const MatmulArgs& own = group.products.args[rows.product];
    const int lane = static_cast<int>(threadIdx.x) & 31;
    if (own.epilogue.lora_u != nullptr && lane < kDecodeRows) {
        const int64_t row = min(rows.row + lane, own.n - 1);
        prefetch_to_l2(own.epilogue.lora_b + row * own.epilogue.ldb);
    }
    if (group.products.swiglu_d != nullptr && lane < kDecodeRows / 2) {  // 128 bytes each
        const int64_t row = min(rows.row + 2 * lane, own.n - 2);
        prefetch_to_l2(group.products.swiglu_d + row * kFusedRotation);
    }
    float acc[kTokens / 8][4] = {};
    const NarrowInt4Weights<kTokens> weights(shared, groups, rows.in_stage);
    multiply_int4<kTokens>(ring, weights, chunks, acc);
    wait_for_groups(groups);  // Nobody reads the ring any more; it takes the sums now.
    if (!a.x_is_ready) {
        wait_for_predecessor();
    }
    const int part = warp / 4;
    char* room = shared + part * NarrowRoom<kTokens>::kBytes;
    if (apart) {
        store_swiglu_apart<kTokens>(
            group.products,
            row0 + part * kNarrowRows,
            acc,
            shared + part * SwigluApartRoom<kTokens>::kBytes
        );
    } else if (swiglu) {
        auto* tile = reinterpret_cast<float*>(room);
        put_whole<kTokens>(own, rows.row, acc, tile);
        wait_for_group();
        store_swiglu_tile<kTokens>(group.products, tile, row0 + part * kSwigluRows);
    } else if (segments > 1) {
        store_segments<kTokens>(a, row0 + part * kNarrowRows, acc, room);
    } else {
        store_whole<kTokens>(a, row0 + part * kNarrowRows, acc, room);
    }
}

// Whether the kernel takes these products, which are aligned as tensor copies need it.
inline bool fits_narrow_int4(const MatmulGroup& group) {
    const int32_t segments = num_segments(group.args[0].k, group.args[0].segment);
    bool fits = group.count <= kInt4MaxProducts;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        const auto places =
            reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.w.data) |
            reinterpret_cast<uintptr_t>(a.w.scales) | static_cast<uintptr_t>(a.w.scale_stride);
        fits = fits && a.ldx % 8 == 0 && a.w.small_scales && a.w.group_shift == 5 &&
               places % 16 == 0 && a.k % kInt4Chunk == 0 && a.segment % kInt4Chunk == 0 &&
               !a.releases_late && num_segments(a.k, a.segment) == segments;
    }
    return fits;
}

constexpr int32_t kNarrowInt4MinRows = 2;  // from which it is quicker than member D, as measured

// Whether two products can be one of a MatmulGroup with `swiglu`.
inline bool fits_narrow_int4_swiglu(const MatmulGroup& group) {
    const MatmulArgs& gate = group.args[0];
    const MatmulArgs& up = group.args[1];
    return group.count == 2 && gate.m >= kNarrowInt4MinRows && gate.m <= kNarrowMaxRows &&
           gate.n > 128 && gate.n % 8 == 0 && gate.n == up.n && gate.k == up.k &&
           gate.segment >= gate.k && (gate.x == up.x || gate.epilogue.lora_u == nullptr) &&
           has_wgmma() && fits_narrow_int4(group);
}

// Numbers the blocks of a launch; returns how many there are.
inline int64_t number_int4_blocks(MatmulGroup& group, int groups, int segments) {
    if (group.swiglu == nullptr) {
        return number_narrow_blocks(group, groups, segments);
    }
    const int rows = swiglu_apart(group) ? kNarrowRows : kSwigluRows;
    const int64_t blocks =  // the first product's
        ceil_div(group.args[0].n, rows * groups) * segments;
    group.first_block[1] = static_cast<int32_t>(blocks);
    group.first_block[2] = static_cast<int32_t>(blocks);
    return blocks;
}

// Whether `beside`, INT4 products that run beside LoRA's narrow ones, may start before x is there
// (MatmulArgs::x_flag): member D, and those which launch_small_tile() and launch_spread() take for
// `narrow`, announce x.
inline bool asks_for_x(const MatmulGroup& narrow, const MatmulGroup& beside) {
    const int32_t rows = beside.args[0].m;
    bool asks = rows >= kNarrowInt4MinRows && rows <= kNarrowMaxRows && has_wgmma() &&
                fits_narrow_int4(beside);
    for (int32_t i = 0; i < beside.count; ++i) {
        asks = asks && beside.args[i].epilogue.columns > 128;
    }
    for (int32_t i = 0; i < narrow.count; ++i) {
        const MatmulArgs& a = narrow.args[i];
        const auto address =
            reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.w.data);
        asks = asks && a.epilogue.columns <= TinyTile::kN && a.k % 8 == 0 && a.ldx % 8 == 0 &&
               address % 16 == 0;
    }
    return asks;
}

// Warp groups of a block: the number that takes the least time where a multiprocessor runs one
// block at once, in cycles as measured on an H200. A wave takes 3,000 to begin and end, and a step
// of 64 columns 200 for each warp group, but not less than 450. Clusters of segments do not fill
// a GPU whose parts they do not divide.
template <int kTokens>
int narrow_int4_groups(MatmulGroup& group, int segments) {
    static int64_t known[kSegments + 1] = {};
    int64_t& at_once = known[segments];
    const auto kernel = matmul_narrow_int4_kernel<kTokens>;
    if (at_once == 0) {
        allow_shared_memory(kernel, kNarrowSharedBytes);
        at_once = clusters_at_once(kernel, 128 + 32, segments, kNarrowSharedBytes);
    }
    const int64_t steps = group.args[0].segment / kTileK;
    int best = 0;
    int64_t least = 0;
    for (int groups = 1; groups <= kNarrowMaxGroups; ++groups) {
        const int64_t clusters = number_int4_blocks(group, groups, 1);
        const int64_t cycles =
            ceil_div(clusters, at_once) * (3000 + steps * std::max(450, 200 * groups));
        if (best == 0 || cycles < least) {
            best = groups;
            least = cycles;
        }
    }
    return best;
}

// False, and nothing done, for products that the kernel does not take.
template <int kTokens>
bool launch_narrow_int4(cudaStream_t queue, MatmulGroup& group) {
    if (!fits_narrow_int4(group)) {
        return false;
    }
    using Layout = NarrowInt4Layout<kTokens>;
    int32_t segments = num_segments(group.args[0].k, group.args[0].segment);
    CHECK(segments == 1 || segments == kSegments);
    const bool apart = swiglu_apart(group);
    segments = apart ? 2 : segments;
    const int groups = narrow_int4_groups<kTokens>(group, segments);
    const int64_t blocks = number_int4_blocks(group, groups, segments);
    NarrowInt4Group all{group, {}, {}, {}};
    undo_shrinking(all.products);
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        const bool whole = group.swiglu == nullptr || apart;
        const int32_t rows = groups * (whole ? kNarrowRows : kSwigluRows);
        all.x[i] = tensor_map(a.x, a.m, a.k, a.ldx * 2, kTokens);
        all.codes[i] = tensor_map(a.w.data, a.n, a.k / 4, a.w.row_bytes, rows);
        all.scales[i] = tensor_map_unswizzled(a.w.scales, a.n, a.k / 32, a.w.scale_stride, rows);
    }
    const int stages = Layout::stages(groups);
    launch_clusters_early(
        static_cast<unsigned>(segments),
        matmul_narrow_int4_kernel<kTokens>,
        dim3(grid_dim(blocks)),
        static_cast<unsigned>(groups) * 128 + 32,
        static_cast<size_t>(stages) * Layout::stage_bytes(groups),
        queue,
        all,
        segments,
        stages
    );
    group.squares_left = group.args[0].epilogue.squares != nullptr;
    return true;
}

}  // namespace orbit::cuda
