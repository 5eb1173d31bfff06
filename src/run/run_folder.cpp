#include "run/run_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"

namespace orbit {
namespace {

// A file that grows by whole lines.
class LineFile {
  public:
    explicit LineFile(std::string path) : path_(std::move(path)) {
        fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        USER_CHECK(fd_ >= 0, "cannot open {} for writing: {}.", path_, std::strerror(errno));
    }

    ~LineFile() { ::close(fd_); }

    LineFile(const LineFile&) = delete;
    LineFile& operator=(const LineFile&) = delete;

    void append(std::string text) {
        struct stat info {};

        USER_CHECK(
            ::fstat(fd_, &info) == 0 && S_ISREG(info.st_mode), "{} is not a regular file.", path_
        );
        if (!text.empty() && text.back() != '\n') {
            text += '\n';
        }
        size_t done = 0;
        while (done < text.size()) {
            const ssize_t written = ::write(fd_, text.data() + done, text.size() - done);
            if (written < 0 && errno == EINTR) {
                continue;
            }
            if (written <= 0) {
                const std::string reason = std::strerror(errno);
                cut(info.st_size);  // no half line stays
                throw UserError(fmt::format(
                    "cannot write {}: {}; free some space, then go on with orbit resume.",
                    path_,
                    reason
                ));
            }
            done += static_cast<size_t>(written);
        }
    }

    void cut(int64_t size) {
        USER_CHECK(
            ::ftruncate(fd_, size) == 0, "cannot shorten {}: {}.", path_, std::strerror(errno)
        );
    }

    void flush() {
        USER_CHECK(::fsync(fd_) == 0, "cannot flush {} to disk: {}.", path_, std::strerror(errno));
    }

  private:
    std::string path_;
    int fd_ = -1;
};

// The number under "step" of a line, or -1 for a line that is none of ours.
int64_t step_of_line(const std::string& line) {
    const auto row = nlohmann::json::parse(line, nullptr, false);
    return row.is_object() && row.contains("step") && row["step"].is_number_integer()
               ? row["step"].get<int64_t>()
               : -1;
}

// Bytes of the leading lines that are whole and belong to a step below `step`.
int64_t length_before(const std::string& path, int64_t step) {
    std::ifstream file(path, std::ios::binary);
    int64_t length = 0;
    for (std::string line; std::getline(file, line) && !file.eof();) {
        const int64_t at = step_of_line(line);
        if (at < 0 || at >= step) {
            break;
        }
        length += static_cast<int64_t>(line.size()) + 1;
    }
    return length;
}

}  // namespace

// Held while the process lives, however it ends.
struct RunFolder::Lock {
    explicit Lock(const std::string& folder) {
        const std::string path = folder + "/lock";
        fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
        USER_CHECK(fd >= 0, "cannot create {}: {}.", path, std::strerror(errno));
        if (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
            ::close(fd);
            throw UserError(fmt::format(
                "another process is working in {}; wait for it, or choose another folder with "
                "--run.",
                folder
            ));
        }
    }

    ~Lock() { ::close(fd); }

    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;

    int fd = -1;
};

RunFolder::RunFolder(std::string path)
    : path_(std::move(path)), lock_(std::make_shared<Lock>(path_)) {}

RunFolder RunFolder::create(const std::string& path) {
    for (const char* name : {"/config.toml", "/metrics.jsonl", "/checkpoints"}) {
        USER_CHECK(
            !file_exists(path + name) && !is_directory(path + name),
            "{} already holds a run; go on with \"orbit resume {}\", or give --run another folder.",
            path,
            path
        );
    }
    make_directories(path);
    return RunFolder(path);
}

RunFolder RunFolder::open(const std::string& path) {
    USER_CHECK(is_directory(path), "there is no run folder {}.", path);
    USER_CHECK(
        file_exists(path + "/config.toml"),
        "{} is not a run folder: it has no config.toml. A run starts with orbit train.",
        path
    );
    return RunFolder(path);
}

void RunFolder::write_config(const std::string& toml) const {
    write_file_atomic(config_path(), toml);
}

void RunFolder::append_metrics(const std::string& line) const {
    LineFile(path_ + "/metrics.jsonl").append(line);
}

void RunFolder::append_rollouts(const std::string& lines) const {
    LineFile(path_ + "/rollouts.jsonl").append(lines);
}

void RunFolder::truncate_after(int64_t step) const {
    for (const char* name : {"/metrics.jsonl", "/rollouts.jsonl"}) {
        const std::string path = path_ + name;
        if (file_exists(path)) {
            LineFile(path).cut(length_before(path, step));
        }
    }
}

void RunFolder::write_checkpoint(
    const RunCheckpoint& checkpoint,
    const std::function<void(const std::string&)>& write_adapter,
    int64_t keep
) const {
    // The lines of the steps that the checkpoint counts must not be lost after it.
    LineFile(path_ + "/metrics.jsonl").flush();
    LineFile(path_ + "/rollouts.jsonl").flush();
    orbit::write_checkpoint(path_ + "/checkpoints", checkpoint, write_adapter, keep);
}

std::optional<RunCheckpoint> RunFolder::latest_checkpoint() const {
    return find_latest_checkpoint(path_ + "/checkpoints");
}

void RunFolder::write_summary(const std::string& json) const {
    write_file_atomic(path_ + "/summary.json", json.ends_with('\n') ? json : json + "\n");
}

}  // namespace orbit
