// OFT on the GPU: x + x D with mma.sync.m16n8k16 over each block, k16 steps ascending, the sum with
// x in fp32, one rounding. Block sizes 16, 32, 64, 128 on tensor cores; any other by plain loops
// (the choice depends on the block size alone, so it never splits rollout from training).
#include "device/cuda/math.cuh"
#include "device/cuda/quad.cuh"
#include "ops/dense_cuda.cuh"
#include "ops/grouped_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int kWindow = 128;  // columns of one thread block; fewer where rows are few
constexpr int kRotateRows = 64;
constexpr int kRotateWarps = kRotateRows / 16;
constexpr int kRotateThreads = 32 * kRotateWarps;
constexpr int kFewTogether = 3;  // products of one thread block where rows are few

// The least columns of a thread block, where rows are few.
template <int kBlock>
constexpr int kFewColumns = std::max(kBlock, 32);

// Shared memory: a tile of x, then a tile of D for each product of the block. Rows are padded by a
// granule: eight of them in eight bank groups.
template <int kBlock>
struct RotateShared {
    static constexpr int kRowBytesD = kBlock * 2 + 16;

    static constexpr __host__ __device__ int row_bytes_x(int window) { return window * 2 + 16; }

    static constexpr __host__ __device__ int bytes_x(int window) {
        return kRotateRows * row_bytes_x(window);
    }

    static constexpr __host__ __device__ int bytes_d(int window) { return window * kRowBytesD; }
};

template <int kBlock, int kThreads>
__device__ __forceinline__ void load_rotation(
    const bf16* d, int32_t width, uint32_t to, int32_t col0, int window
) {
    constexpr int kRowGranules = kBlock / 8;
    for (int i = threadIdx.x; i < window * kRowGranules; i += kThreads) {
        const int row = i / kRowGranules;
        const int granule = i % kRowGranules;
        const bool valid = col0 + row < width;
        const bf16* from = valid ? d + static_cast<int64_t>(col0 + row) * kBlock + granule * 8 : d;
        copy_async_16(to + row * RotateShared<kBlock>::kRowBytesD + granule * 16, from, valid);
    }
}

__device__ __forceinline__ void load_rotate_rows(
    const RotateArgs& a,
    uint32_t to,
    int row_bytes,
    int32_t row0,
    int32_t col0,
    int rows,
    int window
) {
    constexpr int kAcross = kWindow / 8;  // threads for a row
    for (int row = threadIdx.x / kAcross; row < rows; row += kRotateThreads / kAcross) {
        for (int granule = threadIdx.x % kAcross; granule < window / 8; granule += kAcross) {
            const int32_t col = col0 + granule * 8;
            const bool valid = row0 + row < a.rows && col < a.width;
            const bf16* from = valid ? a.x + static_cast<int64_t>(row0 + row) * a.width + col : a.x;
            copy_async_16(to + row * row_bytes + granule * 16, from, valid);
        }
    }
}

// The window's columns of the row that `norm` makes, to the tile of x; all of the row is read.
template <int kBlock>
__device__ __forceinline__ void make_normed_row(
    const PendingNorm::Norm& norm, bool stores, char* tile, int32_t col0, int window
) {
    static_assert(kRotateThreads == kNormThreads);
    __shared__ float shared[kNormThreads / 32];
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const int32_t group = col0 / 8 + thread;
    const bool own = thread < window / 8 && group < norm.width / 8;
    Eight weight{};
    if (own) {  // constant
        weight = load_norm_weight(norm.weight, group, norm.width);
    }
    wait_for_predecessor();
    uint4 x{};
    if (own) {
        x = reinterpret_cast<const uint4*>(norm.x)[group];
    }
    const float scale = inverse_rms_of_row(norm.x, norm.width, norm.eps, shared);
    if (own) {
        const uint4 y = pack_eight(normed(unpack_eight(x), scale, weight));
        reinterpret_cast<uint4*>(tile)[thread] = y;
        if (stores) {
            reinterpret_cast<uint4*>(norm.y)[group] = y;
        }
    }
}

