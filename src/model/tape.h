// Tape: what backward needs, for one layer at a time. An op called with a tape records a closure;
// run_backward() calls them in reverse. Gradients are kept per activation, keyed by its memory: an
// activation is written once and lives until the layer's backward is done. Gradients have the
// activation's type.
#pragma once

#include <functional>
#include <unordered_map>
#include <vector>

#include "device/device.h"

namespace orbit {

class Tape {
  public:
    explicit Tape(Stream& stream) : stream_(&stream) {}

    void record(std::function<void(Tape&)> backward) { steps_.push_back(std::move(backward)); }

    // The finished gradient of an op's output. Zero when nothing used the output.
    Tensor of_output(Tensor y);

    struct Target {
        Tensor grad;
        bool accumulate;  // false: the first writer overwrites
    };

    // Where an op adds the gradient of its input.
    Target of_input(Tensor x);
    // The gradient of `x` is, so far, the memory `grad` itself; later writers add to it.
    void alias(Tensor x, Tensor grad);

    void run_backward();

  private:
    Stream* stream_;
    std::vector<std::function<void(Tape&)>> steps_;
    std::unordered_map<const void*, Tensor> grads_;
};

}  // namespace orbit
