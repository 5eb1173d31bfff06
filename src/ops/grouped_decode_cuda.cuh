// The grouped product of few rows an expert. A thread block keeps up to 8 or 16 rows of one expert
// in shared memory; each of its warps streams 16 rows of the weight after another through a ring
// that does not run dry between them. An item is 16 rows of one product's weight.
#pragma once

#include "ops/grouped_cuda.cuh"
#include "ops/matmul_decode_cuda.cuh"

namespace orbit::cuda {

constexpr int kGroupedStages = 4;
constexpr int kGroupedWarpsMax = 16;  // of a thread block, and of a multiprocessor's registers

// How a launch divides the items of a tile of rows.
struct DecodeItems {
    int32_t of_product = 0;  // items of one product
    int32_t count = 0;       // of all products
    int32_t per_warp = 1;    // one after the other
    int32_t blocks = 1;      // thread blocks of a tile
    int32_t x_stride = 0;    // bytes from a row of x in shared memory to the next
    int32_t x_bytes = 0;
};

struct DecodePlan {
    DecodeItems items;
    int warps = 0;  // of a thread block; 0: the rows do not fit into shared memory
    int64_t shared_bytes = 0;
    int64_t grid = 0;
};

// `ring_bytes`: of one warp. grouped_cuda.cu.
DecodePlan plan_grouped_decode(
    const GroupedArgs& g, int64_t tile_rows, int64_t ring_bytes, int most_warps
);

// No counts need more m-tiles than this: r rows need at most 1 + (r - 1) / tile_rows.
inline int64_t tiles_bound(const GroupedArgs& g, int64_t tile_rows) {
    const int64_t active = std::min(g.experts, g.rows);
    return active + (g.rows - active) / tile_rows;
}

// Copies the warp's items into its ring.
template <WeightFormat kFormat, int kStages>
struct ItemStream {
    using Layout = DecodeLayout<kFormat>;
    static_assert(Layout::kAligned && Layout::kGranules == 8 && Layout::kPerLane == 4);
    const GroupedArgs& g;
    char* ring;  // of this warp
    int32_t of_product;
    int32_t expert;
    int32_t item;  // the one to copy from
    int32_t end;
    int32_t k = 0;      // the column to copy from
    int32_t stage = 0;  // to copy to
    const char* from = nullptr;
    int32_t row_at[Layout::kPerLane];  // bytes from `from` to rows lane / 8 + 4i
    uint32_t to[2];                    // places in a stage of rows lane / 8 and lane / 8 + 4
    const char* scales = nullptr;      // of row lane / 2

    __device__ __forceinline__ ItemStream(
        const GroupedArgs& args,
        const DecodeItems& items,
        int32_t of_expert,
        int32_t first_item,
        int32_t end_item,
        char* warp_ring
    )
        : g(args),
          ring(warp_ring),
          of_product(items.of_product),
          expert(of_expert),
          item(first_item),
          end(end_item) {
        const int lane = threadIdx.x & 31;
        to[0] = shared_address(ring) + swizzled(lane >> 3, lane & 7);
        to[1] = shared_address(ring) + swizzled((lane >> 3) + 4, lane & 7);
        if (item < end) {
            start();
        }
    }

    // Rows past the end repeat the last one.
    __device__ __forceinline__ void start() {
        const int lane = threadIdx.x & 31;
        const int32_t product = item / of_product;
        const int32_t row0 = (item - product * of_product) * kDecodeRows;
        const GroupedProduct& p = g.products[product];
        const WeightView& w = p.one.w;
        const int32_t last = w.rows - 1 - row0;
        from = reinterpret_cast<const char*>(w.data) + expert * p.weight_distance +
               row0 * w.row_bytes + (lane & 7) * 16;
#pragma unroll
        for (int i = 0; i < Layout::kPerLane; ++i) {
            row_at[i] = min((lane >> 3) + 4 * i, last) * static_cast<int32_t>(w.row_bytes);
        }
        if constexpr (Layout::kScalesInRing) {
            scales =
                reinterpret_cast<const char*>(scale_row<kFormat>(w, row0 + min(lane >> 1, last))) +
                expert * p.scale_distance;
        }
    }

    __device__ __forceinline__ void issue() {
        if (item < end) {
            copy();
        }
        copy_async_commit();
    }

