#include "model/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "quant/encode.h"

namespace orbit {
namespace {

constexpr int32_t kInt4Group = 32;

// float32 values of rows [begin, end); the file's bytes have no alignment, decode_f32 needs none.
std::vector<float> rows_of(const StoredWeight& weight, int64_t begin, int64_t end) {
    QuantizedMatrix w;
    w.format = weight.format;
    w.rows = weight.shape[0];
    w.cols = weight.shape[1];
    w.data = weight.data.data();
    std::vector<float> values(static_cast<size_t>((end - begin) * w.cols));
    for (int64_t r = begin; r < end; ++r) {
        decode_f32(w, r, 0, w.cols, values.data() + (r - begin) * w.cols);
    }
    return values;
}

// The packed bytes, and the view of them that the error is measured on.
struct Packing {
    QuantizedMatrix view;
    std::vector<std::byte> data;
    std::vector<std::byte> scales;
    std::vector<float> block_scales;  // FP8, where the view needs float

    Packing(const StoredWeight& weight, WeightFormat format) {
        view.format = format;
        view.rows = weight.shape[0];
        view.cols = weight.shape[1];
        view.group_size = kInt4Group;
        data.resize(static_cast<size_t>(view.rows * row_bytes(format, view.cols)));
        scales.resize(static_cast<size_t>(view.scale_bytes()));
        if (format == WeightFormat::kFp8) {
            block_scales.resize(scales.size() / sizeof(float));
        }
        view.data = data.data();
        view.scales = reinterpret_cast<const bf16*>(scales.data());
        view.block_scales =
            block_scales.empty() ? scales.data() : static_cast<const void*>(block_scales.data());
    }

    uint8_t* codes(int64_t row) {
        return reinterpret_cast<uint8_t*>(data.data()) + row * row_bytes(view.format, view.cols);
    }

    uint8_t* row_scales(int64_t row) {
        return reinterpret_cast<uint8_t*>(scales.data()) + row * (view.scale_bytes() / view.rows);
    }
};

// Rows [begin, end), at most 128 and starting at a multiple of 128.
void encode_rows(Packing& p, const float* values, int64_t begin, int64_t end) {
    const int64_t cols = p.view.cols;
    if (p.view.format == WeightFormat::kFp8) {
        const int64_t blocks = (cols + kFp8Block - 1) / kFp8Block;
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t width = std::min(kFp8Block, cols - b * kFp8Block);
            const float scale = encode_fp8_block(
                values + b * kFp8Block, end - begin, width, cols, p.codes(begin) + b * kFp8Block
            );
            p.block_scales[static_cast<size_t>(begin / kFp8Block * blocks + b)] = scale;
        }
        return;
    }
    for (int64_t r = begin; r < end; ++r) {
        const float* row = values + (r - begin) * cols;
        if (p.view.format == WeightFormat::kInt4) {
            encode_int4(
                row,
                cols,
                kInt4Group,
                reinterpret_cast<uint32_t*>(p.codes(r)),
                reinterpret_cast<bf16*>(p.row_scales(r))
            );
        } else if (p.view.format == WeightFormat::kMxFp4) {
            encode_mxfp4(row, cols, p.codes(r), p.row_scales(r));
        } else {
            encode_nvfp4(row, cols, p.view.global_scale, p.codes(r), p.row_scales(r));
        }
    }
}

float largest_of(const StoredWeight& weight) {
    float largest = 0;
    for (int64_t r = 0; r < weight.shape[0]; ++r) {
        for (const float value : rows_of(weight, r, r + 1)) {
            largest = std::max(largest, std::abs(value));
        }
    }
    return largest;
}

struct Errors {
    double difference = 0;
    double total = 0;
};

Errors errors_of(const Packing& p, const float* values, int64_t begin, int64_t end) {
    Errors errors;
    std::vector<float> back(static_cast<size_t>(p.view.cols));
    for (int64_t r = begin; r < end; ++r) {
        decode_f32(p.view, r, 0, p.view.cols, back.data());
        for (int64_t c = 0; c < p.view.cols; ++c) {
            const auto want = static_cast<double>(values[(r - begin) * p.view.cols + c]);
            const double difference = want - static_cast<double>(back[static_cast<size_t>(c)]);
            errors.difference += difference * difference;
            errors.total += want * want;
        }
    }
    return errors;
}

template <typename T>
std::vector<std::byte> bytes_of(const T* values, size_t count) {
    std::vector<std::byte> bytes(count * sizeof(T));
    std::memcpy(bytes.data(), values, bytes.size());
    return bytes;
}

std::vector<PackedTensor> tensors_of(Packing&& p) {
    const int64_t rows = p.view.rows;
    const int64_t cols = p.view.cols;
    switch (p.view.format) {
        case WeightFormat::kInt4: {
            const int64_t shape[2] = {rows, cols};
            return {
                {".weight_packed", "I32", {rows, cols / 8}, std::move(p.data)},
                {".weight_scale", "BF16", {rows, cols / kInt4Group}, std::move(p.scales)},
                {".weight_shape", "I64", {2}, bytes_of(shape, 2)}};
        }
        case WeightFormat::kFp8: {
            std::vector<bf16> scales;
            for (const float scale : p.block_scales) {
                scales.push_back(to_bf16(scale));  // exact: encode_fp8_block rounded it
            }
            const std::vector<int64_t> shape = {
                (rows + kFp8Block - 1) / kFp8Block, (cols + kFp8Block - 1) / kFp8Block};
            return {
                {".weight", "F8_E4M3", {rows, cols}, std::move(p.data)},
                {".weight_scale_inv", "BF16", shape, bytes_of(scales.data(), scales.size())}};
        }
        case WeightFormat::kMxFp4:
            return {
                {".weight_packed", "U8", {rows, cols / 2}, std::move(p.data)},
                {".weight_scale", "U8", {rows, cols / kMxFp4Group}, std::move(p.scales)}};
        default: {
            const float global = p.view.global_scale;
            return {
                {".weight_packed", "U8", {rows, cols / 2}, std::move(p.data)},
                {".weight_scale", "F8_E4M3", {rows, cols / kNvFp4Group}, std::move(p.scales)},
                {".weight_global_scale", "F32", {1}, bytes_of(&global, 1)}};
        }
    }
}

void check_width(const StoredWeight& weight, WeightFormat format) {
    const int64_t group = format == WeightFormat::kFp8     ? 1
                          : format == WeightFormat::kNvFp4 ? kNvFp4Group
                                                           : int64_t{kInt4Group};
    USER_CHECK(
        weight.shape.size() == 2 && weight.shape[1] % group == 0,
        "{}: \"{}\" has {} columns, which groups of {} do not divide.",
        weight.file,
        weight.name,
        weight.shape.back(),
        group
    );
    USER_CHECK(
        weight.format == WeightFormat::kBF16 || weight.format == WeightFormat::kF16 ||
            weight.format == WeightFormat::kF32,
        "{}: \"{}\" is {} already; quantise the original model.",
        weight.file,
        weight.name,
        format_name(weight.format)
    );
}

}  // namespace

