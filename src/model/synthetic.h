// A model of a published shape with random weights, made on the device: for benchmarks and memory
// tests without files. It has no tokenizer and no stop ids. Weights are drawn so that activations
// keep a sane size.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "model/model.h"

namespace orbit {

std::vector<std::string> synthetic_shapes();  // "qwen3-0.6b", ...

// UserError for an unknown shape (with the nearest name).
ModelConfig synthetic_config(const std::string& shape);

// format: "bf16", "int4", "fp8", "mxfp4" or "nvfp4" (linears; embedding, head and routers stay
// BF16). host_layers: as in LoadOptions.
std::unique_ptr<Model> make_synthetic_model(
    Stream& stream, const std::string& shape, const std::string& format, int64_t host_layers = 0
);

}  // namespace orbit
