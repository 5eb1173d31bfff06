// Gradients of LoRA's factors, and of its low-rank values, on tensor cores. Reading the activations
// [tokens, width] is all the work, so a thread block makes all it can of what it has read. Sums
// over tokens are formed in ranges of kGradientTokens, those over columns in ranges of
// gradient_columns(), both in ascending order; the partial sums are added in ascending order too.
#include <algorithm>

#include "ops/dense_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWindow = 128;  // columns
constexpr int kTokens = 64;   // of a tile
constexpr int kTiles = kGradientTokens / kTokens;
constexpr int kRank = 16;  // of a thread block's narrow matrices
constexpr int kStages = 4;
constexpr int kTileBytes = kTokens * kWindow * 2;
constexpr int kNarrowRow = kRank * 2 + 16;  // bytes; padded against bank conflicts
static_assert(kWindow == 16 * (kThreads / 32));

// kSteps k16 steps of a narrow matrix whose rows, kNarrowRow bytes each, start at `from`.
template <int kSteps>
__device__ __forceinline__ void narrow_fragments(uint32_t (&b)[kSteps][4], uint32_t from) {
    const int lane = threadIdx.x & 31;
    from += static_cast<uint32_t>((lane & 15) * kNarrowRow + (lane >> 4) * 16);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        ldmatrix_x4_trans(b[k][0], b[k][1], b[k][2], b[k][3], from + 16 * k * kNarrowRow);
    }
}

// acc[j] += m b, k16 steps ascending.
template <int kSteps>
__device__ __forceinline__ void multiply_narrow(
    float (&acc)[2][4], const uint32_t (&m)[kSteps][4], const uint32_t (&b)[kSteps][4]
) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        mma_16816(acc[0], m[k], b[k][0], b[k][1]);
        mma_16816(acc[1], m[k], b[k][2], b[k][3]);
    }
}

// A tile's columns 16 `warp`.. as rows, its tokens as the contraction.
__device__ __forceinline__ void column_fragments(
    uint32_t (&m)[kTokens / 16][4], uint32_t tile, int warp
) {
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
        transposed_fragment(m[k], tile, 256, 16 * k, 2 * warp);
    }
}

// kRank columns of rows [row, row + kRows) of a narrow matrix [rows, ld], by kRows * 2 threads of
// which this is `thread`; zeros from row_end on.
template <int kRows>
__device__ __forceinline__ void load_narrow(
    uint32_t to, const bf16* from, int32_t ld, int32_t row, int32_t row_end, int thread
) {
    row += thread / 2;
    const bool valid = row < row_end;
    const bf16* at = valid ? from + static_cast<int64_t>(row) * ld + thread % 2 * 8 : from;
    copy_async_16(to + thread / 2 * kNarrowRow + thread % 2 * 16, at, valid);
}

// This lane's sums of a factor's rows col, col + 8 to a matrix [width, rank].
__device__ __forceinline__ void store_factor(
    float* out,
    const float (&acc)[2][4],
    int32_t col,
    int32_t width,
    int32_t rank0,
    int32_t rank,
    int64_t stride_wide,
    int64_t stride_narrow
) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int32_t row = col + (lane >> 2) + 8 * (c >> 1);
            const int32_t at = rank0 + 8 * j + 2 * (lane & 3) + (c & 1);
            if (row < width && at < rank) {
                out[row * stride_wide + at * stride_narrow] = acc[j][c];
            }
        }
    }
}

// ---- sums over tokens of what has one input -----------------------------------------------------

constexpr int kTogether = 3;  // narrow matrices of a thread block at the most: q, k and v
constexpr int kTogetherStages = 3;
constexpr int kNarrowBytes = kTokens * kNarrowRow;

struct GradientGroup {
    LowRankGradient of[kMaxGroup];
    float* partial[kMaxGroup];  // [ranges of tokens][width * rank]
    int32_t count;
    int32_t together;  // pieces of kRank columns of a thread block, up to kTogether
    int32_t sets;      // of as many

