#include "model/expert_staging.h"

#include "base/error.h"

namespace orbit {
namespace {

int64_t aligned(int64_t bytes) {
    constexpr int64_t kAlignment = 256;
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

const std::byte* codes_of(const QuantizedMatrix& w) {
    return static_cast<const std::byte*>(w.data);
}

const std::byte* scales_of(const QuantizedMatrix& w) {
    const void* scales = w.format == WeightFormat::kInt4 ? w.scales : w.block_scales;
    return static_cast<const std::byte*>(scales);
}

void set_places(QuantizedMatrix& w, const std::byte* codes, const std::byte* scales) {
    w.data = codes;
    if (w.format == WeightFormat::kInt4) {
        w.scales = reinterpret_cast<const bf16*>(scales);
    } else {
        w.block_scales = scales;
    }
}

// The array of `part`'s experts that starts at `to`.
template <typename Part>
ExpertArray array_of(
    const std::vector<QuantizedMatrix>& experts, int64_t bytes, const Part& part, std::byte* to
) {
    ExpertArray a;
    a.from = part(experts[0]);
    a.to = to;
    a.bytes = bytes;
    a.to_distance = aligned(bytes);
    a.from_distance = experts.size() > 1 ? part(experts[1]) - a.from : 0;
    for (size_t e = 0; e < experts.size(); ++e) {
        USER_CHECK(
            part(experts[e]) == a.from + static_cast<int64_t>(e) * a.from_distance,
            "the experts of a layer differ in format, and such a layer cannot stay in host memory; "
            "set moe.host_layers = 0."
        );
    }
    return a;
}

}  // namespace

const MoeWeights& ExpertStaging::stage(
    Stream& stream, const Routing& routing, const MoeWeights& moe
) {
    staged_ = moe;
    std::vector<ExpertArray> arrays;
    std::byte* next = memory_;
    for (ExpertWeights* part : {&staged_.gate, &staged_.up, &staged_.down}) {
        const QuantizedMatrix first = part->w[0];
        const auto count = static_cast<int64_t>(part->w.size());
        const int64_t code_bytes = first.bytes() - first.scale_bytes();
        const ExpertArray codes = array_of(part->w, code_bytes, codes_of, next);
        arrays.push_back(codes);
        next += count * codes.to_distance;
        ExpertArray scales;
        if (first.scale_bytes() > 0) {
            scales = array_of(part->w, first.scale_bytes(), scales_of, next);
            arrays.push_back(scales);
            next += count * scales.to_distance;
        }
        for (int64_t e = 0; e < count; ++e) {
            const std::byte* scale =
                scales.to == nullptr ? nullptr : scales.to + e * scales.to_distance;
            set_places(part->w[static_cast<size_t>(e)], codes.to + e * codes.to_distance, scale);
        }
    }
    CHECK_LE(next - memory_, bytes_);
    stage_experts(stream, routing.offsets, routing.num_experts, arrays);
    return staged_;
}

}  // namespace orbit