    __device__ __forceinline__ void copy() {
        const int lane = threadIdx.x & 31;
        const WeightView& w = g.products[0].one.w;  // the products are alike
        const int32_t k_end = g.products[0].one.k;
        const auto left = static_cast<uint32_t>(k_end - k);  // columns
        const uint32_t bytes =
            kFormat == WeightFormat::kBF16 ? left * 2 : left / 32 * Layout::kBlock;
        const bool exists = static_cast<uint32_t>(lane & 7) * 16 < bytes;
        const uint32_t offset = stage * Layout::kStageBytes;
#pragma unroll
        for (int i = 0; i < Layout::kPerLane; ++i) {
            copy_async_16(to[i % 2] + offset + i / 2 * 1024, from + row_at[i], exists);
        }
        if constexpr (Layout::kScalesInRing) {
            const int32_t last = min(k + Layout::kChunk, k_end) - 1;
            const char* first_byte = scales + scale_offset<kFormat>(w, k);
            const char* last_byte = scales + scale_offset<kFormat>(w, last);
            const char* at =
                first_byte - (reinterpret_cast<uintptr_t>(first_byte) & 15) + (lane & 1) * 16;
            const uint32_t place = shared_address(ring) + offset + kDecodeRows * Layout::kStride +
                                   (lane >> 1) * Layout::kScaleStride + (lane & 1) * 16;
            const bool is_scale = at < last_byte + kScaleBytes<kFormat>;
            copy_async_16(place, at, is_scale);
        }
        stage = stage + 1 == kStages ? 0 : stage + 1;
        from += Layout::kBytes;
        k += Layout::kChunk;
        if (k >= k_end) {
            k = 0;
            if (++item < end) {
                start();
            }
        }
    }
};

// Where a lane reads the item that is multiplied; what ChunkRows needs of a stream.
template <WeightFormat kFormat>
struct ItemRows {
    char* ring;
    int32_t shift[2] = {0, 0};
    const char* lane_scales[2] = {nullptr, nullptr};  // of rows g, g + 8: kFp8
    uint32_t lane_scales_into[2] = {0, 0};            // where they start inside a granule
    bool scales_pair = false;                         // WeightStream

    __device__ __forceinline__ ItemRows(const WeightView& w, int32_t row0, char* warp_ring)
        : ring(warp_ring) {
        if constexpr (kScalesApart<kFormat>) {
            constexpr int kPair = 2 * sizeof(ScaleWord<kFormat>);
            const int g = (threadIdx.x & 31) >> 2;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                lane_scales[i] = reinterpret_cast<const char*>(
                    scale_row<kFormat>(w, min(row0 + g + 8 * i, w.rows - 1))
                );
                lane_scales_into[i] =
                    static_cast<uint32_t>(reinterpret_cast<uintptr_t>(lane_scales[i]) & 15);
            }
            const auto places =
                reinterpret_cast<uintptr_t>(w.scales) | static_cast<uintptr_t>(w.scale_stride);
            scales_pair =
                places % kPair == 0 && (kFormat != WeightFormat::kInt4 || w.group_shift == 5);
        }
    }
};

// The ScaleWords of a chunk's two rows, read at once: those of blocks 2j and 2j + 1 side by side.
template <WeightFormat kFormat>
struct ChunkScales {
    static constexpr int kBits = 8 * sizeof(ScaleWord<kFormat>);
    static constexpr int kPairs = DecodeLayout<kFormat>::kChunk / 64;
    uint32_t two[2][kPairs];

    template <typename Rows>
    __device__ __forceinline__ ChunkScales(const MatmulArgs& a, const Rows& rows) {
        using Two = std::conditional_t<kBits == 8, uint16_t, uint32_t>;
        if (rows.stream->scales_pair) {
#pragma unroll
            for (int i = 0; i < 2 * kPairs; ++i) {
                two[i / kPairs][i % kPairs] =
                    reinterpret_cast<const Two*>(rows.scales[i / kPairs])[i % kPairs];
            }
        } else {
#pragma unroll
            for (int i = 0; i < 2 * kPairs; ++i) {
                const int b = i % kPairs * 2;
                two[i / kPairs][i % kPairs] =
                    rows.scale(a, i / kPairs, b) | (rows.scale(a, i / kPairs, b + 1) << kBits);
            }
        }
    }

    // 64 columns of the chunk: the M side of four k16 steps.
    template <typename Rows>
    __device__ __forceinline__ void fragments(
        const MatmulArgs& a, const Rows& rows, int sub, uint32_t (&w)[4][4]
    ) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t words[2] = {two[i][sub] & ((1u << kBits) - 1), two[i][sub] >> kBits};
            rows.decode_two(a.w, i, 2 * sub, words, w);
        }
    }
};

// The others read theirs, if any, as they need them.
struct NoScales {
    template <typename Rows>
    __device__ __forceinline__ NoScales(const MatmulArgs&, const Rows&) {}

