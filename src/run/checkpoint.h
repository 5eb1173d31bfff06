// Checkpoints on disk: checkpoints/step-NNNNNN/ with
//   checkpoint.json      {"format": 1, "step": N, "tensors": [names in order]}
//   state.json           counters, as the caller wrote them
//   tensors.safetensors  float32 arrays by name
//   adapter/             the adapter in PEFT form
//   digest               "HASH SIZE PATH" for each file above, then "HASH" of those lines
// A checkpoint is built under a temporary name, every file and folder is flushed to disk, and a
// rename makes it appear. It counts only if its digest holds, so a damaged one is passed over for
// the one before.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace orbit {

// One named float32 array in host memory.
struct CheckpointTensor {
    std::string name;
    std::vector<float> values;
};

struct RunCheckpoint {
    int64_t step = 0;        // steps that are done
    std::string state_json;  // counters, versions, device: the caller's business
    std::vector<CheckpointTensor> tensors;
    std::string path;  // set when read
};

// Writes checkpoints/step-N, then removes all but the newest `keep` (and any of a later step: a
// resume from an older one made them stale). `write_adapter(folder)` puts PEFT files into adapter/.
// UserError when the disk is full or not writable; what was there before stays as it was.
void write_checkpoint(
    const std::string& checkpoints,
    const RunCheckpoint& checkpoint,
    const std::function<void(const std::string&)>& write_adapter,
    int64_t keep
);

// The newest checkpoint whose digest holds; warns about each that it passes over.
std::optional<RunCheckpoint> find_latest_checkpoint(const std::string& checkpoints);

// The checkpoint in `folder`; UserError with what is wrong with it.
RunCheckpoint load_checkpoint(const std::string& folder);

}  // namespace orbit
