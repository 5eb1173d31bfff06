// Member P/B for many rows of a bf16 weight on Hopper, and fewer with LoRA. Two thread blocks, one
// above the other, make a pair: each multiplies a tile of 128 rows and shares its half of the
// weight's tile with the other. In a block one thread keeps a ring of stages full with tensor
// copies, and two warp groups of 64 rows each multiply what is there. Blocks stay for all of their
// tiles, so that the next tile's operands arrive while one is stored. Products that are added up go
// through a tile one after the other, and end once.
//
// The bits are those of the other members: k16 steps in ascending order, segments added up in
// ascending order, LoRA's product in a chain of its own, then the epilogue's order.
#include "ops/matmul_pair_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int kThreads = 128 * (kMultipliers + 1);
// The first warp group starts this many steps before the second and so comes to its epilogue
// earlier: one multiplies while the other stores.
constexpr int kLead = 2;
constexpr int kMinDepth = 256;               // of the contraction
static_assert(kLead * kTileK <= kMinDepth);  // One tile is enough to end the second one's wait.
// Where pairs are quicker than the other members, as measured: of rows and tiles of 128 x 128. With
// LoRA, which takes the others longer, fewer rows will do.
constexpr int kManyRows = 1024;
constexpr int kMinTilesOfMany = 64;
constexpr int kMinRows = 512;
constexpr int kMinTiles = 16;
constexpr int kMinColumnsOfHead = 32768;  // of so many, any rows that fill more than half of a pair
constexpr int kLongestSum = 8192;  // of several products in one chain; above, in their segments

constexpr int kMaxRank = 256;  // LoRA's operands take a stage for each 64 of the rank

template <int kTileN>
struct PairTile : PairBytes<kTileN> {
    using PairBytes<kTileN>::kN;
    static constexpr int kStageBytes = PairBytes<kTileN>::kBytesX + PairBytes<kTileN>::kBytesW;
    static constexpr int kStages = kN == 256 ? 4 : kN == 192 ? 5 : 6;
    static constexpr int kSharedBytes = kStages * (kStageBytes + 16);
    static_assert(kMaxRank <= kStages * kTileK && kSharedBytes <= 227 * 1024);
};

struct ProductMaps {
    CUtensorMap x, w;
    CUtensorMap lora_u, lora_b;  // unset without LoRA
};

struct PairedGroup {
    ProductMaps maps[kMaxGroup];
    MatmulGroup products;  // numbers pairs of tiles
    int32_t links;         // products that are added up, from each that is counted on
};

__device__ __forceinline__ int32_t lora_steps(const Epilogue& e) {
    return e.lora_u == nullptr ? 0 : (e.ldu + kTileK - 1) / kTileK;
}

// Fills the next stage: 64 of the contraction, from k on.
template <typename Tile, bool kBackward>
__device__ __forceinline__ void fill_stage(
    Ring<Tile>& ring, const CUtensorMap& x, const CUtensorMap& w, const Place& place, int32_t k
) {
    ring.wait_freed();
    const uint32_t filled = ring.filled(ring.stage);
    mbarrier_expect(filled, Tile::kStageBytes);
    copy_box(ring.x(), x, place.m0, k, filled);
    share_weight<Tile, kBackward>(ring, w, place.n0, k, 0);
    ring.advance();
}

template <typename Tile, bool kBackward>
__device__ __forceinline__ void fill_stages(const PairedGroup& group, Ring<Tile> ring) {
    const int32_t pairs = group.products.first_block[group.products.count];
    const auto stride = static_cast<int32_t>(gridDim.x) / kPair;
    for (auto pair = static_cast<int32_t>(blockIdx.x) / kPair; pair < pairs; pair += stride) {
        const Place place = place_of<Tile>(group.products, pair);
        const MatmulArgs* links = group.products.args + place.product;
        const ProductMaps* maps = group.maps + place.product;
        for (int32_t i = 0; i < group.links; ++i) {
            for (int32_t k = 0; k < links[i].k; k += kTileK) {
                fill_stage<Tile, kBackward>(ring, maps[i].x, maps[i].w, place, k);
            }
        }
        if (links[0].epilogue.lora_u != nullptr) {
            wait_for_predecessor();  // which makes u, where x_is_ready
        }
        for (int32_t i = 0; i < group.links; ++i) {
            for (int32_t step = 0; step < lora_steps(links[i].epilogue); ++step) {
                fill_stage<Tile, kBackward>(
                    ring, maps[i].lora_u, maps[i].lora_b, place, step * kTileK
                );
            }
        }
    }
    wait_for_predecessor();
}

