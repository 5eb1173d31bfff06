// Scalar conversions of the storage formats, shared by CPU and CUDA code (no intrinsics, no
// rounding modes to set). Rounding is to nearest, ties to even, as IEEE 754; NaN stays NaN.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__CUDACC__)
#define ORBIT_HD __host__ __device__ inline
#else
// Always inlined: kernels of several instruction sets include this, and must not share one copy.
#define ORBIT_HD [[gnu::always_inline]] inline
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

// The eight-bit and four-bit formats of packed weights (models.md 10.1), by their codes.
// E4M3 (fn): exponent bias 7, no infinity; 0x7f and 0xff are NaN.
ORBIT_HD float e4m3_to_float(uint8_t code) {
    const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
    const uint32_t exponent = (code >> 3) & 15u;
    const uint32_t mantissa = code & 7u;
    if ((code & 0x7fu) == 0x7fu) {
        return float_from_bits(sign | 0x7fc00000u);
    }
    if (exponent == 0u) {
        return float_from_bits(sign | float_bits(static_cast<float>(mantissa) * 0.001953125f));
    }
    return float_from_bits(sign | ((exponent + 120u) << 23) | (mantissa << 20));
}

// E8M0: 2^(code - 127); 0 is a float32 subnormal and 255 is NaN.
ORBIT_HD float e8m0_to_float(uint8_t code) {
    const uint32_t bits = static_cast<uint32_t>(code) << 23;
    return float_from_bits(code == 0u ? 0x00400000u : code == 255u ? 0x7fc00000u : bits);
}

// E2M1, the low four bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
ORBIT_HD float e2m1_to_float(uint32_t code) {
    const uint32_t sign = (code & 8u) << 28;
    const uint32_t exponent = (code >> 1) & 3u;
    const uint32_t mantissa = code & 1u;
    const uint32_t normal = ((exponent + 126u) << 23) | (mantissa << 22);
    return float_from_bits(sign | (exponent == 0u ? mantissa * 0x3f000000u : normal));
}

// Stores a float in either activation type.
ORBIT_HD void store(float* to, float value) {
    *to = value;
}

ORBIT_HD void store(bf16* to, float value) {
    *to = to_bf16(value);
}

}  // namespace orbit
