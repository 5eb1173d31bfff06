// The safetensors container (models.md 9.1): u64 header length, JSON header, data. Reading checks
// every number against the file: a damaged file is a UserError that names the file and the tensor,
// never a crash.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/file.h"

namespace orbit {

struct StoredTensor {
    std::string name;
    std::string dtype;  // "BF16", "F32", "I32", "F8_E4M3", ... as in the file
    std::vector<int64_t> shape;
    std::span<const std::byte>
        bytes;  // inside the mapping; not aligned: copy, do not cast in place
    std::string file;

    int64_t numel() const;
};

class SafetensorsFile {
  public:
    explicit SafetensorsFile(const std::string& path);

    const std::map<std::string, StoredTensor>& tensors() const { return tensors_; }

    const std::map<std::string, std::string>& metadata() const { return metadata_; }

    // UserError when absent.
    const StoredTensor& tensor(const std::string& name) const;

  private:
    std::unique_ptr<MappedFile> file_;
    std::map<std::string, StoredTensor> tensors_;
    std::map<std::string, std::string> metadata_;
};

// Bits of one element, or 0 for an unknown dtype name.
int safetensors_dtype_bits(const std::string& dtype);

struct TensorToStore {
    std::string name;
    std::string dtype;
    std::vector<int64_t> shape;
    const void* data;
    size_t bytes;
};

// Atomic. Tensors are written in the given order; the header is deterministic.
void write_safetensors(
    const std::string& path,
    const std::vector<TensorToStore>& tensors,
    const std::map<std::string, std::string>& metadata
);

}  // namespace orbit
