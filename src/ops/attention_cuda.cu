// Attention forward: writes the batch's keys and values into their pages, then reads everything
// from pages. Sequences of up to kShortRows rows go through the decode kernel (one thread block a
// row and KV head), longer ones through the prefill kernel (128 rows of one head), of which Hopper
// has its own. All give the same bits.
#include "device/cuda/rows.cuh"
#include "ops/attention_cuda.cuh"
#include "ops/cuda_ops.h"
#include "ops/matmul_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int kRing = 3;  // key and value tiles in turn: K0 V0 K1 V1 ...

template <int kHeadDim>
struct Tile {
    static constexpr int kBytes = kKeyTile * kHeadDim * 2;
};

struct PageWriteArgs {
    const bf16* k;
    const bf16* v;
    bf16* k_pages;
    bf16* v_pages;
    const int32_t* positions;
    const int32_t* sequence_of;
    const int32_t* block_table;
    int32_t max_blocks;
    int32_t kv_heads;
    int32_t head_granules;  // 16-byte granules of a head
    int64_t count;          // granules of k
};

__global__ void __launch_bounds__(256) write_pages_kernel(PageWriteArgs a) {
    release_successor();
    wait_for_predecessor();
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (index >= a.count) {
        return;
    }
    const int64_t head_row = index / a.head_granules;
    const auto granule = static_cast<int32_t>(index % a.head_granules);
    const int64_t token = head_row / a.kv_heads;
    const auto kv_head = static_cast<int32_t>(head_row % a.kv_heads);
    const int32_t position = a.positions[token];
    const int64_t page =
        a.block_table
            [static_cast<int64_t>(a.sequence_of[token]) * a.max_blocks + position / kPageTokens];
    const int64_t to =
        ((page * a.kv_heads + kv_head) * kPageTokens + position % kPageTokens) * a.head_granules +
        granule;
    reinterpret_cast<uint4*>(a.k_pages)[to] = reinterpret_cast<const uint4*>(a.k)[index];
    reinterpret_cast<uint4*>(a.v_pages)[to] = reinterpret_cast<const uint4*>(a.v)[index];
}

// ---- decode -------------------------------------------------------------------------------------

constexpr int kDecodeThreads = 128;
constexpr int kDecodeRows = 16;  // query heads of a KV head, padded

template <int kHeadDim>
struct DecodeShared {
    static constexpr int kMax = kRing * Tile<kHeadDim>::kBytes;      // float [4][16]
    static constexpr int kSum = kMax + 4 * kDecodeRows * 4;          // float [4][16][4]
    static constexpr int kWeights = kSum + 4 * kDecodeRows * 4 * 4;  // bf16 [16][128 + 8]
    static constexpr int kWeightRow = kKeyTile * 2 + 16;             // bytes, padded
    static constexpr int kBytes = kWeights + kDecodeRows * kWeightRow;
};

