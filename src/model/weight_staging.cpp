#include "model/weight_staging.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "base/error.h"

namespace orbit {
namespace {

template <typename T>
T load(const std::byte* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// Whether one of `count` numbers of type T, `stride` bytes apart, has all exponent bits set.
template <typename T>
bool holds_non_finite(const std::byte* from, int64_t count, int64_t stride, T exponent) {
    bool found = false;
    for (int64_t i = 0; i < count; ++i) {
        found |= (load<T>(from + i * stride) & exponent) == exponent;
    }
    return found;
}

// E4M3 and E8M0 have NaN, but no infinity: the codes that equal `nan` under the mask.
bool holds_code(const std::byte* from, int64_t count, unsigned mask, unsigned nan) {
    bool found = false;
    for (int64_t i = 0; i < count; ++i) {
        found |= (std::to_integer<unsigned>(from[i]) & mask) == nan;
    }
    return found;
}

bool holds_non_finite(WeightFormat format, const std::byte* from, int64_t count) {
    constexpr uint16_t kBf16Exponent = 0x7f80;
    constexpr uint16_t kF16Exponent = 0x7c00;
    constexpr uint32_t kF32Exponent = 0x7f800000;
    const int64_t block = row_bytes(format, 32);
    switch (format) {
        case WeightFormat::kFp8:
            return holds_code(from, count, 0x7f, 0x7f);
        case WeightFormat::kBF16:
            return holds_non_finite<uint16_t>(from, count, 2, kBf16Exponent);
        case WeightFormat::kF16:
            return holds_non_finite<uint16_t>(from, count, 2, kF16Exponent);
        case WeightFormat::kF32:
            return holds_non_finite<uint32_t>(from, count, 4, kF32Exponent);
        case WeightFormat::kInt4:
        case WeightFormat::kMxFp4:
        case WeightFormat::kNvFp4:
            return false;  // their scales are checked on their own
        case WeightFormat::kQ8_0:
        case WeightFormat::kQ4_0:
            return holds_non_finite<uint16_t>(from, count / 32, block, kF16Exponent);
        case WeightFormat::kQ4_1:
            return holds_non_finite<uint16_t>(from, count / 32, block, kF16Exponent) ||
                   holds_non_finite<uint16_t>(from + 2, count / 32, block, kF16Exponent);
    }
    return false;
}

// Which row of the file is row `row` of the matrix. GGUF llama files hold the rows of a head as
// (0, d/2, 1, d/2 + 1, ...).
int64_t stored_row(const StoredWeight& weight, int64_t row) {
    if (weight.interleaved_heads == 0) {
        return weight.first_row + row * weight.row_step;
    }
    const int64_t head_rows = weight.shape[0] / weight.interleaved_heads;
    const int64_t head = row / head_rows;
    const int64_t channel = row % head_rows;
    const int64_t half = channel / (head_rows / 2);
    return head * head_rows + 2 * (channel % (head_rows / 2)) + half;
}

// Rows in the order of the matrix, and behind them their scales, if any. Rows are whole, so no
// value changes.
void restore_row_order(const StoredWeight& weight, StagedWeight& staged) {
    QuantizedMatrix& w = staged.matrix;
    CHECK(w.format == WeightFormat::kMxFp4 || w.scale_bytes() == 0);
    const auto rows = static_cast<size_t>(w.rows);
    const auto bytes = static_cast<size_t>(row_bytes(w.format, w.cols));
    const size_t scale_bytes = static_cast<size_t>(w.scale_bytes()) / rows;
    staged.data.resize(rows * (bytes + scale_bytes));
    std::byte* to = staged.data.data();
    std::byte* to_scales = to + rows * bytes;
    for (size_t row = 0; row < rows; ++row) {
        const auto from = static_cast<size_t>(stored_row(weight, static_cast<int64_t>(row)));
        std::memcpy(to + row * bytes, weight.data.data() + from * bytes, bytes);
        if (scale_bytes > 0) {
            const std::byte* scales = weight.scales.data() + from * scale_bytes;
            std::memcpy(to_scales + row * scale_bytes, scales, scale_bytes);
        }
    }
    w.data = to;
    w.block_scales = scale_bytes > 0 ? to_scales : nullptr;
}

void widen_to_f32(ThreadPool& threads, StagedWeight& staged) {
    QuantizedMatrix& w = staged.matrix;
    std::vector<std::byte> wide(static_cast<size_t>(w.rows * w.cols) * sizeof(float));
    auto* out = reinterpret_cast<float*>(wide.data());
    threads.parallel_for(w.rows, 16, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            decode_f32(w, row, 0, w.cols, out + row * w.cols);
        }
    });
    staged.data = std::move(wide);
    w.data = staged.data.data();
    w.format = WeightFormat::kF32;
}

void round_matrix(ThreadPool& threads, const StoredWeight& weight, StagedWeight& staged) {
    QuantizedMatrix& w = staged.matrix;
    std::vector<std::byte> rounded(static_cast<size_t>(w.rows * w.cols) * sizeof(bf16));
    auto* out = reinterpret_cast<bf16*>(rounded.data());
    std::vector<float> errors(static_cast<size_t>(threads.num_threads()), 0.0f);
    threads.parallel_for(w.rows, 16, [&](int64_t begin, int64_t end, int thread) {
        std::vector<float> values(static_cast<size_t>(w.cols));
        float largest = errors[static_cast<size_t>(thread)];
        for (int64_t row = begin; row < end; ++row) {
            decode_f32(w, row, 0, w.cols, values.data());
            for (int64_t i = 0; i < w.cols; ++i) {
                const float value = values[static_cast<size_t>(i)];
                const bf16 near = to_bf16(value);
                out[row * w.cols + i] = near;
                largest = std::max(largest, std::abs(value - to_float(near)));
            }
        }
        errors[static_cast<size_t>(thread)] = largest;
    });
    staged.largest_rounding_error =
        static_cast<double>(*std::max_element(errors.begin(), errors.end()));
    USER_CHECK(
        std::isfinite(staged.largest_rounding_error),
        "{}: the tensor \"{}\" holds a value beyond the range of BF16.",
        weight.file,
        weight.name
    );
    staged.data = std::move(rounded);
    w.data = staged.data.data();
    w.format = WeightFormat::kBF16;
}

void quantize_matrix(ThreadPool& threads, const StoredWeight& weight, StagedWeight& staged) {
    QuantizedMatrix& w = staged.matrix;
    constexpr int32_t kGroup = 32;
    USER_CHECK(
        w.cols % kGroup == 0,
        "{}: the tensor \"{}\" has {} columns, no multiple of {}, and cannot become INT4.",
        weight.file,
        weight.name,
        w.cols,
        kGroup
    );
    std::vector<std::byte> words(static_cast<size_t>(w.rows * w.cols / 2));
    std::vector<bf16> scales(static_cast<size_t>(w.rows * w.cols / kGroup));
    auto* out = reinterpret_cast<uint32_t*>(words.data());
    threads.parallel_for(w.rows, 16, [&](int64_t begin, int64_t end, int) {
        std::vector<float> values(static_cast<size_t>(w.cols));
        for (int64_t row = begin; row < end; ++row) {
            decode_f32(w, row, 0, w.cols, values.data());
            encode_int4(
                values.data(),
                w.cols,
                kGroup,
                out + row * w.cols / 8,
                scales.data() + row * w.cols / kGroup
            );
        }
    });
    staged.data = std::move(words);
    staged.scales = std::move(scales);
    w.format = WeightFormat::kInt4;
    w.group_size = kGroup;
    w.data = staged.data.data();
    w.scales = staged.scales.data();
}

// The float scales of FP8; every stored type is exact in float.
void widen_scales(const StoredWeight& weight, StagedWeight& staged) {
    const int64_t blocks_down = (weight.shape[0] + kFp8Block - 1) / kFp8Block;
    const int64_t blocks_across = (weight.shape[1] + kFp8Block - 1) / kFp8Block;
    std::vector<float> values(static_cast<size_t>(blocks_down * blocks_across));
    if (weight.e8m0_scales) {
        for (size_t i = 0; i < values.size(); ++i) {
            values[i] = e8m0_to_float(std::to_integer<uint8_t>(weight.scales[i]));
        }
    } else {
        QuantizedMatrix scales;
        scales.format = weight.scale_format;
        scales.rows = 1;
        scales.cols = static_cast<int64_t>(values.size());
        scales.data = weight.scales.data();
        decode_f32(scales, 0, 0, scales.cols, values.data());
    }
    for (const float value : values) {
        USER_CHECK(
            std::isfinite(448.0f * value),  // 448 is the largest code
            "{}: a scale of \"{}\", {}, leads beyond the range of float; the file is damaged.",
            weight.file,
            weight.name,
            value
        );
    }
    staged.block_scales = std::move(values);
    staged.matrix.block_scales = staged.block_scales.data();
}

// Scales in F16 or F32 are kept when bf16 holds them exactly; rounding them would change weights.
void convert_scales(const StoredWeight& weight, StagedWeight& staged) {
    QuantizedMatrix scales;
    scales.format = weight.scale_format;
    scales.rows = 1;
    scales.cols = weight.shape[0] * weight.shape[1] / weight.group_size;
    scales.data = weight.scales.data();
    std::vector<float> values(static_cast<size_t>(scales.cols));
    decode_f32(scales, 0, 0, scales.cols, values.data());
    staged.scales.resize(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
        staged.scales[i] = to_bf16(values[i]);
        USER_CHECK(
            to_float(staged.scales[i]) == values[i],
            "{}: the scales of \"{}\" are {} and one of them, {}, is no BF16 number; only scales "
            "that BF16 holds exactly are supported.",
            weight.file,
            weight.name,
            format_name(weight.scale_format),
            values[i]
        );
    }
    staged.matrix.scales = staged.scales.data();
}

}  // namespace