// This warp has read the stage.
template <typename Tile>
__device__ __forceinline__ void free_stage(const Ring<Tile>& ring, int32_t stage) {
    const uint32_t lane = threadIdx.x & 31;
    if (lane < kPair) {
        mbarrier_arrive_at(ring.freed(stage), lane);
    }
}

// Begins acc (+)= x . weight over the next stage. `lead`: when it has been counted down to zero,
// the other warp group may start.
template <typename Tile, bool kBackward>
__device__ __forceinline__ void start_stage(
    float (&acc)[Tile::kFragN][4], const Ring<Tile>& ring, int warpgroup, int add, int32_t& lead
) {
    ring.wait_filled();
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < kTileK / 16; ++i) {
        issue_step<Tile, kBackward, Tile::kN>(acc, ring, warpgroup, 0, i, i > 0 ? 1 : add);
    }
    wgmma_commit();
    if (--lead == 0) {
        barrier_arrive(1, 128 * kMultipliers);
    }
}

// acc = x . weight over `steps` stages, which are freed.
template <typename Tile, bool kBackward>
__device__ __forceinline__ void multiply_stages(
    float (&acc)[Tile::kFragN][4], Ring<Tile>& ring, int warpgroup, int32_t steps, int32_t& lead
) {
    start_stage<Tile, kBackward>(acc, ring, warpgroup, 0, lead);
    int32_t last = ring.stage;
    ring.advance();
#pragma unroll 1
    for (int32_t step = 1; step < steps; ++step) {
        start_stage<Tile, kBackward>(acc, ring, warpgroup, 1, lead);
        wgmma_wait<1>();
        free_stage(ring, last);
        last = ring.stage;
        ring.advance();
    }
    wgmma_wait<0>();
    pin_registers(acc);
    free_stage(ring, last);
}

// LoRA's stages: of one product, 64 of the rank in each, or of several, a stage for each.
struct LoraSteps {
    int32_t stages;
    int32_t in_stage;  // k16 steps; the last one may have fewer
    int32_t count;     // in all

    __device__ __forceinline__ LoraSteps(const Epilogue& e, int32_t links)
        : stages(links > 1 ? links : lora_steps(e)),
          in_stage(links > 1 ? e.ldu / 16 : kTileK / 16),
          count(links * e.ldu / 16) {}
};

// Begins lora = u b^T for 64 columns, over LoRA's stages from `at` on, which are filled.
template <typename Tile, bool kBackward>
__device__ __forceinline__ void start_rank(
    float (&lora)[8][4], Ring<Tile> at, int warpgroup, int column, const LoraSteps& steps
) {
    wgmma_begin();
    issue_step<Tile, kBackward, 64>(lora, at, warpgroup, column, 0, 0);
    int32_t in_stage = 0;
#pragma unroll 1
    for (int32_t step = 1; step < steps.count; ++step) {
        if (++in_stage == steps.in_stage) {
            at.advance();
            in_stage = 0;
        }
        issue_step<Tile, kBackward, 64>(lora, at, warpgroup, column, in_stage, 1);
    }
    wgmma_commit();
}