// One row of the batch and one KV head. Warp w scores keys 32w.. of a tile and weighs channels
// w d/4.. of its values.
template <int kHeadDim>
__device__ __forceinline__ void decode_row(
    const AttentionArgs& a, char* shared, int32_t sequence, int32_t token
) {
    using Shared = DecodeShared<kHeadDim>;
    constexpr int kChannels = kHeadDim / 4;
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int g = lane >> 2;
    const int quad = lane & 3;
    const auto kv_head = static_cast<int32_t>(blockIdx.y);
    const int32_t group = a.heads / a.kv_heads;
    const int32_t first_head = static_cast<int32_t>(blockIdx.z) * kDecodeRows;  // of the group
    const int32_t num_rows = min(kDecodeRows, group - first_head);
    const int32_t last_key = a.positions[token];
    const int32_t tiles = last_key / kKeyTile + 1;
    const uint32_t ring = shared_address(shared);
    auto* tile_max = reinterpret_cast<float*>(shared + Shared::kMax);
    auto* block_sum = reinterpret_cast<float*>(shared + Shared::kSum);
    char* weights = shared + Shared::kWeights;

    const auto load_item = [&](int32_t item, int32_t page_ids) {
        const int32_t tile = item >> 1;
        if (tile < tiles) {
            load_key_tile<kHeadDim, kDecodeThreads>(
                a,
                ring + item % kRing * Tile<kHeadDim>::kBytes,
                (item & 1) == 0 ? a.k_pages : a.v_pages,
                page_ids,
                kv_head,
                tile,
                last_key
            );
        }
        copy_async_commit();
    };
    int32_t pages = tile_pages(a, sequence, 0, last_key);
    load_item(0, pages);
    load_item(1, pages);
    pages = tile_pages(a, sequence, 1, last_key);

    const int64_t head_row = static_cast<int64_t>(token) * a.heads + kv_head * group + first_head;
    uint32_t q[kHeadDim / 16][4];
    load_query<kHeadDim>(
        q,
        g < num_rows ? a.q + (head_row + g) * kHeadDim : nullptr,
        g + 8 < num_rows ? a.q + (head_row + g + 8) * kHeadDim : nullptr
    );
    SoftmaxRow row[2];
    float o[kChannels / 8][4] = {};
    for (int32_t tile = 0; tile < tiles; ++tile) {
        const int32_t next_pages = tile_pages(a, sequence, tile + 2, last_key);
        copy_async_wait<1>();
        __syncthreads();  // Keys of this tile are there; the last tile's values are done with.
        load_item(2 * tile + 2, pages);
        const uint32_t k_tile = ring + 2 * tile % kRing * Tile<kHeadDim>::kBytes;
        const uint32_t v_tile = ring + (2 * tile + 1) % kRing * Tile<kHeadDim>::kBytes;
        float s[4][4];
        score_keys<kKeyTile, kHeadDim>(s, q, k_tile, kKeyBlock * warp);
        const int32_t key0 = tile * kKeyTile + kKeyBlock * warp + 2 * quad;
        float max[2] = {negative_infinity(), negative_infinity()};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                s[j][c] = key0 + 8 * j + (c & 1) <= last_key ? s[j][c] : negative_infinity();
                max[c >> 1] = fmaxf(max[c >> 1], s[j][c]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            max[i] = quad_max(max[i]);
            if (quad == 0) {
                tile_max[warp * kDecodeRows + g + 8 * i] = max[i];
            }
        }
        __syncthreads();  // Maxima are there; the keys are done with.
        load_item(2 * tile + 3, pages);
        pages = next_pages;
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int r = g + 8 * i;
            const float m = fmaxf(
                fmaxf(tile_max[r], tile_max[kDecodeRows + r]),
                fmaxf(tile_max[2 * kDecodeRows + r], tile_max[3 * kDecodeRows + r])
            );
            factor[i] = row[i].raise(m, a.scale_log2);
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float p0 = row[i].weight(s[j][2 * i], a.scale_log2);
                const float p1 = row[i].weight(s[j][2 * i + 1], a.scale_log2);
                sum = __fadd_rn(__fadd_rn(sum, p0), p1);
                *reinterpret_cast<uint32_t*>(
                    weights + r * Shared::kWeightRow + (kKeyBlock * warp + 8 * j + 2 * quad) * 2
                ) = pack_bf16(p0, p1);
            }
            block_sum[(warp * kDecodeRows + r) * 4 + quad] = sum;
        }
        copy_async_wait<2>();
        __syncthreads();  // Weights, sums and values are there.
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float* sums = block_sum + (g + 8 * i) * 4 + quad;
            row[i].add(
                factor[i],
                join_blocks(
                    sums[0], sums[4 * kDecodeRows], sums[8 * kDecodeRows], sums[12 * kDecodeRows]
                )
            );
        }
#pragma unroll
        for (int j = 0; j < kChannels / 8; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                o[j][c] = __fmul_rn(o[j][c], factor[c >> 1]);
            }
        }
        const uint32_t weight_tile = shared_address(weights);
#pragma unroll
        for (int step = 0; step < kKeyTile / 16; ++step) {
            uint32_t p[4];
            ldmatrix_x4(
                p[0],
                p[1],
                p[2],
                p[3],
                weight_tile + static_cast<uint32_t>(
                                  (lane & 15) * Shared::kWeightRow + (2 * step + (lane >> 4)) * 16
                              )
            );
            weigh_values<kKeyTile>(o, p, v_tile, 16 * step, warp * kChannels / 8);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int r = g + 8 * i;
        const float total = row[i].total();
        const float inverse = __frcp_rn(total);
        if (r < num_rows) {
            bf16* out = a.o + (head_row + r) * kHeadDim + warp * kChannels + 2 * quad;
#pragma unroll
            for (int j = 0; j < kChannels / 8; ++j) {
                *reinterpret_cast<uint32_t*>(out + 8 * j) =
                    pack_bf16(__fmul_rn(o[j][2 * i], inverse), __fmul_rn(o[j][2 * i + 1], inverse));
            }
            if (a.lse != nullptr && warp == 0 && quad == 0) {
                a.lse[head_row + r] = log_sum_exp(row[i].max, total, a.scale);
            }
        }
    }
}

