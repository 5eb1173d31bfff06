// The matmul family (performance.md 3.4, contract CC): every member computes an output element as
// chains of mma.sync.m16n8k16 with k ascending, cut into the same contiguous segments, and ends in
// the same epilogue, so all members give the same bits and the choice among them is free.
#pragma once

#include <cuda_runtime.h>

#include "device/cuda/mma.cuh"
#include "device/device.h"
#include "ops/weight_cuda.cuh"

namespace orbit::cuda {

constexpr int kTileK = 64;    // segments are multiples of this
constexpr int kSegments = 4;  // of a forward contraction that is cut

// y = round(scale acc + lora_scale (u b^T) + bias + residual), in this order, in fp32.
struct Epilogue {
    void* y = nullptr;  // [m, ldy], bf16 or fp32
    bool f32_out = false;
    int64_t ldy = 0;
    int32_t columns = 0;  // stored; those from n on are zero (padding of LoRA's u)
    float scale = 1.0f;
    const float* bias = nullptr;     // [n]
    const bf16* residual = nullptr;  // [m, ldy]; may be y
    const bf16* lora_u = nullptr;    // [m, ldu], zero from column `rank` on
    const bf16* lora_b = nullptr;    // [n, rank]; in backward [rank, n]
    int32_t ldu = 0;                 // a multiple of 16
    int32_t rank = 0;
    int32_t ldb = 0;  // elements from a row of lora_b to the next
    float lora_scale = 0.0f;
    // [m, columns / 64], or null: of y as it is stored, the sums of the squares of pieces of 64
    // columns (norm_cuda.cuh). Members ignore it, but for those that say so: squares_left.
    float* squares = nullptr;
};

struct MatmulArgs {
    const bf16* x = nullptr;  // [m, ldx]
    int64_t ldx = 0;
    WeightView w{};  // forward: [n, k]; backward (dgrad): [k, n]
    int32_t m = 0;
    int32_t n = 0;
    int32_t k = 0;        // the contraction
    int32_t segment = 0;  // its length cut into segments of this many
    // LoRA's u = x A^T runs just before the product that adds u B^T, and both read x. Where the
    // first lets its successor start only once x is there (releases_late), the second need not wait
    // before its epilogue (x_is_ready). Up to kBesideMaxRows rows; a member may ignore x_is_ready.
    // With x_flag (Stream::take_flag) in both, the second starts at once and asks there for x,
    // which the first announces: only where both members know it (run_beside()).
    bool releases_late = false;
    bool x_is_ready = false;
    uint32_t* x_flag = nullptr;
    Epilogue epilogue;
};

constexpr int32_t kNarrowMaxRows = 64;    // of x, in the members for few rows
constexpr int32_t kBesideMaxRows = 1023;  // of LoRA's products side by side

// Products of one launch (q, k and v; gate and up; parts of one contraction), of one format and m.
constexpr int kMaxGroup = 8;

struct MatmulGroup {
    MatmulArgs args[kMaxGroup];
    int32_t first_block[kMaxGroup + 1] = {};  // of each product, and one past the last
    int32_t count = 0;
    // Not null: of two products, gate and up, silu(gate) up [m, n], each of both rounded to bf16 as
    // it would be stored. Only for the members for one row and for INT4, where takes_swiglu().
    bf16* swiglu = nullptr;
    // What is stored there is rotated by these blocks of kFusedRotation channels, where
    // rotates_swiglu(). Null: it is not.
    const bf16* swiglu_d = nullptr;
    // LoRA's narrow products: there are multiprocessors for a block of every 32 rows and segment.
    bool spreads = false;
    // LoRA's narrow products follow the wide ones, args[count + i] that of args[i], and each block
    // makes what it needs of u, which is not stored: one_row_makes_u(), clusters_make_u().
    bool makes_u = false;
    bool squares_left = false;  // set by the launch: Epilogue::squares are there
};

// Whether gate and up have inputs of their own, two rotations of one.
__host__ __device__ inline bool swiglu_apart(const MatmulGroup& group) {
    return group.swiglu != nullptr && group.args[0].x != group.args[1].x;
}

// The member for one row, and that for INT4 whose blocks have gate or up alone, rotate.
inline bool rotates_swiglu(const MatmulGroup& group) {
    return group.args[0].m == 1 || swiglu_apart(group);
}

// For members whose INT4 weights are SmallScales<true>.
inline void undo_shrinking(MatmulGroup& group) {
    for (int32_t i = 0; i < group.count; ++i) {
        group.args[i].epilogue.scale *= kShrunkBack;
    }
}

// The product that this thread block works on; `block` becomes the block's number inside it.
__device__ __forceinline__ const MatmulArgs& product_of_block(
    const MatmulGroup& group, int32_t& block
) {
    int32_t i = 0;
    block = static_cast<int32_t>(blockIdx.x);
    while (i + 1 < group.count && block >= group.first_block[i + 1]) {
        ++i;
    }
    block -= group.first_block[i];
    return group.args[i];
}

// Two bf16 of a row at even k, zero from `limit` on.
__device__ __forceinline__ uint32_t load_pair(const bf16* row, int k, int limit) {
    if ((limit & 1) == 0) {
        return k < limit ? *reinterpret_cast<const uint32_t*>(row + k) : 0u;
    }
    const uint32_t low = k < limit ? row[k].bits : 0u;
    const uint32_t high = k + 1 < limit ? row[k + 1].bits : 0u;
    return low | (high << 16);
}

// Row n of lora_b as bf16 pairs along the rank; with kByRank lora_b is [rank, n].
template <bool kByRank>
__device__ __forceinline__ uint32_t
lora_b_pair(const Epilogue& e, int32_t n, int32_t num_n, int k) {
    if (n >= num_n) {
        return 0;
    }
    if constexpr (!kByRank) {
        return load_pair(e.lora_b + static_cast<int64_t>(n) * e.ldb, k, e.rank);
    }
    const bf16* column = e.lora_b + static_cast<int64_t>(k) * e.ldb + n;
    const uint32_t low = k < e.rank ? column[0].bits : 0u;
    const uint32_t high = k + 1 < e.rank ? column[e.ldb].bits : 0u;
    return low | (high << 16);
}

// Rows m and m + 8 of u, 16 of the rank: the M side of the instruction. Rows past the end repeat
// the last one; what they give is not stored.
__device__ __forceinline__ void lora_u_fragment(
    uint32_t (&u)[4], const Epilogue& e, int32_t m, int32_t num_m, int k
) {
    const int q2 = 2 * (threadIdx.x & 3);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t row = min(m + 8 * i, num_m - 1);
        const bf16* at = e.lora_u + row * e.ldu + k + q2;
        u[i] = *reinterpret_cast<const uint32_t*>(at);
        u[i + 2] = *reinterpret_cast<const uint32_t*>(at + 8);
    }
}

