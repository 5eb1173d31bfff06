// Inputs that the adapter tests share.
#pragma once

#include <cstdint>
#include <vector>

#include "adapter/oft_math.h"
#include "base/philox.h"

namespace orbit {

inline const OftTransform kSeries5 = neumann_transform(5, false);

// Uniform in (-1, 1).
inline double noise(uint32_t index, uint32_t stream) {
    return 2.0 * static_cast<double>(uniform_from_word(philox(index, stream, 0, 0, 1, 2).word[0])) -
           1.0;
}

inline std::vector<double> noises(int64_t count, double scale, uint32_t stream) {
    std::vector<double> values;
    for (int64_t i = 0; i < count; ++i) {
        values.push_back(scale * noise(static_cast<uint32_t>(i), stream));
    }
    return values;
}

template <typename S>
std::vector<S> delta_of(const std::vector<S>& v, int64_t b, const OftTransform& t) {
    std::vector<S> d(static_cast<size_t>(b * b));
    std::vector<S> work(static_cast<size_t>(oft_workspace(b, t)));
    oft_rotation_delta(v.data(), b, t, d.data(), work.data());
    return d;
}

inline std::vector<double> gradient_of(
    const std::vector<double>& v, const std::vector<double>& g, int64_t b, const OftTransform& t
) {
    std::vector<double> dv(v.size(), 0.0);
    std::vector<double> work(static_cast<size_t>(oft_workspace(b, t)));
    oft_gradient(v.data(), g.data(), b, t, dv.data(), work.data());
    return dv;
}

}  // namespace orbit
