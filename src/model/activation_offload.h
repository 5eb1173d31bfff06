// ActivationOffload: host memory where layer inputs wait for backward
// (train.activation_offloading), and the stream that copies them beside the work of the pass. Two
// buffers on the device take the inputs in turn: a layer's input leaves while the layer runs
// forward and comes back while the layer above runs backward; the last layer's never leaves. Bytes
// are moved and nothing is computed, so no bit depends on it. A CPU does the same with memory of
// its own, and saves nothing.
//
// One batch at a time, by one thread.
#pragma once

#include <cstdint>

#include "device/device.h"
#include "model/model.h"

namespace orbit {

// Host memory for batches of up to `tokens` tokens.
int64_t offload_bytes(const ModelConfig& config, DType compute, int64_t tokens);

class ActivationOffload {
  public:
    // Takes all its memory here: offload_bytes(), pinned on a GPU.
    ActivationOffload(const Device& device, const Model& model, int64_t tokens);
    ~ActivationOffload();
    ActivationOffload(const ActivationOffload&) = delete;
    ActivationOffload& operator=(const ActivationOffload&) = delete;

    // Starts to copy the input x [T, width] of `layer` to the host, and back into x, after what was
    // issued to `stream` until now. x may be written, or read, after wait().
    void store(Stream& stream, int64_t layer, Tensor x);
    void fetch(Stream& stream, int64_t layer, Tensor x);

    // What is issued to `stream` from now on runs after all copies that were started.
    void wait(Stream& stream) { wait_for(stream, copies_); }

    int64_t bytes() const { return bytes_; }

  private:
    void* place(int64_t layer, Tensor x) const;

    const Device* device_;
    int64_t bytes_;
    char* host_;
    Stream copies_;
};

}  // namespace orbit
