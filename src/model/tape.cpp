#include "model/tape.h"

namespace orbit {
namespace {

Tensor like(Stream& stream, const Tensor& x) {
    Tensor t = x;
    t.data = stream.scratch.take_bytes(static_cast<size_t>(x.bytes()));
    return t;
}

}  // namespace

Tensor Tape::of_output(Tensor y) {
    const auto found = grads_.find(y.data);
    if (found != grads_.end()) {
        Tensor grad = y;
        grad.data = found->second.data;
        return grad;
    }
    const Tensor grad = like(*stream_, y);
    zero_fill(*stream_, grad.data, static_cast<size_t>(grad.bytes()));
    grads_[y.data] = grad;
    return grad;
}

Tape::Target Tape::of_input(Tensor x) {
    const auto found = grads_.find(x.data);
    if (found != grads_.end()) {
        Tensor grad = x;
        grad.data = found->second.data;
        return {grad, true};
    }
    const Tensor grad = like(*stream_, x);
    grads_[x.data] = grad;
    return {grad, false};
}

void Tape::alias(Tensor x, Tensor grad) {
    CHECK(grads_.find(x.data) == grads_.end(), "(a gradient is already there)");
    grads_[x.data] = grad;
}

void Tape::run_backward() {
    for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
        (*step)(*this);
    }
    steps_.clear();
}

}  // namespace orbit
