// Member D for one row of x, the decode step of a single sequence; what does not fit takes
// matmul_decode_cuda.cuh. A warp's ring holds chunks of 16 rows of the weight, their scales and x's
// columns, laid out so that all offsets inside a chunk are constants. What runs outside the loop is
// kept short, because it runs once and none of it is in the caches of instructions.
#pragma once

#include "device/cuda/math.cuh"
#include "ops/matmul_decode_cuda.cuh"
#include "ops/oft_cuda.cuh"

namespace orbit::cuda {

template <WeightFormat kFormat>
constexpr bool kHasOneRow = kFormat == WeightFormat::kBF16 || kFormat == WeightFormat::kInt4 ||
                            kFormat == WeightFormat::kMxFp4 || kFormat == WeightFormat::kNvFp4;

template <WeightFormat kFormat>
struct OneRowLayout {
    static constexpr int kRowBytes = 128;  // of the weight, in a chunk
    static constexpr int kChunk = kRowBytes / BlockBytes<kFormat>::value * 32;  // columns
    static constexpr int kSteps = kChunk / 64;
    // A column of the lanes' rows lies in different banks: bf16's granules are permuted
    // (swizzled()), codes have 16 bytes more than a row, which leaves their places constant.
    static constexpr bool kSwizzles = kFormat == WeightFormat::kBF16;
    static constexpr int kStride = kSwizzles ? kRowBytes : kRowBytes + 16;
    static constexpr int kScales =
        kScalesApart<kFormat>  // bytes of a row's, in a chunk
            ? kChunk / (kFormat == WeightFormat::kNvFp4 ? 16 : 32) * kScaleBytes<kFormat>
            : 0;
    static constexpr int kScalesAt = 16 * kStride;
    static constexpr int kXAt = kScalesAt + 16 * kScales;
    static constexpr int kStageBytes = kXAt + kChunk * 2;
    // Of 64 columns lane q of a quad multiplies with columns 8 i + 2 q and the next. Side by side
    // these eight pairs are read without the matrix loads' repetitions; but they are put there by
    // copies of four bytes, of which a chunk of packed weights would need four times as many.
    static constexpr bool kPairsOfX = kFormat == WeightFormat::kBF16;
    static_assert(kScales == 0 || kScales == 8 || kScales == 16);
};

// The warp's 16 rows of the weight from row0 on, and x: `chunks` chunks of columns from k_begin on.
// What a lane copies, and where to in a stage, stays; only the chunk's number changes.
template <WeightFormat kFormat, int kStages>
struct OneRowStream {
    using Layout = OneRowLayout<kFormat>;
    const char* weight[4];  // of rows lane / 8 + 4i: the granule that this lane copies first
    const char* scales;     // of row lane
    const char* x;
    char* ring;
    uint32_t weight_to[2];  // in a stage, of rows lane / 8 and lane / 8 + 4
    uint32_t x_to;          // the same
    uint32_t fill = 0;      // the stage that is copied next, in bytes from the ring's start
    uint32_t read = 0;      // the stage that is read
    int32_t next = 0;       // the chunk that is copied next
    int32_t chunks;

