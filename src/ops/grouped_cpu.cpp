// The experts' linear layers on the CPU: each expert's rows alone, the weight decoded inside the
// product, or decoded to bf16 first. The two differ in nothing: a weight's value is the bf16 one in
// every format, and an output element is one chain over the depth, wherever a matrix is cut into
// outputs.
#include <algorithm>
#include <cstring>

#include "ops/cuda_ops.h"
#include "ops/dense_matmul.h"
#include "ops/moe.h"

namespace orbit {
namespace {

constexpr int64_t kColumnStep = 32;  // of a panel for dgrad: no format's group is cut

LinearParams expert_params(
    const GroupedLinearParams& p, size_t expert, int64_t begin, int64_t end
) {
    LinearParams linear;
    linear.x = p.x.slice(begin, end);
    linear.w = p.experts[expert];
    if (!p.adapters.empty()) {
        linear.adapter = p.adapters[expert];
    }
    return linear;
}

bool is_packed(WeightFormat format) {
    return format == WeightFormat::kInt4 || format == WeightFormat::kFp8 ||
           format == WeightFormat::kMxFp4 || format == WeightFormat::kNvFp4;
}

// Rows [row, row + rows), columns [column, column + cols) of w, decoded to `out`.
QuantizedMatrix decode(
    Stream& stream,
    const LinearParams& p,
    int64_t row,
    int64_t rows,
    int64_t column,
    int64_t cols,
    DequantBuffer& buffer,
    bf16* out
) {
    DecodePart part;
    part.w = p.w;
    part.row = row;
    part.column = column;
    part.cols = cols;
    // An odd depth takes the products without pairs, which do not flush denormals.
    part.pairs = p.x.dtype == DType::kBF16 && p.w.rows % 2 == 0 && p.w.cols % 2 == 0;
    part.out = out;
    const CpuIsa isa = stream.device.isa;
    stream.threads().parallel_for(rows, 16, [&](int64_t begin, int64_t end, int) {
        ORBIT_CALL_KERNEL(isa, decode_rows, (part, begin, end));
    });
    buffer.count_decoded();
    QuantizedMatrix w;
    w.format = WeightFormat::kBF16;
    w.rows = rows;
    w.cols = cols;
    w.data = out;
    return w;
}

// The whole matrix as bf16 in the buffer; undefined when it does not fit.
QuantizedMatrix decoded_matrix(Stream& stream, const LinearParams& p, DequantBuffer& buffer) {
    bool there = false;
    bf16* place = buffer.place(p.w, there);
    if (place == nullptr) {
        return {};
    }
    if (!there) {
        return decode(stream, p, 0, p.w.rows, 0, p.w.cols, buffer, place);
    }
    QuantizedMatrix w;
    w.format = WeightFormat::kBF16;
    w.rows = p.w.rows;
    w.cols = p.w.cols;
    w.data = place;
    return w;
}

// Columns [column, column + width) of every row, from `wide` to `narrow` or back.
void copy_columns(
    Stream& stream, const Tensor& wide, int64_t column, const Tensor& narrow, bool to_wide
) {
    const int64_t item = dtype_bytes(wide.dtype);
    const auto bytes = static_cast<size_t>(narrow.cols() * item);
    stream.threads().parallel_for(narrow.rows(), 16, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
            auto* w = static_cast<char*>(wide.data) + (r * wide.cols() + column) * item;
            auto* n = static_cast<char*>(narrow.data) + r * narrow.cols() * item;
            std::memcpy(to_wide ? w : n, to_wide ? n : w, bytes);
        }
    });
}

// Forward, a few outputs (rows of the weight) at a time.
void linear_in_panels(
    Stream& stream, const LinearParams& p, DequantBuffer& buffer, int64_t step, const Tensor& y
) {
    buffer.clear();
    for (int64_t n = 0; n < p.w.rows; n += step) {
        const ScratchScope scope(stream.scratch);
        const int64_t count = std::min(step, p.w.rows - n);
        LinearParams part = p;
        part.w = decode(stream, p, n, count, 0, p.w.cols, buffer, buffer.memory());
        if (p.adapter.kind == AdapterKind::kLora) {
            part.adapter.lora_b = p.adapter.lora_b.slice(n, n + count);
        }
        const Tensor out = stream.scratch.take(y.dtype, {y.rows(), count});
        linear(stream, part, out);
        copy_columns(stream, y, n, out, true);
    }
}

// dx through the base (and LoRA), a few of its columns at a time.
void dgrad_in_panels(
    Stream& stream,
    const LinearParams& p,
    DequantBuffer& buffer,
    int64_t step,
    const Tensor& dy,
    const Tensor& dx,
    bool accumulate
) {
    buffer.clear();
    for (int64_t c = 0; c < p.w.cols; c += step) {
        const ScratchScope scope(stream.scratch);
        const int64_t count = std::min(step, p.w.cols - c);
        LinearParams part = p;
        part.w = decode(stream, p, 0, p.w.rows, c, count, buffer, buffer.memory());
        if (p.adapter.kind == AdapterKind::kLora) {
            const Tensor& a = p.adapter.lora_a;
            part.adapter.lora_a = stream.scratch.take(a.dtype, {a.rows(), count});
            copy_columns(stream, a, c, part.adapter.lora_a, false);
        } else {
            part.adapter = {};
        }
        const Tensor out = stream.scratch.take(dx.dtype, {dx.rows(), count});
        part.x = out;  // only its shape is looked at: no adapter gradient is asked for here
        if (accumulate) {
            copy_columns(stream, dx, c, out, false);
        }
        linear_backward(stream, part, dy, out, accumulate, {});
        copy_columns(stream, dx, c, out, true);
    }
}

