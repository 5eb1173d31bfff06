// Products of many rows with packed weights on Hopper: the weights are decoded to scratch memory
// and multiplied there by the member for bf16 (matmul_tma_cuda.cu). Where they do not fit the room
// together, as many outputs at a time as do; no sum is cut, so the bits are those of every member.
#include "device/cuda/rows.cuh"
#include "ops/decode_weight_cuda.cuh"
#include "ops/decoded_weights.h"
#include "ops/matmul_cuda.cuh"

namespace orbit::cuda {
namespace {

constexpr int32_t kOutputStep = 256;  // cuts lie at multiples of it: whole tiles, whole FP8 blocks

// All rows of w, or a range of their columns.
struct DecodePiece {
    WeightView w;
    int32_t first = 0;       // columns / 8
    int32_t row_eights = 0;  // columns / 8
    bf16* to = nullptr;
};

struct DecodePieces {
    DecodePiece piece[kMaxGroup];
    int32_t first_block[kMaxGroup + 1] = {};
    int32_t count = 0;
};

template <WeightFormat kFormat>
__global__ void __launch_bounds__(kUnpackThreads)
    decode_pieces_kernel(const __grid_constant__ DecodePieces pieces) {
    release_successor();
    wait_for_predecessor();
    const auto block = static_cast<int32_t>(blockIdx.x);
    int32_t i = 0;
    while (i + 1 < pieces.count && block >= pieces.first_block[i + 1]) {
        ++i;
    }
    const DecodePiece& p = pieces.piece[i];
    decode_share<kFormat>(p.w, p.first, p.row_eights, block - pieces.first_block[i], p.to);
}

template <WeightFormat kFormat>
void launch_decode(cudaStream_t queue, const DecodePieces& pieces) {
    const dim3 grid(grid_dim(pieces.first_block[pieces.count]));
    launch_early(decode_pieces_kernel<kFormat>, grid, kUnpackThreads, 0, queue, pieces);
}

void decode_pieces(cudaStream_t queue, WeightFormat format, const DecodePieces& pieces) {
    switch (format) {
        case WeightFormat::kInt4:
            return launch_decode<WeightFormat::kInt4>(queue, pieces);
        case WeightFormat::kQ8_0:
            return launch_decode<WeightFormat::kQ8_0>(queue, pieces);
        case WeightFormat::kQ4_0:
            return launch_decode<WeightFormat::kQ4_0>(queue, pieces);
        case WeightFormat::kQ4_1:
            return launch_decode<WeightFormat::kQ4_1>(queue, pieces);
        case WeightFormat::kFp8:
            return launch_decode<WeightFormat::kFp8>(queue, pieces);
        case WeightFormat::kMxFp4:
            return launch_decode<WeightFormat::kMxFp4>(queue, pieces);
        case WeightFormat::kNvFp4:
            return launch_decode<WeightFormat::kNvFp4>(queue, pieces);
        default:
            CHECK(false, "(a packed format)");
    }
}

int64_t output_bytes(const MatmulArgs& a) {
    return int64_t{2} * a.k;  // of the weight, in bf16
}

// Outputs [begin, begin + count) of a product, its weight decoded to `weight`.
MatmulArgs outputs_of(
    const MatmulArgs& a, Direction direction, int32_t begin, int32_t count, const bf16* weight
) {
    const bool forward = direction == Direction::kForward;
    MatmulArgs part = a;
    part.n = count;
    part.w = WeightView{};
    part.w.data = reinterpret_cast<const uint8_t*>(weight);
    part.w.rows = forward ? count : a.k;
    part.w.cols = forward ? a.k : count;
    part.w.row_bytes = int64_t{2} * part.w.cols;
    Epilogue& e = part.epilogue;
    e.columns = count;
    e.y = static_cast<char*>(e.y) + int64_t{begin} * (e.f32_out ? 4 : 2);
    e.bias = e.bias == nullptr ? nullptr : e.bias + begin;
    e.residual = e.residual == nullptr ? nullptr : e.residual + begin;
    if (e.lora_b != nullptr) {
        e.lora_b += forward ? int64_t{begin} * e.ldb : begin;
    }
    return part;
}

DecodePiece piece_of(
    const MatmulArgs& a,
    WeightFormat format,
    Direction direction,
    int32_t begin,
    int32_t count,
    bf16* to
) {
    if (direction == Direction::kForward) {
        return {rows_of_weight(a.w, format, begin, count), 0, a.w.cols / 8, to};
    }
    return {a.w, begin / 8, count / 8, to};
}

// Collects pieces of products that fit the room together, then decodes and multiplies them.
class DecodedProducts {
  public:
    DecodedProducts(
        cudaStream_t queue, WeightFormat format, Direction direction, bf16* room, int64_t bytes
    )
        : queue_(queue), format_(format), direction_(direction), room_(room), bytes_(bytes) {}

