#include "base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "base/error.h"

namespace orbit {
namespace {

struct Descriptor {
    int fd;

    ~Descriptor() {
        if (fd >= 0) {
            ::close(fd);
        }
    }
};

// Removes a half-written file when writing it fails: a full disk stays no fuller than it was.
struct Temporary {
    std::string path;  // empty once it has its final name

    ~Temporary() {
        if (!path.empty()) {
            ::unlink(path.c_str());
        }
    }
};

void write_all(int fd, std::string_view content, const std::string& path) {
    while (!content.empty()) {
        const ssize_t written = ::write(fd, content.data(), content.size());
        if (written < 0 && errno == EINTR) {
            continue;
        }
        USER_CHECK(
            written > 0,
            "cannot write {}: {}; free some space or choose another place.",
            path,
            std::strerror(errno)
        );
        content.remove_prefix(static_cast<size_t>(written));
    }
}

std::string parent_of(const std::string& path) {
    const auto parent = std::filesystem::path(path).parent_path().string();
    return parent.empty() ? "." : parent;
}

}  // namespace

bool file_exists(const std::string& path) {
    struct stat info {};

    return ::stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode);
}

bool is_directory(const std::string& path) {
    struct stat info {};

    return ::stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

std::string read_file(const std::string& path) {
    const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
    USER_CHECK(file.fd >= 0, "cannot open {}: {}.", path, std::strerror(errno));
    std::string content;
    char buffer[1 << 16];
    for (;;) {
        const ssize_t got = ::read(file.fd, buffer, sizeof buffer);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        USER_CHECK(got >= 0, "cannot read {}: {}.", path, std::strerror(errno));
        if (got == 0) {
            return content;
        }
        content.append(buffer, static_cast<size_t>(got));
    }
}

void make_directories(const std::string& path) {
    std::error_code error;
    std::filesystem::create_directories(path, error);
    USER_CHECK(is_directory(path), "cannot create the folder {}: {}.", path, error.message());
}

void fsync_path(const std::string& path) {
    const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
    USER_CHECK(file.fd >= 0, "cannot open {}: {}.", path, std::strerror(errno));
    USER_CHECK(::fsync(file.fd) == 0, "cannot flush {} to disk: {}.", path, std::strerror(errno));
}

void write_file_atomic(const std::string& path, std::string_view content) {
    write_file_atomic(path, std::span<const std::string_view>(&content, 1));
}

void write_file_atomic(const std::string& path, std::span<const std::string_view> parts) {
    Temporary temporary{path + ".tmp"};
    {
        const Descriptor file{
            ::open(temporary.path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644)};
        USER_CHECK(file.fd >= 0, "cannot create {}: {}.", temporary.path, std::strerror(errno));
        for (const std::string_view part : parts) {
            write_all(file.fd, part, path);
        }
        USER_CHECK(
            ::fsync(file.fd) == 0, "cannot flush {} to disk: {}.", path, std::strerror(errno)
        );
    }
    rename_path(temporary.path, path);
    temporary.path.clear();
    fsync_path(parent_of(path));
}

void rename_path(const std::string& from, const std::string& to) {
    USER_CHECK(
        ::rename(from.c_str(), to.c_str()) == 0,
        "cannot rename {} to {}: {}.",
        from,
        to,
        std::strerror(errno)
    );
}

void remove_all(const std::string& path) {
    std::error_code error;
    std::filesystem::remove_all(path, error);
    USER_CHECK(!error, "cannot remove {}: {}.", path, error.message());
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
    const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
    USER_CHECK(file.fd >= 0, "cannot open {}: {}.", path, std::strerror(errno));

    struct stat info {};

    USER_CHECK(
        ::fstat(file.fd, &info) == 0 && S_ISREG(info.st_mode), "{} is not a regular file.", path
    );
    size_ = static_cast<size_t>(info.st_size);
    if (size_ == 0) {
        return;
    }
    void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.fd, 0);
    USER_CHECK(mapped != MAP_FAILED, "cannot map {}: {}.", path, std::strerror(errno));
    data_ = static_cast<const std::byte*>(mapped);
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) {
        ::munmap(const_cast<std::byte*>(data_), size_);
    }
}

}  // namespace orbit
