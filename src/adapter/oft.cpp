#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "adapter/oft_kernels.h"
#include "adapter/state.h"

namespace orbit {
namespace {

bool owns_rotation(const SiteLayout& site) {
    return site.kind == AdapterKind::kOft && site.owns_first;
}

// Calls body(site, row, work) for every row of v, split over the threads.
void for_each_row(
    const HostWork& host,
    const OftJob& job,
    const std::function<void(const SiteLayout&, int64_t, float*)>& body
) {
    const int64_t workspace = oft_workspace(job.block_max, job.transform);
    const auto range = [&](int64_t begin, int64_t end, int) {
        std::vector<float> work(static_cast<size_t>(workspace));
        for (const SiteLayout& site : job.sites) {
            if (!owns_rotation(site)) {
                continue;
            }
            const int64_t first = std::max<int64_t>(0, begin - site.first_row);
            const int64_t last = std::min(site.rows, end - site.first_row);
            for (int64_t row = first; row < last; ++row) {
                body(site, row, work.data());
            }
        }
    };
    host.threads.parallel_for(job.num_rows, 1, range);
}

const float* row_of(const SiteLayout& site, int64_t row, const float* masters) {
    return masters + site.master + row * oft_parameters(site.block);
}

}  // namespace

std::vector<OftBound> oft_derive(
    const HostWork& work, const OftJob& job, DType compute, const float* masters, char* copies
) {
    std::vector<OftBound> bounds(static_cast<size_t>(job.num_rows));
    for_each_row(work, job, [&](const SiteLayout& site, int64_t row, float* scratch) {
        const int64_t block_bytes = site.block * site.block * dtype_bytes(compute);
        char* first = copies + site.copy * dtype_bytes(compute);
        char* copy = first + row * block_bytes;
        const float* v = row_of(site, row, masters);
        OftBound* bound = &bounds[static_cast<size_t>(site.first_row + row)];
        ORBIT_CALL_KERNEL(
            work.isa,
            oft_derive_block,
            (v, site.block, job.transform, compute, copy, bound, scratch)
        );
        for (int64_t n = 1; site.rows == 1 && n < site.num_blocks; ++n) {
            std::memcpy(first + n * block_bytes, copy, static_cast<size_t>(block_bytes));
        }
    });
    return bounds;
}

void oft_finish_gradients(
    const HostWork& work,
    const OftJob& job,
    const float* masters,
    const float* delta_gradients,
    float* gradients
) {
    for_each_row(work, job, [&](const SiteLayout& site, int64_t row, float* scratch) {
        const int64_t size = site.block * site.block;
        const float* delta = delta_gradients + site.copy + row * size;
        float* sum = scratch;
        if (site.rows < site.num_blocks) {
            std::memcpy(sum, delta, static_cast<size_t>(size) * sizeof(float));
            for (int64_t n = 1; n < site.num_blocks; ++n) {
                for (int64_t i = 0; i < size; ++i) {
                    sum[i] += delta[n * size + i];
                }
            }
            delta = sum;
        }
        if (all_zero(delta, size)) {
            return;  // an expert without tokens; the sum below would add zeros
        }
        float* dv = gradients + site.master + row * oft_parameters(site.block);
        const float* v = row_of(site, row, masters);
        ORBIT_CALL_KERNEL(
            work.isa, oft_gradient_block, (v, delta, site.block, job.transform, dv, scratch + size)
        );
    });
}

std::vector<OftBound> oft_bounds(const HostWork& work, const OftJob& job, const float* masters) {
    std::vector<OftBound> bounds(static_cast<size_t>(job.num_rows));
    for_each_row(work, job, [&](const SiteLayout& site, int64_t row, float* scratch) {
        const float* v = row_of(site, row, masters);
        OftBound* bound = &bounds[static_cast<size_t>(site.first_row + row)];
        ORBIT_CALL_KERNEL(work.isa, oft_bound_block, (v, site.block, bound, scratch));
    });
    return bounds;
}

void oft_check_bounds(const OftJob& job, const std::vector<OftBound>& bounds) {
    for (const SiteLayout& site : job.sites) {
        for (int64_t row = 0; owns_rotation(site) && row < site.rows; ++row) {
            const OftBound& bound = bounds[static_cast<size_t>(site.first_row + row)];
            USER_CHECK(
                std::isfinite(bound.norm) && std::isfinite(bound.theta),
                "{}: block {} of {} holds values that are not finite; go back to an earlier "
                "checkpoint and lower train.lr.",
                job.origin,
                row,
                site.site.module
            );
            USER_CHECK(
                job.transform.exact || bound.theta < 1.0,
                "{}: block {} of {} has the rotation bound {:.3f}, and from 1 on the "
                "Cayley-Neumann series is no rotation any more; lower train.lr, or set "
                "adapter.exact_cayley = true.",
                job.origin,
                row,
                site.site.module,
                bound.theta
            );
        }
    }
}

bool oft_project(const OftJob& job, double eps, float* masters) {
    bool moved = false;
    for (const SiteLayout& site : job.sites) {
        for (int64_t row = 0; owns_rotation(site) && row < site.rows; ++row) {
            float* v = masters + site.master + row * oft_parameters(site.block);
            double sum = 0;
            for (int64_t i = 0; i < oft_parameters(site.block); ++i) {
                sum += static_cast<double>(v[i]) * static_cast<double>(v[i]);
            }
            const double norm = std::sqrt(2 * sum);
            const double limit = eps / std::sqrt(static_cast<double>(site.rows));
            // A row on the ball stays bit for bit: its rounded norm may exceed the limit a little.
            if (norm > limit * (1 + 1e-6)) {
                moved = true;
                for (int64_t i = 0; i < oft_parameters(site.block); ++i) {
                    v[i] = static_cast<float>(static_cast<double>(v[i]) * (limit / norm));
                }
            }
        }
    }
    return moved;
}

}  // namespace orbit
