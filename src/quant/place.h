// Copies a weight into its final place in an arena, in the layout the device's kernels read.
#pragma once

#include <string_view>

#include "device/device.h"
#include "quant/quantized_matrix.h"

namespace orbit {

// `host`: host memory, of any alignment, that only has to live until the call returns. The result
// points into `arena`.
QuantizedMatrix place_weight(
    Stream& stream, Arena& arena, std::string_view name, const QuantizedMatrix& host
);

}  // namespace orbit