    // Rows past the end repeat the last one.
    __device__ __forceinline__
    OneRowStream(const MatmulArgs& a, int32_t row0, int32_t k_begin, int32_t count, char* at)
        : ring(at), chunks(count) {
        const int lane = threadIdx.x & 31;
        const int64_t start = static_cast<int64_t>(k_begin / 32) * BlockBytes<kFormat>::value;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int32_t row = min(row0 + (lane >> 3) + 4 * i, a.w.rows - 1);
            weight[i] = reinterpret_cast<const char*>(a.w.data) + row * a.w.row_bytes + start +
                        (lane & 7) * 16;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = (lane >> 3) + 4 * i;
            const int granule = Layout::kSwizzles ? (lane & 7) ^ row : lane & 7;
            weight_to[i] = static_cast<uint32_t>(row * Layout::kStride + granule * 16);
        }
        if constexpr (kScalesApart<kFormat>) {
            const int32_t row = min(row0 + (lane & 15), a.w.rows - 1);
            scales = reinterpret_cast<const char*>(scale_row<kFormat>(a.w, row)) +
                     scale_offset<kFormat>(a.w, k_begin);
        }
        x = reinterpret_cast<const char*>(a.x + k_begin) + lane * (Layout::kPairsOfX ? 4 : 16);
        x_to = Layout::kPairsOfX ? (lane & 3) * 32 + (lane >> 2) * 4 : lane * 16;
        // Or else they would be computed again for each chunk.
        asm volatile("" : "+l"(weight[0]), "+l"(weight[1]), "+l"(weight[2]), "+l"(weight[3]));
        asm volatile("" : "+r"(weight_to[0]), "+r"(weight_to[1]), "+r"(x_to));
    }

    // from + chunk * kBytes, which the compiler would carry along in more instructions.
    template <uint32_t kBytes>
    static __device__ __forceinline__ const char* in_chunk(const char* from, uint32_t chunk) {
        const char* at;
        asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(chunk), "n"(kBytes), "l"(from));
        return at;
    }

    static __device__ __forceinline__ uint32_t after(uint32_t stage) {
        constexpr uint32_t kLast = (kStages - 1) * Layout::kStageBytes;
        return stage == kLast ? 0 : stage + Layout::kStageBytes;
    }

    __device__ __forceinline__ void copy_weight(uint32_t stage, uint32_t chunk) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            copy_async_16(
                stage + weight_to[i % 2] + i / 2 * 8 * Layout::kStride,
                in_chunk<Layout::kRowBytes>(weight[i], chunk)
            );
        }
        if constexpr (Layout::kScales > 0) {
            if (x_to < 16 * 16) {  // lanes 0 to 15, told by what is at hand
                copy_async<Layout::kScales>(
                    stage + Layout::kScalesAt + x_to / 16 * Layout::kScales,
                    in_chunk<Layout::kScales>(scales, chunk)
                );
            }
        }
    }

    __device__ __forceinline__ void copy_x(uint32_t stage, uint32_t chunk) const {
        const uint32_t to = stage + Layout::kXAt + x_to;
        const char* from = in_chunk<Layout::kChunk * 2>(x, chunk);
        if constexpr (Layout::kPairsOfX) {
            static_assert(Layout::kChunk == 64);
            copy_async<4>(to, from);
        } else {
            static_assert(Layout::kChunk == 256);
            copy_async_16(to, from);
        }
    }

    template <typename Copy>
    __device__ __forceinline__ void start(const Copy& copy) const {
        const uint32_t base = shared_address(ring);
#pragma unroll 1
        for (int c = 0; c < kStages - 1; ++c) {
            if (c < chunks) {
                copy(base + c * Layout::kStageBytes, static_cast<uint32_t>(c));
            }
            copy_async_commit();
        }
    }

    // The first chunks but for x: the weights are constant, and need not wait for other kernels.
    __device__ __forceinline__ void start_weights() const {
        start([&](uint32_t stage, uint32_t chunk) { copy_weight(stage, chunk); });
    }

    __device__ __forceinline__ void start_x() {
        start([&](uint32_t stage, uint32_t chunk) { copy_x(stage, chunk); });
        next = kStages - 1;
        fill = (kStages - 1) * Layout::kStageBytes;
    }

    // The next chunk, which is in the ring.
    __device__ __forceinline__ const char* next_chunk() {
        copy_async_wait<kStages - 2>();
        __syncwarp();  // Every lane's bytes are there, and every lane left the stage before.
        const char* chunk = ring + read;
        read = after(read);
        return chunk;
    }

    // Another one on its way, into the stage before it.
    __device__ __forceinline__ void refill() {
        if (next < chunks) {
            const uint32_t stage = shared_address(ring) + fill;
            copy_weight(stage, static_cast<uint32_t>(next));
            copy_x(stage, static_cast<uint32_t>(next));
        }
        copy_async_commit();
        fill = after(fill);
        ++next;
    }
};

