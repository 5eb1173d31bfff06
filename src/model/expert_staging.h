// ExpertStaging: room on the device for the packed experts of one layer whose own place is host
// memory (moe.host_layers). A layer's experts that received rows are copied there before its
// products; the products read the same bytes as ever, from another address.
#pragma once

#include "model/model.h"

namespace orbit {

class ExpertStaging {
  public:
    // Takes model.staged_bytes of the stream's scratch, which must outlive this.
    ExpertStaging(Stream& stream, const Model& model)
        : memory_(static_cast<std::byte*>(
              stream.scratch.take_bytes(static_cast<size_t>(model.staged_bytes))
          )),
          bytes_(model.staged_bytes) {}

    // `moe` with the weights of its active experts on the device; valid until the next call.
    const MoeWeights& stage(Stream& stream, const Routing& routing, const MoeWeights& moe);

  private:
    std::byte* memory_;
    int64_t bytes_;
    MoeWeights staged_;
};

}  // namespace orbit
