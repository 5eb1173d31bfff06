#include "opcheck/opcheck.h"

namespace orbit::opcheck {

float Random::uniform(float low, float high) {
    const float u = static_cast<float>(engine_() >> 40) * 0x1p-24f;
    return low + (high - low) * u;
}

float Random::normal() {
    float sum = 0;
    for (int i = 0; i < 6; ++i) {
        sum += uniform(-1.0f, 1.0f);
    }
    return sum * 0.70710678f;
}

int64_t Random::below(int64_t bound) {
    return static_cast<int64_t>(engine_() % static_cast<uint64_t>(bound));
}

std::vector<float> Random::normals(int64_t count, float scale) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) {
        value = scale * normal();
    }
    return values;
}

Input input(std::string name, DType dtype, std::vector<int64_t> shape, std::vector<float> values) {
    Input in;
    in.name = std::move(name);
    in.dtype = dtype;
    in.shape = std::move(shape);
    in.values = std::move(values);
    in.grad_dtype = dtype;
    int64_t numel = 1;
    for (const int64_t dim : in.shape) {
        numel *= dim;
    }
    CHECK_EQ(numel, static_cast<int64_t>(in.values.size()));
    if (dtype == DType::kBF16) {
        for (float& value : in.values) {
            value = round_to_bf16(value);
        }
    }
    return in;
}

Input per_row(Input in) {
    in.per_row = true;
    return in;
}

Input with_grad(Input in, DType grad_dtype) {
    in.grad = true;
    in.grad_dtype = grad_dtype;
    return in;
}

Input raw_input(std::string name, std::vector<uint8_t> bytes, std::vector<float> decoded) {
    Input in;
    in.name = std::move(name);
    in.dtype = DType::kU8;
    in.shape = {static_cast<int64_t>(bytes.size())};
    in.values = std::move(decoded);
    in.bytes = std::move(bytes);
    return in;
}

}  // namespace orbit::opcheck