// Adds x, and the old value when accumulating, to the products of a row and eight columns for each
// of kTiles fragments, and stores them; four fragments as 16 bytes a lane. `x`, `y`: of the row
// and the fragments' first column; `exists`: the row does. All lanes.
template <int kTiles>
__device__ __forceinline__ void store_rotated(
    const RotateArgs& a, bf16* y, const char* x, bool exists, const float (&v)[kTiles][2]
) {
    const int at = 2 * static_cast<int>(threadIdx.x & 3);
    uint32_t pairs[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        const auto pair = *reinterpret_cast<const uint32_t*>(x + 2 * (8 * t + at));
        float v0 = __fadd_rn(low_bf16(pair), v[t][0]);
        float v1 = __fadd_rn(high_bf16(pair), v[t][1]);
        if (a.accumulate && exists) {
            const auto old = *reinterpret_cast<const uint32_t*>(y + 8 * t + at);
            v0 = __fadd_rn(low_bf16(old), v0);
            v1 = __fadd_rn(high_bf16(old), v1);
        }
        pairs[t] = pack_bf16(v0, v1);
    }
    if constexpr (kTiles == 4) {
        transpose_quad(pairs);
        if (exists) {
            *reinterpret_cast<uint4*>(y + 4 * at) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
        }
    } else if (exists) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            *reinterpret_cast<uint32_t*>(y + 8 * t + at) = pairs[t];
        }
    }
}

