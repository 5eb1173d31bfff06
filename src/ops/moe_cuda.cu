// The mixture of experts on the GPU: not there yet, and said so.
#include "device/cuda/check.cuh"
#include "ops/cuda_ops.h"

namespace orbit::cuda {
namespace {

[[noreturn]] void refuse() {
    throw UserError(
        "models with experts do not run on the GPU yet; use device = \"cpu\" (--device cpu)."
    );
}

}  // namespace

void route(Stream&, const RouterParams&, const Routing&) {
    refuse();
}

void route_backward(Stream&, const RouterParams&, const Routing&, const float*, Tensor) {
    refuse();
}

void dispatch_rows(Stream&, const Routing&, Tensor, Tensor) {
    refuse();
}

void dispatch_rows_backward(Stream&, const Routing&, Tensor, Tensor, bool) {
    refuse();
}

void combine_rows(Stream&, const Routing&, Tensor, Tensor, Tensor) {
    refuse();
}

void combine_rows_backward(Stream&, const Routing&, Tensor, Tensor, Tensor, float*) {
    refuse();
}

void grouped_linear(Stream&, const GroupedLinearParams&, Tensor) {
    refuse();
}

void grouped_linear_backward(Stream&, const GroupedLinearParams&, Tensor, Tensor, bool, std::span<const AdapterGrad>) {
    refuse();
}

}  // namespace orbit::cuda