// kAllShort: every sequence of the batch has one row.
template <int kHeadDim, bool kAllShort>
__global__ void __launch_bounds__(kDecodeThreads) attention_decode_kernel(AttentionArgs a) {
    extern __shared__ __align__(1024) char shared[];
    release_successor();
    wait_for_predecessor();
    int32_t token = static_cast<int32_t>(blockIdx.x);
    int32_t sequence = 0;
    if constexpr (kAllShort) {
        sequence = a.sequence_of[token];
    } else {
        const SequenceSlot slot =
            locate(a.sequence_begin, a.num_sequences, token, [](int32_t length) {
                return length <= kShortRows ? length : 0;
            });
        if (slot.sequence < 0) {
            return;
        }
        sequence = slot.sequence;
        token = a.sequence_begin[sequence] + slot.offset;
    }
    decode_row<kHeadDim>(a, shared, sequence, token);
}

// ---- prefill and training -----------------------------------------------------------------------

constexpr int kPrefillThreads = 256;
constexpr int kPrefillRows = 128;

template <int kHeadDim>
__global__ void __launch_bounds__(kPrefillThreads, 1) attention_prefill_kernel(AttentionArgs a) {
    extern __shared__ __align__(1024) char shared[];
    const int warp = threadIdx.x >> 5;
    const int g = (threadIdx.x & 31) >> 2;
    const auto head = static_cast<int32_t>(blockIdx.y);
    const int32_t kv_head = head / (a.heads / a.kv_heads);
    const SequenceSlot slot = locate(
        a.sequence_begin,
        a.num_sequences,
        static_cast<int32_t>(gridDim.x - 1 - blockIdx.x),
        [](int32_t length) {
            return length > kShortRows ? (length + kPrefillRows - 1) / kPrefillRows : 0;
        }
    );
    if (slot.sequence < 0) {
        return;
    }
    const int32_t sequence = slot.sequence;
    const int32_t begin = a.sequence_begin[sequence];
    const int32_t length = a.sequence_begin[sequence + 1] - begin;
    const int32_t position0 = a.sequence_position[sequence];
    const int32_t last_key = position0 + min(length, (slot.offset + 1) * kPrefillRows) - 1;
    const int32_t tiles = last_key / kKeyTile + 1;
    const uint32_t ring = shared_address(shared);
    const auto load_item = [&](int32_t item, int32_t page_ids) {
        const int32_t tile = item >> 1;
        if (tile < tiles) {
            load_key_tile<kHeadDim, kPrefillThreads>(
                a,
                ring + item % kRing * Tile<kHeadDim>::kBytes,
                (item & 1) == 0 ? a.k_pages : a.v_pages,
                page_ids,
                kv_head,
                tile,
                last_key
            );
        }
        copy_async_commit();
    };
    int32_t pages = tile_pages(a, sequence, 0, last_key);
    load_item(0, pages);
    load_item(1, pages);
    pages = tile_pages(a, sequence, 1, last_key);

    const bf16* q_row[2];
    int64_t head_row[2];
    int32_t position[2];  // of rows g and g + 8; -1 for padding
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int32_t row_index = slot.offset * kPrefillRows + warp * 16 + g + 8 * i;
        const bool valid = row_index < length;
        position[i] = valid ? position0 + row_index : -1;
        head_row[i] = valid ? static_cast<int64_t>(begin + row_index) * a.heads + head : -1;
        q_row[i] = valid ? a.q + head_row[i] * kHeadDim : nullptr;
    }
    uint32_t q[kHeadDim / 16][4];
    load_query<kHeadDim>(q, q_row[0], q_row[1]);
    SoftmaxRow row[2];
    float o[kHeadDim / 8][4] = {};
    for (int32_t tile = 0; tile < tiles; ++tile) {
        const int32_t next_pages = tile_pages(a, sequence, tile + 2, last_key);
        copy_async_wait<1>();
        __syncthreads();  // Keys of this tile are there; the last tile's values are done with.
        load_item(2 * tile + 2, pages);
        const uint32_t k_tile = ring + 2 * tile % kRing * Tile<kHeadDim>::kBytes;
        const uint32_t v_tile = ring + (2 * tile + 1) % kRing * Tile<kHeadDim>::kBytes;
        float s[kKeyTile / 8][4];
        score_keys<kKeyTile, kHeadDim>(s, q, k_tile, 0);
        __syncthreads();  // The keys are done with.
        load_item(2 * tile + 3, pages);
        pages = next_pages;
        float factor[2];
        mask_scores(s, position, tile);
        soften(s, row, factor, a.scale_log2);
        rescale(o, factor);
        copy_async_wait<2>();
        __syncthreads();  // Values are there.
#pragma unroll
        for (int step = 0; step < kKeyTile / 16; ++step) {
            uint32_t p[4];
            pack_fragments(p, s[2 * step], s[2 * step + 1]);
            weigh_values<kKeyTile>(o, p, v_tile, 16 * step, 0);
        }
    }
    store_rows<kHeadDim>(a, o, row, head_row);
}