    __host__ __device__ int32_t stage_bytes() const { return kTileBytes + together * kNarrowBytes; }
};

struct Piece {
    int32_t gradient;  // -1: none
    int32_t rank0;
};

__device__ __forceinline__ Piece find_piece(const GradientGroup& group, int32_t index) {
    for (int32_t g = 0; g < group.count; ++g) {
        const int32_t pieces = group.of[g].narrow_ld / kRank;
        if (index < pieces) {
            return {g, index * kRank};
        }
        index -= pieces;
    }
    return {-1, 0};
}

__global__ void __launch_bounds__(kThreads, 3)
    low_rank_gradients_kernel(const __grid_constant__ GradientGroup group) {
    release_successor();
    extern __shared__ __align__(1024) char shared[];
    const uint32_t base = shared_address(shared);
    const int warp = threadIdx.x >> 5;
    const LowRankGradient& all = group.of[0];
    const int32_t col0 = static_cast<int32_t>(blockIdx.x) / group.sets * kWindow;
    const int32_t first = static_cast<int32_t>(blockIdx.x) % group.sets * group.together;
    const int32_t begin = static_cast<int32_t>(blockIdx.y) * kGradientTokens;
    const int32_t end = min(all.rows, begin + kGradientTokens);
    Piece piece[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
        piece[i] = i < group.together ? find_piece(group, first + i) : Piece{-1, 0};
    }
    wait_for_predecessor();
    const auto stage_of = [&](int32_t tile) {
        return base + tile % kTogetherStages * group.stage_bytes();
    };
    const auto load = [&](int32_t tile) {
        const int32_t row = begin + tile * kTokens;
        if (row < end) {
            const uint32_t to = stage_of(tile);
            load_token_tile<kThreads>(to, all.wide, row, end, col0, all.width);
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                if (piece[i].gradient >= 0 && static_cast<int>(threadIdx.x >> 7) == i % 2) {
                    const LowRankGradient& g = group.of[piece[i].gradient];
                    load_narrow<kTokens>(
                        to + kTileBytes + i * kNarrowBytes,
                        g.narrow + piece[i].rank0,
                        g.narrow_ld,
                        row,
                        end,
                        threadIdx.x & 127
                    );
                }
            }
        }
        copy_async_commit();
    };
#pragma unroll
    for (int s = 0; s < kTogetherStages - 1; ++s) {
        load(s);
    }
    float acc[kTogether][2][4] = {};
    const int32_t tiles = (end - begin + kTokens - 1) / kTokens;
    for (int32_t tile = 0; tile < tiles; ++tile) {
        copy_async_wait<kTogetherStages - 2>();
        __syncthreads();
        load(tile + kTogetherStages - 1);
        const uint32_t wide = stage_of(tile);
        uint32_t m[kTokens / 16][4];
        column_fragments(m, wide, warp);
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            if (piece[i].gradient >= 0) {
                uint32_t b[kTokens / 16][4];
                narrow_fragments(b, wide + kTileBytes + i * kNarrowBytes);
                multiply_narrow(acc[i], m, b);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
        if (piece[i].gradient >= 0) {
            const LowRankGradient& g = group.of[piece[i].gradient];
            store_factor(
                group.partial[piece[i].gradient] +
                    static_cast<int64_t>(blockIdx.y) * g.width * g.rank,
                acc[i],
                col0 + 16 * warp,
                g.width,
                piece[i].rank0,
                g.rank,
                g.stride_wide,
                g.stride_narrow
            );
        }
    }
}

// ---- what is made of an output's gradient -------------------------------------------------------

constexpr int kColumns = 512;  // of a thread block at the most: gradient_columns()

struct OutputShared {
    static constexpr int kU = kStages * kTileBytes;               // all of the block's tokens
    static constexpr int kB = kU + kGradientTokens * kNarrowRow;  // all of its columns
    static constexpr int kBytes = kB + kColumns * kNarrowRow;
    static_assert(2 * (kBytes + 1024) <= 228 * 1024);
};