// Columns [64 step, 64 step + 64) of a chunk, as they lie there: packed codes; and a chunk's
// scales.
template <WeightFormat kFormat>
struct OneRowWords {
    using Layout = OneRowLayout<kFormat>;
    static constexpr int kBits = 8 * sizeof(ScaleWord<kFormat>);
    static constexpr int kScaleWords = Layout::kScales / 4;
    uint32_t codes[2][2];             // of both blocks, of rows lane / 4 and lane / 4 + 8
    uint32_t scales[2][kScaleWords];  // of these rows, of the chunk's blocks

    __device__ __forceinline__ void load_scales(const char* chunk) {
        const int lane = threadIdx.x & 31;
        const char* from = chunk + Layout::kScalesAt + (lane >> 2) * Layout::kScales;
        using Row = std::conditional_t<kScaleWords == 2, uint2, uint4>;
        static_assert(sizeof(Row) == Layout::kScales);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Row row = *reinterpret_cast<const Row*>(from + 8 * i * Layout::kScales);
            memcpy(scales[i], &row, sizeof row);
        }
    }

    // A block's 16 bytes are a word for each lane of a quad, as matrix loads give them.
    __device__ __forceinline__ void load(const char* chunk, int step) {
        const int lane = threadIdx.x & 31;
        const uint32_t at =
            shared_address(chunk) + (lane & 15) * Layout::kStride + (lane >> 4) * 16 + step * 32;
        ldmatrix_x4(codes[0][0], codes[0][1], codes[1][0], codes[1][1], at);
    }

    // The M side of four k16 steps.
    __device__ __forceinline__ void decode(const WeightView& view, int step, uint32_t (&w)[4][4])
        const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                uint32_t pair[4];
                if constexpr (kFormat == WeightFormat::kInt4) {
                    SmallScales<true>(scales[i][step]).decode(codes[b][i], b, pair);
                } else {
                    const int bit = (2 * step + b) * kBits;
                    const uint32_t scale =
                        (scales[i][bit / 32] >> (bit % 32)) & ((1u << kBits) - 1);
                    decode_word<kFormat>(view, codes[b][i], scale, pair);
                }
                place_pairs(pair, i, b, w);
            }
        }
    }
};

// The same of bf16 weights.
template <>
struct OneRowWords<WeightFormat::kBF16> {
    uint32_t fragments[4][4];

    __device__ __forceinline__ void load(const char* chunk, int) {
        const int lane = threadIdx.x & 31;
        const uint32_t from = shared_address(chunk);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t at = from + swizzled(lane & 15, 2 * i + (lane >> 4));
            ldmatrix_x4(fragments[i][0], fragments[i][1], fragments[i][2], fragments[i][3], at);
        }
    }

    __device__ __forceinline__ void load_scales(const char*) {}

    __device__ __forceinline__ void decode(const WeightView&, int, uint32_t (&w)[4][4]) const {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            w[i / 4][i % 4] = fragments[i / 4][i % 4];
        }
    }
};

// Columns [64 step, 64 step + 64) of a chunk's x: of the N side every column is the row; the first
// is stored.
template <WeightFormat kFormat>
__device__ __forceinline__ void load_x(uint32_t (&x)[8], const char* chunk, int step) {
    using Layout = OneRowLayout<kFormat>;
    const int lane = threadIdx.x & 31;
    const char* from = chunk + Layout::kXAt + step * 128;
    if constexpr (Layout::kPairsOfX) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto four = reinterpret_cast<const uint4*>(from + (lane & 3) * 32)[i];
            x[4 * i] = four.x;
            x[4 * i + 1] = four.y;
            x[4 * i + 2] = four.z;
            x[4 * i + 3] = four.w;
        }
    } else {
        const uint32_t at = shared_address(from) + (lane >> 3) * 16;
        ldmatrix_x4(x[0], x[1], x[2], x[3], at);
        ldmatrix_x4(x[4], x[5], x[6], x[7], at + 64);
    }
}

