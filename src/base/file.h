// Files: read, map, and write so that a crash leaves the old content or the new, never a mixture.
// Every failure is a UserError that names the path and the system's reason.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace orbit {

bool file_exists(const std::string& path);
bool is_directory(const std::string& path);
std::string read_file(const std::string& path);
void make_directories(const std::string& path);
// Writes to a temporary neighbour, fsyncs, renames over `path`, fsyncs the folder.
void write_file_atomic(const std::string& path, std::string_view content);
// The same, of parts written one after the other, so that a large file need not be in memory twice.
void write_file_atomic(const std::string& path, std::span<const std::string_view> parts);
void fsync_path(const std::string& path);  // file or folder
void rename_path(const std::string& from, const std::string& to);
void remove_all(const std::string& path);

// A file mapped read-only.
class MappedFile {
  public:
    explicit MappedFile(const std::string& path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    std::span<const std::byte> bytes() const { return {data_, size_}; }

    const std::string& path() const { return path_; }

  private:
    std::string path_;
    const std::byte* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace orbit
