// Packs one matrix of a checkpoint into a published low-precision layout, for orbit quantize.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "base/thread_pool.h"
#include "model/checkpoint.h"

namespace orbit {

// "int4", "fp8", "mxfp4" or "nvfp4"; UserError for anything else.
WeightFormat parse_quantized_format(std::string_view name);

struct PackedTensor {
    std::string suffix;  // of the module's name: ".weight_packed"
    std::string dtype;
    std::vector<int64_t> shape;
    std::vector<std::byte> bytes;
};

struct PackedMatrix {
    std::vector<PackedTensor> tensors;
    double relative_error = 0;  // RMS of the difference over RMS of the weights
};

// `weight`: BF16, F16 or F32, [out, in]. Layouts:
//   int4    compressed-tensors pack-quantized, groups of 32, BF16 scales
//   fp8     blocks of 128 x 128, BF16 weight_scale_inv, as the published Qwen3 FP8 files
//   mxfp4   compressed-tensors mxfp4-pack-quantized
//   nvfp4   compressed-tensors nvfp4-pack-quantized
// UserError when the width does not fit the format's groups.
PackedMatrix pack_matrix(ThreadPool& threads, const StoredWeight& weight, WeightFormat format);

// The quantization_config that belongs to it, as JSON text. `plain`: modules of linear layers that
// stayed as they were.
std::string quantization_config_text(WeightFormat format, const std::vector<std::string>& plain);

}  // namespace orbit
