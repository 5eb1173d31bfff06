#include "quant/place.h"

namespace orbit {

QuantizedMatrix place_weight(
    Stream& stream, Arena& arena, std::string_view name, const QuantizedMatrix& host
) {
    QuantizedMatrix placed = host;
    const auto data_bytes = static_cast<size_t>(host.rows * row_bytes(host.format, host.cols));
    void* data = arena.take_bytes(name, data_bytes);
    copy_to_device(stream, data, host.data, data_bytes);
    placed.data = data;
    const auto scale_bytes = static_cast<size_t>(host.scale_bytes());
    if (scale_bytes > 0) {
        const bool is_int4 = host.format == WeightFormat::kInt4;
        void* scales = arena.take_bytes(name, scale_bytes);
        const void* from = is_int4 ? host.scales : host.block_scales;
        copy_to_device(stream, scales, from, scale_bytes);
        if (is_int4) {
            placed.scales = static_cast<const bf16*>(scales);
        } else {
            placed.block_scales = scales;
        }
    }
    // The host bytes may be a staging buffer that goes away.
    synchronize(stream);
    return placed;
}

}  // namespace orbit
