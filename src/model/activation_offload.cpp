#include "model/activation_offload.h"

namespace orbit {

int64_t offload_bytes(const ModelConfig& config, DType compute, int64_t tokens) {
    return (config.num_layers - 1) * tokens * config.width * dtype_bytes(compute);
}

ActivationOffload::ActivationOffload(const Device& device, const Model& model, int64_t tokens)
    : device_(&device),
      bytes_(offload_bytes(model.config, model.compute, tokens)),
      host_(static_cast<char*>(host_allocate(device, static_cast<size_t>(bytes_)))),
      copies_(device) {}

ActivationOffload::~ActivationOffload() {
    synchronize(copies_);
    host_free(*device_, host_);
}

void* ActivationOffload::place(int64_t layer, Tensor x) const {
    CHECK((layer + 1) * x.bytes() <= bytes_, "(a batch of more tokens than were announced)");
    return host_ + layer * x.bytes();
}

void ActivationOffload::store(Stream& stream, int64_t layer, Tensor x) {
    wait_for(copies_, stream);
    start_copy_to_host(copies_, place(layer, x), x.data, static_cast<size_t>(x.bytes()));
}

void ActivationOffload::fetch(Stream& stream, int64_t layer, Tensor x) {
    wait_for(copies_, stream);
    copy_to_device(copies_, x.data, place(layer, x), static_cast<size_t>(x.bytes()));
}

}  // namespace orbit
