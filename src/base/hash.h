// 64-bit content hash (XXH3) as 16 hex digits: digests of weights, tokenizers and files shown to
// people.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace orbit {

uint64_t hash64(const void* data, size_t bytes, uint64_t seed = 0);
std::string hash_hex(uint64_t hash);

}  // namespace orbit