QuantizedMatrix stored_matrix(const StoredWeight& weight) {
    CHECK(weight.shape.size() == 1 || weight.shape.size() == 2);
    QuantizedMatrix w;
    w.format = weight.format;
    w.rows = weight.shape.size() == 2 ? weight.shape[0] : 1;
    w.cols = weight.shape.back();
    w.group_size = weight.group_size;
    w.data = weight.data.data();
    if (weight.format == WeightFormat::kInt4 && weight.scale_format == WeightFormat::kBF16) {
        w.scales = reinterpret_cast<const bf16*>(weight.scales.data());
    }
    if (weight.format == WeightFormat::kMxFp4 || weight.format == WeightFormat::kNvFp4) {
        w.block_scales = weight.scales.data();
        w.global_scale = weight.global_scale;
        w.global_divides = weight.global_divides;
        CHECK_EQ(weight.scales.size(), static_cast<size_t>(w.scale_bytes() * weight.row_step));
    }
    const int64_t rows = w.rows * weight.row_step;
    CHECK_EQ(weight.data.size(), static_cast<size_t>(rows * row_bytes(w.format, w.cols)));
    return w;
}

void check_finite(ThreadPool& threads, const StoredWeight& weight) {
    std::atomic<bool> found{false};
    const auto scan = [&](WeightFormat format, std::span<const std::byte> bytes, int64_t count) {
        constexpr int64_t kChunk = 1 << 16;  // a multiple of every block
        threads.parallel_for((count + kChunk - 1) / kChunk, 1, [&](int64_t a, int64_t b, int) {
            for (int64_t chunk = a; chunk < b; ++chunk) {
                const int64_t first = chunk * kChunk;
                const std::byte* from = bytes.data() + row_bytes(format, first);
                if (holds_non_finite(format, from, std::min(kChunk, count - first))) {
                    found = true;
                }
            }
        });
    };
    scan(weight.format, weight.data, weight.numel());
    if (weight.format == WeightFormat::kInt4) {
        scan(weight.scale_format, weight.scales, weight.numel() / weight.group_size);
    }
    const auto num_scales = static_cast<int64_t>(weight.scales.size());
    if (weight.format == WeightFormat::kNvFp4) {
        scan(WeightFormat::kFp8, weight.scales, num_scales);
    } else if (weight.format == WeightFormat::kMxFp4) {
        // 255 is NaN; 6 times the scales of 253 and 254 lies beyond float.
        for (const unsigned code : {253U, 254U, 255U}) {
            found = found || holds_code(weight.scales.data(), num_scales, 0xff, code);
        }
    }
    USER_CHECK(
        !found,
        "{}: the tensor \"{}\" holds a NaN or an infinity; the file is damaged or the training "
        "that made it diverged.",
        weight.file,
        weight.name
    );
}