    template <typename Rows>
    __device__ __forceinline__ void fragments(
        const MatmulArgs& a, const Rows& rows, int sub, uint32_t (&w)[4][4]
    ) const {
        rows.template fragments<false>(a, 2 * sub, w);
    }
};

// acc = W x^T of one item. `slot`: the ring's stage to read next. `x`: rows in shared memory.
template <WeightFormat kFormat, int kStages, int kTiles>
__device__ __forceinline__ void multiply_item(
    const MatmulArgs& a,
    const ItemRows<kFormat>& from,
    ItemStream<kFormat, kStages>& stream,
    uint32_t x,
    int32_t x_stride,
    int32_t& slot,
    float (&acc)[kTiles][4]
) {
    using Layout = DecodeLayout<kFormat>;
    constexpr int kChunkSteps = Layout::kChunk / 64;
    const int lane = threadIdx.x & 31;
    // Rows past the end repeat the last one; what they give is not stored.
    uint32_t x_row[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        x_row[t] = x + min((lane & 7) + 8 * t, a.m - 1) * x_stride + (lane >> 3) * 16;
    }
    // `inside`: the chunk is inside the contraction.
    const auto multiply_chunk = [&](int32_t k0, auto inside) {
        const ChunkRows<kFormat, kStages, ItemRows<kFormat>> rows(
            a, from, static_cast<uint32_t>(slot) * Layout::kStageBytes, k0
        );
        const std::
            conditional_t<inside.value && Layout::kScalesInRing, ChunkScales<kFormat>, NoScales>
                scales(a, rows);
#pragma unroll
        for (int sub = 0; sub < kChunkSteps; ++sub) {
            const int32_t k = k0 + 64 * sub;
            if (!inside.value && k >= a.k) {
                break;
            }
            uint32_t v[kTiles][8];
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                const uint32_t at = x_row[t] + 2 * k;
                ldmatrix_x4(v[t][0], v[t][1], v[t][2], v[t][3], at);
                ldmatrix_x4(v[t][4], v[t][5], v[t][6], v[t][7], at + 64);
            }
            uint32_t w[4][4];
            scales.fragments(a, rows, sub, w);
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                // Past the end scales may be anything.
                if (inside.value || k + 16 * step < a.k) {
#pragma unroll
                    for (int t = 0; t < kTiles; ++t) {
                        mma_16816(acc[t], w[step], v[t][2 * step], v[t][2 * step + 1]);
                    }
                }
            }
        }
    };
#pragma unroll 1
    for (int32_t k0 = 0; k0 < a.k; k0 += Layout::kChunk) {
        copy_async_wait<kStages - 2>();
        __syncwarp();  // Every lane's bytes are there, and every lane left the stage before.
        stream.issue();
        if (k0 + Layout::kChunk <= a.k) {
            multiply_chunk(k0, std::true_type{});
        } else {
            multiply_chunk(k0, std::false_type{});
        }
        slot = slot + 1 == kStages ? 0 : slot + 1;
    }
}

// The expert's rows, zeros from column k on up to a multiple of 64. A warp takes whole rows.
__device__ __forceinline__ void copy_rows(const MatmulArgs& a, uint32_t x, int32_t x_stride) {
    const int lane = threadIdx.x & 31;
    const int32_t granules = (a.k + 63) / 64 * 8;
    for (int32_t row = threadIdx.x >> 5; row < a.m; row += static_cast<int32_t>(blockDim.x) >> 5) {
        const bf16* from = a.x + row * a.ldx;
        for (int32_t i = lane; i < granules; i += 32) {
            const bool exists = 8 * i < a.k;
            copy_async_16(x + row * x_stride + 16 * i, exists ? from + 8 * i : from, exists);
        }
    }
}

template <WeightFormat kFormat, int kStages, int kTiles>
__device__ __forceinline__ void multiply_items(
    const GroupedArgs& g,
    const DecodeItems& items,
    const ExpertRows& rows,
    ItemStream<kFormat, kStages>& stream,
    uint32_t x,
    int32_t first,
    bool& waits
) {
    int32_t slot = 0;
    int32_t of_product = -1;  // whose u is loaded
    LoraOperands<kTiles> lora = {};
#pragma unroll 1
    for (int32_t item = first; item < stream.end; ++item) {
        const int32_t product = item / items.of_product;
        const int32_t row0 = (item - product * items.of_product) * kDecodeRows;
        const MatmulArgs a = args_of_expert(g, product, rows);
        const bool has_lora = a.epilogue.lora_u != nullptr;
        if (has_lora) {
            lora.load_b(a, row0, 0);
        }
        float acc[kTiles][4] = {};
        const ItemRows<kFormat> from(a.w, row0, stream.ring);
        multiply_item<kFormat, kStages, kTiles>(a, from, stream, x, items.x_stride, slot, acc);
        if (waits) {
            wait_for_predecessor();
            waits = false;
        }
        if (has_lora && product != of_product) {
            lora.load_u(a, 0, 0);
            of_product = product;
        }
        store_decode(a, acc, lora, row0, 0);
    }
}