template <WeightFormat kFormat, int kStages>
__device__ __forceinline__ void multiply_one_row(
    const WeightView& view, OneRowStream<kFormat, kStages>& stream, int32_t chunks, float (&acc)[4]
) {
    using Layout = OneRowLayout<kFormat>;
#pragma unroll 1
    for (int32_t c = 0; c < chunks; ++c) {
        const char* chunk = stream.next_chunk();
        OneRowWords<kFormat> words;
        words.load_scales(chunk);
        words.load(chunk, 0);
#pragma unroll
        for (int step = 0; step < Layout::kSteps; ++step) {
            uint32_t x[8];
            load_x<kFormat>(x, chunk, step);
            if (step == 0) {
                stream.refill();  // while these loads are under way
            }
            uint32_t w[4][4];
            words.decode(view, step, w);
            if (step + 1 < Layout::kSteps) {
                words.load(chunk, step + 1);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                mma_16816(acc, w[i], x[2 * i], x[2 * i + 1]);
            }
        }
    }
}

// The end of a warp's product: lanes 4 g have the sums of rows g and g + 8 (of its 16) and x's row.
struct OneRowEnd {
    LoraOperands<1> lora = {};
    float added[2][2] = {};  // bias and residual of the two rows

    static __device__ __forceinline__ int32_t row_of(int32_t row0, int i) {
        return row0 + static_cast<int32_t>(threadIdx.x & 31) / 4 + 8 * i;
    }

    // lora.load_b() in fewer instructions, where the rank allows it.
    __device__ __forceinline__ void load_b(const MatmulArgs& a, int32_t row0, int32_t k) {
        const Epilogue& e = a.epilogue;
        if (e.rank != e.ldu || e.ldb % 2 != 0) {
            return lora.load_b(a, row0, k);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int32_t row = min(row_of(row0, i), a.n - 1);
            const bf16* at =
                e.lora_b + static_cast<int64_t>(row) * e.ldb + k + 2 * (threadIdx.x & 3);
            lora.b[i] = *reinterpret_cast<const uint32_t*>(at);
            lora.b[i + 2] = *reinterpret_cast<const uint32_t*>(at + 8);
        }
    }

    // What is there before LoRA's u.
    __device__ __forceinline__ void load_early(const MatmulArgs& a, int32_t row0) {
        const Epilogue& e = a.epilogue;
        if (e.lora_u != nullptr) {
            load_b(a, row0, 0);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int32_t n = row_of(row0, i);
            if (e.bias != nullptr && n < a.n) {
                added[i][0] = e.bias[n];
            }
            if (e.residual != nullptr && n < a.n) {
                added[i][1] = to_float(e.residual[n]);
            }
        }
    }

    // u b^T of the rows, in the lanes 4 g.
    __device__ __forceinline__ void multiply_low_rank(
        const MatmulArgs& a, int32_t row0, float (&low_rank)[4]
    ) {
#pragma unroll 1
        for (int32_t k = 0;;) {
            lora.load_u(a, 0, k);
            mma_16816(low_rank, lora.b, lora.u[0][0], lora.u[0][1]);
            k += 16;
            if (k >= a.epilogue.ldu) {
                break;
            }
            load_b(a, row0, k);
        }
    }