// ---- host ---------------------------------------------------------------------------------------

void write_pages(cudaStream_t queue, const AttentionParams& p) {
    const int64_t head_dim = p.k.shape[2];
    PageWriteArgs a{};
    a.k = activations(p.k);
    a.v = activations(p.v);
    a.k_pages = activations(p.kv.k_pages);
    a.v_pages = activations(p.kv.v_pages);
    a.positions = p.batch.positions;
    a.sequence_of = p.batch.sequence_of;
    a.block_table = p.batch.block_table;
    a.max_blocks = p.batch.max_blocks;
    a.kv_heads = static_cast<int32_t>(p.k.shape[1]);
    a.head_granules = static_cast<int32_t>(head_dim / 8);
    a.count = p.k.numel() / 8;
    launch_early(write_pages_kernel, dim3(grid_dim(ceil_div(a.count, 256))), 256, 0, queue, a);
}

template <int kHeadDim>
void launch_attention(cudaStream_t queue, const AttentionArgs& a) {
    const int32_t group = a.heads / a.kv_heads;
    const unsigned groups = grid_dim_yz(ceil_div(group, kDecodeRows));
    const unsigned kv_heads = grid_dim_yz(a.kv_heads);
    constexpr int kDecodeBytes = DecodeShared<kHeadDim>::kBytes;
    if (a.num_tokens == a.num_sequences) {
        const auto kernel = attention_decode_kernel<kHeadDim, true>;
        allow_shared_memory(kernel, kDecodeBytes);
        const dim3 grid(grid_dim(a.num_tokens), kv_heads, groups);
        launch_early(kernel, grid, kDecodeThreads, kDecodeBytes, queue, a);
        return;
    }
    const int64_t short_rows =
        std::min<int64_t>(a.num_tokens, int64_t{kShortRows} * a.num_sequences);
    const auto decode = attention_decode_kernel<kHeadDim, false>;
    allow_shared_memory(decode, kDecodeBytes);
    launch_early(
        decode, dim3(grid_dim(short_rows), kv_heads, groups), kDecodeThreads, kDecodeBytes, queue, a
    );
    if (has_wgmma()) {
        launch_prefill_wgmma(queue, a, kHeadDim);
        return;
    }
    const auto prefill = attention_prefill_kernel<kHeadDim>;
    constexpr int kPrefillBytes = kRing * Tile<kHeadDim>::kBytes;
    allow_shared_memory(prefill, kPrefillBytes);
    const int64_t tiles = a.num_tokens / kPrefillRows + a.num_sequences;
    prefill<<<dim3(grid_dim(tiles), grid_dim_yz(a.heads)), kPrefillThreads, kPrefillBytes, queue>>>(
        a
    );
    LAUNCH_CHECK();
}

}  // namespace

void attention(Stream& stream, const AttentionParams& p, Tensor o, float* lse) {
    if (p.batch.num_tokens == 0) {
        return;
    }
    CHECK_EQ(p.q.rank, 3);
    const int64_t head_dim = p.q.shape[2];
    USER_CHECK(
        head_dim == 64 || head_dim == 128,
        "heads of {} channels are not supported on a GPU (64 and 128 are); use device = \"cpu\".",
        head_dim
    );
    CHECK_EQ(p.q.shape[1] % p.k.shape[1], 0);
    AttentionArgs a{};
    a.q = activations(p.q);
    a.k_pages = activations(p.kv.k_pages);
    a.v_pages = activations(p.kv.v_pages);
    a.positions = p.batch.positions;
    a.sequence_of = p.batch.sequence_of;
    a.sequence_begin = p.batch.sequence_begin;
    a.sequence_position = p.batch.sequence_position;
    a.block_table = p.batch.block_table;
    a.o = activations(o);
    a.lse = lse;
    a.num_tokens = p.batch.num_tokens;
    a.num_sequences = p.batch.num_sequences;
    a.max_blocks = p.batch.max_blocks;
    a.heads = static_cast<int32_t>(p.q.shape[1]);
    a.kv_heads = static_cast<int32_t>(p.k.shape[1]);
    a.scale = p.scale;
    a.scale_log2 = p.scale * kLog2E;
    const cudaStream_t queue = queue_of(stream);
    write_pages(queue, p);
    if (head_dim == 64) {
        launch_attention<64>(queue, a);
    } else {
        launch_attention<128>(queue, a);
    }
}

}  // namespace orbit::cuda
