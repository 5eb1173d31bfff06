// The GGUF container (models.md 10.8): key/values and tensor infos, read in place. Every length is
// checked against the file before it is used; a damaged file is a UserError, never a crash.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"

namespace orbit {

enum class GgufType : uint32_t {
    kU8,
    kI8,
    kU16,
    kI16,
    kU32,
    kI32,
    kF32,
    kBool,
    kString,
    kArray,
    kU64,
    kI64,
    kF64
};

// A value where it stands in the file; arrays keep their elements' bytes and are decoded on demand.
struct GgufValue {
    GgufType type = GgufType::kU8;
    GgufType element = GgufType::kU8;  // arrays
    uint64_t count = 1;                // elements of an array
    std::span<const std::byte> bytes;  // of the elements
};

struct GgufTensor {
    std::string name;
    std::vector<int64_t> shape;  // slowest axis first, as everywhere in Orbit
    uint32_t type = 0;           // ggml type id
    uint64_t offset = 0;         // into the data section
};

class GgufFile {
  public:
    explicit GgufFile(const std::string& path);

    const std::string& path() const { return file_->path(); }

    bool has(const std::string& key) const { return values_.contains(key); }

    const std::map<std::string, GgufTensor>& tensors() const { return tensors_; }

    // The bytes of the data section from a tensor's offset on, at least `bytes` of them.
    std::span<const std::byte> tensor_bytes(const GgufTensor& tensor, uint64_t bytes) const;

    // nullopt when the key is absent; UserError when it is there with another type.
    std::optional<int64_t> integer(const std::string& key) const;
    std::optional<double> number(const std::string& key) const;
    std::optional<bool> boolean(const std::string& key) const;
    std::optional<std::string> text(const std::string& key) const;
    // Empty when absent.
    std::vector<std::string> texts(const std::string& key) const;
    std::vector<int32_t> integers(const std::string& key) const;

    std::unique_ptr<MappedFile> release_mapping() { return std::move(file_); }

  private:
    const GgufValue* find(const std::string& key) const;

    std::unique_ptr<MappedFile> file_;
    std::map<std::string, GgufValue> values_;
    std::map<std::string, GgufTensor> tensors_;
    std::span<const std::byte> data_;
};

}  // namespace orbit
