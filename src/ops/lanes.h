// Sixteen fp32 lanes for CPU kernels (X_kernels.cpp), made of one AVX-512, two AVX2 or four SSE
// registers. Everything stands in the namespace of the instruction set that is being compiled and
// is always inlined, so that no copy of one set can be linked into another.
//
// fused(a, b, c) is a * b + c with one rounding where the set has it, and with two in the reference
// set; code that must give the same bits on every set writes product and sum apart.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "base/number_formats.h"

namespace orbit::ORBIT_ISA {

#define ORBIT_LANES [[gnu::always_inline]] inline

#if defined(ORBIT_AVX512)
constexpr int kNativeLanes = 16;
#elif defined(ORBIT_AVX2)
constexpr int kNativeLanes = 8;
#else
constexpr int kNativeLanes = 4;
#endif
constexpr int kLanes = 16;
constexpr int kParts = kLanes / kNativeLanes;

using NativeFloat [[gnu::vector_size(kNativeLanes * 4)]] = float;
using NativeInt [[gnu::vector_size(kNativeLanes * 4)]] = int32_t;
using NativeWord [[gnu::vector_size(kNativeLanes * 4)]] = uint32_t;
using NativeHalf [[gnu::vector_size(kNativeLanes * 2)]] = uint16_t;

struct Lanes {
    NativeFloat part[kParts];
};

struct LaneMask {
    NativeInt part[kParts];
};

ORBIT_LANES Lanes splat(float value) {
    Lanes r;
    for (int i = 0; i < kParts; ++i) {
        r.part[i] = value - NativeFloat{};
    }
    return r;
}

ORBIT_LANES NativeFloat load_native(const float* from) {
    NativeFloat r;
    __builtin_memcpy(&r, from, sizeof(NativeFloat));
    return r;
}

ORBIT_LANES NativeFloat load_native(const bf16* from) {
    NativeHalf half;
    __builtin_memcpy(&half, from, sizeof(NativeHalf));
    return __builtin_bit_cast(NativeFloat, __builtin_convertvector(half, NativeWord) << 16);
}

template <typename T>
ORBIT_LANES Lanes load(const T* from) {
    Lanes r;
    for (int i = 0; i < kParts; ++i) {
        r.part[i] = load_native(from + i * kNativeLanes);
    }
    return r;
}

// The bits of bf16 values, rounded as to_bf16 does.
ORBIT_LANES NativeWord bf16_words(NativeFloat value) {
    const NativeWord bits = __builtin_bit_cast(NativeWord, value);
    const NativeWord rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const NativeWord quiet = (bits >> 16) | 0x40u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}

ORBIT_LANES void store_native(float* to, NativeFloat value) {
    __builtin_memcpy(to, &value, sizeof(NativeFloat));
}

ORBIT_LANES void store_native(bf16* to, NativeFloat value) {
    const NativeHalf half = __builtin_convertvector(bf16_words(value), NativeHalf);
    __builtin_memcpy(to, &half, sizeof(NativeHalf));
}

template <typename T>
ORBIT_LANES void store(T* to, const Lanes& value) {
    for (int i = 0; i < kParts; ++i) {
        store_native(to + i * kNativeLanes, value.part[i]);
    }
}

ORBIT_LANES Lanes round_lanes_to_bf16(const Lanes& a) {
    Lanes r;
    for (int i = 0; i < kParts; ++i) {
        r.part[i] = __builtin_bit_cast(NativeFloat, bf16_words(a.part[i]) << 16);
    }
    return r;
}

ORBIT_LANES Lanes operator+(const Lanes& a, const Lanes& b) {
    Lanes r;
    for (int i = 0; i < kParts; ++i) {
        r.part[i] = a.part[i] + b.part[i];
    }
    return r;
}

ORBIT_LANES Lanes operator-(const Lanes& a, const Lanes& b) {
    Lanes r;
    for (int i = 0; i < kParts; ++i) {
        r.part[i] = a.part[i] - b.part[i];
    }
    return r;
}

ORBIT_LANES Lanes operator*(const Lanes& a, const Lanes& b) {
    Lanes r;
    for (int i = 0; i < kParts; ++i) {
        r.part[i] = a.part[i] * b.part[i];
    }
    return r;
}

ORBIT_LANES Lanes operator/(const Lanes& a, const Lanes& b) {
    Lanes r;
    for (int i = 0; i < kParts; ++i) {
        r.part[i] = a.part[i] / b.part[i];
    }
    return r;
}

ORBIT_LANES Lanes fused(const Lanes& a, const Lanes& b, const Lanes& c) {
    Lanes r;
    for (int i = 0; i < kParts; ++i) {
#if defined(ORBIT_AVX512)
        r.part[i] = _mm512_fmadd_ps(a.part[i], b.part[i], c.part[i]);
#elif defined(ORBIT_AVX2)
        r.part[i] = _mm256_fmadd_ps(a.part[i], b.part[i], c.part[i]);
#else
        r.part[i] = a.part[i] * b.part[i] + c.part[i];
#endif
    }
    return r;
}

ORBIT_LANES Lanes larger(const Lanes& a, const Lanes& b) {
    Lanes r;
    for (int i = 0; i < kParts; ++i) {
        r.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
    }
    return r;
}

// Lanes whose limit is above `index`.
ORBIT_LANES LaneMask lanes_below(int32_t index, const int32_t* limits) {
    LaneMask r;
    for (int i = 0; i < kParts; ++i) {
        NativeInt limit;
        __builtin_memcpy(&limit, limits + i * kNativeLanes, sizeof(NativeInt));
        r.part[i] = limit > index;
    }
    return r;
}

ORBIT_LANES Lanes choose(const LaneMask& mask, const Lanes& yes, const Lanes& no) {
    Lanes r;
    for (int i = 0; i < kParts; ++i) {
        r.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
    }
    return r;
}

// Rows and columns of a square of native registers change places.
ORBIT_LANES void transpose(NativeFloat (&row)[kNativeLanes]) {
    NativeInt low;
    NativeInt high;
    for (int i = 0; i < kNativeLanes; ++i) {
        low[i] = i / 2 + (i % 2) * kNativeLanes;
        high[i] = low[i] + kNativeLanes / 2;
    }
    // Each round interleaves the first half of the rows with the second.
    for (int round = 1; round < kNativeLanes; round *= 2) {
        NativeFloat next[kNativeLanes];
        for (int i = 0; i < kNativeLanes / 2; ++i) {
            next[2 * i] = __builtin_shuffle(row[i], row[i + kNativeLanes / 2], low);
            next[2 * i + 1] = __builtin_shuffle(row[i], row[i + kNativeLanes / 2], high);
        }
        for (int i = 0; i < kNativeLanes; ++i) {
            row[i] = next[i];
        }
    }
}

// The fixed tree of the lane sums: distance 8, 4, 2, 1.
ORBIT_LANES float sum_lanes(const Lanes& a) {
    float value[kLanes];
    store(value, a);
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        for (int i = 0; i < distance; ++i) {
            value[i] += value[i + distance];
        }
    }
    return value[0];
}

ORBIT_LANES float largest_lane(const Lanes& a) {
    float value[kLanes];
    store(value, a);
    float best = value[0];
    for (int i = 1; i < kLanes; ++i) {
        best = value[i] > best ? value[i] : best;
    }
    return best;
}

}  // namespace orbit::ORBIT_ISA