// v = scale v + lora_scale u b^T, the sum over all links. While 64 columns are added, the next ones
// are multiplied.
template <typename Tile, bool kBackward>
__device__ __forceinline__ void add_lora_stages(
    float (&v)[Tile::kFragN][4], Ring<Tile>& ring, int warpgroup, const Epilogue& e, int32_t links
) {
    constexpr int kColumns = Tile::kN / 64;
    const LoraSteps steps(e, links);
    Ring<Tile> at = ring;
    for (int32_t stage = 0; stage < steps.stages; ++stage) {
        at.wait_filled();
        at.advance();
    }
    float lora[2][8][4];
    start_rank<Tile, kBackward>(lora[0], ring, warpgroup, 0, steps);
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
        if (column + 1 < kColumns) {
            start_rank<Tile, kBackward>(
                lora[(column + 1) % 2], ring, warpgroup, 64 * (column + 1), steps
            );
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        pin_registers(lora[column % 2]);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                float& sum = v[column * 8 + j][c];
                sum = add_lora(e, sum, lora[column % 2][j][c]);
            }
        }
    }
    for (int32_t stage = 0; stage < steps.stages; ++stage) {
        free_stage(ring, ring.stage);
        ring.advance();
    }
}

// The same to a float y, two columns a lane.
template <int kFragN>
__device__ __forceinline__ void store_floats(
    const MatmulArgs& a, const float (&v)[kFragN][4], int32_t m, int32_t n0
) {
    const Epilogue& e = a.epilogue;
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < kFragN; ++j) {
        const int32_t n = n0 + 8 * j + 2 * (lane & 3);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int32_t row = m + (lane >> 2) + 8 * i;
            if (row < a.m && n < e.columns) {
                *reinterpret_cast<float2*>(
                    static_cast<float*>(e.y) + static_cast<int64_t>(row) * e.ldy + n
                ) = float2{v[j][2 * i], v[j][2 * i + 1]};
            }
        }
    }
}

// y of this warp's 16 rows from m on, and LoRA's stages. v: the product, or the sum of `links`
// whose first is `a`.
template <typename Tile, bool kBackward, bool kSegmented>
__device__ __forceinline__ void finish_tile(
    const MatmulArgs& a,
    int32_t links,
    float (&v)[Tile::kFragN][4],
    Ring<Tile>& ring,
    int warpgroup,
    int32_t m,
    int32_t n0
) {
    constexpr int kGroups = Tile::kN / 32;
    constexpr int kBatch = kSegmented ? 2 : 4;  // of the residual, loaded together
    const Epilogue& e = a.epilogue;
    const bool eights = e.ldy % 8 == 0 && a.n % 8 == 0 && e.columns == a.n;
    const bool plain_floats = e.f32_out && e.bias == nullptr && e.residual == nullptr;
    if (e.lora_u != nullptr) {
        add_lora_stages<Tile, kBackward>(v, ring, warpgroup, e, links);
    } else {
#pragma unroll
        for (int j = 0; j < Tile::kFragN; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                v[j][c] = __fmul_rn(v[j][c], e.scale);
            }
        }
    }
    if (eights && !e.f32_out) {
        const LaneRows rows(a, m, n0);
#pragma unroll
        for (int first = 0; first < kGroups; first += kBatch) {
            uint4 residual[kBatch][2];
            load_residual(residual, e, rows, first);
#pragma unroll
            for (int g = 0; g < kBatch; ++g) {
                store_group(a, &v[4 * (first + g)], residual[g], rows, first + g);
            }
        }
    } else if (eights && plain_floats) {
        store_floats(a, v, m, n0);
    } else {
        store_elements<Tile::kFragN>(a, v, m, n0);
    }
}

