// The run folder (docs: README, "What a run leaves"). Everything in it survives a crash at any
// moment:
//   config.toml      complete, as run
//   metrics.jsonl    one object a step, flushed each step; numbers in their shortest round-trip
//   form rollouts.jsonl   one object an answer checkpoints/step-NNNNNN/   state.json,
//   tensors.safetensors, adapter/ (PEFT); written under a temporary name, every
//                    file and folder flushed, then renamed; `digest` (hashes of the other files) is
//                    written last
//   adapter/         the final adapter, PEFT
//   summary.json
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

struct Checkpoint {
    int64_t step = 0;        // steps that are done
    std::string state_json;  // counters, versions, device: the caller's business
    std::vector<CheckpointTensor> tensors;
    std::string path;  // set when read
};

class RunFolder {
  public:
    // A new run: UserError when `path` already holds one.
    static RunFolder create(const std::string& path);
    // An existing run: UserError when `path` is none.
    static RunFolder open(const std::string& path);

    const std::string& path() const { return path_; }

    std::string config_path() const { return path_ + "/config.toml"; }

    void write_config(const std::string& toml) const;

    // Appends one line and flushes it. A full disk is a UserError that says so; what was written
    // before stays.
    void append_metrics(const std::string& line) const;
    void append_rollouts(const std::string& lines) const;  // whole lines, each with its newline
    // Cuts both files to the lines whose "step" is below `step` (a torn last line goes too).
    void truncate_after(int64_t step) const;

    // `write_adapter(folder)` puts the adapter's PEFT files into the checkpoint. Keeps the newest
    // `keep` checkpoints.
    void write_checkpoint(
        const Checkpoint& checkpoint,
        const std::function<void(const std::string&)>& write_adapter,
        int64_t keep
    ) const;
    // The newest checkpoint that is whole; damaged ones are named in a warning and passed over.
    // Empty: none.
    std::optional<Checkpoint> latest_checkpoint() const;

    void write_summary(const std::string& json) const;

  private:
    explicit RunFolder(std::string path) : path_(std::move(path)) {}

    std::string path_;
};

}  // namespace orbit
