// TokenBatch: a ragged batch built on the host, then uploaded in one copy. Prefill, decode, scoring
// and training fill it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "device/device.h"
#include "ops/batch.h"

namespace orbit {

class TokenBatch {
  public:
    // Appends `ids` of one sequence, the first at position `position`. `pages` are all pages of the
    // sequence so far, enough for position + ids.size() tokens.
    void add(std::span<const int32_t> ids, int32_t position, std::span<const int32_t> pages);

    int32_t num_tokens() const { return static_cast<int32_t>(ids_.size()); }

    int32_t num_sequences() const { return static_cast<int32_t>(position_.size()); }

    bool empty() const { return ids_.empty(); }

    // The view's memory comes from stream.scratch and lives as long as the caller's scope.
    BatchView upload(Stream& stream) const;

  private:
    std::vector<int32_t> ids_;
    std::vector<int32_t> positions_;
    std::vector<int32_t> sequence_of_;
    std::vector<int32_t> begin_;
    std::vector<int32_t> position_;
    std::vector<std::vector<int32_t>> pages_;
};

// Copies host numbers into scratch memory of the stream.
template <typename T>
T* upload_array(Stream& stream, std::span<const T> values) {
    T* device = static_cast<T*>(stream.scratch.take_bytes(values.size_bytes()));
    copy_to_device(stream, device, values.data(), values.size_bytes());
    return device;
}

}  // namespace orbit