    // sums[i]: of row g + 8 i, in the lanes 4 g. They become what is stored.
    __device__ __forceinline__ void finish(
        const Epilogue& e, const float (&low_rank)[4], float (&sums)[2]
    ) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            sums[i] = add_lora(e, sums[i], low_rank[2 * i]);
            sums[i] = e.bias != nullptr ? __fadd_rn(sums[i], added[i][0]) : sums[i];
            sums[i] = e.residual != nullptr ? __fadd_rn(sums[i], added[i][1]) : sums[i];
        }
    }

    // Rows from n on are zeros.
    static __device__ __forceinline__ void store(
        const MatmulArgs& a, int32_t row0, const float (&values)[2]
    ) {
        const Epilogue& e = a.epilogue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int32_t n = row_of(row0, i);
            if ((threadIdx.x & 3) != 0 || n >= e.columns) {
                continue;
            }
            const float v = n < a.n ? values[i] : 0.0f;
            if (e.f32_out) {
                static_cast<float*>(e.y)[n] = v;
            } else {
                static_cast<bf16*>(e.y)[n] = round_bf16(v);
            }
        }
    }
};

constexpr int kOneRowWarps = 4;

// The sums of each warp of a block, in shared memory.
template <int kWarps>
struct OneRowShares {
    float of_row[kWarps][kDecodeRows];

    // Read by other warps after the next barrier.
    __device__ __forceinline__ void put(int warp, const float (&sums)[2]) {
        const int lane = static_cast<int>(threadIdx.x) & 31;
        if ((lane & 3) == 0) {
            of_row[warp][lane / 4] = sums[0];
            of_row[warp][lane / 4 + 8] = sums[1];
        }
    }

    // LoRA's u of the sums that `segments` warps from `first` on have put, as the N side takes it.
    __device__ __forceinline__ uint2 low_rank_input(int first, int segments, int32_t rank) const {
        const int column = 2 * (static_cast<int>(threadIdx.x) & 3);
        float u[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int k = column + i / 2 * 8 + i % 2;
            float sum = of_row[first][k];
            if (segments > 1) {
                sum = __fadd_rn(0.0f, sum);
                for (int s = 1; s < segments; ++s) {
                    sum = __fadd_rn(sum, of_row[first + s][k]);
                }
            }
            u[i / 2][i % 2] = k < rank ? sum : 0.0f;
        }
        return uint2{pack_bf16(u[0][0], u[0][1]), pack_bf16(u[1][0], u[1][1])};
    }

    // Those of kSegments warps in ascending order.
    __device__ __forceinline__ void add_segments(float (&sums)[2]) const {
        const int g = (static_cast<int>(threadIdx.x) & 31) / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            sums[i] = 0.0f;
#pragma unroll
            for (int s = 0; s < kSegments; ++s) {
                sums[i] = __fadd_rn(sums[i], of_row[s][g + 8 * i]);
            }
        }
    }

    // silu(gate) up of row `lane` of warp `gate` and the next one, up.
    __device__ __forceinline__ bf16 swiglu(int gate, int lane) const {
        return round_bf16(swiglu_of(
            to_float(round_bf16(of_row[gate][lane])), to_float(round_bf16(of_row[gate + 1][lane]))
        ));
    }

    __device__ __forceinline__ void store_swiglu(int gate, int32_t row0, int32_t n, bf16* y) const {
        const int lane = static_cast<int>(threadIdx.x) & 31;
        if (lane < kDecodeRows && row0 + lane < n) {
            y[row0 + lane] = swiglu(gate, lane);
        }
    }
};

// The rotation of what a block makes with MatmulGroup::swiglu, a warp for eight of its columns.
struct OneRowRotation {
    static_assert(kFusedRotation == kOneRowWarps / 2 * kDecodeRows);
    static_assert(kRotationFragments == kOneRowWarps);
    char d[kFusedRotation * kRotationRowBytes];
    bf16 x[kFusedRotation];

    // By all threads; not committed.
    __device__ __forceinline__ void load(const bf16* all, int32_t block) {
        const bf16* from = all + static_cast<int64_t>(block) * kFusedRotation * kFusedRotation;
        copy_rotations(
            shared_address(d),
            from,
            kFusedRotation,
            static_cast<int>(threadIdx.x),
            kOneRowWarps * 32
        );
    }

