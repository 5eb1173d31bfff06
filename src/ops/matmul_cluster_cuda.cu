// Member C, Hopper: 65 to 1,023 rows of a bf16 weight, so few that all tiles run at once. Blocks
// are in pairs that lie one above the other. A contraction that is cut has a cluster of four pairs,
// a segment in each, whose blocks then add up a quarter of the columns, in ascending order. Else a
// cluster is one pair, or four side by side that share x, too. LoRA's u = x A^T is 16 more columns
// of the product, made by every block for its own rows, or comes from a product beside this one.
//
// The bits are those of the other members, for the reasons given in matmul_tma_cuda.cu; u is summed
// as any product with A's shape and then rounded.
#include <algorithm>

#include "ops/matmul_pair_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int kSumThreads = 128 * kMultipliers;
constexpr int kClusterThreads = kSumThreads + 32;  // a warp loads
constexpr int kColumnsOfU = 16;                    // of u, made here
constexpr int kMostPairs = kSegments;              // of a cluster

enum class Form : uint8_t {
    kCut,   // a pair for each segment
    kPair,  // one
    kRow,   // kMostPairs side by side
};

constexpr int tile_columns(Form form) {
    return form == Form::kCut ? 128 : 64;
}

constexpr int pairs_of(Form form) {
    return form == Form::kPair ? 1 : kMostPairs;
}

// Columns of a cluster's tiles.
constexpr int cluster_columns(Form form) {
    return tile_columns(form) * (form == Form::kRow ? kMostPairs : 1);
}

// Of a multiprocessor.
constexpr int blocks_at_once(Form form) {
    return form == Form::kCut ? 1 : 2;
}

template <Form kForm, bool kMakesU>
struct ClusterTile : PairBytes<tile_columns(kForm)> {
    using Bytes = PairBytes<tile_columns(kForm)>;
    static constexpr bool kCut = kForm == Form::kCut;
    static constexpr bool kSharesX = kForm == Form::kRow;
    static constexpr int kBytesA = kMakesU ? kColumnsOfU * kTileK * 2 : 0;
    static constexpr int kFragments = Bytes::kFragN + (kMakesU ? kColumnsOfU / 8 : 0);
    static constexpr int kStageBytes = Bytes::kBytesX + Bytes::kBytesW + kBytesA;
    static constexpr int kStages = kCut ? 5 : 4;
    static constexpr int kSharedBytes = kStages * (kStageBytes + 16);
    static_assert(blocks_at_once(kForm) * (kSharedBytes + 1024) <= 228 * 1024);
    static_assert(!kCut || kFragments * kSumThreads * 16 <= kStages * kStageBytes);
    // Rows of x that a block brings, and blocks that free a stage of its ring.
    static constexpr int kRowsOfX = kSharesX ? kTileM / kMostPairs : kTileM;
    static constexpr int kReaders = kSharesX ? kMostPairs + 1 : kPair;
};

__device__ __forceinline__ int32_t pair_in_cluster() {
    return static_cast<int32_t>(block_in_cluster() / kPair);
}

struct ClusterMaps {
    CUtensorMap x, w;
    CUtensorMap a;  // LoRA's, with MatmulGroup::makes_u
};

struct ClusterGroup {
    ClusterMaps maps[kMaxGroup];
    MatmulGroup products;  // numbers clusters
};

// The columns of the contraction that are this block's.
struct DepthRange {
    int32_t begin;
    int32_t end;

    __device__ __forceinline__ DepthRange(const MatmulArgs& a, bool cut)
        : begin(cut ? pair_in_cluster() * a.segment : 0),
          end(cut ? min(a.k, begin + a.segment) : a.k) {}

    __device__ __forceinline__ int32_t steps() const { return (end - begin + kTileK - 1) / kTileK; }
};

// This warp has read the stage: it tells all blocks that bring some of it.
template <typename Tile>
__device__ __forceinline__ void free_stage(const Ring<Tile>& ring, int32_t stage) {
    const uint32_t lane = threadIdx.x & 31;
    const uint32_t own = block_in_cluster();
    if (lane < Tile::kReaders) {
        uint32_t block = own / kPair * kPair + lane;  // of the pair
        if constexpr (Tile::kSharesX) {
            block = lane < kMostPairs ? own % kPair + kPair * lane : own ^ 1;
        }
        mbarrier_arrive_at(ring.freed(stage), block);
    }
}