// The products of 16 rows from `row` of a tile of x on, which starts with row0 of x and column
// col0, with the rotation whose columns start with `first` of the tile's, at d_tile. A warp.
template <int kBlock, bool kTranspose>
__device__ __forceinline__ void rotate_rows(
    const RotateArgs& a,
    bf16* y,
    const char* x_tile,
    uint32_t d_tile,
    int row_bytes_x,
    int32_t row0,
    int row,
    int32_t col0,
    int first
) {
    using Shared = RotateShared<kBlock>;
    constexpr int kTiles = std::min(kBlock / 8, 4);  // fragments that are stored at once
    const int lane = threadIdx.x & 31;
    uint32_t x[kBlock / 16][4];
#pragma unroll
    for (int step = 0; step < kBlock / 16; ++step) {
        const int granule = (first + 16 * step) / 8 + (lane >> 4);
        ldmatrix_x4(
            x[step][0],
            x[step][1],
            x[step][2],
            x[step][3],
            shared_address(x_tile) +
                static_cast<uint32_t>((row + (lane & 15)) * row_bytes_x + granule * 16)
        );
    }
#pragma unroll 1
    for (int n = 0; n < kBlock; n += 8 * kTiles) {
        float acc[kTiles][4] = {};
#pragma unroll
        for (int step = 0; step < kBlock / 16; ++step) {
#pragma unroll
            for (int t = 0; t < kTiles; t += 2) {
                uint32_t b[4];
                if constexpr (kTranspose) {
                    const int of_d = first + n + 8 * t + (lane & 7) + ((lane >> 4) << 3);
                    const int granule = 2 * step + ((lane >> 3) & 1);
                    const int at = of_d * Shared::kRowBytesD + granule * 16;
                    ldmatrix_x4(b[0], b[1], b[2], b[3], d_tile + static_cast<uint32_t>(at));
                } else {
                    const int of_d = first + 16 * step + (lane & 15);
                    const int granule = n / 8 + t + (lane >> 4);
                    const int at = of_d * Shared::kRowBytesD + granule * 16;
                    ldmatrix_x4_trans(b[0], b[1], b[2], b[3], d_tile + static_cast<uint32_t>(at));
                }
                mma_16816(acc[t], x[step], b[0], b[1]);
                mma_16816(acc[t + 1], x[step], b[2], b[3]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = row + (lane >> 2) + 8 * half;
            float v[kTiles][2];
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                v[t][0] = acc[t][2 * half];
                v[t][1] = acc[t][2 * half + 1];
            }
            store_rotated<kTiles>(
                a,
                y + static_cast<int64_t>(row0 + at) * a.width + col0 + first + n,
                x_tile + at * row_bytes_x + (first + n) * 2,
                row0 + at < a.rows,
                v
            );
        }
    }
}

// With experts: goes on to the rows and the rotation of the expert that owns tile `row0` of
// kRotateRows rows. False: there is none.
__device__ __forceinline__ bool take_expert(RotateArgs& a, int32_t& row0) {
    if (a.offsets == nullptr) {
        return true;
    }
    ExpertRows rows;
    if (!find_tile<kRotateRows>(a.offsets, a.experts, row0 / kRotateRows, rows)) {
        return false;
    }
    row0 = rows.first;
    a.rows = rows.first + rows.count;
    a.d += rows.expert * a.distance;
    return true;
}

struct RotateGroup {
    RotateArgs args[kMaxGroup];
    int32_t together;        // products of a thread block, which read the same x
    int32_t window;          // columns of a thread block
    PendingNorm::Norm norm;  // with a y: x is that, of few rows, and is made on the way
};

// A warp: 16 rows. Where a block has fewer than four times as many, warps share them, and take the
// blocks of the rotations in turn.
template <int kBlock, bool kTranspose>
__global__ void __launch_bounds__(kRotateThreads)
    rotate_kernel(const __grid_constant__ RotateGroup group) {
    release_successor();
    const RotateArgs* products = group.args + blockIdx.z * group.together;
    RotateArgs a = products[0];
    extern __shared__ __align__(1024) char shared[];
    using Shared = RotateShared<kBlock>;
    const int window = group.window;
    const int row_bytes_x = Shared::row_bytes_x(window);
    const int32_t col0 = static_cast<int32_t>(blockIdx.x) * window;
    int32_t row0 = static_cast<int32_t>(blockIdx.y) * kRotateRows;
    const uint32_t x_tile = shared_address(shared);
    const uint32_t d_tiles = x_tile + Shared::bytes_x(window);
    const auto load_rotations = [&] {
        load_rotation<kBlock, kRotateThreads>(a.d, a.width, d_tiles, col0, window);
        for (int p = 1; p < group.together; ++p) {
            const uint32_t to = d_tiles + p * Shared::bytes_d(window);
            load_rotation<kBlock, kRotateThreads>(products[p].d, a.width, to, col0, window);
        }
    };
    const PendingNorm::Norm& norm = group.norm;
    if (norm.y != nullptr) {
        load_rotations();
        make_normed_row<kBlock>(norm, blockIdx.z == 0, shared, col0, window);
    } else if (a.offsets == nullptr) {
        load_rotations();
        wait_for_predecessor();
    } else {
        wait_for_predecessor();
        if (!take_expert(a, row0)) {
            return;
        }
        load_rotations();
    }
    const int tiles = min(kRotateWarps, (a.rows - row0 + 15) / 16);
    if (norm.y == nullptr) {
        load_rotate_rows(a, x_tile, row_bytes_x, row0, col0, 16 * tiles, window);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    const int sharing = tiles == 1 ? kRotateWarps : tiles == 2 ? kRotateWarps / 2 : 1;
    const int warp = static_cast<int>(threadIdx.x >> 5);
    const int warp_row = warp / sharing * 16;
    if (row0 + warp_row >= a.rows) {
        return;
    }
    const int blocks = window / kBlock;
#pragma unroll 1
    for (int item = warp % sharing; item < blocks * group.together; item += sharing) {
        const int p = item / blocks;
        const int first = item % blocks * kBlock;
        if (col0 + first < a.width) {
            const uint32_t d_tile = d_tiles + p * Shared::bytes_d(window);
            rotate_rows<kBlock, kTranspose>(
                a, products[p].y, shared, d_tile, row_bytes_x, row0, warp_row, col0, first
            );
        }
    }
}

// The same for 2 to kRotateRows rows that a norm makes, the sums of whose squares are there: all of
// a thread block's products together, of as few columns as can be, and every load that waits for
// the predecessor at once.
constexpr int kNormedThreads = 4 * kRotateRows;

template <int kBlock>
__global__ void __launch_bounds__(kNormedThreads)
    normed_rotate_kernel(const __grid_constant__ RotateGroup group) {
    release_successor();
    using Shared = RotateShared<kBlock>;
    constexpr int kUnit = kFewColumns<kBlock>;
    constexpr int kAcross = kUnit / 8;  // threads for a row
    constexpr int kRowsAtOnce = kNormedThreads / kAcross;
    constexpr int kPasses = kRotateRows / kRowsAtOnce;
    constexpr int kRowBytes = Shared::row_bytes_x(kUnit);
    extern __shared__ __align__(1024) char shared[];
    __shared__ float scales[kRotateRows];
    const RotateArgs* products = group.args + blockIdx.z * group.together;
    const RotateArgs& a = products[0];
    const PendingNorm::Norm& norm = group.norm;
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const int32_t col0 = static_cast<int32_t>(blockIdx.x) * kUnit;
    const uint32_t d_tiles = shared_address(shared) + Shared::bytes_x(kUnit);
    for (int p = 0; p < group.together; ++p) {
        const uint32_t to = d_tiles + p * Shared::bytes_d(kUnit);
        load_rotation<kBlock, kNormedThreads>(products[p].d, a.width, to, col0, kUnit);
    }
    copy_async_commit();
    const int32_t first_group = col0 / 8 + thread % kAcross;  // of eight columns
    const bool own = 8 * first_group < norm.width;
    Eight weight{};
    if (own) {
        weight = load_norm_weight(norm.weight, first_group, norm.width);
    }
    const auto offset = [&](int32_t row) { return row * norm.width + 8 * first_group; };
    wait_for_predecessor();
    uint4 x[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        const int32_t row = thread / kAcross + i * kRowsAtOnce;
        x[i] = own && row < norm.rows ? *reinterpret_cast<const uint4*>(norm.x + offset(row))
                                      : uint4{};
    }
    const auto pieces = static_cast<int32_t>(norm.width / kSquaresPiece);
    const int32_t row_of_quad = min(thread / 4, norm.rows - 1);
    const float sum = sum_of_pieces(norm.squares + row_of_quad * pieces, pieces);
    scales[thread / 4] = inverse_rms(sum, static_cast<float>(norm.width), norm.eps);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        const int32_t row = thread / kAcross + i * kRowsAtOnce;
        const uint4 y = pack_eight(normed(unpack_eight(x[i]), scales[row], weight));
        *reinterpret_cast<uint4*>(shared + row * kRowBytes + thread % kAcross * 16) = y;
        if (blockIdx.z == 0 && own && row < norm.rows) {
            *reinterpret_cast<uint4*>(norm.y + offset(row)) = y;
        }
    }
    copy_async_wait<0>();
    __syncthreads();
    constexpr int kBlocks = kUnit / kBlock;
    const int tiles = (norm.rows + 15) / 16;
#pragma unroll 1
    for (int item = thread / 32; item < tiles * kBlocks * group.together;
         item += kNormedThreads / 32) {
        const int p = item / (tiles * kBlocks);
        const int rest = item % (tiles * kBlocks);
        const int first = rest % kBlocks * kBlock;
        if (col0 + first < a.width) {
            const uint32_t d_tile = d_tiles + p * Shared::bytes_d(kUnit);
            const int row = rest / kBlocks * 16;
            rotate_rows<kBlock, false>(
                a, products[p].y, shared, d_tile, kRowBytes, 0, row, col0, first
            );
        }
    }
}

__global__ void __launch_bounds__(256) rotate_plain_kernel(RotateArgs a, bool transpose) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (index >= static_cast<int64_t>(a.rows) * a.width) {
        return;
    }
    const int64_t row = index / a.width;
    const int32_t col = static_cast<int32_t>(index % a.width);
    const int32_t j = col % a.block;
    const bf16* x = a.x + row * a.width + col - j;
    const bf16* d = a.d + static_cast<int64_t>(col - j) * a.block;
    for (int32_t e = 1; e < a.experts; ++e) {
        d += a.offsets[e] <= row ? a.distance : 0;
    }
    float acc = 0.0f;
    for (int32_t i = 0; i < a.block; ++i) {
        const bf16 r = transpose ? d[static_cast<int64_t>(j) * a.block + i]
                                 : d[static_cast<int64_t>(i) * a.block + j];
        acc = __fmaf_rn(to_float(x[i]), to_float(r), acc);
    }
    float v = __fadd_rn(to_float(x[j]), acc);
    if (a.accumulate) {
        v = __fadd_rn(to_float(a.y[index]), v);
    }
    a.y[index] = round_bf16(v);
}

