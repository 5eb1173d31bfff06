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
    if (host.scales != nullptr) {
        const size_t scale_bytes = static_cast<size_t>(host.bytes()) - data_bytes;
        void* scales = arena.take_bytes(name, scale_bytes);
        copy_to_device(stream, scales, host.scales, scale_bytes);
        placed.scales = static_cast<const bf16*>(scales);
    }
    // The host bytes may be a staging buffer that goes away.
    synchronize(stream);
    return placed;
}

}  // namespace orbit