template <WeightFormat kFormat, int kTiles, int kStages>
__global__ void __launch_bounds__(32 * kGroupedWarpsMax, 1)
    grouped_decode_kernel(const __grid_constant__ GroupedArgs g, DecodeItems items) {
    extern __shared__ __align__(1024) char shared[];
    const MatmulArgs& one = g.products[0].one;
    bool waits = one.x_is_ready;  // before the first epilogue
    if (!one.releases_late) {
        release_successor();
    }
    if (!waits) {
        wait_for_predecessor();
        if (one.releases_late) {
            release_successor();
        }
    }
    const auto block = static_cast<int32_t>(blockIdx.x);
    ExpertRows rows;
    if (find_tile<8 * kTiles>(g.offsets, g.experts, block / items.blocks, rows)) {
        rows.count = min(rows.count, 8 * kTiles);
        const auto warps = static_cast<int32_t>(blockDim.x) >> 5;
        const auto warp = static_cast<int32_t>(threadIdx.x) >> 5;
        const int32_t first = (block % items.blocks * warps + warp) * items.per_warp;
        const int32_t end = min(first + items.per_warp, items.count);
        const uint32_t x = shared_address(shared);
        copy_rows(args_of_expert(g, 0, rows), x, items.x_stride);
        copy_async_commit();
        char* ring = shared + items.x_bytes + warp * kRingBytes<kFormat, kStages>;
        ItemStream<kFormat, kStages> stream(g, items, rows.expert, first, end, ring);
#pragma unroll 1
        for (int c = 0; c < kStages - 1; ++c) {
            stream.issue();
        }
        copy_async_wait<kStages - 1>();  // all but the ring's: x is there
        __syncthreads();
        if (kTiles == 1 || rows.count <= 8) {
            multiply_items<kFormat, kStages, 1>(g, items, rows, stream, x, first, waits);
        } else {
            multiply_items<kFormat, kStages, kTiles>(g, items, rows, stream, x, first, waits);
        }
    }
    if (waits) {
        wait_for_predecessor();
    }
}

template <WeightFormat kFormat, int kTiles, int kStages>
bool launch_grouped_decode(cudaStream_t queue, const GroupedArgs& g, int most_warps) {
    const DecodePlan plan =
        plan_grouped_decode(g, 8 * kTiles, kRingBytes<kFormat, kStages>, most_warps);
    if (plan.warps == 0) {
        return false;
    }
    const auto kernel = grouped_decode_kernel<kFormat, kTiles, kStages>;
    const auto shared = static_cast<size_t>(plan.shared_bytes);
    allow_shared_memory(kernel, shared);
    launch_early(
        kernel,
        dim3(grid_dim(plan.grid)),
        32 * static_cast<unsigned>(plan.warps),
        shared,
        queue,
        g,
        plan.items
    );
    return true;
}

// False: the rows do not fit into shared memory, or are too many for this member.
template <WeightFormat kFormat>
bool launch_grouped_decode(cudaStream_t queue, const GroupedArgs& g) {
    const int64_t rows_per_expert = g.rows / g.experts;
    if (rows_per_expert > kDecodeMaxRows) {
        return false;
    }
    const bool one_tile = rows_per_expert <= 4;
    if constexpr (kFormat == WeightFormat::kBF16) {
        // Warps that are nearly alone on their multiprocessor (LoRA's narrow side) hide the
        // memory's latency by a deeper ring alone.
        const int64_t tiles = tiles_bound(g, one_tile ? 8 : 16);
        const int64_t warps =
            tiles * g.count * ceil_div(g.products[0].one.epilogue.columns, kDecodeRows);
        if (warps <= 4 * device_limits().multiprocessors && has_wgmma()) {
            const bool done = one_tile
                                  ? launch_grouped_decode<kFormat, 1, kDeepStages>(queue, g, 2)
                                  : launch_grouped_decode<kFormat, 2, kDeepStages>(queue, g, 2);
            if (done) {
                return true;
            }
        }
    }
    return one_tile ? launch_grouped_decode<kFormat, 1, kGroupedStages>(queue, g, kGroupedWarpsMax)
                    : launch_grouped_decode<kFormat, 2, kGroupedStages>(queue, g, kGroupedWarpsMax);
}

}  // namespace orbit::cuda