    void add(const MatmulArgs& a) {
        for (int32_t begin = 0; begin < a.n;) {
            const int64_t fit = (bytes_ - used_) / output_bytes(a);
            int32_t count = a.n - begin;
            if (count > fit) {
                count = static_cast<int32_t>(fit / kOutputStep) * kOutputStep;
            }
            if (count == 0 || products_.count == kMaxGroup) {
                CHECK(products_.count > 0, "(some outputs fit the room)");
                run();
                continue;
            }
            add_piece(a, begin, count);
            begin += count;
        }
    }

    void run() {
        if (products_.count > 0) {
            decode_pieces(queue_, format_, pieces_);
            matmul_pairs(queue_, direction_, products_);
        }
        pieces_ = {};
        products_ = {};
        used_ = 0;
    }

  private:
    void add_piece(const MatmulArgs& a, int32_t begin, int32_t count) {
        bf16* to = room_ + used_ / 2;
        products_.args[products_.count++] = outputs_of(a, direction_, begin, count, to);
        DecodePiece& piece = pieces_.piece[pieces_.count];
        piece = piece_of(a, format_, direction_, begin, count, to);
        const int64_t blocks =
            ceil_div(int64_t{piece.w.rows} * piece.row_eights, int64_t{kUnpackEights});
        const int32_t first = pieces_.first_block[pieces_.count];
        pieces_.first_block[++pieces_.count] = first + static_cast<int32_t>(blocks);
        used_ += count * output_bytes(a);
    }

    cudaStream_t queue_;
    WeightFormat format_;
    Direction direction_;
    bf16* room_;
    int64_t bytes_;
    int64_t used_ = 0;
    DecodePieces pieces_{};
    MatmulGroup products_;
};

bool fits_decoded(WeightFormat format, const MatmulGroup& group) {
    const bool packed = format >= WeightFormat::kInt4 && format <= WeightFormat::kNvFp4;
    if (!packed || group.args[0].m < kDecodeFirstRows || !fits_pairs(group)) {
        return false;
    }
    for (int32_t i = 0; i < group.count; ++i) {
        const MatmulArgs& a = group.args[i];
        if (!is_aligned(a, 32) || a.epilogue.columns != a.n ||
            kOutputStep * output_bytes(a) > kDecodedBytes) {
            return false;
        }
    }
    return true;
}

}  // namespace

WeightView rows_of_weight(WeightView w, WeightFormat format, int64_t begin, int64_t count) {
    w.data += begin * w.row_bytes;
    if (w.scales != nullptr) {
        w.scales += (format == WeightFormat::kFp8 ? begin / 128 : begin) * w.scale_stride;
    }
    w.rows = static_cast<int32_t>(count);
    return w;
}

bool decodes_first(const Device& device) {
    int major = 0;
    if (!device.is_cpu()) {
        CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.ordinal)
        );
    }
    return major == 9;
}

void weight_matmul(Stream& stream, WeightFormat format, Direction direction, MatmulGroup& group) {
    if (!fits_decoded(format, group)) {
        return matmul_group(queue_of(stream), format, direction, group);
    }
    int64_t elements = 0;
    for (int32_t i = 0; i < group.count; ++i) {
        elements += int64_t{group.args[i].n} * group.args[i].k;
    }
    const ScratchScope scope(stream.scratch);
    const int64_t bytes = decoded_bytes(elements);
    auto* room = static_cast<bf16*>(stream.scratch.take_bytes(static_cast<size_t>(bytes)));
    DecodedProducts products(queue_of(stream), format, direction, room, bytes);
    for (int32_t i = 0; i < group.count; ++i) {
        products.add(group.args[i]);
    }
    products.run();
}

}  // namespace orbit::cuda