template <typename Tile, bool kBackward, bool kSegmented>
__device__ __forceinline__ void multiply_tiles(
    const PairedGroup& group, Ring<Tile> ring, int warpgroup
) {
    int32_t lead = 0;
    if (warpgroup == 0) {
        lead = kLead;
    } else {
        barrier_sync(1, 128 * kMultipliers);
    }
    const int32_t pairs = group.products.first_block[group.products.count];
    const auto stride = static_cast<int32_t>(gridDim.x) / kPair;
#pragma unroll 1
    for (auto pair = static_cast<int32_t>(blockIdx.x) / kPair; pair < pairs; pair += stride) {
        const Place place = place_of<Tile>(group.products, pair);
        const MatmulArgs* links = group.products.args + place.product;
        const auto warp = static_cast<int32_t>(threadIdx.x >> 5);
        const int32_t m = place.m0 + warp * 16;
        float acc[Tile::kFragN][4];  // the first wgmma of a segment does not read them
        const auto finish = [&](float(&sum)[Tile::kFragN][4]) {
            finish_tile<Tile, kBackward, kSegmented>(
                links[0], group.links, sum, ring, warpgroup, m, place.n0
            );
        };
        if constexpr (kSegmented) {
            float total[Tile::kFragN][4] = {};
#pragma unroll 1
            for (int32_t i = 0; i < group.links; ++i) {
                const int32_t steps = (links[i].k + kTileK - 1) / kTileK;
                const int32_t segment_steps = links[i].segment / kTileK;
#pragma unroll 1
                for (int32_t first = 0; first < steps; first += segment_steps) {
                    const int32_t count = min(segment_steps, steps - first);
                    multiply_stages<Tile, kBackward>(acc, ring, warpgroup, count, lead);
                    add_fragments(total, acc);
                }
            }
            finish(total);
        } else {
            int32_t steps = 0;
            for (int32_t i = 0; i < group.links; ++i) {
                steps += (links[i].k + kTileK - 1) / kTileK;
            }
            multiply_stages<Tile, kBackward>(acc, ring, warpgroup, steps, lead);
            finish(acc);
        }
    }
}

template <int kTileN, bool kBackward, bool kSegmented>
__global__ void __launch_bounds__(kThreads, 1)
    matmul_pair_kernel(const __grid_constant__ PairedGroup group) {
    using Tile = PairTile<kTileN>;
    extern __shared__ __align__(1024) char shared[];
    const Ring<Tile> ring(shared);
    const int warpgroup = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x >> 7), 0);
    if (threadIdx.x == 0) {
        ring.init(kPair);
        prefetch_map(group.maps[0].x);
        prefetch_map(group.maps[0].w);
    }
    release_successor();
    cluster_arrive();  // No block's barriers are used before they are made, and fenced.
    cluster_wait();
    if (!group.products.args[0].x_is_ready) {
        wait_for_predecessor();
    }
    if (warpgroup == kMultipliers) {
        lower_registers<24>();
        if (threadIdx.x == 128 * kMultipliers) {
            fill_stages<Tile, kBackward>(group, ring);
        }
        __syncwarp();
        cluster_sync();  // The other block may still write here, or count at these barriers.
    } else {
        raise_registers<240>();
        multiply_tiles<Tile, kBackward, kSegmented>(group, ring, warpgroup);
        cluster_sync();
    }
}

int32_t num_pairs_at_once() {
    return device_limits().multiprocessors / kPair;
}

ProductMaps maps_of(const MatmulArgs& a, bool backward, int32_t tile_n) {
    const Epilogue& e = a.epilogue;
    const int32_t weight_rows = (backward ? kTileK : tile_n) / kPair;
    ProductMaps maps{};
    maps.x = tensor_map(a.x, a.m, a.k, a.ldx * 2, kTileM);
    maps.w = tensor_map(a.w.data, a.w.rows, a.w.cols, a.w.row_bytes, weight_rows);
    if (e.lora_u != nullptr) {
        const int64_t rows = backward ? e.rank : a.n;
        const int64_t cols = backward ? a.n : e.rank;
        maps.lora_u = tensor_map(e.lora_u, a.m, e.ldu, int64_t{2} * e.ldu, kTileM);
        maps.lora_b = tensor_map(e.lora_b, rows, cols, int64_t{2} * e.ldb, weight_rows);
    }
    return maps;
}

template <int kTileN, bool kBackward, bool kSegmented>
void launch_pairs(cudaStream_t queue, const MatmulGroup& products, int32_t links) {
    PairedGroup group;
    group.products = products;
    group.links = links;
    for (int32_t i = 0; i < products.count - 1 + links; ++i) {
        group.maps[i] = maps_of(products.args[i], kBackward, kTileN);
    }
    const int64_t pairs = number_blocks(group.products, kPair * kTileM, kTileN);
    const auto kernel = matmul_pair_kernel<kTileN, kBackward, kSegmented>;
    constexpr size_t kShared = PairTile<kTileN>::kSharedBytes;
    allow_shared_memory(kernel, kShared);
    const dim3 grid(grid_dim(kPair * std::min<int64_t>(pairs, num_pairs_at_once())));
    launch_clusters_early(kPair, kernel, grid, kThreads, kShared, queue, group);
}