// The N side of one fragment: row n + lane / 4 of lora_b, 16 of the rank from k on.
template <bool kByRank>
__device__ __forceinline__ uint2
lora_b_fragment(const Epilogue& e, int32_t n, int32_t num_n, int k) {
    const int32_t row = n + static_cast<int32_t>(threadIdx.x & 31) / 4;
    const int at = k + 2 * (threadIdx.x & 3);
    return uint2{
        lora_b_pair<kByRank>(e, row, num_n, at), lora_b_pair<kByRank>(e, row, num_n, at + 8)};
}

// lora = u b^T for rows m, m + 8 and columns n.. of one fragment. `first`, `first_b`: the rank's
// first 16 of both.
template <bool kByRank>
__device__ __forceinline__ void lora_fragment(
    float (&lora)[4],
    const Epilogue& e,
    const uint32_t (&first)[4],
    uint2 first_b,
    int32_t m,
    int32_t num_m,
    int32_t n,
    int32_t num_n
) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        lora[c] = 0.0f;
    }
    mma_16816(lora, first, first_b.x, first_b.y);
#pragma unroll 1
    for (int k = 16; k < e.ldu; k += 16) {
        uint32_t u[4];
        lora_u_fragment(u, e, m, num_m, k);
        const uint2 b = lora_b_fragment<kByRank>(e, n, num_n, k);
        mma_16816(lora, u, b.x, b.y);
    }
}

// scale acc + lora_scale lora: the part of the epilogue that is done on fragments.
__device__ __forceinline__ float add_lora(const Epilogue& e, float acc, float lora) {
    const float v = __fmul_rn(acc, e.scale);
    return e.lora_u == nullptr ? v : __fadd_rn(v, __fmul_rn(e.lora_scale, lora));
}

// The rest of it, for one element; v holds what add_lora gave.
__device__ __forceinline__ void finish_one(
    const Epilogue& e, float v, int32_t m, int32_t n, int32_t num_n
) {
    if (n >= e.columns) {
        return;
    }
    const int64_t at = static_cast<int64_t>(m) * e.ldy + n;
    if (n >= num_n) {
        v = 0.0f;
    } else {
        if (e.bias != nullptr) {
            v = __fadd_rn(v, e.bias[n]);
        }
        if (e.residual != nullptr) {
            v = __fadd_rn(v, to_float(e.residual[at]));
        }
    }
    if (e.f32_out) {
        static_cast<float*>(e.y)[at] = v;
    } else {
        static_cast<bf16*>(e.y)[at] = round_bf16(v);
    }
}