// Few rows: all products of a thread block together, whose columns are as few as still give each
// multiprocessor one block.
template <int kBlock>
void cut_for_few_rows(RotateGroup& group, int32_t width, int32_t count) {
    constexpr int kUnit = kFewColumns<kBlock>;
    group.together = count <= kFewTogether ? count : 1;
    const int64_t units = ceil_div(width, kUnit) * (count / group.together);
    const int64_t in_window = ceil_div(units, device_limits().multiprocessors);
    group.window = static_cast<int32_t>(std::min<int64_t>(kWindow, in_window * kUnit));
}

template <int kBlock>
void launch_normed_rotate(cudaStream_t queue, const RotateGroup& group, int32_t count) {
    using Shared = RotateShared<kBlock>;
    constexpr int kUnit = kFewColumns<kBlock>;
    const auto kernel = normed_rotate_kernel<kBlock>;
    allow_shared_memory(kernel, Shared::bytes_x(kUnit) + kFewTogether * Shared::bytes_d(kUnit));
    launch_early(
        kernel,
        dim3(
            grid_dim(ceil_div(group.args[0].width, kUnit)),
            1,
            static_cast<unsigned>(count / group.together)
        ),
        kNormedThreads,
        Shared::bytes_x(kUnit) + group.together * Shared::bytes_d(kUnit),
        queue,
        group
    );
}

