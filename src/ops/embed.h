// Embedding lookup. y[t] = table row ids[t], decoded to the compute type. ids: int32 [T] on the
// device, in [0, rows).
#pragma once

#include "device/device.h"
#include "quant/quantized_matrix.h"

namespace orbit {

void embed(
    Stream& stream, const QuantizedMatrix& table, const int32_t* ids, Tensor y
);  // y: [T, cols]

// y[i] = x[index[i]] for rows of any compute type; and its adjoint x[index[i]] += y[i] (indices
// distinct, others untouched).
void gather_rows(Stream& stream, Tensor x, const int32_t* index, Tensor y);
void scatter_rows(Stream& stream, Tensor y, const int32_t* index, Tensor x);

}  // namespace orbit
