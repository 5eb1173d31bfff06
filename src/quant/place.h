// Copies a weight into its final place in an arena, in the layout the device's kernels read.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "device/device.h"
#include "quant/quantized_matrix.h"

namespace orbit {

// `host`: host memory, of any alignment, that only has to live until the call returns. The result
// points into `arena`.
QuantizedMatrix place_weight(
    Stream& stream, Arena& arena, std::string_view name, const QuantizedMatrix& host
);

// Puts 4-bit codes (16-byte aligned, in the memory of the stream's device) of matrices like `shape`
// into the order of quant/arrange.h, in place; place_weight has done so. Nothing to do on a CPU,
// whose kernels read the file's order, and for other formats.
void arrange_codes(Stream& stream, const QuantizedMatrix& shape, void* data, size_t bytes);

// Matrices of one shape and format, placed at one distance from each other: the experts of a layer.
// The first one decides; another one of a different kind gets a place of its own.
class MatrixStack {
  public:
    MatrixStack(Arena& arena, std::string name, int64_t count)
        : arena_(&arena), name_(std::move(name)), count_(count) {}

    // As place_weight.
    QuantizedMatrix add(Stream& stream, const QuantizedMatrix& host);

  private:
    Arena* arena_;
    std::string name_;
    int64_t count_;
    int64_t used_ = 0;
    QuantizedMatrix first_;
    std::byte* data_ = nullptr;
    std::byte* scales_ = nullptr;
};

}  // namespace orbit