    // x, the first row of the M side, after its rotation to y.
    __device__ __forceinline__ void store(bf16* y) const {
        const int lane = static_cast<int>(threadIdx.x) & 31;
        const int warp = static_cast<int>(threadIdx.x) / 32;
        uint32_t fragments[2][4] = {};
        if (lane < 4) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                fragments[i / 2][i % 2 * 2] =
                    *reinterpret_cast<const uint32_t*>(x + 8 * i + 2 * lane);
            }
        }
        float acc[4];
        multiply_rotation(acc, fragments, shared_address(d), 0, warp);
        if (lane < 4) {
            const int at = 8 * warp + 2 * lane;
            const auto own = *reinterpret_cast<const uint32_t*>(x + at);
            *reinterpret_cast<uint32_t*>(y + at) = add_rotated(own, acc[0], acc[1]);
        }
    }
};

static_assert(kOneRowWarps == kSegments);

// MatmulArgs::x_flag, for all threads of the block. Returns how many blocks had asked, in thread 0.
__device__ __forceinline__ uint32_t ask_for_x(const MatmulArgs& a) {
    uint32_t asked = 0;
    if (threadIdx.x == 0) {
        wait_for_flag(a.x_flag);
        asked = count_waiter(a.x_flag);  // the answer is not waited for here
    }
    __syncthreads();
    return asked;
}

// Warps of a block that has LoRA's narrow products to itself (MatmulGroup::makes_u): one for each
// segment, or for the two inputs of swiglu.
constexpr int kWarpsWithU = 2 * kOneRowWarps;

// Warps side by side share 16 weight rows: those of the segments, or with swiglu gate's and up's.
// With kMakesU warps from kOneRowWarps on multiply LoRA's narrow weight, each block for itself.
template <WeightFormat kFormat, int kStages, bool kMakesU>
__global__ void __launch_bounds__((kMakesU ? kWarpsWithU : kOneRowWarps) * 32)
    matmul_one_row_kernel(const __grid_constant__ MatmulGroup group) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ OneRowShares<kMakesU ? kWarpsWithU : kOneRowWarps> shares;
    __shared__ __align__(16) OneRowRotation rotation;
    using Layout = OneRowLayout<kFormat>;
    int32_t block = 0;
    const MatmulArgs& own = product_of_block(group, block);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const bool makes_u = kMakesU && warp >= kOneRowWarps;
    const bool swiglu = group.swiglu != nullptr;
    const MatmulArgs& wide = swiglu ? group.args[warp & 1] : own;
    const MatmulArgs& a = makes_u ? (&wide)[group.count] : wide;
    const bool cut = a.segment < a.k;
    const int sharing = swiglu ? 2 : cut ? kSegments : 1;
    const int share = warp % sharing;
    const int32_t row0 =
        makes_u ? 0 : (block * (kOneRowWarps / sharing) + warp / sharing) * kDecodeRows;
    const int32_t k_begin = cut ? share * a.segment : 0;
    const int32_t k_end = cut ? min(a.k, k_begin + a.segment) : a.k;
    const bool works = row0 < a.epilogue.columns;
    const bool ends = works && !makes_u && (swiglu || share == 0);
    const int32_t chunks = works ? (k_end - k_begin) / Layout::kChunk : 0;
    if (!a.releases_late) {
        release_successor();
    }
    OneRowStream<kFormat, kStages> stream(
        a, row0, k_begin, chunks, shared + warp * kStages * Layout::kStageBytes
    );
    if (!kMakesU && group.swiglu_d != nullptr) {
        rotation.load(group.swiglu_d, block);
    }
    stream.start_weights();
    if (!a.x_is_ready) {
        wait_for_predecessor();
    }
    uint32_t asked = 0;
    if (a.x_flag != nullptr) {
        if (a.x_is_ready) {
            asked = ask_for_x(a);
        } else if (blockIdx.x == 0 && threadIdx.x == 0) {
            set_flag(a.x_flag);
        }
    }
    if (a.releases_late) {
        release_successor();
    }
    stream.start_x();
    OneRowEnd end;
    if (ends) {
        end.load_early(a, row0);
    }
    float acc[4] = {};
    multiply_one_row(a.w, stream, chunks, acc);
    if (a.x_is_ready) {
        wait_for_predecessor();
        if (a.x_flag != nullptr && threadIdx.x == 0) {
            clear_after_last(a.x_flag, asked);
        }
    }
    float sums[2] = {acc[0], acc[2]};
    if (cut || kMakesU) {
        shares.put(warp, sums);
        __syncthreads();
    }
    if (cut) {
        shares.add_segments(sums);
    }
    if (ends) {
        float low_rank[4] = {};
        if constexpr (kMakesU) {
            const int segments = cut ? kSegments : 1;
            const int first = kOneRowWarps + (swiglu ? share : 0);
            const uint2 u = shares.low_rank_input(first, segments, a.epilogue.rank);
            mma_16816(low_rank, end.lora.b, u.x, u.y);
        } else if (a.epilogue.lora_u != nullptr) {
            end.multiply_low_rank(a, row0, low_rank);
        }
        end.finish(a.epilogue, low_rank, sums);
    }
    if (swiglu) {
        if (!makes_u) {
            shares.put(warp, sums);
        }
        __syncthreads();
        if (!kMakesU && group.swiglu_d != nullptr) {
            if (threadIdx.x < kFusedRotation) {
                const int at = static_cast<int>(threadIdx.x);
                rotation.x[at] = shares.swiglu(at / kDecodeRows * 2, at % kDecodeRows);
            }
            __syncthreads();
            rotation.store(group.swiglu + block * kFusedRotation);
        } else if (share == 0 && !makes_u) {
            shares.store_swiglu(warp, row0, a.n, group.swiglu);
        }
    } else if (ends) {
        OneRowEnd::store(a, row0, sums);
    }
}

