#include "model/base_bytes.h"

#include <algorithm>

#include "model/rope_table.h"

namespace orbit {
namespace {

int64_t aligned(int64_t bytes) {
    constexpr int64_t kAlignment = 256;
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

int64_t placed_bytes(const ExpectedWeight& weight, const FormatOf& format_of) {
    if (weight.shape.size() == 1) {
        return aligned(weight.shape[0] * int64_t{sizeof(float)});
    }
    const MatrixFormat format = format_of(weight);
    QuantizedMatrix w;
    w.format = format.format;
    w.group_size = format.group_size;
    w.rows = weight.shape[0];
    w.cols = weight.shape[1];
    return aligned(w.bytes() - w.scale_bytes()) + aligned(w.scale_bytes());
}

// What stage_matrix makes of a stored format.
WeightFormat staged_format(WeightFormat stored, bool linear, bool is_gguf, const LoadOptions& o) {
    const bool wide = stored == WeightFormat::kF16 || stored == WeightFormat::kF32;
    if (!wide && stored != WeightFormat::kBF16) {
        return stored;
    }
    if (linear && o.quantize == "int4") {
        return WeightFormat::kInt4;
    }
    return wide && is_gguf && o.compute == DType::kF32 ? WeightFormat::kF32 : WeightFormat::kBF16;
}

}  // namespace

int64_t base_bytes(const ModelConfig& config, const FormatOf& format_of) {
    const int64_t rope_rows = std::min(config.max_positions, kRopeRowsMax);
    int64_t total = 2 * aligned(rope_rows * (config.head_dim / 2) * int64_t{sizeof(float)});
    for (const ExpectedWeight& weight : expected_weights(config)) {
        total += placed_bytes(weight, format_of);
    }
    return total;
}

FormatOf placed_formats(const Checkpoint& checkpoint, const LoadOptions& options) {
    return [&checkpoint, options](const ExpectedWeight& weight) {
        const StoredWeight& stored = checkpoint.weights.at(weight.name);
        const WeightFormat format =
            staged_format(stored.format, weight.linear, checkpoint.is_gguf, options);
        return MatrixFormat{format, format == stored.format ? stored.group_size : 32};
    };
}

int64_t base_bytes(const Checkpoint& checkpoint, const LoadOptions& options) {
    return base_bytes(checkpoint.config, placed_formats(checkpoint, options));
}

std::vector<AdapterSite> adapter_sites(const ModelConfig& config) {
    std::vector<AdapterSite> sites;
    for (const ExpectedWeight& weight : expected_weights(config)) {
        if (weight.linear) {
            const std::string module = weight.name.substr(0, weight.name.rfind('.'));
            sites.push_back({module, weight.shape[1], weight.shape[0]});
        }
    }
    return sites;
}

}  // namespace orbit