WeightFormat parse_quantized_format(std::string_view name) {
    if (name == "int4") {
        return WeightFormat::kInt4;
    }
    if (name == "fp8") {
        return WeightFormat::kFp8;
    }
    if (name == "mxfp4") {
        return WeightFormat::kMxFp4;
    }
    USER_CHECK(name == "nvfp4", "--format must be int4, fp8, mxfp4 or nvfp4, but is \"{}\".", name);
    return WeightFormat::kNvFp4;
}

PackedMatrix pack_matrix(ThreadPool& threads, const StoredWeight& weight, WeightFormat format) {
    check_width(weight, format);
    Packing packing(weight, format);
    if (format == WeightFormat::kNvFp4) {
        packing.view.global_scale = nvfp4_global_scale(largest_of(weight));
        packing.view.global_divides = true;
    }
    const int64_t rows = packing.view.rows;
    const int64_t blocks = (rows + kFp8Block - 1) / kFp8Block;
    std::vector<Errors> errors(static_cast<size_t>(blocks));
    threads.parallel_for(blocks, 1, [&](int64_t first, int64_t last, int) {
        for (int64_t b = first; b < last; ++b) {
            const int64_t begin = b * kFp8Block;
            const int64_t end = std::min(rows, begin + kFp8Block);
            const std::vector<float> values = rows_of(weight, begin, end);
            encode_rows(packing, values.data(), begin, end);
            errors[static_cast<size_t>(b)] = errors_of(packing, values.data(), begin, end);
        }
    });
    Errors sum;
    for (const Errors& part : errors) {
        sum.difference += part.difference;
        sum.total += part.total;
    }
    PackedMatrix packed;
    packed.relative_error = sum.total > 0 ? std::sqrt(sum.difference / sum.total) : 0;
    packed.tensors = tensors_of(std::move(packing));
    return packed;
}

std::string quantization_config_text(WeightFormat format, const std::vector<std::string>& plain) {
    using nlohmann::ordered_json;
    ordered_json config = ordered_json::object();
    if (format == WeightFormat::kFp8) {
        config["quant_method"] = "fp8";
        config["fmt"] = "e4m3";
        config["activation_scheme"] = "dynamic";
        config["weight_block_size"] = {kFp8Block, kFp8Block};
        config["modules_to_not_convert"] = plain;
        return config.dump();
    }
    const bool is_int4 = format == WeightFormat::kInt4;
    const bool is_nvfp4 = format == WeightFormat::kNvFp4;
    const char* name = is_int4    ? "pack-quantized"
                       : is_nvfp4 ? "nvfp4-pack-quantized"
                                  : "mxfp4-pack-quantized";
    config = ordered_json::parse(R"({
        "quant_method": "compressed-tensors", "format": "", "quantization_status": "compressed",
        "kv_cache_scheme": null, "global_compression_ratio": null,
        "config_groups": {"group_0": {
            "input_activations": null, "output_activations": null, "targets": ["Linear"],
            "format": "",
            "weights": {"num_bits": 4, "type": "float", "symmetric": true, "group_size": 32,
                        "strategy": "group", "dynamic": false, "observer": "minmax",
                        "observer_kwargs": {}, "actorder": null, "block_structure": null}}}})");
    ordered_json& group = config["config_groups"]["group_0"];
    config["format"] = name;
    group["format"] = name;
    if (is_int4) {
        group["weights"]["type"] = "int";
    } else if (is_nvfp4) {
        group["weights"]["group_size"] = kNvFp4Group;
        group["weights"]["strategy"] = "tensor_group";
    }
    config["ignore"] = plain;
    return config.dump();
}

}  // namespace orbit