struct OutputGroup {
    LoraOutputGradient of[kMaxGroup];
    float* du_partial[kMaxGroup];  // [ranges of columns][rows, ld]
    float* b_partial[kMaxGroup];   // [ranges of tokens][width * rank]
    int32_t first_block[kMaxGroup + 1];
    int32_t count;
    int32_t rows;
    int32_t windows;  // of a thread block
};

// kRank columns of rows [col0, col0 + kColumns) of B [width, rank]; zeros outside.
__device__ __forceinline__ void load_factor(
    char* shared, const LoraOutputGradient& a, int32_t col0, int32_t rank0
) {
    const auto address = reinterpret_cast<uintptr_t>(a.b) | static_cast<uintptr_t>(2 * a.rank);
    for (int i = threadIdx.x; i < kColumns * 2; i += kThreads) {
        const int32_t col = col0 + i / 2;
        const int32_t first = rank0 + i % 2 * 8;
        char* to = shared + i / 2 * kNarrowRow + i % 2 * 16;
        const bf16* from = a.b + static_cast<int64_t>(col) * a.rank + first;
        if (address % 16 == 0) {
            const bool valid = col < a.width && first < a.rank;
            copy_async_16(shared_address(to), valid ? from : a.b, valid);
            continue;
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const bool valid = col < a.width && first + j < a.rank;
            reinterpret_cast<bf16*>(to)[j] = valid ? from[j] : bf16{};
        }
    }
}

// The partial sums of du, of which each of two warps has those over half of a window's columns.
__device__ __forceinline__ void store_low_rank(
    float* out,
    float* shared,
    const float (&du)[kTiles][2][4],
    int32_t begin,
    int32_t end,
    int32_t ld
) {
    constexpr int kHalf = kThreads / 2;
    const int lane = threadIdx.x & 31;
    const auto thread = static_cast<int>(threadIdx.x) % kHalf;
    const bool second = threadIdx.x >= kHalf;
    __syncthreads();  // Nobody reads the tiles any more.
    if (second) {
#pragma unroll
        for (int i = 0; i < kTiles * 8; ++i) {
            shared[i * kHalf + thread] = du[i / 8][i / 4 % 2][i % 4];
        }
    }
    __syncthreads();
    if (second) {
        return;
    }
    const int32_t row0 = begin + thread / 32 * 16 + (lane >> 2);
#pragma unroll
    for (int i = 0; i < kTiles * 8; i += 2) {
        const int32_t row = row0 + i / 8 * kTokens + 8 * (i % 4 / 2);
        const int32_t col = 8 * (i / 4 % 2) + 2 * (lane & 3);
        const float* own = &du[i / 8][i / 4 % 2][i % 4];
        if (row < end) {
            *reinterpret_cast<float2*>(out + static_cast<int64_t>(row) * ld + col) = float2{
                __fadd_rn(own[0], shared[i * kHalf + thread]),
                __fadd_rn(own[1], shared[(i + 1) * kHalf + thread])};
        }
    }
}