// Whether the layout above takes this product.
template <WeightFormat kFormat>
bool fits_one_row(const MatmulArgs& a) {
    if constexpr (kHasOneRow<kFormat>) {
        using Layout = OneRowLayout<kFormat>;
        const int32_t segments = num_segments(a.k, a.segment);
        const auto address =
            reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.w.data);
        bool fits = a.m == 1 && address % 16 == 0 && a.k % Layout::kChunk == 0 &&
                    (segments == 1 || (segments == kSegments && a.segment % Layout::kChunk == 0));
        if constexpr (Layout::kScales > 0) {
            const auto places =
                reinterpret_cast<uintptr_t>(a.w.scales) | static_cast<uintptr_t>(a.w.scale_stride);
            fits = fits && places % Layout::kScales == 0 &&
                   (kFormat != WeightFormat::kInt4 || (a.w.group_shift == 5 && a.w.small_scales));
        }
        return fits;
    }
    return false;
}

// Shared memory that lets a multiprocessor have no more than an even share of the blocks. INT4's
// loop takes the longer the more warps run it, so where it is long, all wait for the fullest one.
inline int64_t even_share_bytes(int64_t blocks) {
    const int64_t share = ceil_div(blocks, device_limits().multiprocessors);
    return shared_memory_limit() / (share + 1) / 16 * 16 + 16;
}

template <WeightFormat kFormat, int kStages>
void launch_one_row_stages(cudaStream_t queue, const MatmulGroup& group, int64_t blocks) {
    using Layout = OneRowLayout<kFormat>;
    const auto kernel = matmul_one_row_kernel<kFormat, kStages, false>;
    int64_t shared = kOneRowWarps * kStages * Layout::kStageBytes;
    if (kFormat == WeightFormat::kInt4 && group.args[0].segment > kStages * Layout::kChunk) {
        shared = std::max(shared, even_share_bytes(blocks));
    }
    allow_shared_memory(kernel, shared);
    MatmulGroup all = group;
    if constexpr (kFormat == WeightFormat::kInt4) {
        undo_shrinking(all);
    }
    launch_early(kernel, dim3(grid_dim(blocks)), kOneRowWarps * 32, shared, queue, all);
}

