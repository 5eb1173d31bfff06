// opcheck: one program that checks every op on every device against a plain float64 reference.
//
// A case describes one op at one shape: its inputs (made on the host, copied to the stream's
// device by the framework), its outputs, how to run it, and the same mathematics in float64. From
// that the framework derives every mode:
//   forward      outputs against the reference
//   grad         backward against central differences of the reference
//   invariance   rows computed alone, in subsets, in another order, on other thread counts: equal
//   bits determinism  forward and backward twice: equal bits perf         time, bytes, GFLOP/s
//   (only when asked for)
// To add an op: write X_cases.cpp with `void add_X_cases(CaseList& cases)`, declare it in cases.h
// and list it in main.cpp.
#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "device/device.h"
#include "quant/quantized_matrix.h"

namespace orbit::opcheck {

using Values = std::vector<std::vector<double>>;  // one flat array per input or output

struct Input {
    std::string name;
    DType dtype = DType::kF32;
    std::vector<int64_t> shape;
    std::vector<float> values;   // what the reference sees; rounded to dtype by `input()`
    std::vector<uint8_t> bytes;  // what is uploaded instead of `values`, when not empty
    QuantizedMatrix weight;      // whose data `bytes` are; no format with 4-bit codes: none
    bool per_row = false;        // the first axis is the batch's rows
    bool grad = false;           // backward computes d(this)
    DType grad_dtype = DType::kF32;
};

struct Output {
    std::string name;
    DType dtype = DType::kF32;
    std::vector<int64_t> shape;
    bool per_row = true;
};

using Tensors = std::vector<Tensor>;

struct Case {
    std::string op;
    std::string name;
    std::vector<Input> inputs;
    std::vector<Output> outputs;

    // Tensors in the order of inputs and outputs; their first axis may be shorter than declared
    // (row subsets), so take the number of rows from them.
    std::function<void(Stream&, const Tensors& in, const Tensors& out)> run;
    std::function<Values(const Values& in)> reference;
    // d_in: zeroed, undefined where the input has no `grad`.
    std::function<void(Stream&, const Tensors& in, const Tensors& d_out, const Tensors& d_in)>
        backward;

    // Largest allowed |got - want| / (|want| + rms(want)) of an output element.
    double forward_tolerance = 1e-5;
    // Largest allowed ||got - want|| / ||want|| of a gradient, over the sampled coordinates.
    double grad_tolerance = 1e-3;
    double flops = 0;  // of one run, for perf
    double bytes = 0;  // that one run has to move
    double backward_flops = 0;
    bool perf_only = false;  // too large for the reference
    bool gpu_only = false;   // shapes that pick the GPU's kernels; a CPU learns nothing from them
    // Fills in large inputs just before the case runs; they are dropped after it.
    std::function<void(Case&)> prepare;
};

using CaseList = std::vector<Case>;

// Random values, the same on every machine.
class Random {
  public:
    explicit Random(uint64_t seed) : engine_(seed) {}

    float uniform(float low, float high);
    float normal();  // near enough: the sum of uniforms
    int64_t below(int64_t bound);
    std::vector<float> normals(int64_t count, float scale = 1.0f);

  private:
    std::mt19937_64 engine_;
};

// An input of floats rounded to dtype (kF32, kBF16 or kF16), or of kI32 numbers.
Input input(std::string name, DType dtype, std::vector<int64_t> shape, std::vector<float> values);
Input per_row(Input in);                      // the first axis is the batch's rows
Input with_grad(Input in, DType grad_dtype);  // backward writes d(in) in grad_dtype
Input raw_input(std::string name, std::vector<uint8_t> bytes, std::vector<float> decoded);

}  // namespace orbit::opcheck
