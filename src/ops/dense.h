// The one linear op: frozen quantised base, optional adapter, bias and residual, one rounding.
//
//   no adapter:  y = round( x W^T + bias + residual )
//   LoRA (Hu et al. 2021):  y = round( x W^T + s * (round(x A^T) B^T) + bias + residual )
//   OFT  (Qiu et al. 2023, input-centric form of OFTv2):  y = round( round(x + x D) W^T + bias +
//   residual ),
//        D = R - I block-diagonal, R the (Neumann-)Cayley rotation; PEFT's orientation (x R, then
//        W).
// Products of bf16 values accumulate in fp32 in one fixed order per output element that depends on
// the weight's shape and on nothing else: not on T, not on the thread count. fp32 epilogue in the
// order written.
#pragma once

#include <span>

#include "device/device.h"
#include "quant/quantized_matrix.h"

namespace orbit {

enum class AdapterKind : uint8_t { kNone, kLora, kOft };

// The compute copies of one site's adapter, in the compute type; views into an adapter slot.
struct AdapterView {
    AdapterKind kind = AdapterKind::kNone;
    Tensor lora_a;         // [r, in]
    Tensor lora_b;         // [out, r]
    float lora_scale = 0;  // alpha / r, or alpha / sqrt(r)
    Tensor oft_d;  // [in / b, b, b]: row i, column j of block n adds x[n b + i] * D[n][i][j] to
                   // output n b + j
};

// float32 gradient sums that backward adds to: same shapes as the view.
struct AdapterGrad {
    float* lora_a = nullptr;
    float* lora_b = nullptr;
    float* oft_d = nullptr;
};

struct LinearParams {
    Tensor x;                     // [T, in]
    QuantizedMatrix w;            // [out, in]
    const float* bias = nullptr;  // [out], or null
    AdapterView adapter;
    Tensor residual;  // [T, out], or undefined
    // The next op norms y for layers with OFT adapters: a kernel may leave it what it needs for
    // that.
    bool before_rotations = false;
    // take_lora_u(), or undefined: linear() leaves LoRA's round(x A^T) there, and linear_backward()
    // reads it instead of computing it again.
    Tensor lora_u;
};

// Scratch for LinearParams::lora_u: [T, r] in the compute type, r rounded up to 16 on a GPU.
Tensor take_lora_u(Stream& stream, const LinearParams& p);

void linear(
    Stream& stream, const LinearParams& p, Tensor y
);  // y: [T, out]; may be the residual's memory

// linear() of several layers on as many rows each (q, k and v; gate and up): the same bits, in
// fewer launches on a GPU. y[i] is no other one's input.
void linear_group(Stream& stream, std::span<const LinearParams> params, std::span<const Tensor> y);

// What linear_swiglu() has left in y.
enum class SwigluResult : uint8_t {
    kGateAndUp,  // y[0] and y[1]
    kSwiglu,     // y[0] is silu(gate) up, with the bits of swiglu(), and y[1] is anything
    kRotated,    // y[0] is that rotated by `oft_d`, with the bits of linear()
};

// linear_group() of two layers of one shape, gate and up, and what a kernel of a GPU that takes
// both can do in its end. oft_d: AdapterView::oft_d of the layer that reads silu(gate) up, or
// undefined.
SwigluResult linear_swiglu(
    Stream& stream,
    std::span<const LinearParams> params,
    std::span<const Tensor> y,
    const Tensor& oft_d = {}
);

// dx (+)= dy through base and adapter; adapter gradients are added to `grad` in token order (null
// members: skipped). dx undefined: only the adapter gradients. The residual's gradient is dy itself
// and is the caller's to add.
void linear_backward(
    Stream& stream,
    const LinearParams& p,
    Tensor dy,
    Tensor dx,
    bool accumulate_dx,
    const AdapterGrad& grad
);

// linear_backward() of several layers on one x (q, k and v; gate and up): dx (+)= their sum, which
// a GPU may round once instead of for each of them.
void linear_group_backward(
    Stream& stream,
    std::span<const LinearParams> params,
    std::span<const Tensor> dy,
    Tensor dx,
    bool accumulate_dx,
    std::span<const AdapterGrad> grads
);

// logits[i, v] = h[i] . W[v] in fp32, not rounded, in the same order as linear: rows [0, N) of h,
// all of W. Used by the head in chunks; logits: float32 [N, V].
void linear_f32_out(Stream& stream, Tensor h, const QuantizedMatrix& w, Tensor logits);
// dh = dlogits W (dlogits in float32 are rounded to the compute type first). Overwrites dh: [N, D].
void linear_f32_out_backward(Stream& stream, Tensor dlogits, const QuantizedMatrix& w, Tensor dh);

}  // namespace orbit