// A stage's bytes but for x: both weights are constant.
template <typename Tile>
__device__ __forceinline__ void load_weights(
    const Ring<Tile>& ring, const ClusterMaps& maps, int32_t n0, int32_t k
) {
    const uint32_t filled = ring.filled(ring.stage);
    mbarrier_expect(filled, Tile::kStageBytes);
    share_weight<Tile, false>(ring, maps.w, n0, k, block_in_cluster() / kPair * kPair);
    if constexpr (Tile::kBytesA > 0) {
        copy_box(ring.w() + Tile::kBytesW, maps.a, 0, k, filled);
    }
}

template <typename Tile>
__device__ __forceinline__ void load_x(
    const Ring<Tile>& ring, const ClusterMaps& maps, int32_t m0, int32_t k
) {
    const uint32_t filled = ring.filled(ring.stage);
    if constexpr (!Tile::kSharesX) {
        copy_box(ring.x(), maps.x, m0, k, filled);
    } else {
        constexpr uint32_t kFirsts = 0x55;  // of four pairs
        const int32_t row = pair_in_cluster() * Tile::kRowsOfX;
        const auto blocks = static_cast<uint16_t>(kFirsts << half_of_pair());
        copy_box_to_blocks(ring.x() + row * 128, maps.x, m0 + row, k, filled, blocks);
    }
}

// One thread. The weights of the first stages do not wait for x.
template <typename Tile>
__device__ __forceinline__ void fill_stages(
    const MatmulArgs& a, const ClusterMaps& maps, Ring<Tile> ring, const Place& place
) {
    const DepthRange range(a, Tile::kCut);
    const int32_t early = min(range.steps(), int32_t{Tile::kStages});
    Ring<Tile> ahead = ring;
    for (int32_t i = 0; i < early; ++i) {
        load_weights(ahead, maps, place.n0, range.begin + i * kTileK);
        ahead.advance();
    }
    if (!a.x_is_ready) {
        wait_for_predecessor();
    }
    for (int32_t i = 0; i < early; ++i) {
        load_x(ring, maps, place.m0, range.begin + i * kTileK);
        ring.advance();
    }
    for (int32_t k = range.begin + early * kTileK; k < range.end; k += kTileK) {
        ring.wait_freed();
        load_weights(ring, maps, place.n0, k);
        load_x(ring, maps, place.m0, k);
        ring.advance();
    }
}

// Begins acc (+)= 64 rows of x . the weight's tile and A, which follows it, over the next stage.
template <typename Tile>
__device__ __forceinline__ void start_step(
    float (&acc)[Tile::kFragments][4], const Ring<Tile>& ring, int warpgroup, int add
) {
    ring.wait_filled();
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < kTileK / 16; ++i) {
        issue_step<Tile, false, 8 * Tile::kFragments>(acc, ring, warpgroup, 0, i, i > 0 ? 1 : add);
    }
    wgmma_commit();
}

template <typename Tile>
__device__ __forceinline__ void multiply_steps(
    float (&acc)[Tile::kFragments][4], Ring<Tile>& ring, int warpgroup, int32_t steps
) {
    start_step<Tile>(acc, ring, warpgroup, 0);
    int32_t last = ring.stage;
    ring.advance();
#pragma unroll 1
    for (int32_t step = 1; step < steps; ++step) {
        start_step<Tile>(acc, ring, warpgroup, 1);
        wgmma_wait<1>();
        free_stage(ring, last);
        last = ring.stage;
        ring.advance();
    }
    wgmma_wait<0>();
    pin_registers(acc);
    free_stage(ring, last);
}

// What a warp stores: 16 rows from m on, kCount fragments of eight columns from n on.
template <int kCount, bool kMakesU>
struct WarpEnd {
    static constexpr int kGroups = kCount / 4;  // of 32 columns; none: pairs
    int32_t m;
    int32_t n;
    bool whole;  // y is bf16, in rows of whole granules
    uint32_t u[4];
    uint2 b[kCount];
    uint4 residual[kGroups > 0 ? kGroups : 1][2];

    __device__ __forceinline__ WarpEnd(const MatmulArgs& a, int32_t row, int32_t column)
        : m(row), n(column) {
        const Epilogue& e = a.epilogue;
        whole = e.ldy % 8 == 0 && a.n % 8 == 0 && e.columns == a.n && !e.f32_out;
    }

    __device__ __forceinline__ int32_t lane_row() const {
        return m + static_cast<int32_t>((threadIdx.x & 31) >> 2);
    }

