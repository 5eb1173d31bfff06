// Philox4x32-10 (Salmon et al., SC'11): a counter-based generator, so a draw depends on (key,
// counter) alone and on no state. Used for sampling, data order and initialisation (algorithms:
// keyed streams, nothing to save for resume).
#pragma once

#include <array>
#include <cstdint>

#include "base/number_formats.h"

namespace orbit {

struct PhiloxWords {
    uint32_t word[4];
};

ORBIT_HD PhiloxWords
philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
        const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
        const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c0 = n0;
        c1 = static_cast<uint32_t>(p1);
        c2 = n2;
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return PhiloxWords{{c0, c1, c2, c3}};
}

// Uniform in (0, 1), never 0 or 1: u = (x + 0.5) 2^-32, in fp32 and clamped below 1.
ORBIT_HD float uniform_from_word(uint32_t x) {
    const float u = static_cast<float>(x) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
    return u < 0.99999994f ? u : 0.99999994f;
}

}  // namespace orbit
