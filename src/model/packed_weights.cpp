#include "model/packed_weights.h"

#include <cmath>
#include <cstring>

#include "base/error.h"

namespace orbit {
namespace {

constexpr std::string_view kWeight = ".weight";
constexpr std::string_view kPacked = ".weight_packed";
constexpr std::string_view kBlocks = "_blocks";

// The tensors of one packed matrix.
class Parts {
  public:
    Parts(
        const TensorMap& tensors,
        const StoredTensor& data,
        size_t suffix,
        std::set<std::string>& out
    )
        : tensors_(tensors),
          data_(data),
          module_(data.name.substr(0, data.name.size() - suffix)),
          consumed_(out) {
        consumed_.insert(data.name);
    }

    const StoredTensor& data() const { return data_; }

    const std::string& module() const { return module_; }

    bool has(const std::string& suffix) const { return tensors_.contains(module_ + suffix); }

    const StoredTensor& take(const std::string& suffix) {
        const auto found = tensors_.find(module_ + suffix);
        USER_CHECK(
            found != tensors_.end(),
            "{}: the tensor \"{}\" has no \"{}\" beside it.",
            data_.file,
            data_.name,
            module_ + suffix
        );
        consumed_.insert(found->first);
        return *found->second;
    }

  private:
    const TensorMap& tensors_;
    const StoredTensor& data_;
    std::string module_;
    std::set<std::string>& consumed_;
};

// weight_shape: two integers (I32 or I64), the unpacked [out, in].
std::vector<int64_t> unpacked_shape(const StoredTensor& shape) {
    USER_CHECK(
        shape.numel() == 2 && (shape.dtype == "I32" || shape.dtype == "I64"),
        "{}: the tensor \"{}\" must hold two I32 or I64 sizes.",
        shape.file,
        shape.name
    );
    std::vector<int64_t> dims;
    for (size_t i = 0; i < 2; ++i) {
        int64_t value = 0;
        if (shape.dtype == "I32") {
            int32_t narrow = 0;
            std::memcpy(&narrow, shape.bytes.data() + i * sizeof narrow, sizeof narrow);
            value = narrow;
        } else {
            std::memcpy(&value, shape.bytes.data() + i * sizeof value, sizeof value);
        }
        dims.push_back(value);
    }
    return dims;
}

StoredWeight packed(const Parts& parts, WeightFormat format, const StoredTensor& scale) {
    StoredWeight weight;
    weight.name = parts.data().name;
    weight.file = parts.data().file;
    weight.format = format;
    weight.data = parts.data().bytes;
    weight.scales = scale.bytes;
    return weight;
}

void check_fits(bool fits, const Parts& parts, const StoredTensor& scale, const char* what) {
    USER_CHECK(
        fits,
        "{}: \"{}\" ({} {}) and its scales ({} {}) do not make {}.",
        parts.data().file,
        parts.data().name,
        parts.data().dtype,
        shape_text(parts.data().shape),
        scale.dtype,
        shape_text(scale.shape),
        what
    );
}

// compressed-tensors pack-quantized, symmetric INT4 (models.md 10.4).
StoredWeight int4_weight(Parts parts) {
    for (const char* refused : {".weight_zero_point", ".weight_g_idx"}) {
        USER_CHECK(
            !parts.has(refused),
            "{}: \"{}{}\" belongs to asymmetric or reordered INT4, which is not supported.",
            parts.data().file,
            parts.module(),
            refused
        );
    }
    const StoredTensor& data = parts.data();
    const StoredTensor& scale = parts.take(".weight_scale");
    StoredWeight weight = packed(parts, WeightFormat::kInt4, scale);
    weight.scale_format = read_plain_weight(scale).format;
    weight.shape = unpacked_shape(parts.take(".weight_shape"));
    const int64_t rows = weight.shape[0];
    const int64_t cols = weight.shape[1];
    check_fits(
        data.dtype == "I32" && data.shape.size() == 2 && scale.shape.size() == 2 && rows > 0 &&
            cols > 0 && cols % 32 == 0 && data.shape[0] == rows && data.shape[1] == cols / 8 &&
            scale.shape[0] == rows && scale.shape[1] > 0 && cols % scale.shape[1] == 0 &&
            (cols / scale.shape[1]) % 32 == 0 && cols / scale.shape[1] <= 1024,
        parts,
        scale,
        "an INT4 matrix with groups of a multiple of 32 columns"
    );
    weight.group_size = static_cast<int32_t>(cols / scale.shape[1]);
    return weight;
}

// E2M1 nibbles [out, in / 2] with one scale for `group` columns of a row.
StoredWeight fp4_weight(
    const Parts& parts, WeightFormat format, const StoredTensor& scale, const char* what
) {
    StoredWeight weight = packed(parts, format, scale);
    const auto& shape = parts.data().shape;
    const int64_t group = format == WeightFormat::kMxFp4 ? kMxFp4Group : kNvFp4Group;
    check_fits(
        shape.size() == 2 && scale.shape.size() == 2 && shape[0] > 0 && shape[1] > 0 &&
            shape[1] % (group / 2) == 0 && scale.shape[0] == shape[0] &&
            scale.shape[1] == shape[1] / (group / 2),
        parts,
        scale,
        what
    );
    weight.shape = {shape[0], 2 * shape[1]};
    return weight;
}

StoredWeight mxfp4_weight(Parts parts, const char* scale_name) {
    const StoredTensor& scale = parts.take(scale_name);
    constexpr const char* kWhat = "an MXFP4 matrix with an E8M0 scale for 32 columns";
    check_fits(scale.dtype == "U8" || scale.dtype == "F8_E8M0", parts, scale, kWhat);
    return fp4_weight(parts, WeightFormat::kMxFp4, scale, kWhat);
}

// gpt-oss: the experts of a layer, 16 bytes for 32 columns.
StoredWeight fused_mxfp4_weight(Parts parts) {
    const StoredTensor& scale = parts.take("_scales");
    StoredWeight weight = packed(parts, WeightFormat::kMxFp4, scale);
    const auto& shape = parts.data().shape;
    check_fits(
        parts.data().dtype == "U8" && scale.dtype == "U8" && shape.size() == 4 &&
            shape[3] == kMxFp4Group / 2 && parts.data().numel() > 0 &&
            scale.shape == std::vector<int64_t>{shape[0], shape[1], shape[2]},
        parts,
        scale,
        "MXFP4 experts of [experts, rows, blocks, 16] with a U8 scale a block"
    );
    weight.shape = {shape[0], shape[1], shape[2] * kMxFp4Group};
    return weight;
}

StoredWeight nvfp4_weight(Parts parts, const char* global_name, bool divides) {
    const StoredTensor& scale = parts.take(".weight_scale");
    constexpr const char* kWhat = "an NVFP4 matrix with an E4M3 scale for 16 columns";
    check_fits(scale.dtype == "F8_E4M3", parts, scale, kWhat);
    StoredWeight weight = fp4_weight(parts, WeightFormat::kNvFp4, scale, kWhat);
    const StoredTensor& global = parts.take(global_name);
    USER_CHECK(
        global.dtype == "F32" && global.numel() == 1,
        "{}: \"{}\" must be one F32 number.",
        global.file,
        global.name
    );
    std::memcpy(&weight.global_scale, global.bytes.data(), sizeof weight.global_scale);
    weight.global_divides = divides;
    // The largest value of a code is 448 * 6.
    const float scaled = divides ? 2688.0f / weight.global_scale : 2688.0f * weight.global_scale;
    USER_CHECK(
        std::isfinite(weight.global_scale) && weight.global_scale > 0 && std::isfinite(scaled),
        "{}: the scale \"{}\" is {}; a positive number within the range of float is needed.",
        global.file,
        global.name,
        weight.global_scale
    );
    return weight;
}

// V3 and Qwen3 name the scales weight_scale_inv, although they multiply; V4 names them scale.
StoredWeight fp8_weight(Parts parts) {
    const StoredTensor& scale =
        parts.take(parts.has(".weight_scale_inv") ? ".weight_scale_inv" : ".scale");
    StoredWeight weight = packed(parts, WeightFormat::kFp8, scale);
    weight.e8m0_scales = scale.dtype == "F8_E8M0";
    if (!weight.e8m0_scales) {
        weight.scale_format = read_plain_weight(scale).format;
    }
    weight.shape = parts.data().shape;
    const auto blocks = [](int64_t size) { return (size + kFp8Block - 1) / kFp8Block; };
    check_fits(
        weight.shape.size() == 2 && scale.shape.size() == 2 && weight.shape[0] > 0 &&
            weight.shape[1] > 0 && scale.shape[0] == blocks(weight.shape[0]) &&
            scale.shape[1] == blocks(weight.shape[1]),
        parts,
        scale,
        "an FP8 matrix with a scale for every block of 128 x 128"
    );
    return weight;
}

// The names that gate, up and down have for one expert each, out of a fused tensor.
void split_experts(
    Checkpoint& checkpoint, const StoredWeight& fused, const std::vector<const char*>& projections
) {
    const std::string prefix = fused.name.substr(0, fused.name.rfind('.') + 1);
    const auto parts = static_cast<int64_t>(projections.size());
    USER_CHECK(
        fused.shape.size() == 3 && fused.numel() > 0 && fused.shape[1] % parts == 0,
        "{}: \"{}\" has the shape {}; fused experts have [experts, rows, columns].",
        fused.file,
        fused.name,
        shape_text(fused.shape)
    );
    const int64_t rows = fused.shape[1] / parts;
    const int64_t cols = fused.shape[2];
    // Plain projections lie one behind the other, packed ones (gpt-oss) alternate row by row.
    const int64_t step = fused.format == WeightFormat::kMxFp4 ? parts : 1;
    const auto pieces = static_cast<size_t>(fused.shape[0] * parts / step);
    const size_t bytes = fused.data.size() / pieces;
    const size_t scale_bytes = fused.scales.size() / pieces;
    for (int64_t e = 0; e < fused.shape[0]; ++e) {
        for (int64_t part = 0; part < parts; ++part) {
            const auto piece = static_cast<size_t>((e * parts + part) / step);
            StoredWeight one = fused;
            one.shape = {rows, cols};
            one.data = fused.data.subspan(piece * bytes, bytes);
            one.scales = fused.scales.subspan(piece * scale_bytes, scale_bytes);
            one.first_row = part % step;
            one.row_step = step;
            const std::string name =
                fmt::format("{}{}.{}.weight", prefix, e, projections[static_cast<size_t>(part)]);
            const bool added = checkpoint.weights.emplace(name, std::move(one)).second;
            USER_CHECK(added, "{}: \"{}\" is there twice, fused and alone.", fused.file, name);
        }
    }
}

}  // namespace

StoredWeight read_plain_weight(const StoredTensor& tensor) {
    StoredWeight weight;
    weight.name = tensor.name;
    weight.file = tensor.file;
    weight.shape = tensor.shape;
    weight.data = tensor.bytes;
    USER_CHECK(
        tensor.dtype == "BF16" || tensor.dtype == "F16" || tensor.dtype == "F32",
        "{}: the tensor \"{}\" is {}; BF16, F16 and F32 are supported.",
        tensor.file,
        tensor.name,
        tensor.dtype
    );
    weight.format = tensor.dtype == "BF16"  ? WeightFormat::kBF16
                    : tensor.dtype == "F16" ? WeightFormat::kF16
                                            : WeightFormat::kF32;
    return weight;
}

std::optional<StoredWeight> read_packed_weight(
    const TensorMap& tensors, const StoredTensor& tensor, std::set<std::string>& consumed
) {
    if (tensor.name.ends_with(kPacked)) {
        Parts parts(tensors, tensor, kPacked.size(), consumed);
        if (tensor.dtype != "U8") {
            return int4_weight(parts);
        }
        if (parts.has(".weight_global_scale")) {
            return nvfp4_weight(parts, ".weight_global_scale", true);
        }
        return mxfp4_weight(parts, ".weight_scale");
    }
    if (tensor.name.ends_with(kBlocks)) {
        return fused_mxfp4_weight(Parts(tensors, tensor, kBlocks.size(), consumed));
    }
    if (!tensor.name.ends_with(kWeight)) {
        return std::nullopt;
    }
    if (tensor.dtype == "U8") {
        return nvfp4_weight(
            Parts(tensors, tensor, kWeight.size(), consumed), ".weight_scale_2", false
        );
    }
    if (tensor.dtype == "I8") {
        return mxfp4_weight(Parts(tensors, tensor, kWeight.size(), consumed), ".scale");
    }
    if (tensor.dtype == "F8_E4M3") {
        return fp8_weight(Parts(tensors, tensor, kWeight.size(), consumed));
    }
    return std::nullopt;
}

std::string packed_weight_name(const std::string& tensor) {
    if (tensor.ends_with(kBlocks)) {
        return tensor.substr(0, tensor.size() - kBlocks.size());
    }
    return tensor.substr(0, tensor.rfind('.')) + ".weight";
}

bool is_left_over(const std::string& name) {
    return name.ends_with("rotary_emb.inv_freq") || name.ends_with(".input_scale") ||
           name.ends_with(".input_global_scale");
}

void split_fused_experts(Checkpoint& checkpoint) {
    std::vector<std::pair<std::string, StoredWeight>> fused;
    for (auto it = checkpoint.weights.begin(); it != checkpoint.weights.end();) {
        const bool is_fused = it->first.ends_with(".experts.gate_up_proj") ||
                              it->first.ends_with(".experts.down_proj");
        if (is_fused) {
            fused.emplace_back(it->first, std::move(it->second));
        }
        it = is_fused ? checkpoint.weights.erase(it) : std::next(it);
    }
    for (const auto& [name, weight] : fused) {
        if (name.ends_with("down_proj")) {
            split_experts(checkpoint, weight, {"down_proj"});
        } else {
            split_experts(checkpoint, weight, {"gate_proj", "up_proj"});
        }
    }
}

}  // namespace orbit
