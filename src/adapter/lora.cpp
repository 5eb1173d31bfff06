#include <cmath>

#include "adapter/state.h"
#include "base/hash.h"
#include "base/philox.h"

namespace orbit {
namespace {

constexpr uint32_t kStreamLoraInit = 0x4c4f5241;  // "LORA"

void round_into(DType compute, const float* from, int64_t begin, int64_t end, char* to) {
    if (compute == DType::kF32) {
        float* copy = reinterpret_cast<float*>(to);
        for (int64_t i = begin; i < end; ++i) {
            copy[i] = from[i];
        }
    } else {
        bf16* copy = reinterpret_cast<bf16*>(to);
        for (int64_t i = begin; i < end; ++i) {
            copy[i] = to_bf16(from[i]);
        }
    }
}

}  // namespace

void lora_init_a(float* a, int64_t rank, int64_t in, const std::string& name, uint64_t seed) {
    const uint64_t hash = hash64(name.data(), name.size());
    const float bound = 1.0f / std::sqrt(static_cast<float>(in));
    for (int64_t i = 0; i < rank * in; i += 4) {
        const PhiloxWords words = philox(
            static_cast<uint32_t>(i >> 2),
            kStreamLoraInit,
            static_cast<uint32_t>(hash),
            static_cast<uint32_t>(hash >> 32),
            static_cast<uint32_t>(seed),
            static_cast<uint32_t>(seed >> 32)
        );
        for (int64_t lane = 0; lane < 4 && i + lane < rank * in; ++lane) {
            a[i + lane] = (2.0f * uniform_from_word(words.word[lane]) - 1.0f) * bound;
        }
    }
}

std::vector<RoundRange> lora_ranges(const std::vector<SiteLayout>& sites) {
    std::vector<RoundRange> ranges;
    for (const SiteLayout& site : sites) {
        if (site.kind == AdapterKind::kLora) {
            const int64_t num_a = site.owns_first ? site.rank * site.site.in : 0;
            const int64_t num_b = site.owns_b ? site.rank * site.site.out : 0;
            ranges.push_back({site.master, site.copy, num_a});
            ranges.push_back({site.master_b, site.copy_b, num_b});
        }
    }
    return ranges;
}

void lora_derive(
    const HostWork& work,
    const std::vector<SiteLayout>& sites,
    DType compute,
    const float* masters,
    char* copies
) {
    for (const RoundRange& range : lora_ranges(sites)) {
        char* to = copies + range.to * dtype_bytes(compute);
        work.threads.parallel_for(range.count, 1 << 15, [&](int64_t begin, int64_t end, int) {
            round_into(compute, masters + range.from, begin, end, to);
        });
    }
}

}  // namespace orbit
