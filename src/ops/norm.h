// RMSNorm (Zhang & Sennrich 2019), "form B" of models.md 1.1: y = round(w * x * rsqrt(mean(x^2) +
// eps)), one rounding to the compute type, everything inside in fp32. The sum of squares runs in 16
// fixed lanes, then a fixed tree.
#pragma once

#include "device/device.h"

namespace orbit {

// x, y: [T, D] in the compute type (bf16, or f32 in check mode). weight: float32 [D].
void rms_norm(Stream& stream, Tensor x, const float* weight, float eps, Tensor y);

// dx (+)= d loss / dx from dy, recomputing the row's scale from x. dx += when accumulate.
void rms_norm_backward(
    Stream& stream, Tensor x, const float* weight, float eps, Tensor dy, Tensor dx, bool accumulate
);

}  // namespace orbit