template <int kBlock, bool kTranspose>
void launch_rotate(
    cudaStream_t queue, std::span<const RotateArgs> args, const PendingNorm::Norm& norm
) {
    const auto kernel = rotate_kernel<kBlock, kTranspose>;
    using Shared = RotateShared<kBlock>;
    const RotateArgs& a = args[0];
    const auto count = static_cast<int32_t>(args.size());
    RotateGroup group{{}, 1, kWindow, norm};
    std::copy(args.begin(), args.end(), group.args);
    if (a.rows <= kRotateRows && a.offsets == nullptr) {
        cut_for_few_rows<kBlock>(group, a.width, count);
    }
    if (norm.squares != nullptr) {
        return launch_normed_rotate<kBlock>(queue, group, count);
    }
    allow_shared_memory(kernel, Shared::bytes_x(kWindow) + kFewTogether * Shared::bytes_d(kWindow));
    const auto launch = [&](int64_t tiles) {
        launch_early(
            kernel,
            dim3(
                grid_dim(ceil_div(a.width, group.window)),
                grid_dim_yz(tiles),
                static_cast<unsigned>(count / group.together)
            ),
            kRotateThreads,
            Shared::bytes_x(group.window) + group.together * Shared::bytes_d(group.window),
            queue,
            group
        );
    };
    if (a.offsets != nullptr) {
        return launch(ceil_div(a.rows, kRotateRows) + std::min(a.rows, a.experts));
    }
    constexpr int32_t kSlice = 32768 * kRotateRows;
    for (int32_t row = 0; row < a.rows; row += kSlice) {
        const int32_t rows = std::min(kSlice, a.rows - row);
        for (int32_t i = 0; i < count; ++i) {
            group.args[i].rows = rows;
            group.args[i].x = args[i].x + static_cast<int64_t>(row) * a.width;
            group.args[i].y = args[i].y + static_cast<int64_t>(row) * a.width;
        }
        launch(ceil_div(rows, kRotateRows));
    }
}

