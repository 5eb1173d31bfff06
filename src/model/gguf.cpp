#include "model/gguf.h"

#include <cmath>
#include <cstring>

#include "base/error.h"

namespace orbit {
namespace {

constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr int kNestingMax = 4;
constexpr uint64_t kAlignmentMax = 1 << 20;
constexpr size_t kNameBytesMax = 1024;

// Bytes of one value, or 0 for strings and arrays.
uint64_t scalar_bytes(GgufType type) {
    switch (type) {
        case GgufType::kU8:
        case GgufType::kI8:
        case GgufType::kBool:
            return 1;
        case GgufType::kU16:
        case GgufType::kI16:
            return 2;
        case GgufType::kU32:
        case GgufType::kI32:
        case GgufType::kF32:
            return 4;
        case GgufType::kU64:
        case GgufType::kI64:
        case GgufType::kF64:
            return 8;
        case GgufType::kString:
        case GgufType::kArray:
            return 0;
    }
    return 0;
}

template <typename T>
T load(const std::byte* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

class Reader {
  public:
    explicit Reader(const MappedFile& file) : file_(&file), rest_(file.bytes()) {}

    size_t position() const { return file_->bytes().size() - rest_.size(); }

    std::span<const std::byte> take(uint64_t bytes, const char* what) {
        USER_CHECK(
            bytes <= rest_.size(),
            "{}: it ends inside {} (byte {} of {}); the file is truncated or damaged, fetch it "
            "again.",
            file_->path(),
            what,
            position(),
            file_->bytes().size()
        );
        const auto taken = rest_.first(bytes);
        rest_ = rest_.subspan(bytes);
        return taken;
    }

    template <typename T>
    T number(const char* what) {
        return load<T>(take(sizeof(T), what).data());
    }

    std::string_view text(const char* what) {
        const auto length = number<uint64_t>(what);
        const auto bytes = take(length, what);
        return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
    }

    GgufType type() {
        const auto id = number<uint32_t>("a value's type");
        USER_CHECK(
            id <= static_cast<uint32_t>(GgufType::kF64),
            "{}: a value before byte {} has the unknown type {}; the file is damaged.",
            file_->path(),
            position(),
            id
        );
        return static_cast<GgufType>(id);
    }

    GgufValue value() {
        GgufValue value;
        value.type = type();
        if (value.type == GgufType::kArray) {
            value.element = type();
            value.count = number<uint64_t>("the length of an array");
        }
        const size_t begin = position();
        skip(value.type == GgufType::kArray ? value.element : value.type, value.count, 0);
        value.bytes = file_->bytes().subspan(begin, position() - begin);
        return value;
    }

  private:
    // Every element takes at least one byte, so a huge count ends with the file.
    void skip(GgufType type, uint64_t count, int depth) {
        USER_CHECK(depth < kNestingMax, "{}: it has arrays nested too deep.", file_->path());
        const uint64_t bytes = scalar_bytes(type);
        if (bytes != 0) {
            USER_CHECK(
                count <= rest_.size() / bytes,
                "{}: an array at byte {} claims {} values, more than the file holds.",
                file_->path(),
                position(),
                count
            );
            take(count * bytes, "an array");
            return;
        }
        for (uint64_t i = 0; i < count; ++i) {
            if (type == GgufType::kString) {
                text("a string");
            } else {
                const GgufType element = this->type();
                const auto length = number<uint64_t>("the length of an array");
                skip(element, length, depth + 1);
            }
        }
    }

    const MappedFile* file_;
    std::span<const std::byte> rest_;
};

GgufTensor read_tensor_info(Reader& reader, const std::string& path) {
    GgufTensor tensor;
    const std::string_view name = reader.text("a tensor's name");
    USER_CHECK(
        !name.empty() && name.size() <= kNameBytesMax,
        "{}: a tensor's name has {} bytes; the file is damaged.",
        path,
        name.size()
    );
    tensor.name = name;
    const auto rank = reader.number<uint32_t>("a tensor's shape");
    USER_CHECK(
        rank >= 1 && rank <= 4,
        "{}: the tensor \"{}\" has {} axes; the file is damaged.",
        path,
        tensor.name,
        rank
    );
    uint64_t numel = 1;
    for (uint32_t axis = 0; axis < rank; ++axis) {
        const auto size = reader.number<uint64_t>("a tensor's shape");
        USER_CHECK(
            size > 0 && size <= (uint64_t{1} << 40) &&
                !__builtin_mul_overflow(numel, size, &numel) && numel <= (uint64_t{1} << 50),
            "{}: the tensor \"{}\" has an impossible shape; the file is damaged.",
            path,
            tensor.name
        );
        // GGUF names the fastest axis first.
        tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(size));
    }
    tensor.type = reader.number<uint32_t>("a tensor's type");
    tensor.offset = reader.number<uint64_t>("a tensor's offset");
    return tensor;
}

int64_t integer_at(GgufType type, const std::byte* at) {
    switch (type) {
        case GgufType::kU8:
        case GgufType::kBool:
            return load<uint8_t>(at);
        case GgufType::kI8:
            return load<int8_t>(at);
        case GgufType::kU16:
            return load<uint16_t>(at);
        case GgufType::kI16:
            return load<int16_t>(at);
        case GgufType::kU32:
            return load<uint32_t>(at);
        case GgufType::kI32:
            return load<int32_t>(at);
        case GgufType::kU64:
            return static_cast<int64_t>(load<uint64_t>(at) & 0x7fffffffffffffffu);
        default:
            return load<int64_t>(at);
    }
}

bool is_integer(GgufType type) {
    return scalar_bytes(type) != 0 && type != GgufType::kF32 && type != GgufType::kF64 &&
           type != GgufType::kBool;
}

}  // namespace

GgufFile::GgufFile(const std::string& path) : file_(std::make_unique<MappedFile>(path)) {
    Reader reader(*file_);
    USER_CHECK(
        reader.number<uint32_t>("the header") == kMagic,
        "{} is neither a GGUF file nor a folder of a Hugging Face model.",
        path
    );
    const auto version = reader.number<uint32_t>("the header");
    USER_CHECK(
        version == 2 || version == 3,
        "{}: GGUF version {} is not supported; 2 and 3 (little-endian) are.",
        path,
        version
    );
    const auto num_tensors = reader.number<uint64_t>("the header");
    const auto num_values = reader.number<uint64_t>("the header");
    // Both loops end with the file at the latest: every round consumes bytes.
    for (uint64_t i = 0; i < num_values; ++i) {
        const std::string key(reader.text("a key"));
        USER_CHECK(
            values_.emplace(key, reader.value()).second,
            "{}: the key \"{}\" is there twice; the file is damaged.",
            path,
            key
        );
    }
    for (uint64_t i = 0; i < num_tensors; ++i) {
        GgufTensor tensor = read_tensor_info(reader, path);
        const std::string name = tensor.name;
        USER_CHECK(
            tensors_.emplace(name, std::move(tensor)).second,
            "{}: the tensor \"{}\" is there twice; the file is damaged.",
            path,
            name
        );
    }
    const auto alignment = static_cast<uint64_t>(integer("general.alignment").value_or(32));
    USER_CHECK(
        alignment > 0 && alignment <= kAlignmentMax,
        "{}: general.alignment is {}; the file is damaged.",
        path,
        alignment
    );
    const uint64_t begin = (reader.position() + alignment - 1) / alignment * alignment;
    if (begin < file_->bytes().size()) {
        data_ = file_->bytes().subspan(begin);
    }
}

std::span<const std::byte> GgufFile::tensor_bytes(const GgufTensor& tensor, uint64_t bytes) const {
    USER_CHECK(
        tensor.offset <= data_.size() && bytes <= data_.size() - tensor.offset,
        "{}: the tensor \"{}\" needs bytes {} to {} of {} bytes of data; the file is truncated, "
        "fetch it again.",
        path(),
        tensor.name,
        tensor.offset,
        tensor.offset + bytes,
        data_.size()
    );
    return data_.subspan(tensor.offset, bytes);
}

const GgufValue* GgufFile::find(const std::string& key) const {
    const auto found = values_.find(key);
    return found == values_.end() ? nullptr : &found->second;
}

std::optional<int64_t> GgufFile::integer(const std::string& key) const {
    const GgufValue* value = find(key);
    if (value == nullptr) {
        return std::nullopt;
    }
    USER_CHECK(is_integer(value->type), "{}: \"{}\" is not a whole number.", path(), key);
    return integer_at(value->type, value->bytes.data());
}

std::optional<double> GgufFile::number(const std::string& key) const {
    const GgufValue* value = find(key);
    if (value == nullptr) {
        return std::nullopt;
    }
    double result = NAN;
    if (value->type == GgufType::kF32) {
        result = static_cast<double>(load<float>(value->bytes.data()));
    } else if (value->type == GgufType::kF64) {
        result = load<double>(value->bytes.data());
    } else if (is_integer(value->type)) {
        result = static_cast<double>(integer_at(value->type, value->bytes.data()));
    }
    USER_CHECK(std::isfinite(result), "{}: \"{}\" is not a finite number.", path(), key);
    return result;
}

std::optional<bool> GgufFile::boolean(const std::string& key) const {
    const GgufValue* value = find(key);
    if (value == nullptr) {
        return std::nullopt;
    }
    USER_CHECK(value->type == GgufType::kBool, "{}: \"{}\" is not a bool.", path(), key);
    return load<uint8_t>(value->bytes.data()) != 0;
}

std::optional<std::string> GgufFile::text(const std::string& key) const {
    const GgufValue* value = find(key);
    if (value == nullptr) {
        return std::nullopt;
    }
    USER_CHECK(value->type == GgufType::kString, "{}: \"{}\" is not a string.", path(), key);
    const auto bytes = value->bytes.subspan(sizeof(uint64_t));
    return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

std::vector<std::string> GgufFile::texts(const std::string& key) const {
    const GgufValue* value = find(key);
    if (value == nullptr) {
        return {};
    }
    USER_CHECK(
        value->type == GgufType::kArray && value->element == GgufType::kString,
        "{}: \"{}\" is not a list of strings.",
        path(),
        key
    );
    std::vector<std::string> list;
    list.reserve(value->count);
    auto rest = value->bytes;
    for (uint64_t i = 0; i < value->count; ++i) {
        const auto length = load<uint64_t>(rest.data());
        rest = rest.subspan(sizeof(uint64_t));
        list.emplace_back(reinterpret_cast<const char*>(rest.data()), length);
        rest = rest.subspan(length);
    }
    return list;
}

std::vector<int32_t> GgufFile::integers(const std::string& key) const {
    const GgufValue* value = find(key);
    if (value == nullptr) {
        return {};
    }
    USER_CHECK(
        value->type == GgufType::kArray && is_integer(value->element),
        "{}: \"{}\" is not a list of whole numbers.",
        path(),
        key
    );
    const uint64_t bytes = scalar_bytes(value->element);
    std::vector<int32_t> list;
    list.reserve(value->count);
    for (uint64_t i = 0; i < value->count; ++i) {
        const int64_t number = integer_at(value->element, value->bytes.data() + i * bytes);
        USER_CHECK(
            number >= INT32_MIN && number <= INT32_MAX,
            "{}: \"{}\" holds {}, which is too large.",
            path(),
            key,
            number
        );
        list.push_back(static_cast<int32_t>(number));
    }
    return list;
}

}  // namespace orbit
