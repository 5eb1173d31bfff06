// Attention forward, and keys and values written into their pages. Sequences of up to kShortRows
// rows go through the decode kernels (a row and KV head each), longer ones through the prefill
// kernel (128 rows of one head), of which Hopper has its own. All give the same bits.
#include "device/cuda/rows.cuh"
#include "ops/attention_cuda.cuh"
#include "ops/cuda_ops.h"
#include "ops/matmul_cuda.cuh"

namespace orbit::cuda {
namespace {

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

template <int kHeadDim>
void launch_prefill(Stream& stream, const AttentionArgs& a, int64_t pages) {
    if (has_wgmma()) {
        launch_prefill_wgmma(stream, a, kHeadDim, pages);
        return;
    }
    const auto prefill = attention_prefill_kernel<kHeadDim>;
    constexpr int kPrefillBytes = kRing * Tile<kHeadDim>::kBytes;
    allow_shared_memory(prefill, kPrefillBytes);
    const int64_t tiles = a.num_tokens / kPrefillRows + a.num_sequences;
    prefill<<<
        dim3(grid_dim(tiles), grid_dim_yz(a.heads)),
        kPrefillThreads,
        kPrefillBytes,
        queue_of(stream)>>>(a);
    LAUNCH_CHECK();
}

}  // namespace

void append_kv(Stream& stream, const AttentionParams& p) {
    if (p.batch.num_tokens == 0) {
        return;
    }
    const int64_t head_dim = p.k.shape[2];
    USER_CHECK(
        head_dim % 8 == 0,
        "heads of {} channels are not supported on a GPU (64 and 128 are); use device = \"cpu\".",
        head_dim
    );
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
    const dim3 grid(grid_dim(ceil_div(a.count, 256)));
    launch_early(write_pages_kernel, grid, 256, 0, queue_of(stream), a);
}

bool attention(Stream& stream, const AttentionParams& p, Tensor o, float* lse) {
    if (p.batch.num_tokens == 0) {
        return false;
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
    const bool rotates = p.oft_d.defined() && decode_rotates(a, head_dim, p.oft_d.shape[1]);
    if (rotates) {
        CHECK(lse == nullptr, "(backward would read the rotated o)");
        CHECK_EQ(p.oft_d.shape[0] * p.oft_d.shape[1], a.heads * head_dim);
        a.oft_d = activations(p.oft_d);
    }
    const cudaStream_t queue = queue_of(stream);
    const bool only_short = a.num_tokens == a.num_sequences;
    launch_decode(queue, a, head_dim, only_short, p.batch.max_positions);
    if (!only_short) {
        const int64_t pages = p.kv.k_pages.numel() / (a.kv_heads * kPageTokens * head_dim);
        head_dim == 64 ? launch_prefill<64>(stream, a, pages)
                       : launch_prefill<128>(stream, a, pages);
    }
    return rotates;
}

}  // namespace orbit::cuda
