// What experts in host memory (moe.host_layers) cost: the bytes that cross the link, and its rate.
#pragma once

#include <cstdint>

#include "device/device.h"
#include "model/model.h"

namespace orbit {

// Experts of a layer that `tokens` tokens choose, if they choose by chance: E (1 - (1 - K/E)^T).
double active_experts(int64_t experts, int64_t selected, int64_t tokens);

// Bytes from host memory in one forward over `tokens` tokens, if they choose by chance. A training
// batch needs twice that: its recomputed layers serve the gradient too.
double streamed_bytes(const ModelConfig& config, int64_t host_bytes, int64_t tokens);

// Bytes/s from page-locked host memory to the device, measured with plain copies of `bytes` into
// the stream's scratch.
double host_link_rate(Stream& stream, int64_t bytes);

}  // namespace orbit