__global__ void __launch_bounds__(kThreads, 2)
    output_gradients_kernel(const __grid_constant__ OutputGroup group) {
    release_successor();
    extern __shared__ __align__(1024) char shared[];
    using Shared = OutputShared;
    const uint32_t base = shared_address(shared);
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    auto block = static_cast<int32_t>(blockIdx.x);
    int32_t index = 0;
    while (index + 1 < group.count && block >= group.first_block[index + 1]) {
        ++index;
    }
    block -= group.first_block[index];
    const LoraOutputGradient& a = group.of[index];
    const int32_t pieces = a.ld / kRank;  // neighbours read the same columns
    const int32_t rank0 = block % pieces * kRank;
    const int32_t range = block / pieces;
    const int32_t first_col = range * group.windows * kWindow;
    const int32_t windows = min(group.windows, (a.width - first_col + kWindow - 1) / kWindow);
    const int32_t begin = static_cast<int32_t>(blockIdx.y) * kGradientTokens;
    const int32_t end = min(group.rows, begin + kGradientTokens);
    const int32_t tiles = (end - begin + kTokens - 1) / kTokens;
    int32_t next_window = 0;
    int32_t next_tile = 0;
    int32_t next_stage = 0;
    const auto load_next = [&] {
        if (next_window < windows) {
            load_token_tile<kThreads>(
                base + next_stage * kTileBytes,
                a.dy,
                begin + next_tile * kTokens,
                end,
                first_col + next_window * kWindow,
                a.width
            );
            next_stage = (next_stage + 1) % kStages;
            if (++next_tile == tiles) {
                next_tile = 0;
                ++next_window;
            }
        }
        copy_async_commit();
    };
    wait_for_predecessor();
    load_factor(shared + Shared::kB, a, first_col, rank0);
    const bool makes_b = group.b_partial[index] != nullptr;
    for (int32_t row = 0; makes_b && row < kGradientTokens; row += kThreads / 2) {
        load_narrow<kThreads / 2>(
            base + Shared::kU + row * kNarrowRow, a.u + rank0, a.ld, begin + row, end, threadIdx.x
        );
    }
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
        load_next();
    }
    // Of du a warp has 16 of a tile's tokens and half of its columns.
    const int token = warp % 4 * 16;
    const int half = warp / 4 * (kWindow / 2);
    float du[kTiles][2][4] = {};
    int32_t stage = 0;
#pragma unroll 1
    for (int32_t window = 0; window < windows; ++window) {
        const uint32_t factor =
            base + Shared::kB + static_cast<uint32_t>((window * kWindow + half) * kNarrowRow);
        float db[2][4] = {};
        uint32_t b[kWindow / 32][4];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            if (tile >= tiles) {
                continue;
            }
            copy_async_wait<kStages - 2>();
            __syncthreads();
            load_next();
            const uint32_t wide = base + stage * kTileBytes;
            stage = (stage + 1) % kStages;
            if (tile == 0) {
                narrow_fragments(b, factor);
            }
            if (makes_b) {
                uint32_t m[kTokens / 16][4];
                uint32_t u[kTokens / 16][4];
                column_fragments(m, wide, warp);
                narrow_fragments(u, base + Shared::kU + tile * kTokens * kNarrowRow);
                multiply_narrow(db, m, u);
            }
            uint32_t m[kWindow / 32][4];
            const int row = token + (lane & 15);
#pragma unroll
            for (int k = 0; k < kWindow / 32; ++k) {
                const int granule = half / 8 + 2 * k + (lane >> 4);
                const auto at = static_cast<uint32_t>(row * 256 + ((granule ^ (row & 7)) << 4));
                ldmatrix_x4(m[k][0], m[k][1], m[k][2], m[k][3], wide + at);
            }
            multiply_narrow(du[tile], m, b);
        }
        if (makes_b) {
            store_factor(
                group.b_partial[index] + static_cast<int64_t>(blockIdx.y) * a.width * a.rank,
                db,
                first_col + window * kWindow + 16 * warp,
                a.width,
                rank0,
                a.rank,
                a.rank,
                1
            );
        }
    }
    float* out = group.du_partial[index] + static_cast<int64_t>(range) * group.rows * a.ld + rank0;
    store_low_rank(out, reinterpret_cast<float*>(shared), du, begin, end, a.ld);
}

// ---- any shape ----------------------------------------------------------------------------------

// For rows that are not 16-byte aligned.
__global__ void __launch_bounds__(kThreads) low_rank_gradient_plain_kernel(LowRankGradient a) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= static_cast<int64_t>(a.width) * a.rank) {
        return;
    }
    const int64_t i = index / a.rank;
    const int64_t j = index % a.rank;
    float sum = 0.0f;
    for (int64_t t = 0; t < a.rows; ++t) {
        sum = __fmaf_rn(
            to_float(a.wide[t * a.width + i]), to_float(a.narrow[t * a.narrow_ld + j]), sum
        );
    }
    float* at = a.grad + i * a.stride_wide + j * a.stride_narrow;
    *at = __fadd_rn(*at, __fmul_rn(a.scale, sum));
}

