#include "quant/place.h"

#include <cstring>

#include "quant/arrange.h"

namespace orbit {

namespace {

constexpr size_t kAlignment = 256;

size_t aligned(int64_t bytes) {
    return (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment;
}

size_t data_bytes(const QuantizedMatrix& w) {
    return static_cast<size_t>(w.rows * row_bytes(w.format, w.cols));
}

void copy_bytes(Stream& stream, MemoryPlace place, void* to, const void* from, size_t bytes) {
    if (place == MemoryPlace::kHost) {
        std::memcpy(to, from, bytes);
    } else {
        copy_to_device(stream, to, from, bytes);
    }
}

// `scales` is null when the format has none.
QuantizedMatrix copied_to(
    Stream& stream, MemoryPlace place, const QuantizedMatrix& host, void* data, void* scales
) {
    QuantizedMatrix placed = host;
    copy_bytes(stream, place, data, host.data, data_bytes(host));
    arrange_codes(stream, host, data, data_bytes(host));
    placed.data = data;
    if (scales != nullptr) {
        const bool is_int4 = host.format == WeightFormat::kInt4;
        const void* from = is_int4 ? host.scales : host.block_scales;
        copy_bytes(stream, place, scales, from, static_cast<size_t>(host.scale_bytes()));
        placed.scales = is_int4 ? static_cast<const bf16*>(scales) : nullptr;
        placed.block_scales = is_int4 ? nullptr : scales;
    }
    // The host bytes may be a staging buffer that goes away.
    synchronize(stream);
    return placed;
}

}  // namespace

void arrange_codes(Stream& stream, const QuantizedMatrix& shape, void* data, size_t bytes) {
    const bool has_codes = shape.format == WeightFormat::kInt4 ||
                           shape.format == WeightFormat::kMxFp4 ||
                           shape.format == WeightFormat::kNvFp4;
    if (has_codes && is_arranged(shape.cols) && !stream.is_cpu()) {
        cuda::arrange_codes(stream, data, bytes);
    }
}

QuantizedMatrix place_weight(
    Stream& stream, Arena& arena, std::string_view name, const QuantizedMatrix& host
) {
    void* data = arena.take_bytes(name, data_bytes(host));
    const auto scale_bytes = static_cast<size_t>(host.scale_bytes());
    void* scales = scale_bytes > 0 ? arena.take_bytes(name, scale_bytes) : nullptr;
    QuantizedMatrix placed = copied_to(stream, arena.place(), host, data, scales);
    placed.small_scales =
        host.format == WeightFormat::kInt4 && !stream.is_cpu() && has_small_scales(host);
    return placed;
}

QuantizedMatrix MatrixStack::add(Stream& stream, const QuantizedMatrix& host) {
    if (used_ == 0) {
        first_ = host;
        const auto count = static_cast<size_t>(count_);
        data_ = static_cast<std::byte*>(
            arena_->take_bytes(name_, count * aligned(static_cast<int64_t>(data_bytes(host))))
        );
        if (host.scale_bytes() > 0) {
            scales_ = static_cast<std::byte*>(
                arena_->take_bytes(name_, count * aligned(host.scale_bytes()))
            );
        }
    }
    if (used_ == count_ || host.format != first_.format || host.rows != first_.rows ||
        host.cols != first_.cols || host.group_size != first_.group_size) {
        return place_weight(stream, *arena_, name_, host);
    }
    const auto at = static_cast<size_t>(used_++);
    void* data = data_ + at * aligned(static_cast<int64_t>(data_bytes(host)));
    void* scales = scales_ == nullptr ? nullptr : scales_ + at * aligned(host.scale_bytes());
    return copied_to(stream, arena_->place(), host, data, scales);
}

}  // namespace orbit