template <int kBlock>
void launch_rotate(
    cudaStream_t queue,
    std::span<const RotateArgs> args,
    bool transpose,
    const PendingNorm::Norm& norm
) {
    if (transpose) {
        launch_rotate<kBlock, true>(queue, args, norm);
    } else {
        launch_rotate<kBlock, false>(queue, args, norm);
    }
}

constexpr int kGradThreads = 256;
constexpr int kGradTile = 64 * 256;  // bytes of 64 tokens x 128 columns
constexpr int kGradShared = 4 * kGradTile;

// One thread block: 128 columns, kGradientTokens tokens. Warp w owns rows 16w..16w+15 of the
// window's rotation blocks and all columns of the block they belong to.
template <int kBlock>
__global__ void __launch_bounds__(kGradThreads) rotation_gradient_kernel(
    const bf16* x, const bf16* dxr, int32_t rows, int32_t width, float* partial
) {
    extern __shared__ __align__(1024) char shared[];
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int32_t col0 = static_cast<int32_t>(blockIdx.x) * kWindow;
    const int32_t begin = static_cast<int32_t>(blockIdx.y) * kGradientTokens;
    const int32_t end = min(rows, begin + kGradientTokens);
    const uint32_t base = shared_address(shared);
    const int first = 16 * warp / kBlock * kBlock;  // the rotation block's first column
    const auto load = [&](int32_t tile) {
        const int32_t row = begin + tile * 64;
        if (row < end) {
            const uint32_t to = base + (tile & 1) * 2 * kGradTile;
            load_token_tile<kGradThreads>(to, x, row, end, col0, width);
            load_token_tile<kGradThreads>(to + kGradTile, dxr, row, end, col0, width);
        }
        copy_async_commit();
    };
    float acc[kBlock / 8][4] = {};
    const int32_t tiles = (end - begin + 63) / 64;
    load(0);
    for (int32_t tile = 0; tile < tiles; ++tile) {
        load(tile + 1);
        copy_async_wait<1>();
        __syncthreads();
        const uint32_t x_tile = base + (tile & 1) * 2 * kGradTile;
#pragma unroll
        for (int k = 0; k < 64; k += 16) {
            uint32_t a[4];
            transposed_fragment(a, x_tile, 256, k, 2 * warp);
#pragma unroll
            for (int j = 0; j < kBlock / 8; j += 2) {
                const int row = k + (lane & 15);
                const int granule = first / 8 + j + (lane >> 4);
                uint32_t b[4];
                ldmatrix_x4_trans(
                    b[0],
                    b[1],
                    b[2],
                    b[3],
                    x_tile + kGradTile +
                        static_cast<uint32_t>(row * 256 + ((granule ^ (row & 7)) << 4))
                );
                mma_16816(acc[j], a, b[0], b[1]);
                mma_16816(acc[j + 1], a, b[2], b[3]);
            }
        }
        __syncthreads();
    }
    float* out = partial + static_cast<int64_t>(blockIdx.y) * width * kBlock;
#pragma unroll
    for (int j = 0; j < kBlock / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int32_t row = col0 + 16 * warp + (lane >> 2) + 8 * (c >> 1);
            if (row < width) {
                out[static_cast<int64_t>(row) * kBlock + 8 * j + 2 * (lane & 3) + (c & 1)] =
                    acc[j][c];
            }
        }
    }
}