void backward_in_panels(
    Stream& stream,
    const LinearParams& p,
    DequantBuffer& buffer,
    int64_t step,
    const Tensor& dy,
    const Tensor& dx,
    bool accumulate,
    const AdapterGrad& grad
) {
    if (p.adapter.kind == AdapterKind::kOft) {
        const ScratchScope scope(stream.scratch);
        const Tensor g = stream.scratch.take(dx.dtype, {dx.rows(), dx.cols()});
        dgrad_in_panels(stream, p, buffer, step, dy, g, false);
        rotation_backward(stream, p.x, p.adapter.oft_d, g, dx, accumulate, grad.oft_d);
        return;
    }
    linear_backward(stream, p, dy, {}, false, grad);  // LoRA's gradients; they read no base weight
    dgrad_in_panels(stream, p, buffer, step, dy, dx, accumulate);
}

void forward_expert(Stream& stream, LinearParams p, DequantBuffer* buffer, const Tensor& y) {
    if (buffer != nullptr && is_packed(p.w.format)) {
        const QuantizedMatrix whole = decoded_matrix(stream, p, *buffer);
        const int64_t panel = buffer->bytes() / (2 * p.w.cols);
        if (whole.defined()) {
            p.w = whole;
        } else if (panel > 0) {
            return linear_in_panels(stream, p, *buffer, panel, y);
        }
    }
    linear(stream, p, y);
}

void backward_expert(
    Stream& stream,
    LinearParams p,
    DequantBuffer* buffer,
    const Tensor& dy,
    const Tensor& dx,
    bool accumulate,
    const AdapterGrad& grad
) {
    if (buffer != nullptr && is_packed(p.w.format)) {
        const QuantizedMatrix whole = decoded_matrix(stream, p, *buffer);
        const int64_t panel = buffer->bytes() / (2 * p.w.rows) / kColumnStep * kColumnStep;
        if (whole.defined()) {
            p.w = whole;
        } else if (panel > 0) {
            return backward_in_panels(stream, p, *buffer, panel, dy, dx, accumulate, grad);
        }
    }
    linear_backward(stream, p, dy, dx, accumulate, grad);
}

}  // namespace

bf16* DequantBuffer::place(const QuantizedMatrix& w, bool& decoded) {
    const int64_t bytes = w.rows * w.cols * 2;
    if (bytes != slot_bytes_) {
        slots_.clear();
        slot_bytes_ = bytes;
    }
    const auto at = [&](size_t slot) { return memory_ + slot * static_cast<size_t>(bytes / 2); };
    size_t oldest = 0;
    for (size_t i = 0; i < slots_.size(); ++i) {
        if (slots_[i].weight == w.data) {
            slots_[i].used = ++clock_;
            decoded = true;
            return at(i);
        }
        oldest = slots_[i].used < slots_[oldest].used ? i : oldest;
    }
    decoded = false;
    if (static_cast<int64_t>(slots_.size() + 1) * bytes <= bytes_) {
        oldest = slots_.size();
        slots_.push_back({});
    } else if (slots_.empty()) {
        return nullptr;
    }
    slots_[oldest] = {w.data, ++clock_};
    return at(oldest);
}

void stage_experts(
    Stream& stream, const int32_t* offsets, int32_t num_experts, std::span<const ExpertArray> arrays
) {
    CHECK_LE(arrays.size(), kExpertArraysMax);
    if (!stream.is_cpu()) {
        cuda::stage_experts(stream, offsets, num_experts, arrays);
        return;
    }
    stream.threads().parallel_for(num_experts, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t e = begin; e < end; ++e) {
            for (const ExpertArray& a : arrays) {
                if (offsets[e] < offsets[e + 1]) {
                    std::memcpy(
                        a.to + e * a.to_distance,
                        a.from + e * a.from_distance,
                        static_cast<size_t>(a.bytes)
                    );
                }
            }
        }
    });
}

void grouped_linear(Stream& stream, const GroupedLinearParams& p, Tensor y) {
    if (!stream.is_cpu()) {
        cuda::grouped_linear_group(stream, std::span(&p, 1), std::span(&y, 1));
        return;
    }
    for (size_t e = 0; e < p.experts.size(); ++e) {
        const int64_t begin = p.offsets[e];
        const int64_t end = p.offsets[e + 1];
        if (begin < end) {
            const LinearParams expert = expert_params(p, e, begin, end);
            forward_expert(stream, expert, p.dequant, y.slice(begin, end));
        }
    }
}

void grouped_linear_group(
    Stream& stream, std::span<const GroupedLinearParams> params, std::span<const Tensor> y
) {
    CHECK_EQ(params.size(), y.size());
    if (!stream.is_cpu()) {
        cuda::grouped_linear_group(stream, params, y);
        return;
    }
    for (size_t i = 0; i < params.size(); ++i) {
        grouped_linear(stream, params[i], y[i]);
    }
}

void grouped_linear_backward(
    Stream& stream,
    const GroupedLinearParams& p,
    Tensor dy,
    Tensor dx,
    bool accumulate_dx,
    std::span<const AdapterGrad> grads
) {
    if (!stream.is_cpu()) {
        cuda::grouped_linear_backward(stream, p, dy, dx, accumulate_dx, grads);
        return;
    }
    for (size_t e = p.experts.size(); e-- > 0;) {
        const int64_t begin = p.offsets[e];
        const int64_t end = p.offsets[e + 1];
        if (begin < end) {
            backward_expert(
                stream,
                expert_params(p, e, begin, end),
                p.dequant,
                dy.slice(begin, end),
                dx.slice(begin, end),
                accumulate_dx,
                grads.empty() ? AdapterGrad{} : grads[e]
            );
        }
    }
}

}  // namespace orbit
