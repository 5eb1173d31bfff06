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

bool is_packed(WeightFormat format) {
    return format != WeightFormat::kBF16 && format != WeightFormat::kF16 &&
           format != WeightFormat::kF32;
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

void check_host_layers(const ModelConfig& config, int64_t layers) {
    USER_CHECK(
        layers <= config.num_expert_layers(),
        "moe.host_layers = {} is more than the number of layers with experts, which is {} here; "
        "lower it.",
        layers,
        config.num_expert_layers()
    );
}

HostExperts host_experts(const ModelConfig& config, const FormatOf& format_of, int64_t layers) {
    HostExperts host;
    if (layers == 0) {
        return host;
    }
    check_host_layers(config, layers);
    std::vector<int64_t> bytes(static_cast<size_t>(config.num_expert_layers()), 0);
    for (const ExpectedWeight& weight : expected_weights(config)) {
        if (weight.expert_layer >= 0 && config.on_host(weight.expert_layer, layers)) {
            bytes[static_cast<size_t>(weight.expert_layer)] += placed_bytes(weight, format_of);
        }
    }
    for (const int64_t layer : bytes) {
        host.bytes += layer;
        host.staged = std::max(host.staged, layer);
    }
    return host;
}

void reserve_base(Model& model, const FormatOf& format_of, int64_t host_layers) {
    const HostExperts host = host_experts(model.config, format_of, host_layers);
    model.arena.reserve(static_cast<size_t>(base_bytes(model.config, format_of) - host.bytes));
    if (host.bytes > 0) {
        model.host.reserve(static_cast<size_t>(host.bytes));
    }
    model.staged_bytes = host.staged;
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

PackedParts packed_parts(const ModelConfig& config, const FormatOf& format_of) {
    const std::string head =
        config.tied_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
    PackedParts parts;
    for (const ExpectedWeight& weight : expected_weights(config)) {
        const bool outside = weight.linear && weight.name.find(".experts.") == std::string::npos;
        if (outside || weight.name == head) {
            (outside ? parts.linears : parts.head) |= is_packed(format_of(weight).format);
        }
    }
    return parts;
}

PackedParts packed_parts(const Model& model) {
    PackedParts parts;
    parts.head = is_packed(model.head.format);
    for (const LayerWeights& l : model.layers) {
        for (const LinearWeights* w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) {
            parts.linears = parts.linears || (w->w.defined() && is_packed(w->w.format));
        }
    }
    return parts;
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
