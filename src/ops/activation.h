// SwiGLU: y = silu(gate) * up, fp32 inside, one rounding.
#pragma once

#include "device/device.h"

namespace orbit {

void swiglu(Stream& stream, Tensor gate, Tensor up, Tensor y);  // all [T, I]
void swiglu_backward(Stream& stream, Tensor gate, Tensor up, Tensor dy, Tensor dgate, Tensor dup);

// y = a + b, elementwise (gradient accumulation of a residual branch); y may be a.
void add(Stream& stream, Tensor a, Tensor b, Tensor y);

}  // namespace orbit
