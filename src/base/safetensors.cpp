#include "base/safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace orbit {
namespace {

constexpr uint64_t kHeaderBytesMax = 100 << 20;

const std::map<std::string, int>& dtype_table() {
    static const std::map<std::string, int> table = {
        {"BOOL", 8},    {"U8", 8},   {"I8", 8},      {"F8_E4M3", 8}, {"F8_E5M2", 8},
        {"F8_E8M0", 8}, {"F4", 4},   {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"I16", 16},
        {"U16", 16},    {"F16", 16}, {"BF16", 16},   {"I32", 32},    {"U32", 32},
        {"F32", 32},    {"I64", 64}, {"U64", 64},    {"F64", 64},    {"C64", 64},
    };
    return table;
}

StoredTensor parse_entry(
    const std::string& path,
    const std::string& name,
    const nlohmann::json& entry,
    std::span<const std::byte> data
) {
    StoredTensor tensor;
    tensor.name = name;
    tensor.file = path;
    const auto bad = [&](const std::string& what) {
        return UserError(fmt::format(
            "{}: tensor \"{}\" {}; the file is damaged, fetch it again.", path, name, what
        ));
    };
    if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string() ||
        !entry.contains("shape") || !entry["shape"].is_array() || !entry.contains("data_offsets") ||
        !entry["data_offsets"].is_array() || entry["data_offsets"].size() != 2) {
        throw bad("lacks dtype, shape or data_offsets");
    }
    tensor.dtype = entry["dtype"].get<std::string>();
    const int bits = safetensors_dtype_bits(tensor.dtype);
    if (bits == 0) {
        throw bad("has the unknown dtype \"" + tensor.dtype + "\"");
    }
    uint64_t numel = 1;
    for (const auto& dim : entry["shape"]) {
        if (!dim.is_number_unsigned() || dim.get<uint64_t>() > (uint64_t{1} << 48)) {
            throw bad("has a shape that is not made of sizes");
        }
        tensor.shape.push_back(static_cast<int64_t>(dim.get<uint64_t>()));
        if (__builtin_mul_overflow(numel, dim.get<uint64_t>(), &numel) ||
            numel > (uint64_t{1} << 52)) {
            throw bad("has a shape that is too large");
        }
    }
    const auto& offsets = entry["data_offsets"];
    if (!offsets[0].is_number_unsigned() || !offsets[1].is_number_unsigned()) {
        throw bad("has data_offsets that are not sizes");
    }
    const auto begin = offsets[0].get<uint64_t>();
    const auto end = offsets[1].get<uint64_t>();
    if (begin > end || end > data.size()) {
        throw bad(fmt::format("ends at byte {} of {} bytes of data", end, data.size()));
    }
    const uint64_t needed_bits = numel * static_cast<uint64_t>(bits);
    if (needed_bits % 8 != 0 || end - begin != needed_bits / 8) {
        throw bad(
            fmt::format("has {} bytes where its shape needs {}", end - begin, (needed_bits + 7) / 8)
        );
    }
    tensor.bytes = data.subspan(begin, end - begin);
    return tensor;
}

// The format allows no holes and no overlap: every byte of the data belongs to one tensor.
void check_coverage(
    const std::string& path,
    const std::map<std::string, StoredTensor>& tensors,
    std::span<const std::byte> data
) {
    std::vector<const StoredTensor*> in_order;
    for (const auto& [name, tensor] : tensors) {
        if (!tensor.bytes.empty()) {
            in_order.push_back(&tensor);
        }
    }
    std::sort(in_order.begin(), in_order.end(), [](const auto* a, const auto* b) {
        return a->bytes.data() < b->bytes.data();
    });
    const std::byte* at = data.data();
    for (const StoredTensor* tensor : in_order) {
        USER_CHECK(
            tensor->bytes.data() == at,
            "{}: the tensor \"{}\" {}; the file is damaged, fetch it again.",
            path,
            tensor->name,
            tensor->bytes.data() < at ? "overlaps another" : "has a hole before it"
        );
        at += tensor->bytes.size();
    }
    USER_CHECK(
        at == data.data() + data.size(),
        "{}: {} bytes at its end belong to no tensor; the file is damaged, fetch it again.",
        path,
        data.data() + data.size() - at
    );
}

}  // namespace

int64_t StoredTensor::numel() const {
    int64_t n = 1;
    for (const int64_t dim : shape) {
        n *= dim;
    }
    return n;
}

int safetensors_dtype_bits(const std::string& dtype) {
    const auto found = dtype_table().find(dtype);
    return found == dtype_table().end() ? 0 : found->second;
}

SafetensorsFile::SafetensorsFile(const std::string& path)
    : file_(std::make_unique<MappedFile>(path)) {
    const auto bytes = file_->bytes();
    USER_CHECK(
        bytes.size() >= 8, "{} has {} bytes and is no safetensors file.", path, bytes.size()
    );
    uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, bytes.data(), 8);
    USER_CHECK(
        header_bytes <= kHeaderBytesMax && header_bytes <= bytes.size() - 8,
        "{}: its header claims {} bytes, the file has {}; it is truncated or no safetensors file.",
        path,
        header_bytes,
        bytes.size()
    );
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 8, header_bytes);
    const auto header = nlohmann::json::parse(text, nullptr, false);
    USER_CHECK(
        header.is_object(),
        "{}: its header is not valid JSON; the file is damaged, fetch it again.",
        path
    );
    const auto data = bytes.subspan(8 + header_bytes);
    for (const auto& [name, entry] : header.items()) {
        if (name == "__metadata__") {
            for (const auto& [key, value] : entry.items()) {
                metadata_[key] = value.is_string() ? value.get<std::string>() : value.dump();
            }
            continue;
        }
        tensors_.emplace(name, parse_entry(path, name, entry, data));
    }
    check_coverage(path, tensors_, data);
}

const StoredTensor& SafetensorsFile::tensor(const std::string& name) const {
    const auto found = tensors_.find(name);
    USER_CHECK(found != tensors_.end(), "{} has no tensor \"{}\".", file_->path(), name);
    return found->second;
}

void write_safetensors(
    const std::string& path,
    const std::vector<TensorToStore>& tensors,
    const std::map<std::string, std::string>& metadata
) {
    nlohmann::ordered_json header = nlohmann::ordered_json::object();
    if (!metadata.empty()) {
        header["__metadata__"] = metadata;
    }
    size_t offset = 0;
    for (const auto& tensor : tensors) {
        header[tensor.name] = {
            {"dtype", tensor.dtype},
            {"shape", tensor.shape},
            {"data_offsets", {offset, offset + tensor.bytes}}};
        offset += tensor.bytes;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    std::string header_bytes(8, '\0');
    const uint64_t header_length = text.size();
    std::memcpy(header_bytes.data(), &header_length, 8);
    header_bytes += text;
    std::vector<std::string_view> parts = {header_bytes};
    for (const auto& tensor : tensors) {
        parts.emplace_back(static_cast<const char*>(tensor.data), tensor.bytes);
    }
    write_file_atomic(path, parts);
}

}  // namespace orbit
