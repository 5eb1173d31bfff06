#include <algorithm>

#include "ops/cuda_ops.h"
#include "ops/decode_state.h"

namespace orbit {

void advance_decode(Stream& stream, const DecodeState& s) {
    if (!stream.is_cpu()) {
        cuda::advance_decode(stream, s);
        return;
    }
    const int32_t step = s.step[0];
    for (int32_t b = 0; b < s.batch; ++b) {
        s.tokens[step * s.batch + b] = s.sampled[b];
        s.logprobs[step * s.batch + b] = s.sampled_logprob[b];
        s.ids[b] = s.sampled[b];
        s.positions[b] = std::min(s.positions[b] + 1, s.limits[b]);
        s.samples[b].position += 1;
        s.samples[b].forced = s.forced[(step + 1) * s.batch + b];
    }
    s.step[0] = step + 1;
}

}  // namespace orbit
