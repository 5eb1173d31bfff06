// Calls a function with the element type of activations: float (check mode) or bf16.
#pragma once

#include "base/error.h"
#include "base/number_formats.h"
#include "device/tensor.h"

namespace orbit {

// f(T{}) with T the stored type; f is a generic lambda.
template <typename F>
void with_compute_type(DType type, F&& f) {
    if (type == DType::kBF16) {
        f(bf16{});
        return;
    }
    CHECK(type == DType::kF32, "(activations are bf16 or float32)");
    f(float{});
}

}  // namespace orbit
