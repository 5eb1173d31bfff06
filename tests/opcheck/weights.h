// Random weights in every format, with their values worked out here, apart from the library.
#pragma once

#include <cstdint>
#include <vector>

#include "opcheck/opcheck.h"
#include "quant/quantized_matrix.h"

namespace orbit::opcheck {

struct TestWeight {
    QuantizedMatrix shape;  // no data: format, rows, cols, group_size
    std::vector<uint8_t> data;
    std::vector<uint8_t> scales;      // one byte when the format has none
    std::vector<float> bf16_values;   // [rows, cols]
    std::vector<float> exact_values;  // the f32 check mode's
};

TestWeight make_weight(WeightFormat format, int64_t rows, int64_t cols, Random& random);

// The data of weights as an input, with the f32 check mode's values or those of bf16.
Input weight_input(const TestWeight& w, bool f32);

// The matrix again, with its bytes at these tensors.
QuantizedMatrix at_tensors(const QuantizedMatrix& shape, const Tensor& data, const Tensor& scales);

}  // namespace orbit::opcheck