    __device__ __forceinline__ void load_b(const MatmulArgs& a) {
        if (a.epilogue.lora_u != nullptr) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
                b[j] = lora_b_fragment<false>(a.epilogue, n + 8 * j, a.n, 0);
            }
        }
    }

    // What other kernels have made.
    __device__ __forceinline__ void load_late(const MatmulArgs& a) {
        if (!kMakesU && a.epilogue.lora_u != nullptr) {
            lora_u_fragment(u, a.epilogue, lane_row(), a.m, 0);
        }
        if (kGroups > 0 && whole) {
            load_residual(residual, a.epilogue, LaneRows(a, m, n), 0);
        }
    }

    // u as the instruction takes it, from the sums of its columns.
    __device__ __forceinline__ void round_u(const float (*sums)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u[i] = pack_bf16(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
        }
    }

    __device__ __forceinline__ void add_low_rank(
        const Epilogue& e, float (*v)[4], int32_t rows, int32_t columns
    ) const {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            float lora[4] = {};
            if constexpr (kMakesU) {
                mma_16816(lora, u, b[j].x, b[j].y);
            } else if (e.lora_u != nullptr) {
                lora_fragment<false>(lora, e, u, b[j], lane_row(), rows, n + 8 * j, columns);
            }
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                v[j][c] = add_lora(e, v[j][c], lora[c]);
            }
        }
    }

    // Two neighbours a lane.
    __device__ __forceinline__ void store_pairs(const MatmulArgs& a, float (*v)[4]) const {
        const Epilogue& e = a.epilogue;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            if (e.bias != nullptr) {
                add_bias(v[j], a, n + 8 * j);
            }
            const int32_t column = n + 8 * j + 2 * static_cast<int32_t>(threadIdx.x & 3);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int32_t row = lane_row() + 8 * i;
                if (row >= a.m || column >= a.n) {
                    continue;
                }
                const int64_t at = static_cast<int64_t>(row) * e.ldy + column;
                float low = v[j][2 * i];
                float high = v[j][2 * i + 1];
                if (e.residual != nullptr) {
                    const auto two = *reinterpret_cast<const uint32_t*>(e.residual + at);
                    low = __fadd_rn(low, low_bf16(two));
                    high = __fadd_rn(high, high_bf16(two));
                }
                *reinterpret_cast<uint32_t*>(static_cast<bf16*>(e.y) + at) = pack_bf16(low, high);
            }
        }
    }

    __device__ __forceinline__ void store(const MatmulArgs& a, float (*v)[4]) const {
        add_low_rank(a.epilogue, v, a.m, a.n);
        if (!whole) {
            store_elements<kCount>(a, v, m, n);
        } else if constexpr (kGroups == 0) {
            store_pairs(a, v);
        } else {
            const LaneRows rows(a, m, n);
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                store_group(a, &v[4 * g], residual[g], rows, g);
            }
        }
    }
};

// v = the sums over the segments of fragments from `first` on. `sums`: fragments, a float4 for each
// of kSumThreads threads; every block has those of its segment there.
template <int kCount>
__device__ __forceinline__ void add_segments(float (&v)[kCount][4], const float4* sums, int first) {
    float4 part[kSegments][kCount];
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
        const float4* of_segment = in_block_of_cluster(
            sums + first * kSumThreads + threadIdx.x, kPair * s + half_of_pair()
        );
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            part[s][j] = of_segment[j * kSumThreads];
        }
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
        v[j][0] = v[j][1] = v[j][2] = v[j][3] = 0.0f;
#pragma unroll
        for (int s = 0; s < kSegments; ++s) {
            v[j][0] = __fadd_rn(v[j][0], part[s][j].x);
            v[j][1] = __fadd_rn(v[j][1], part[s][j].y);
            v[j][2] = __fadd_rn(v[j][2], part[s][j].z);
            v[j][3] = __fadd_rn(v[j][3], part[s][j].w);
        }
    }
}

template <int kCount>
__device__ __forceinline__ void put_sums(float4* sums, const float (&v)[kCount][4]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
        sums[j * kSumThreads + threadIdx.x] = float4{v[j][0], v[j][1], v[j][2], v[j][3]};
    }
}

