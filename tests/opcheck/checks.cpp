#include "opcheck/checks.h"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>

#include "quant/place.h"

namespace orbit::opcheck {
namespace {

constexpr int64_t kSampledCoordinates = 48;  // per input, in grad
constexpr double kPerfSeconds = 0.15;

using Bytes = std::vector<uint8_t>;
using Rows = std::vector<int64_t>;

int64_t numel_of(const std::vector<int64_t>& shape) {
    return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

Bytes encode(DType dtype, const std::vector<float>& values) {
    Bytes bytes(values.size() * static_cast<size_t>(dtype_bytes(dtype)));
    for (size_t i = 0; i < values.size(); ++i) {
        if (dtype == DType::kF32) {
            std::memcpy(&bytes[i * 4], &values[i], 4);
        } else if (dtype == DType::kBF16) {
            const bf16 rounded = to_bf16(values[i]);
            std::memcpy(&bytes[i * 2], &rounded, 2);
        } else {
            CHECK(dtype == DType::kI32, "(give other types as bytes)");
            const auto whole = static_cast<int32_t>(values[i]);
            std::memcpy(&bytes[i * 4], &whole, 4);
        }
    }
    return bytes;
}

std::vector<double> decode(DType dtype, const Bytes& bytes) {
    std::vector<double> values(bytes.size() / static_cast<size_t>(dtype_bytes(dtype)));
    for (size_t i = 0; i < values.size(); ++i) {
        if (dtype == DType::kBF16) {
            bf16 half{};
            std::memcpy(&half, &bytes[i * 2], 2);
            values[i] = static_cast<double>(to_float(half));
        } else if (dtype == DType::kI32) {
            int32_t whole = 0;
            std::memcpy(&whole, &bytes[i * 4], 4);
            values[i] = whole;
        } else {
            CHECK(dtype == DType::kF32, "(outputs are f32, bf16 or i32)");
            float single = 0;
            std::memcpy(&single, &bytes[i * 4], 4);
            values[i] = static_cast<double>(single);
        }
    }
    return values;
}

Tensor tensor_of(void* data, DType dtype, const std::vector<int64_t>& shape) {
    Tensor t;
    t.data = data;
    t.dtype = dtype;
    for (const int64_t dim : shape) {
        t.shape[static_cast<size_t>(t.rank++)] = dim;
    }
    return t;
}

Bytes pick_rows(const Bytes& bytes, int64_t num_rows, const Rows& rows) {
    const size_t stride = num_rows == 0 ? 0 : bytes.size() / static_cast<size_t>(num_rows);
    Bytes picked(rows.size() * stride);
    for (size_t i = 0; i < rows.size(); ++i) {
        std::memcpy(
            picked.data() + i * stride, bytes.data() + static_cast<size_t>(rows[i]) * stride, stride
        );
    }
    return picked;
}

int64_t rows_of(const Case& c) {
    for (const auto& in : c.inputs) {
        if (in.per_row) {
            return in.shape[0];
        }
    }
    return -1;
}

Bytes upload_bytes(const Input& in) {
    return in.bytes.empty() ? encode(in.dtype, in.values) : in.bytes;
}

// The case's tensors on the device of one stream, for all rows or the rows named.
class Instance {
  public:
    Instance(const Case& c, Stream& stream, const Rows* rows = nullptr)
        : case_(&c), stream_(&stream), arena_(stream.device) {
        for (const auto& in : c.inputs) {
            auto shape = in.shape;
            Bytes bytes = upload_bytes(in);
            if (rows != nullptr && in.per_row) {
                bytes = pick_rows(bytes, shape[0], *rows);
                shape[0] = static_cast<int64_t>(rows->size());
            }
            in_.push_back(allocate(in.dtype, shape));
            copy_to_device(stream, in_.back().data, bytes.data(), bytes.size());
            arrange_codes(stream, in.weight, in_.back().data, bytes.size());
        }
        for (const auto& out : c.outputs) {
            auto shape = out.shape;
            if (rows != nullptr && out.per_row) {
                shape[0] = static_cast<int64_t>(rows->size());
            }
            out_.push_back(allocate(out.dtype, shape));
        }
        synchronize(stream);
    }

    void run() { case_->run(*stream_, in_, out_); }

    std::vector<Bytes> outputs() { return download(out_); }

    // Uploads d(outputs) and zeroes d(inputs).
    void prepare_backward(const std::vector<std::vector<float>>& d_outputs) {
        for (size_t i = 0; i < d_outputs.size(); ++i) {
            const Bytes bytes = encode(out_[i].dtype, d_outputs[i]);
            d_out_.push_back(allocate(out_[i].dtype, case_->outputs[i].shape));
            copy_to_device(*stream_, d_out_.back().data, bytes.data(), bytes.size());
        }
        for (const auto& in : case_->inputs) {
            d_in_.push_back(in.grad ? allocate(in.grad_dtype, in.shape) : Tensor{});
        }
        synchronize(*stream_);
    }

    void run_backward() { case_->backward(*stream_, in_, d_out_, d_in_); }

    std::vector<Bytes> gradients(const std::vector<std::vector<float>>& d_outputs) {
        prepare_backward(d_outputs);
        run_backward();
        return download(d_in_);
    }

  private:
    Tensor allocate(DType dtype, const std::vector<int64_t>& shape) {
        const Tensor t = tensor_of(nullptr, dtype, shape);
        return tensor_of(
            arena_.take_bytes("opcheck", static_cast<size_t>(t.bytes())), dtype, shape
        );
    }

    std::vector<Bytes> download(const Tensors& tensors) {
        std::vector<Bytes> all;
        for (const auto& t : tensors) {
            Bytes bytes(t.defined() ? static_cast<size_t>(t.bytes()) : 0);
            if (!bytes.empty()) {
                copy_to_host(*stream_, bytes.data(), t.data, bytes.size());
            }
            all.push_back(std::move(bytes));
        }
        return all;
    }

    const Case* case_;
    Stream* stream_;
    Arena arena_;
    Tensors in_;
    Tensors out_;
    Tensors d_in_;
    Tensors d_out_;
};

Values input_values(const Case& c) {
    Values values;
    for (const auto& in : c.inputs) {
        values.emplace_back(in.values.begin(), in.values.end());
    }
    return values;
}

std::vector<std::vector<float>> random_cotangents(const Case& c) {
    Random random(77);
    std::vector<std::vector<float>> d_outputs;
    for (const auto& out : c.outputs) {
        const Input rounded =
            input(out.name, out.dtype, out.shape, random.normals(numel_of(out.shape)));
        d_outputs.push_back(rounded.values);
    }
    return d_outputs;
}

double loss(const Values& outputs, const std::vector<std::vector<float>>& d_outputs) {
    double sum = 0;
    for (size_t o = 0; o < outputs.size(); ++o) {
        for (size_t i = 0; i < outputs[o].size(); ++i) {
            sum += outputs[o][i] * static_cast<double>(d_outputs[o][i]);
        }
    }
    return sum;
}

double central_difference(
    const Case& c,
    Values& values,
    size_t which,
    size_t at,
    const std::vector<std::vector<float>>& d_outputs
) {
    const double saved = values[which][at];
    const double step = 1e-5 * std::max(1.0, std::abs(saved));
    values[which][at] = saved + step;
    const double above = loss(c.reference(values), d_outputs);
    values[which][at] = saved - step;
    const double below = loss(c.reference(values), d_outputs);
    values[which][at] = saved;
    return (above - below) / (2 * step);
}

// "" when equal, else the first place where the bits differ.
std::string first_difference(
    const Case& c, const std::vector<Bytes>& a, const std::vector<Bytes>& b, const char* what
) {
    for (size_t o = 0; o < a.size(); ++o) {
        CHECK_EQ(a[o].size(), b[o].size());
        for (size_t i = 0; i < a[o].size(); ++i) {
            if (a[o][i] != b[o][i]) {
                const bool is_output = o < c.outputs.size();
                const size_t size =
                    is_output ? static_cast<size_t>(dtype_bytes(c.outputs[o].dtype)) : 1;
                return fmt::format("{}: {}th result differs at element {}", what, o, i / size);
            }
        }
    }
    return "";
}

std::string check_rows(
    const Case& c,
    Stream& stream,
    const std::vector<Bytes>& full,
    const Rows& rows,
    const char* what
) {
    const int64_t num_rows = rows_of(c);
    Instance part(c, stream, &rows);
    part.run();
    const auto got = part.outputs();
    std::vector<Bytes> want;
    for (size_t o = 0; o < full.size(); ++o) {
        want.push_back(c.outputs[o].per_row ? pick_rows(full[o], num_rows, rows) : got[o]);
    }
    return first_difference(c, got, want, what);
}

// Once to warm up, then for a while; the shortest: other processes only ever add time.
double best_seconds(Stream& stream, const std::function<void()>& body) {
    using Clock = std::chrono::steady_clock;
    body();
    synchronize(stream);
    double best = 1e300;
    const auto started = Clock::now();
    for (int i = 0;
         i < 5 || std::chrono::duration<double>(Clock::now() - started).count() < kPerfSeconds;
         ++i) {
        const auto before = Clock::now();
        body();
        synchronize(stream);
        best = std::min(best, std::chrono::duration<double>(Clock::now() - before).count());
    }
    return best;
}

}  // namespace

Verdict check_forward(const Case& c, Stream& stream) {
    Instance instance(c, stream);
    instance.run();
    const auto outputs = instance.outputs();
    const Values want = c.reference(input_values(c));
    Verdict verdict{true, ""};
    double largest = 0;
    for (size_t o = 0; o < outputs.size(); ++o) {
        const auto got = decode(c.outputs[o].dtype, outputs[o]);
        CHECK_EQ(got.size(), want[o].size());
        double squares = 0;
        for (const double value : want[o]) {
            squares += value * value;
        }
        const double rms =
            std::sqrt(squares / static_cast<double>(std::max<size_t>(1, got.size())));
        for (size_t i = 0; i < got.size(); ++i) {
            const double error =
                std::abs(got[i] - want[o][i]) / (std::abs(want[o][i]) + rms + 1e-300);
            if (!(error <= c.forward_tolerance) && verdict.passed) {
                verdict.passed = false;
                verdict.detail = fmt::format(
                    "{}[{}] = {}, reference {}; ", c.outputs[o].name, i, got[i], want[o][i]
                );
            }
            largest = std::max(largest, error);
        }
    }
    verdict.detail += fmt::format("error {:.1e} of {:.1e}", largest, c.forward_tolerance);
    return verdict;
}

Verdict check_grad(const Case& c, Stream& stream) {
    const auto d_outputs = random_cotangents(c);
    Instance instance(c, stream);
    instance.run();
    const auto gradients = instance.gradients(d_outputs);
    Values values = input_values(c);
    Random random(99);
    Verdict verdict{true, ""};
    double largest = 0;
    for (size_t which = 0; which < c.inputs.size(); ++which) {
        if (!c.inputs[which].grad) {
            continue;
        }
        const auto got = decode(c.inputs[which].grad_dtype, gradients[which]);
        const auto count = static_cast<int64_t>(got.size());
        double error = 0;
        double norm = 0;
        for (int64_t s = 0; s < std::min(count, kSampledCoordinates); ++s) {
            const auto at =
                static_cast<size_t>(count <= kSampledCoordinates ? s : random.below(count));
            const double want = central_difference(c, values, which, at, d_outputs);
            error += (got[at] - want) * (got[at] - want);
            norm += want * want;
        }
        const double relative = std::sqrt(error / std::max(norm, 1e-300));
        if (!(relative <= c.grad_tolerance)) {
            verdict.passed = false;
            verdict.detail += fmt::format("d({}) is off; ", c.inputs[which].name);
        }
        largest = std::max(largest, relative);
    }
    verdict.detail += fmt::format("error {:.1e} of {:.1e}", largest, c.grad_tolerance);
    return verdict;
}

Verdict check_invariance(const Case& c, Stream& stream, Stream& other) {
    const int64_t num_rows = rows_of(c);
    Instance whole(c, stream);
    whole.run();
    const auto full = whole.outputs();
    int compared = 0;
    const auto fail = [](const std::string& text) { return Verdict{false, text}; };
    for (int64_t row = 0; row < std::min<int64_t>(num_rows, 3); ++row) {
        const Rows alone = {row * (num_rows - 1) / 2 % num_rows};
        if (const auto text = check_rows(c, stream, full, alone, "a row alone"); !text.empty()) {
            return fail(text);
        }
        ++compared;
    }
    Random random(5);
    for (int trial = 0; trial < 3; ++trial) {
        Rows rows(static_cast<size_t>(num_rows));
        std::iota(rows.begin(), rows.end(), 0);
        for (size_t i = rows.size(); i > 1; --i) {
            std::swap(
                rows[i - 1], rows[static_cast<size_t>(random.below(static_cast<int64_t>(i)))]
            );
        }
        if (trial > 0) {
            rows.resize(static_cast<size_t>(1 + random.below(num_rows)));
        }
        if (const auto text = check_rows(c, stream, full, rows, "shuffled rows"); !text.empty()) {
            return fail(text);
        }
        ++compared;
    }
    Instance elsewhere(c, other);
    elsewhere.run();
    if (const auto text = first_difference(c, elsewhere.outputs(), full, "other thread count");
        !text.empty()) {
        return fail(text);
    }
    return {true, fmt::format("{} row sets equal in every bit", compared + 1)};
}

Verdict check_determinism(const Case& c, Stream& stream) {
    std::vector<std::vector<Bytes>> results;
    for (int i = 0; i < 2; ++i) {
        Instance instance(c, stream);
        instance.run();
        auto all = instance.outputs();
        if (c.backward) {
            for (auto& gradient : instance.gradients(random_cotangents(c))) {
                all.push_back(std::move(gradient));
            }
        }
        results.push_back(std::move(all));
    }
    const auto text = first_difference(c, results[0], results[1], "second run");
    return text.empty() ? Verdict{true, "equal bits"} : Verdict{false, text};
}

Verdict measure(const Case& c, Stream& stream) {
    Instance instance(c, stream);
    const double forward = best_seconds(stream, [&] { instance.run(); });
    std::string detail = fmt::format(
        "{:9.1f} us {:7.1f} GFLOP/s {:6.1f} GB/s",
        forward * 1e6,
        c.flops / forward * 1e-9,
        c.bytes / forward * 1e-9
    );
    if (c.backward) {
        instance.prepare_backward(random_cotangents(c));
        const double backward = best_seconds(stream, [&] { instance.run_backward(); });
        detail += fmt::format("; backward {:9.1f} us", backward * 1e6);
        if (c.backward_flops > 0) {
            detail += fmt::format(" {:7.1f} GFLOP/s", c.backward_flops / backward * 1e-9);
        }
    }
    return {true, detail};
}

}  // namespace orbit::opcheck
