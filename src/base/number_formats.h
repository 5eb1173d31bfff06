// Scalar conversions of the storage formats, shared by CPU and CUDA code (no intrinsics, no
// rounding modes to set). Rounding is to nearest, ties to even, as IEEE 754; NaN stays NaN.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__CUDACC__)
#define ORBIT_HD __host__ __device__ inline
#else
#define ORBIT_HD inline
#endif

namespace orbit {

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

ORBIT_HD uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    return std::bit_cast<uint32_t>(value);
#endif
}

ORBIT_HD float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    return std::bit_cast<float>(bits);
#endif
}

ORBIT_HD float to_float(float value) {
    return value;
}

ORBIT_HD float to_float(bf16 value) {
    return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

ORBIT_HD bf16 to_bf16(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return bf16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
    }
    return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

ORBIT_HD float round_to_bf16(float value) {
    return to_float(to_bf16(value));
}

ORBIT_HD float to_float(f16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t exponent = (value.bits >> 10) & 31u;
    const uint32_t mantissa = value.bits & 1023u;
    if (exponent == 31u) {
        return float_from_bits(sign | 0x7f800000u | (mantissa << 13));
    }
    if (exponent == 0u) {
        const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
        return float_from_bits(sign | float_bits(magnitude));
    }
    return float_from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

// Stores a float in either activation type.
ORBIT_HD void store(float* to, float value) {
    *to = value;
}

ORBIT_HD void store(bf16* to, float value) {
    *to = to_bf16(value);
}

}  // namespace orbit
