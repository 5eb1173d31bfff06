// The rows of a decode loop that runs on the device without the host: each step reads ids and
// positions, and advance_decode feeds the sampled tokens back. All pointers are device memory; B
// rows, padded to a bucket size.
#pragma once

#include "device/device.h"
#include "ops/batch.h"
#include "ops/logprob.h"

namespace orbit {

struct DecodeState {
    int32_t batch = 0;  // B
    int32_t max_blocks = 0;
    int32_t* ids = nullptr;        // [B] the token to read next
    int32_t* positions = nullptr;  // [B] its position
    int32_t* limits =
        nullptr;  // [B] last position that has a page; a row stays there when it gets past it
    int32_t* rows = nullptr;            // [B] 0, 1, 2, ...: sequence_of and the head's rows
    int32_t* sequence_begin = nullptr;  // [B + 1] 0, 1, 2, ...
    int32_t* block_table = nullptr;     // [B, max_blocks]
    SampleRow* samples = nullptr;       // [B]
    int32_t* forced = nullptr;   // [steps, B] tokens that are taken instead of drawn, -1 for none
    int32_t* step = nullptr;     // [1] steps done since the upload
    int32_t* sampled = nullptr;  // [B] what sample_tokens wrote
    float* sampled_logprob = nullptr;  // [B]
    int32_t* tokens = nullptr;         // [steps, B] all of them, for the host
    float* logprobs = nullptr;         // [steps, B]
};

// Records the sampled tokens under the current step, makes them the next ids, and moves every row
// one position on.
void advance_decode(Stream& stream, const DecodeState& state);

}  // namespace orbit
