// exp and log in plain fp32 arithmetic (no libm, no fma), so that every instruction set and every
// machine computes the same bits, and so that loops over them vectorise. exp: Cody-Waite reduction
// and a degree-6 polynomial, below 2 ulp. log: reduction to [sqrt(1/2), sqrt(2)) and the classical
// fdlibm-like rational form, below 2 ulp.
#pragma once

#include "base/number_formats.h"

namespace orbit {

// exp(x): 0 below -87.3, inf above 88.7; exp(0) = 1 exactly. NaN stays NaN.
ORBIT_HD float exact_exp(float x) {
    const float clamped = x < -87.33f ? -87.33f : (x > 88.72f ? 88.72f : x);
    const float scaled = clamped * 1.4426950408889634f;
    const float shifted =
        scaled + 12582912.0f;  // 1.5 * 2^23: the integer nearest to `scaled` lands in the low bits
    const float n = shifted - 12582912.0f;
    const float r = (clamped - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
    float p = 1.3888889225e-3f;
    p = p * r + 8.3333337680e-3f;
    p = p * r + 4.1666667908e-2f;
    p = p * r + 1.6666667163e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const int32_t exponent = static_cast<int32_t>(float_bits(shifted) & 0x7fffffu) - 0x400000;
    // Two steps, so that 2^128 and 2^-127 do not leave the exponent's range.
    const int32_t half = exponent >> 1;
    const float a = float_from_bits(static_cast<uint32_t>(half + 127) << 23);
    const float b = float_from_bits(static_cast<uint32_t>(exponent - half + 127) << 23);
    float result = p * a * b;
    result = x < -87.33f ? 0.0f : result;
    result = x > 88.72f ? float_from_bits(0x7f800000u) : result;
    return x != x ? x : result;
}

// log(x) for x > 0 (normal numbers); log(1) = 0 exactly.
ORBIT_HD float exact_log(float x) {
    const uint32_t bits = float_bits(x);
    const uint32_t shifted = bits + (0x3f800000u - 0x3f3504f3u);
    const int32_t exponent = static_cast<int32_t>(shifted >> 23) - 127;
    const float m = float_from_bits((shifted & 0x007fffffu) + 0x3f3504f3u);
    const float f = m - 1.0f;
    const float s = f / (2.0f + f);
    const float z = s * s;
    const float w = z * z;
    const float t1 = w * (0.40000972152f + w * 0.24279078841f);
    const float t2 = z * (0.66666662693f + w * 0.28498786688f);
    const float r = t2 + t1;
    const float hfsq = 0.5f * f * f;
    const float e = static_cast<float>(exponent);
    return s * (hfsq + r) + e * 9.0580006145e-6f - hfsq + f + e * 0.69313812256f;
}

}  // namespace orbit
