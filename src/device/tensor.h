// A Tensor is a trivially copyable view: pointer, type and shape of a dense row-major array in the
// memory of one device. It owns nothing; the arena or scratch it came from does.
#pragma once

#include <array>
#include <cstdint>

#include "base/error.h"
#include "base/number_formats.h"

namespace orbit {

enum class DType : uint8_t { kF32, kBF16, kF16, kI32, kI64, kU8 };

inline int64_t dtype_bytes(DType type) {
    switch (type) {
        case DType::kF32:
        case DType::kI32:
            return 4;
        case DType::kBF16:
        case DType::kF16:
            return 2;
        case DType::kI64:
            return 8;
        case DType::kU8:
            return 1;
    }
    return 0;
}

template <typename T>
struct DTypeOf;

template <>
struct DTypeOf<float> {
    static constexpr DType value = DType::kF32;
};

template <>
struct DTypeOf<bf16> {
    static constexpr DType value = DType::kBF16;
};

template <>
struct DTypeOf<f16> {
    static constexpr DType value = DType::kF16;
};

template <>
struct DTypeOf<int32_t> {
    static constexpr DType value = DType::kI32;
};

template <>
struct DTypeOf<int64_t> {
    static constexpr DType value = DType::kI64;
};

template <>
struct DTypeOf<uint8_t> {
    static constexpr DType value = DType::kU8;
};

struct Tensor {
    void* data = nullptr;
    DType dtype = DType::kF32;
    int rank = 0;
    std::array<int64_t, 4> shape{};

    bool defined() const { return data != nullptr; }

    int64_t numel() const {
        int64_t n = 1;
        for (int i = 0; i < rank; ++i) {
            n *= shape[static_cast<size_t>(i)];
        }
        return n;
    }

    int64_t bytes() const { return numel() * dtype_bytes(dtype); }

    int64_t cols() const {
        return rank == 0 ? 1 : shape[static_cast<size_t>(rank - 1)];
    }  // the last axis

    int64_t rows() const { return cols() == 0 ? 0 : numel() / cols(); }  // all axes but the last

    // The elements as T; T must be the stored type.
    template <typename T>
    T* as() const {
        CHECK(DTypeOf<T>::value == dtype, "(tensor holds another type)");
        return static_cast<T*>(data);
    }

    Tensor reshaped(std::initializer_list<int64_t> dims) const {
        Tensor view = *this;
        view.rank = 0;
        for (const int64_t dim : dims) {
            view.shape[static_cast<size_t>(view.rank++)] = dim;
        }
        CHECK_EQ(view.numel(), numel());
        return view;
    }

    // Rows [begin, end) along the first axis.
    Tensor slice(int64_t begin, int64_t end) const {
        CHECK_LE(end, shape[0]);
        Tensor view = *this;
        view.shape[0] = end - begin;
        const int64_t stride = shape[0] == 0 ? 0 : numel() / shape[0];
        view.data = static_cast<char*>(data) + begin * stride * dtype_bytes(dtype);
        return view;
    }
};

inline Tensor make_tensor(void* data, DType dtype, std::initializer_list<int64_t> dims) {
    Tensor t;
    t.data = data;
    t.dtype = dtype;
    for (const int64_t dim : dims) {
        t.shape[static_cast<size_t>(t.rank++)] = dim;
    }
    return t;
}

}  // namespace orbit