// Both blocks of a pair have the sums of their segment's fragments: they go to shared memory, and
// from there to `v`, this block's share of all segments, and to u.
template <typename Tile, int kShare, bool kMakesU, typename Wait>
__device__ __forceinline__ void exchange_sums(
    float4* sums,
    const float (&acc)[Tile::kFragments][4],
    float (&v)[kShare][4],
    float (&u)[2][4],
    const Wait& wait
) {
    barrier_sync(1, kSumThreads);  // Nobody reads the ring any more; it takes the sums now.
    put_sums(sums, acc);
    cluster_publish();
    wait();
    cluster_wait();
    add_segments(v, sums, pair_in_cluster() * kShare);
    if constexpr (kMakesU) {
        add_segments(u, sums, Tile::kFragN);
    }
    cluster_publish();  // These reads are done: after a relaxed arrival they need not be.
}

template <typename Tile, bool kMakesU>
__device__ __forceinline__ void multiply_and_store(
    const MatmulArgs& a, Ring<Tile> ring, const Place& place, float4* sums
) {
    constexpr bool kCut = Tile::kCut;
    constexpr int kShare = Tile::kFragN / (kCut ? kSegments : 1);
    const int warpgroup = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x >> 7), 0);
    const int32_t warp_row = place.m0 + static_cast<int32_t>(threadIdx.x >> 5) * 16;
    WarpEnd<kShare, kMakesU> end(
        a, warp_row, place.n0 + (kCut ? pair_in_cluster() * kShare * 8 : 0)
    );
    const auto wait = [&] {
        wait_for_predecessor();
        end.load_late(a);
    };
    const auto wait_late = [&] {
        if (a.x_is_ready) {
            wait();
        }
    };
    end.load_b(a);  // constant as the weights are
    if (!a.x_is_ready) {
        wait();
    }
    float acc[Tile::kFragments][4];
    multiply_steps(acc, ring, warpgroup, DepthRange(a, kCut).steps());
    if constexpr (kCut) {
        float v[kShare][4];
        float u[2][4];
        exchange_sums<Tile, kShare, kMakesU>(sums, acc, v, u, wait_late);
        if constexpr (kMakesU) {
            end.round_u(u);
        }
        end.store(a, v);
        cluster_wait();  // The others have read this block's sums.
    } else {
        wait_late();
        if constexpr (kMakesU) {
            end.round_u(&acc[Tile::kFragN]);
        }
        end.store(a, acc);
        cluster_sync();  // The others may still write here, or count at these barriers.
    }
}

template <Form kForm, bool kMakesU>
__global__ void __launch_bounds__(kClusterThreads, blocks_at_once(kForm))
    matmul_cluster_kernel(const __grid_constant__ ClusterGroup group) {
    using Tile = ClusterTile<kForm, kMakesU>;
    extern __shared__ __align__(1024) char shared[];
    const Ring<Tile> ring(shared);
    constexpr int kBlocks = kPair * pairs_of(kForm);
    Place place = place_of<PairBytes<cluster_columns(kForm)>>(
        group.products, static_cast<int32_t>(blockIdx.x) / kBlocks
    );
    if constexpr (Tile::kSharesX) {
        place.n0 += pair_in_cluster() * Tile::kN;
    }
    const MatmulArgs& a = group.products.args[place.product];
    const ClusterMaps& maps = group.maps[place.product];
    if (threadIdx.x == kSumThreads) {
        ring.init(Tile::kReaders);
        prefetch_map(maps.x);
        prefetch_map(maps.w);
    }
    release_successor();
    cluster_arrive();  // No block's barriers are used before they are made, and fenced.
    cluster_wait();
    if (threadIdx.x < kSumThreads) {
        multiply_and_store<Tile, kMakesU>(a, ring, place, reinterpret_cast<float4*>(shared));
        return;
    }
    if (threadIdx.x == kSumThreads) {
        fill_stages(a, maps, ring, place);
    }
    __syncwarp();
    cluster_sync();
    if constexpr (Tile::kCut) {
        cluster_sync();
    }
}

// As measured: pairs alone where their last rows fill most of both blocks.
Form form_of(const MatmulGroup& group) {
    const MatmulArgs& a = group.args[0];
    const int32_t last = (a.m - 1) % (kPair * kTileM) + 1;
    return a.segment < a.k ? Form::kCut : last > kTileM * 3 / 2 ? Form::kPair : Form::kRow;
}