StagedWeight stage_matrix(
    ThreadPool& threads, const StoredWeight& weight, const StagingOptions& options
) {
    check_finite(threads, weight);
    StagedWeight staged;
    staged.matrix = stored_matrix(weight);
    if (weight.row_step > 1 || weight.interleaved_heads > 0) {
        restore_row_order(weight, staged);
    }
    const bool wide = weight.format == WeightFormat::kF16 || weight.format == WeightFormat::kF32;
    if (weight.format == WeightFormat::kInt4) {
        if (weight.scale_format != WeightFormat::kBF16) {
            convert_scales(weight, staged);
        }
    } else if (weight.format == WeightFormat::kFp8) {
        widen_scales(weight, staged);
    } else if (options.quantize_int4 && (wide || weight.format == WeightFormat::kBF16)) {
        quantize_matrix(threads, weight, staged);
    } else if (wide && options.keep_f32) {
        if (weight.format == WeightFormat::kF16) {
            widen_to_f32(threads, staged);
        }
    } else if (wide) {
        round_matrix(threads, weight, staged);
    }
    return staged;
}

std::vector<float> stage_vector(const StoredWeight& weight) {
    ThreadPool alone(1);
    check_finite(alone, weight);
    const QuantizedMatrix w = stored_matrix(weight);
    std::vector<float> values(static_cast<size_t>(w.cols));
    decode_f32(w, 0, 0, w.cols, values.data());
    return values;
}

}  // namespace orbit