// Time of a launch with tiles of this width, up to a factor: narrow ones read more for each
// product, 3 to 8 % of the time on an H200.
int64_t cost_of(const MatmulGroup& group, int64_t tile_n) {
    int64_t pairs = 0;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        pairs += ceil_div(a.m, kPair * kTileM) * ceil_div(a.epilogue.columns, tile_n);
    }
    const int64_t percent = tile_n == 128 ? 108 : 100;
    return ceil_div(pairs, num_pairs_at_once()) * tile_n * percent;
}

template <bool kBackward>
void launch_best_pairs(
    cudaStream_t queue, const MatmulGroup& group, bool segmented, int32_t links = 1
) {
    // Segments take a second set of accumulators: 256 columns of both do not fit the registers.
    const bool narrow = cost_of(group, 128) < cost_of(group, segmented ? 192 : 256);
    if (segmented && narrow) {
        launch_pairs<128, kBackward, true>(queue, group, links);
    } else if (segmented) {
        launch_pairs<192, kBackward, true>(queue, group, links);
    } else if (narrow) {
        launch_pairs<128, kBackward, false>(queue, group, links);
    } else {
        launch_pairs<256, kBackward, false>(queue, group, links);
    }
}

// fits_pairs() of one product, but for the number of tiles.
bool fits_in_shape(const MatmulArgs& a) {
    const Epilogue& e = a.epilogue;
    const auto lora = reinterpret_cast<uintptr_t>(e.lora_u) | reinterpret_cast<uintptr_t>(e.lora_b);
    const bool is_head = a.m > kTileM && e.columns >= kMinColumnsOfHead;
    return a.k >= kMinDepth && e.ldu <= kMaxRank && lora % 16 == 0 && e.ldb % 8 == 0 &&
           (a.m >= kMinRows || e.lora_u != nullptr || is_head);
}

}  // namespace

bool fits_pairs(const MatmulGroup& group) {
    const int32_t rows = group.args[0].m;
    if (!has_wgmma() || rows <= kNarrowMaxRows) {
        return false;
    }
    int64_t tiles = 0;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        tiles += ceil_div(a.m, kTileM) * ceil_div(a.epilogue.columns, 128);
        if (!fits_in_shape(a)) {
            return false;
        }
    }
    return tiles >= (rows < kManyRows ? kMinTiles : kMinTilesOfMany);
}

void matmul_pairs(cudaStream_t queue, Direction direction, const MatmulGroup& group) {
    bool segmented = false;
    for (int32_t i = 0; i < group.count; ++i) {
        segmented = segmented || group.args[i].segment < group.args[i].k;
    }
    if (direction == Direction::kForward) {
        launch_best_pairs<false>(queue, group, segmented);
    } else {
        launch_best_pairs<true>(queue, group, segmented);
    }
}

bool matmul_sum(cudaStream_t queue, const MatmulGroup& group) {
    const MatmulArgs& first = group.args[0];
    MatmulGroup counted = group;
    counted.count = 1;
    int64_t depth = 0;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        if (!is_aligned(a, 8) || !fits_in_shape(a) || a.epilogue.ldu != first.epilogue.ldu ||
            a.epilogue.ldu > kTileK) {
            return false;
        }
        CHECK(a.m == first.m && a.n == first.n);
        CHECK(a.epilogue.lora_scale == first.epilogue.lora_scale && a.epilogue.scale == 1.0f);
        depth += a.k;
    }
    if (first.m < kManyRows || !fits_pairs(counted) || group.count > kMaxRank / kTileK) {
        return false;
    }
    launch_best_pairs<true>(queue, counted, depth > kLongestSum, group.count);
    return true;
}

}  // namespace orbit::cuda