// ---- partial sums -------------------------------------------------------------------------------

constexpr int kMaxSums = 2 * kMaxGroup;

struct SumsGroup {
    PartialSums of[kMaxSums];
    int32_t first_block[kMaxSums + 1];
    int32_t count;
};

__device__ __forceinline__ void add_four(float4& sum, const float4& v) {
    sum.x = __fadd_rn(sum.x, v.x);
    sum.y = __fadd_rn(sum.y, v.y);
    sum.z = __fadd_rn(sum.z, v.z);
    sum.w = __fadd_rn(sum.w, v.w);
}

// Four sums a thread.
__global__ void __launch_bounds__(kThreads)
    add_partials_kernel(const __grid_constant__ SumsGroup group) {
    release_successor();
    wait_for_predecessor();
    int32_t index = 0;
    while (index + 1 < group.count &&
           static_cast<int32_t>(blockIdx.x) >= group.first_block[index + 1]) {
        ++index;
    }
    const PartialSums& a = group.of[index];
    const int64_t i =
        (static_cast<int64_t>(blockIdx.x) - group.first_block[index]) * kThreads + threadIdx.x;
    if (4 * i >= a.count) {
        return;
    }
    float4 sum{};
#pragma unroll 8
    for (int32_t s = 0; s < a.num_partials; ++s) {
        add_four(sum, reinterpret_cast<const float4*>(a.partial + s * a.count)[i]);
    }
    sum = float4{
        __fmul_rn(a.scale, sum.x),
        __fmul_rn(a.scale, sum.y),
        __fmul_rn(a.scale, sum.z),
        __fmul_rn(a.scale, sum.w)};
    if (a.rounded != nullptr) {
        reinterpret_cast<uint2*>(a.rounded)[i] =
            uint2{pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w)};
        return;
    }
    float* grad = a.grad + 4 * i;  // may lie at any float
    grad[0] = __fadd_rn(grad[0], sum.x);
    grad[1] = __fadd_rn(grad[1], sum.y);
    grad[2] = __fadd_rn(grad[2], sum.z);
    grad[3] = __fadd_rn(grad[3], sum.w);
}

float* take_floats(Stream& stream, int64_t count) {
    return static_cast<float*>(stream.scratch.take_bytes(static_cast<size_t>(count) * sizeof(float))
    );
}

bool in_granules(const bf16* wide, int32_t width) {
    return width % 8 == 0 && reinterpret_cast<uintptr_t>(wide) % 16 == 0;
}

}  // namespace

void add_partials(cudaStream_t queue, std::span<const PartialSums> sums) {
    SumsGroup group{};
    CHECK_LE(sums.size(), size_t{kMaxSums});
    for (const PartialSums& s : sums) {
        CHECK_EQ(s.count % 4, 0);
        const int64_t blocks = ceil_div(s.count, int64_t{4} * kThreads);
        group.of[group.count] = s;
        const int32_t first = group.first_block[group.count];
        group.first_block[++group.count] = first + static_cast<int32_t>(blocks);
    }
    const dim3 grid(grid_dim(group.first_block[group.count]));
    launch_early(add_partials_kernel, grid, kThreads, 0, queue, group);
}

