// OFT's rotations from their packed skew values, and back. A GPU must give the host's bits.
#include <fmt/core.h>

#include <cstring>

#include "adapter/oft_math.h"
#include "base/error.h"
#include "opcheck/cases.h"
#include "ops/oft_transform.h"

namespace orbit::opcheck {
namespace {

std::vector<OftRow> rows_of(int64_t rows, int32_t block) {
    std::vector<OftRow> result;
    for (int64_t r = 0; r < rows; ++r) {
        result.push_back({r * oft_parameters(block), r * block * block, 1, block});
    }
    return result;
}

std::vector<float> host_deltas(const std::vector<float>& v, int64_t rows, int64_t block) {
    const OftTransform transform;
    std::vector<float> d(static_cast<size_t>(rows * block * block));
    std::vector<float> work(static_cast<size_t>(oft_workspace(block, transform)));
    for (int64_t r = 0; r < rows; ++r) {
        const float* row = v.data() + r * oft_parameters(block);
        oft_rotation_delta(row, block, transform, d.data() + r * block * block, work.data());
    }
    return d;
}

void derive(Stream& stream, const Tensor& v, const Tensor& d, int32_t block) {
    const int64_t rows = v.shape[0];
    std::vector<float> values(static_cast<size_t>(v.numel()));
    copy_to_host(stream, values.data(), v.data, values.size() * sizeof(float));
    const std::vector<float> host = host_deltas(values, rows, block);
    std::vector<bf16> rounded(host.size());
    for (size_t i = 0; i < host.size(); ++i) {
        rounded[i] = to_bf16(host[i]);
    }
    if (stream.is_cpu()) {
        std::memcpy(d.data, rounded.data(), rounded.size() * sizeof(bf16));
        return;
    }
    std::vector<OftRowBound> bounds(static_cast<size_t>(rows));
    cuda::oft_derive_rows(stream, rows_of(rows, block), v.as<float>(), d.as<bf16>(), bounds);
    std::vector<bf16> found(rounded.size());
    copy_to_host(stream, found.data(), d.data, found.size() * sizeof(bf16));
    std::vector<float> work(static_cast<size_t>(oft_workspace(block, OftTransform{})));
    for (int64_t r = 0; r < rows; ++r) {
        const OftRowBound& row = bounds[static_cast<size_t>(r)];
        const OftBound found_bound = oft_bound_of(row.squares, row.squares_of_square);
        const OftBound bound =
            oft_bound(values.data() + r * oft_parameters(block), block, work.data());
        CHECK(found_bound.norm == bound.norm && found_bound.theta == bound.theta);
    }
    CHECK(std::memcmp(found.data(), rounded.data(), found.size() * sizeof(bf16)) == 0);
}

void gradient(
    Stream& stream, const Tensor& v, const Tensor& d_delta, const Tensor& dv, int32_t block
) {
    const int64_t rows = v.shape[0];
    std::vector<float> values(static_cast<size_t>(v.numel()));
    std::vector<float> deltas(static_cast<size_t>(d_delta.numel()));
    std::vector<bf16> rounded(deltas.size());
    std::vector<float> host(values.size(), 0.0f);
    copy_to_host(stream, values.data(), v.data, values.size() * sizeof(float));
    copy_to_host(stream, rounded.data(), d_delta.data, rounded.size() * sizeof(bf16));
    for (size_t i = 0; i < deltas.size(); ++i) {
        deltas[i] = to_float(rounded[i]);
    }
    std::vector<float> work(static_cast<size_t>(oft_workspace(block, OftTransform{})));
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = r * oft_parameters(block);
        const float* g = deltas.data() + r * block * block;
        oft_gradient(values.data() + at, g, block, OftTransform{}, host.data() + at, work.data());
    }
    if (stream.is_cpu()) {
        std::memcpy(dv.data, host.data(), host.size() * sizeof(float));
        return;
    }
    const ScratchScope scope(stream.scratch);
    const Tensor device = stream.scratch.take(DType::kF32, {d_delta.numel()});
    copy_to_device(stream, device.data, deltas.data(), deltas.size() * sizeof(float));
    cuda::oft_gradient_rows(
        stream, rows_of(rows, block), v.as<float>(), device.as<float>(), dv.as<float>()
    );
    std::vector<float> found(host.size());
    copy_to_host(stream, found.data(), dv.data, found.size() * sizeof(float));
    CHECK(std::memcmp(found.data(), host.data(), found.size() * sizeof(float)) == 0);
}

void add_case(CaseList& cases, int64_t rows, int32_t block) {
    Random random(cases.size() + 1);
    const int64_t parameters = oft_parameters(block);
    Case c;
    c.op = "oft_transform";
    c.name = fmt::format("{} rows, block {}", rows, block);
    Input v = input("v", DType::kF32, {rows, parameters}, random.normals(rows * parameters, 0.03f));
    v.grad = true;
    c.inputs = {v};
    c.outputs = {{"d", DType::kBF16, {rows, block, block}, true}};
    c.run = [block](Stream& stream, const Tensors& in, const Tensors& out) {
        derive(stream, in[0], out[0], block);
    };
    c.reference = [rows, block](const Values& in) {
        const OftTransform transform;
        std::vector<double> d(static_cast<size_t>(rows * block * block));
        std::vector<double> work(static_cast<size_t>(oft_workspace(block, transform)));
        for (int64_t r = 0; r < rows; ++r) {
            const double* row = in[0].data() + r * oft_parameters(block);
            oft_rotation_delta(row, block, transform, d.data() + r * block * block, work.data());
        }
        return Values{d};
    };
    c.backward = [block](
                     Stream& stream, const Tensors& in, const Tensors& d_out, const Tensors& d_in
                 ) { gradient(stream, in[0], d_out[0], d_in[0], block); };
    c.forward_tolerance = 1e-2;
    cases.push_back(c);
}

}  // namespace

void add_oft_transform_cases(CaseList& cases) {
    add_case(cases, 5, 32);
    add_case(cases, 3, 16);
    add_case(cases, 2, 64);
    add_case(cases, 2, 10);
}

}  // namespace orbit::opcheck
