// Instantiated once per weight format, in matmul_*_cuda.cu: which member runs, and the plain one.
#pragma once

#include "ops/matmul_decode_cuda.cuh"
#include "ops/matmul_tile_cuda.cuh"

namespace orbit::cuda {

// Member R, plain: one warp a tile of 16 x 8, elements read one by one. For shapes whose rows are
// not 16-byte aligned.
template <WeightFormat kFormat, bool kBackward>
__global__ void __launch_bounds__(32) matmul_plain_kernel(MatmulArgs a) {
    const int lane = threadIdx.x;
    const int g = lane >> 2;
    const int q2 = 2 * (lane & 3);
    const int32_t n0 = static_cast<int32_t>(blockIdx.x) * 8;
    const int32_t m0 = static_cast<int32_t>(blockIdx.y) * 16;
    const auto x_at = [&](int32_t m, int32_t k) -> uint32_t {
        return m < a.m && k < a.k ? a.x[m * a.ldx + k].bits : 0u;
    };
    const auto w_at = [&](int32_t n, int32_t k) -> uint32_t {
        if (n >= a.n || k >= a.k) {
            return 0u;
        }
        return kBackward ? weight_value<kFormat>(a.w, k, n).bits
                         : weight_value<kFormat>(a.w, n, k).bits;
    };
    const auto x_pair = [&](int32_t m, int32_t k) { return x_at(m, k) | (x_at(m, k + 1) << 16); };
    const auto w_pair = [&](int32_t n, int32_t k) { return w_at(n, k) | (w_at(n, k + 1) << 16); };
    float acc[4] = {};
    float total[4] = {};
    for (int32_t k = 0; k < a.k; k += 16) {
        if (k > 0 && k % a.segment == 0) {
            for (int c = 0; c < 4; ++c) {
                total[c] = __fadd_rn(total[c], acc[c]);
                acc[c] = 0.0f;
            }
        }
        const uint32_t x[4] = {
            x_pair(m0 + g, k + q2),
            x_pair(m0 + g + 8, k + q2),
            x_pair(m0 + g, k + q2 + 8),
            x_pair(m0 + g + 8, k + q2 + 8)};
        mma_16816(acc, x, w_pair(n0 + g, k + q2), w_pair(n0 + g, k + q2 + 8));
    }
    if (a.segment < a.k) {
        for (int c = 0; c < 4; ++c) {
            acc[c] = __fadd_rn(total[c], acc[c]);
        }
    }
    const Epilogue& e = a.epilogue;
    float lora[4] = {};
    if (e.lora_u != nullptr) {
        for (int k = 0; k < e.ldu; k += 16) {
            const uint32_t u[4] = {
                lora_u_pair(e, m0 + g, a.m, k + q2),
                lora_u_pair(e, m0 + g + 8, a.m, k + q2),
                lora_u_pair(e, m0 + g, a.m, k + q2 + 8),
                lora_u_pair(e, m0 + g + 8, a.m, k + q2 + 8)};
            mma_16816(
                lora,
                u,
                lora_b_pair(e, n0 + g, a.n, k + q2),
                lora_b_pair(e, n0 + g, a.n, k + q2 + 8)
            );
        }
    }
    for (int c = 0; c < 4; ++c) {
        const int32_t m = m0 + g + 8 * (c >> 1);
        if (m < a.m) {
            store_one(e, acc[c], lora[c], m, n0 + q2 + (c & 1), a.n);
        }
    }
}

template <WeightFormat kFormat, bool kBackward>
void launch_plain(cudaStream_t queue, const MatmulArgs& a) {
    // Rows in slices: the grid's second axis is short.
    constexpr int32_t kSlice = 32768 * 16;
    for (int32_t m = 0; m < a.m; m += kSlice) {
        MatmulArgs part = a;
        part.m = std::min(kSlice, a.m - m);
        part.x += m * a.ldx;
        Epilogue& e = part.epilogue;
        e.y = static_cast<char*>(e.y) + m * e.ldy * (e.f32_out ? 4 : 2);
        e.residual = e.residual == nullptr ? nullptr : e.residual + m * e.ldy;
        e.lora_u = e.lora_u == nullptr ? nullptr : e.lora_u + static_cast<int64_t>(m) * e.ldu;
        const dim3 grid(grid_dim(ceil_div(e.columns, 8)), grid_dim_yz(ceil_div(part.m, 16)));
        matmul_plain_kernel<kFormat, kBackward><<<grid, 32, 0, queue>>>(part);
        LAUNCH_CHECK();
    }
}

// All members give the same bits; which one runs is a matter of speed and alignment only.
template <WeightFormat kFormat>
void matmul_format(cudaStream_t queue, Direction direction, const MatmulArgs& a) {
    const auto address = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.w.data);
    const bool aligned = a.k % 8 == 0 && a.ldx % 8 == 0 && a.w.cols % 8 == 0 && address % 16 == 0;
    const bool segmented = a.segment < a.k;
    if (direction == Direction::kForward) {
        if (!aligned) {
            launch_plain<kFormat, false>(queue, a);
        } else if (a.m <= kDecodeMaxRows) {
            launch_decode<kFormat>(queue, a);
        } else if (segmented) {
            launch_best_tile<kFormat, false, true>(queue, a);
        } else {
            launch_best_tile<kFormat, false, false>(queue, a);
        }
    } else if (!aligned) {
        launch_plain<kFormat, true>(queue, a);
    } else if (segmented) {
        launch_best_tile<kFormat, true, true>(queue, a);
    } else {
        launch_best_tile<kFormat, true, false>(queue, a);
    }
}

}  // namespace orbit::cuda