void low_rank_gradients(Stream& stream, std::span<const LowRankGradient> gradients) {
    CHECK(!gradients.empty() && gradients.size() <= size_t{kMaxGroup});
    const LowRankGradient& first = gradients[0];
    if (!in_granules(first.wide, first.width)) {
        for (const LowRankGradient& g : gradients) {
            const int64_t count = static_cast<int64_t>(g.width) * g.rank;
            low_rank_gradient_plain_kernel<<<
                grid_dim(ceil_div(count, kThreads)),
                kThreads,
                0,
                queue_of(stream)>>>(g);
            LAUNCH_CHECK();
        }
        return;
    }
    const ScratchScope scope(stream.scratch);
    const int64_t ranges = ceil_div(first.rows, kGradientTokens);
    GradientGroup group{};
    PartialSums sums[kMaxGroup];
    int32_t pieces = 0;
    for (const LowRankGradient& g : gradients) {
        CHECK(g.wide == first.wide && g.width == first.width && g.rows == first.rows);
        const int64_t factor = int64_t{g.width} * g.rank;
        const int32_t i = group.count++;
        group.of[i] = g;
        group.partial[i] = take_floats(stream, ranges * factor);
        sums[i] = {
            .partial = group.partial[i],
            .count = factor,
            .num_partials = static_cast<int32_t>(ranges),
            .scale = g.scale,
            .grad = g.grad};
        pieces += g.narrow_ld / kRank;
    }
    group.together = std::min(pieces, kTogether);
    group.sets = static_cast<int32_t>(ceil_div(pieces, group.together));
    const size_t shared = size_t{kTogetherStages} * static_cast<size_t>(group.stage_bytes());
    allow_shared_memory(low_rank_gradients_kernel, shared);
    const dim3 grid(grid_dim(ceil_div(first.width, kWindow) * group.sets), grid_dim_yz(ranges));
    const cudaStream_t queue = queue_of(stream);
    launch_early(low_rank_gradients_kernel, grid, kThreads, shared, queue, group);
    add_partials(queue, {sums, gradients.size()});
}

bool fits_output_gradient(const LoraOutputGradient& a) {
    return in_granules(a.dy, a.width);
}

void lora_output_gradients(
    Stream& stream, std::span<const LoraOutputGradient> gradients, int32_t rows
) {
    CHECK(!gradients.empty() && gradients.size() <= size_t{kMaxGroup});
    const ScratchScope scope(stream.scratch);
    const int64_t token_ranges = ceil_div(rows, kGradientTokens);
    OutputGroup group{};
    group.rows = rows;
    int64_t columns = 0;
    for (const LoraOutputGradient& g : gradients) {
        columns += g.width;
    }
    const int32_t in_range = gradient_columns(columns);
    CHECK(in_range <= kColumns && in_range % kWindow == 0);
    group.windows = in_range / kWindow;
    PartialSums sums[kMaxSums];
    size_t num_sums = 0;
    for (const LoraOutputGradient& g : gradients) {
        CHECK(fits_output_gradient(g) && g.ld % kRank == 0);
        const int64_t column_ranges = ceil_div(g.width, in_range);
        const int64_t low_rank = int64_t{rows} * g.ld;
        const int64_t factor = int64_t{g.width} * g.rank;
        const int32_t i = group.count++;
        group.of[i] = g;
        group.du_partial[i] = take_floats(stream, column_ranges * low_rank);
        sums[num_sums++] = {
            .partial = group.du_partial[i],
            .count = low_rank,
            .num_partials = static_cast<int32_t>(column_ranges),
            .scale = g.scale,
            .rounded = g.du};
        if (g.grad_b != nullptr) {
            group.b_partial[i] = take_floats(stream, token_ranges * factor);
            sums[num_sums++] = {
                .partial = group.b_partial[i],
                .count = factor,
                .num_partials = static_cast<int32_t>(token_ranges),
                .scale = g.scale,
                .grad = g.grad_b};
        }
        group.first_block[i + 1] =
            group.first_block[i] + static_cast<int32_t>(column_ranges * (g.ld / kRank));
    }
    allow_shared_memory(output_gradients_kernel, OutputShared::kBytes);
    const dim3 grid(grid_dim(group.first_block[group.count]), grid_dim_yz(token_ranges));
    const cudaStream_t queue = queue_of(stream);
    launch_early(
        output_gradients_kernel, grid, kThreads, size_t{OutputShared::kBytes}, queue, group
    );
    add_partials(queue, {sums, num_sums});
}

}  // namespace orbit::cuda
