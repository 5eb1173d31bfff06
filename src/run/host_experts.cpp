#include "run/host_experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/log.h"

namespace orbit {

double active_experts(int64_t experts, int64_t selected, int64_t tokens) {
    const auto all = static_cast<double>(experts);
    const double missed = 1.0 - static_cast<double>(selected) / all;
    return all * (1.0 - std::pow(missed, static_cast<double>(tokens)));
}

double streamed_bytes(const ModelConfig& config, int64_t host_bytes, int64_t tokens) {
    if (host_bytes == 0) {
        return 0;
    }
    const double active = active_experts(config.num_experts, config.experts_per_token, tokens);
    return static_cast<double>(host_bytes) * active / static_cast<double>(config.num_experts);
}

double host_link_rate(Stream& stream, int64_t bytes) {
    constexpr int kCopies = 5;
    const auto size = static_cast<size_t>(bytes);
    const ScratchScope scope(stream.scratch);
    Arena host(stream.device, MemoryPlace::kHost);
    void* from = host.take_bytes("link", size);
    void* to = stream.scratch.take_bytes(size);
    std::memset(from, 1, size);
    double best = 0;
    for (int i = 0; i < kCopies; ++i) {
        const double start = now_s();
        copy_to_device(stream, to, from, size);
        synchronize(stream);
        best = std::max(best, static_cast<double>(bytes) / (now_s() - start));
    }
    return best;
}

}  // namespace orbit
