// Gradients of LoRA's factors: sums over tokens of outer products, [tokens, width]^T [tokens,
// rank], on tensor cores. Each thread block sums kGradientTokens tokens in ascending order; the
// partial sums are added in ascending order too.
#include "ops/dense_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWindow = 128;
constexpr int kWideTile = 64 * 256;

template <int kRank>
struct Shared {
    static constexpr int kRowBytes = kRank * 2 + 16;  // padded against bank conflicts
    static constexpr int kNarrowTile = 64 * kRowBytes;
    static constexpr int kStage = kWideTile + kNarrowTile;
    static constexpr int kBytes = 2 * kStage;
};

template <int kRank>
__device__ __forceinline__ void load_narrow(
    uint32_t to, const LowRankGradient& a, int32_t row0, int32_t row_end, int32_t rank0
) {
    constexpr int kRowGranules = kRank / 8;
    for (int i = threadIdx.x; i < 64 * kRowGranules; i += kThreads) {
        const int row = i / kRowGranules;
        const int granule = i % kRowGranules;
        const int32_t col = rank0 + granule * 8;
        const bool valid = row0 + row < row_end && col < a.narrow_ld;
        const bf16* from =
            valid ? a.narrow + static_cast<int64_t>(row0 + row) * a.narrow_ld + col : a.narrow;
        copy_async_16(to + row * Shared<kRank>::kRowBytes + granule * 16, from, valid);
    }
}

// partial[split][i][j], i over width, j over rank.
template <int kRank>
__global__ void __launch_bounds__(kThreads)
    low_rank_gradient_kernel(LowRankGradient a, float* partial) {
    extern __shared__ __align__(1024) char shared[];
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int32_t col0 = static_cast<int32_t>(blockIdx.x) * kWindow;
    const int32_t begin = static_cast<int32_t>(blockIdx.y) * kGradientTokens;
    const int32_t end = min(a.rows, begin + kGradientTokens);
    const int32_t rank0 = static_cast<int32_t>(blockIdx.z) * kRank;
    const uint32_t base = shared_address(shared);
    const auto load = [&](int32_t tile) {
        const int32_t row = begin + tile * 64;
        if (row < end) {
            const uint32_t to = base + (tile & 1) * Shared<kRank>::kStage;
            load_token_tile<kThreads>(to, a.wide, row, end, col0, a.width);
            load_narrow<kRank>(to + kWideTile, a, row, end, rank0);
        }
        copy_async_commit();
    };
    float acc[kRank / 8][4] = {};
    const int32_t tiles = (end - begin + 63) / 64;
    load(0);
    for (int32_t tile = 0; tile < tiles; ++tile) {
        load(tile + 1);
        copy_async_wait<1>();
        __syncthreads();
        const uint32_t wide = base + (tile & 1) * Shared<kRank>::kStage;
#pragma unroll
        for (int k = 0; k < 64; k += 16) {
            uint32_t m[4];
            transposed_fragment(m, wide, 256, k, 2 * warp);
#pragma unroll
            for (int j = 0; j < kRank / 8; j += 2) {
                const int row = k + (lane & 15);
                uint32_t b[4];
                ldmatrix_x4_trans(
                    b[0],
                    b[1],
                    b[2],
                    b[3],
                    wide + kWideTile +
                        static_cast<uint32_t>(
                            row * Shared<kRank>::kRowBytes + (j + (lane >> 4)) * 16
                        )
                );
                mma_16816(acc[j], m, b[0], b[1]);
                mma_16816(acc[j + 1], m, b[2], b[3]);
            }
        }
        __syncthreads();
    }
    float* out = partial + static_cast<int64_t>(blockIdx.y) * a.width * a.rank;
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int32_t row = col0 + 16 * warp + (lane >> 2) + 8 * (c >> 1);
            const int32_t rank = rank0 + 8 * j + 2 * (lane & 3) + (c & 1);
            if (row < a.width && rank < a.rank) {
                out[row * a.stride_wide + rank * a.stride_narrow] = acc[j][c];
            }
        }
    }
}

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

__global__ void __launch_bounds__(kThreads) add_partials_kernel(
    const float* partial, int32_t num_partials, int64_t count, float scale, float* grad
) {
    release_successor();
    wait_for_predecessor();
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= count) {
        return;
    }
    float sum = 0.0f;
    for (int32_t s = 0; s < num_partials; ++s) {
        sum = __fadd_rn(sum, partial[s * count + i]);
    }
    grad[i] = __fadd_rn(grad[i], __fmul_rn(scale, sum));
}

template <int kRank>
void launch_low_rank(Stream& stream, const LowRankGradient& a) {
    const ScratchScope scope(stream.scratch);
    const int64_t count = static_cast<int64_t>(a.width) * a.rank;
    const int64_t splits = ceil_div(a.rows, kGradientTokens);
    auto* partial = static_cast<float*>(
        stream.scratch.take_bytes(static_cast<size_t>(splits * count) * sizeof(float))
    );
    const auto kernel = low_rank_gradient_kernel<kRank>;
    allow_shared_memory(kernel, Shared<kRank>::kBytes);
    const cudaStream_t queue = queue_of(stream);
    const dim3 grid(
        grid_dim(ceil_div(a.width, kWindow)),
        grid_dim_yz(splits),
        grid_dim_yz(ceil_div(a.rank, kRank))
    );
    kernel<<<grid, kThreads, Shared<kRank>::kBytes, queue>>>(a, partial);
    LAUNCH_CHECK();
    add_partials(queue, partial, static_cast<int32_t>(splits), count, a.scale, a.grad);
}

}  // namespace

void add_partials(
    cudaStream_t queue,
    const float* partial,
    int32_t num_partials,
    int64_t count,
    float scale,
    float* grad
) {
    launch_early(
        add_partials_kernel,
        dim3(grid_dim(ceil_div(count, kThreads))),
        kThreads,
        0,
        queue,
        partial,
        num_partials,
        count,
        scale,
        grad
    );
}

void low_rank_gradient(Stream& stream, const LowRankGradient& a) {
    if (a.width % 8 != 0 || reinterpret_cast<uintptr_t>(a.wide) % 16 != 0) {
        const int64_t count = static_cast<int64_t>(a.width) * a.rank;
        low_rank_gradient_plain_kernel<<<
            grid_dim(ceil_div(count, kThreads)),
            kThreads,
            0,
            queue_of(stream)>>>(a);
        LAUNCH_CHECK();
    } else if (a.rank <= 16) {
        launch_low_rank<16>(stream, a);
    } else if (a.rank <= 32) {
        launch_low_rank<32>(stream, a);
    } else {
        launch_low_rank<64>(stream, a);
    }
}

}  // namespace orbit::cuda