// MatmulGroup::makes_u.
constexpr int kStagesWithU = 12;

inline void launch_one_row_with_u(cudaStream_t queue, const MatmulGroup& group, int64_t blocks) {
    const auto kernel = matmul_one_row_kernel<WeightFormat::kBF16, kStagesWithU, true>;
    const MatmulArgs& a = group.args[0];
    const int narrow = group.swiglu != nullptr ? 2 : num_segments(a.k, a.segment);
    const auto warps = static_cast<unsigned>(kOneRowWarps + narrow);
    const size_t shared = warps * kStagesWithU * OneRowLayout<WeightFormat::kBF16>::kStageBytes;
    allow_shared_memory(kernel, shared);
    launch_early(kernel, dim3(grid_dim(blocks)), warps * 32, shared, queue, group);
}

// Whether two products can be one of a MatmulGroup with `swiglu`.
template <WeightFormat kFormat>
bool fits_swiglu(const MatmulGroup& group) {
    const MatmulArgs& gate = group.args[0];
    const MatmulArgs& up = group.args[1];
    return group.count == 2 && gate.n == up.n && gate.k == up.k && gate.segment >= gate.k &&
           fits_one_row<kFormat>(gate) && fits_one_row<kFormat>(up);
}

template <WeightFormat kFormat>
bool fit_one_row(const MatmulGroup& group) {
    return std::all_of(group.args, group.args + group.count, fits_one_row<kFormat>);
}

// Returns how many there are.
inline int64_t number_one_row_blocks(MatmulGroup& group) {
    const bool swiglu = group.swiglu != nullptr;  // all blocks are the first product's
    int64_t blocks = 0;
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        const int sharing = swiglu ? 2 : num_segments(a.k, a.segment);
        group.first_block[i] = static_cast<int32_t>(blocks);
        if (!swiglu || i == 0) {
            blocks += ceil_div(ceil_div(a.epilogue.columns, kDecodeRows), kOneRowWarps / sharing);
        }
    }
    group.first_block[group.count] = static_cast<int32_t>(blocks);
    return blocks;
}

// MatmulGroup::makes_u: whether every block can have LoRA's narrow products to itself. Where each
// is alone on its multiprocessor, reading A once more costs it less than a launch before it.
inline bool one_row_makes_u(const MatmulGroup& narrow, const MatmulGroup& wide) {
    if (narrow.count != wide.count || 2 * wide.count > kMaxGroup || !has_wgmma() ||
        !fit_one_row<WeightFormat::kBF16>(wide) || !fit_one_row<WeightFormat::kBF16>(narrow)) {
        return false;
    }
    for (int32_t i = 0; i < wide.count; ++i) {
        const MatmulArgs& a = narrow.args[i];
        const MatmulArgs& b = wide.args[i];
        if (a.epilogue.y != b.epilogue.lora_u || a.x != b.x || a.segment != b.segment ||
            a.epilogue.columns > kDecodeRows) {
            return false;
        }
    }
    MatmulGroup counted = wide;
    return number_one_row_blocks(counted) <= device_limits().multiprocessors;
}

// False: not for these products.
template <WeightFormat kFormat>
bool launch_one_row(cudaStream_t queue, MatmulGroup& group) {
    if constexpr (kHasOneRow<kFormat>) {
        if (!fit_one_row<kFormat>(group)) {
            return false;
        }
        const int64_t blocks = number_one_row_blocks(group);
        // As in launch_decode().
        if constexpr (kFormat == WeightFormat::kBF16) {
            if (group.makes_u) {
                launch_one_row_with_u(queue, group, blocks);
                return true;
            }
            if (blocks <= device_limits().multiprocessors && has_wgmma()) {
                launch_one_row_stages<kFormat, kDeepStages>(queue, group, blocks);
                return true;
            }
        }
        launch_one_row_stages<kFormat, kDecodeStages<kFormat>>(queue, group, blocks);
        return true;
    }
    return false;
}

}  // namespace orbit::cuda