// Eight neighbouring elements, n a multiple of eight, in rows of a multiple of eight.
__device__ __forceinline__ void finish_eight(
    const Epilogue& e, float (&v)[8], int32_t m, int32_t n
) {
    const int64_t at = static_cast<int64_t>(m) * e.ldy + n;
    if (e.bias != nullptr) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            v[i] = __fadd_rn(v[i], e.bias[n + i]);
        }
    }
    if (e.residual != nullptr) {
        const auto r = *reinterpret_cast<const uint4*>(e.residual + at);
        const uint32_t pairs[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[2 * i] = __fadd_rn(v[2 * i], low_bf16(pairs[i]));
            v[2 * i + 1] = __fadd_rn(v[2 * i + 1], high_bf16(pairs[i]));
        }
    }
    if (e.f32_out) {
        auto* y = reinterpret_cast<float4*>(static_cast<float*>(e.y) + at);
        y[0] = float4{v[0], v[1], v[2], v[3]};
        y[1] = float4{v[4], v[5], v[6], v[7]};
    } else {
        *reinterpret_cast<uint4*>(static_cast<bf16*>(e.y) + at) = uint4{
            pack_bf16(v[0], v[1]),
            pack_bf16(v[2], v[3]),
            pack_bf16(v[4], v[5]),
            pack_bf16(v[6], v[7])};
    }
}

// Host side. Number of segments a weight's contraction is cut into: a function of its shape alone.
// Weights with few rows and a long contraction gain decode parallelism (one warp a segment).
int32_t forward_segment(int64_t n, int64_t k);  // columns in a segment, a multiple of 64
int32_t backward_segment(int64_t k);
int32_t num_segments(int64_t k, int32_t segment);

enum class Direction : uint8_t { kForward, kBackward };

// Rows of both operands start at 16 bytes, and the weight's columns are multiples of `unit`, at
// least 8.
inline bool is_aligned(const MatmulArgs& a, int32_t unit) {
    const auto address = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.w.data);
    return address % 16 == 0 && a.k % 8 == 0 && a.ldx % 8 == 0 && a.w.cols % unit == 0;
}

bool has_wgmma();               // of the current device: Hopper
int64_t shared_memory_limit();  // of the current device: bytes that one thread block may have

// Runs one member; format and shape pick it. matmul_*_cuda.cu.
void matmul(cudaStream_t queue, WeightFormat format, Direction direction, const MatmulArgs& args);

// Products of one format and one m in one launch. `group.first_block` is filled in here.
void matmul_group(cudaStream_t queue, WeightFormat format, Direction direction, MatmulGroup& group);

// The same, packed weights of many rows decoded first where that is quicker, to the stream's
// scratch. matmul_decoded_cuda.cu.
void weight_matmul(Stream& stream, WeightFormat format, Direction direction, MatmulGroup& group);

// Many rows of bf16 weights on Hopper: matmul_tma_cuda.cu. Whether that member takes these
// products, whose operands are known to be aligned.
bool fits_pairs(const MatmulGroup& group);
void matmul_pairs(cudaStream_t queue, Direction direction, const MatmulGroup& group);

// 65 to kBesideMaxRows rows of bf16 weights on Hopper, few enough tiles: matmul_cluster_cuda.cu, as
// above. The second: whether it takes LoRA's narrow products too (MatmulGroup::makes_u).
bool fits_clusters(const MatmulGroup& group);
bool clusters_make_u(const MatmulGroup& narrow, const MatmulGroup& wide);
void matmul_clusters(cudaStream_t queue, const MatmulGroup& group);

// The same member as matmul_pairs: args[0].epilogue's y = the sum of all products, each with its
// LoRA (Direction::kBackward). False: it does not take them, and nothing was launched.
bool matmul_sum(cudaStream_t queue, const MatmulGroup& group);

// Rows [begin, begin + count) of a packed weight; begin is a multiple of 128.
WeightView rows_of_weight(WeightView w, WeightFormat format, int64_t begin, int64_t count);

template <WeightFormat kFormat>
void matmul_format(cudaStream_t queue, Direction direction, MatmulGroup& group);

}  // namespace orbit::cuda
