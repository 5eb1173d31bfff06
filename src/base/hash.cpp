#include "base/hash.h"

#include <fmt/core.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace orbit {

uint64_t hash64(const void* data, size_t bytes, uint64_t seed) {
    return XXH3_64bits_withSeed(data, bytes, seed);
}

std::string hash_hex(uint64_t hash) {
    return fmt::format("{:016x}", hash);
}

}  // namespace orbit