__global__ void __launch_bounds__(256) rotation_gradient_plain_kernel(
    const bf16* x, const bf16* dxr, int32_t rows, int32_t width, int32_t block, float* grad
) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (index >= static_cast<int64_t>(width) * block) {
        return;
    }
    const int32_t i = static_cast<int32_t>(index / block);
    const int32_t j = i / block * block + static_cast<int32_t>(index % block);
    float sum = 0.0f;
    for (int64_t t = 0; t < rows; ++t) {
        sum = __fmaf_rn(to_float(x[t * width + i]), to_float(dxr[t * width + j]), sum);
    }
    grad[index] = __fadd_rn(grad[index], sum);
}

template <int kBlock>
void launch_rotation_gradient(
    Stream& stream, const bf16* x, const bf16* dxr, int32_t rows, int32_t width, float* grad
) {
    const ScratchScope scope(stream.scratch);
    const int64_t count = static_cast<int64_t>(width) * kBlock;
    const int64_t splits = ceil_div(rows, kGradientTokens);
    auto* partial = static_cast<float*>(
        stream.scratch.take_bytes(static_cast<size_t>(splits * count) * sizeof(float))
    );
    const auto kernel = rotation_gradient_kernel<kBlock>;
    allow_shared_memory(kernel, kGradShared);
    const cudaStream_t queue = queue_of(stream);
    const dim3 grid(grid_dim(ceil_div(width, kWindow)), grid_dim_yz(splits));
    kernel<<<grid, kGradThreads, kGradShared, queue>>>(x, dxr, rows, width, partial);
    LAUNCH_CHECK();
    const PartialSums sums{
        .partial = partial,
        .count = count,
        .num_partials = static_cast<int32_t>(splits),
        .grad = grad};
    add_partials(queue, {&sums, 1});
}

// Calls run with the block size as a constant where there are kernels for it. False: there are
// none.
template <typename Run>
bool with_block(int32_t block, const Run& run) {
    switch (block) {
        case 16:
            run(std::integral_constant<int, 16>{});
            return true;
        case 32:
            run(std::integral_constant<int, 32>{});
            return true;
        case 64:
            run(std::integral_constant<int, 64>{});
            return true;
        case 128:
            run(std::integral_constant<int, 128>{});
            return true;
        default:
            return false;
    }
}

}  // namespace

bool rotation_norms(int32_t block) {
    return with_block(block, [](auto) {});
}

void rotate(
    cudaStream_t queue,
    std::span<const RotateArgs> args,
    bool transpose,
    const PendingNorm::Norm& norm
) {
    CHECK(!args.empty() && args.size() <= size_t{kMaxGroup});
    CHECK(
        norm.y == nullptr ||
        (rotation_norms(args[0].block) && args[0].rows == norm.rows &&
         norm.rows <= (norm.squares == nullptr ? 1 : kRotateRows) && !transpose)
    );
    for (const RotateArgs& a : args) {
        CHECK(a.rows == args[0].rows && a.width == args[0].width && a.block == args[0].block);
        CHECK(args.size() == 1 || a.offsets == nullptr);
    }
    const bool launched = with_block(args[0].block, [&](auto block) {
        launch_rotate<decltype(block)::value>(queue, args, transpose, norm);
    });
    if (launched) {
        return;
    }
    for (const RotateArgs& a : args) {
        const int64_t count = static_cast<int64_t>(a.rows) * a.width;
        rotate_plain_kernel<<<grid_dim(ceil_div(count, 256)), 256, 0, queue>>>(a, transpose);
        LAUNCH_CHECK();
    }
}

void rotation_gradient(
    Stream& stream,
    const bf16* x,
    const bf16* dxr,
    int32_t rows,
    int32_t width,
    int32_t block,
    float* grad
) {
    const bool launched = with_block(block, [&](auto size) {
        launch_rotation_gradient<decltype(size)::value>(stream, x, dxr, rows, width, grad);
    });
    if (launched) {
        return;
    }
    const int64_t count = static_cast<int64_t>(width) * block;
    rotation_gradient_plain_kernel<<<grid_dim(ceil_div(count, 256)), 256, 0, queue_of(stream)>>>(
        x, dxr, rows, width, block, grad
    );
    LAUNCH_CHECK();
}

}  // namespace orbit::cuda