template <Form kForm, bool kMakesU>
void launch_cluster(cudaStream_t queue, const MatmulGroup& products) {
    using Tile = ClusterTile<kForm, kMakesU>;
    ClusterGroup group;
    group.products = products;
    for (int32_t i = 0; i < products.count; ++i) {
        const MatmulArgs& a = products.args[i];
        ClusterMaps& maps = group.maps[i];
        maps.x = tensor_map(a.x, a.m, a.k, a.ldx * 2, Tile::kRowsOfX);
        maps.w = tensor_map(a.w.data, a.w.rows, a.w.cols, a.w.row_bytes, Tile::kN / kPair);
        if constexpr (kMakesU) {
            const WeightView& w = products.args[products.count + i].w;
            maps.a = tensor_map(w.data, w.rows, w.cols, w.row_bytes, kColumnsOfU);
        }
    }
    const int64_t clusters = number_blocks(group.products, kPair * kTileM, cluster_columns(kForm));
    const auto kernel = matmul_cluster_kernel<kForm, kMakesU>;
    constexpr int kBlocks = kPair * pairs_of(kForm);
    allow_shared_memory(kernel, Tile::kSharedBytes);
    const dim3 grid(grid_dim(clusters * kBlocks));
    launch_clusters_early(kBlocks, kernel, grid, kClusterThreads, Tile::kSharedBytes, queue, group);
}

template <Form kForm>
void launch_cluster(cudaStream_t queue, const MatmulGroup& group) {
    if (group.makes_u) {
        launch_cluster<kForm, true>(queue, group);
    } else {
        launch_cluster<kForm, false>(queue, group);
    }
}

int64_t count_tiles(const MatmulGroup& group, int64_t columns) {
    int64_t tiles = 0;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        tiles += ceil_div(a.m, kPair * kTileM) * ceil_div(a.epilogue.columns, columns);
    }
    return tiles;
}

// Clusters of eight do not divide all parts of the GPU: they leave some multiprocessors idle.
int64_t cluster_waves(const MatmulGroup& group) {
    const Form form = form_of(group);
    const int64_t blocks = kPair * pairs_of(form);
    const int64_t idle = form == Form::kPair ? 0 : 1;
    const int64_t clusters =
        (device_limits().multiprocessors / blocks - idle) * blocks_at_once(form);
    return ceil_div(count_tiles(group, cluster_columns(form)), clusters);
}

// Of a contraction that is cut: whether clusters are quicker than pairs that stay for all of their
// tiles (matmul_tma_cuda.cu), as measured on an H200. In halves of a pair's step of 64 columns: the
// steps, and what each wave begins and ends with.
bool cut_is_quicker(const MatmulGroup& group) {
    int64_t steps = 0;
    for (int32_t i = 0; i < group.count; ++i) {
        steps = std::max(steps, ceil_div(group.args[i].k, kTileK));
    }
    const int64_t pairs_at_once = device_limits().multiprocessors / kPair;
    const int64_t waves_of_pairs = ceil_div(count_tiles(group, 128), pairs_at_once);
    return cluster_waves(group) * (3 * ceil_div(steps, kSegments) + 16) <
           waves_of_pairs * (2 * steps + 24);
}

}  // namespace

bool fits_clusters(const MatmulGroup& group) {
    const int32_t rows = group.args[0].m;
    if (!has_wgmma() || rows <= kNarrowMaxRows || rows > kBesideMaxRows) {
        return false;
    }
    const int32_t segments = num_segments(group.args[0].k, group.args[0].segment);
    const bool alike = std::all_of(group.args, group.args + group.count, [&](const MatmulArgs& a) {
        return num_segments(a.k, a.segment) == segments;
    });
    if (!alike || (segments != 1 && segments != kSegments)) {
        return false;
    }
    return form_of(group) == Form::kCut ? cut_is_quicker(group) : cluster_waves(group) == 1;
}

bool clusters_make_u(const MatmulGroup& narrow, const MatmulGroup& wide) {
    if (narrow.count != wide.count || 2 * wide.count > kMaxGroup || !fits_clusters(wide)) {
        return false;
    }
    for (int32_t i = 0; i < wide.count; ++i) {
        const MatmulArgs& a = narrow.args[i];
        const MatmulArgs& b = wide.args[i];
        if (a.epilogue.y != b.epilogue.lora_u || a.x != b.x || a.segment != b.segment ||
            a.epilogue.columns > kColumnsOfU || !is_aligned(a, 8) || !is_aligned(b, 8)) {
            return false;
        }
    }
    return true;
}

void matmul_clusters(cudaStream_t queue, const MatmulGroup& group) {
    switch (form_of(group)) {
        case Form::kCut:
            return launch_cluster<Form::kCut>(queue, group);
        case Form::kPair:
            return launch_cluster<Form::kPair>(queue, group);
        case Form::kRow:
            return launch_cluster<Form::kRow>(queue, group);
    }
}

}  // namespace orbit::cuda
