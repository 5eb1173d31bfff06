// The run folder (docs: README, "What a run leaves"). Everything in it survives a crash at any
// moment:
//   config.toml      complete, as run
//   metrics.jsonl    one object a step; numbers in their shortest round-trip form
//   rollouts.jsonl   one object an answer
//   checkpoints/     see checkpoint.h
//   adapter/         the final adapter, PEFT
//   summary.json
// One process at a time works in it: the folder is locked while a RunFolder exists.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "run/checkpoint.h"

namespace orbit {

class RunFolder {
  public:
    // A new run: UserError when `path` already holds one.
    static RunFolder create(const std::string& path);
    // An existing run: UserError when `path` is none.
    static RunFolder open(const std::string& path);

    const std::string& path() const { return path_; }

    std::string config_path() const { return path_ + "/config.toml"; }

    void write_config(const std::string& toml) const;

    // Appends one line with a single write (flushed to disk with the next checkpoint). A full disk
    // is a UserError that says so; what was written before stays, and no half line with it.
    void append_metrics(const std::string& line) const;
    void append_rollouts(const std::string& lines) const;  // whole lines, each with its newline
    // Cuts both files to the lines whose "step" is below `step` (a torn last line goes too).
    void truncate_after(int64_t step) const;

    // `write_adapter(folder)` puts the adapter's PEFT files into the checkpoint. Keeps the newest
    // `keep` checkpoints.
    void write_checkpoint(
        const RunCheckpoint& checkpoint,
        const std::function<void(const std::string&)>& write_adapter,
        int64_t keep
    ) const;
    // The newest checkpoint that is whole; damaged ones are named in a warning and passed over.
    // Empty: none.
    std::optional<RunCheckpoint> latest_checkpoint() const;

    void write_summary(const std::string& json) const;

  private:
    struct Lock;
    explicit RunFolder(std::string path);

    std::string path_;
    std::shared_ptr<Lock> lock_;
};

}  // namespace orbit
