#include "run/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/safetensors.h"

namespace orbit {
namespace {

namespace fs = std::filesystem;
constexpr const char* kDigest = "digest";
constexpr const char* kTemporary = ".tmp-";

std::string step_name(int64_t step) {
    return fmt::format("step-{:06d}", step);
}

// The step of a checkpoint folder's name, or nothing for any other name.
std::optional<int64_t> step_of(const std::string& name) {
    if (!name.starts_with("step-")) {
        return std::nullopt;
    }
    int64_t step = -1;
    const char* end = name.data() + name.size();
    const auto [stop, error] = std::from_chars(name.data() + 5, end, step);
    const bool whole = error == std::errc() && stop == end && step >= 0;
    return whole && step_name(step) == name ? std::optional(step) : std::nullopt;
}

std::vector<std::string> names_in(const std::string& folder) {
    std::vector<std::string> names;
    std::error_code error;
    for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
        names.push_back(at->path().filename().string());
    }
    std::sort(names.begin(), names.end());
    return names;
}

std::vector<int64_t> steps_in(const std::string& checkpoints) {
    std::vector<int64_t> steps;
    for (const auto& name : names_in(checkpoints)) {
        if (const auto step = step_of(name)) {
            steps.push_back(*step);
        }
    }
    std::sort(steps.begin(), steps.end());
    return steps;
}

// Every file below `folder` but the digest, by relative path, sorted.
std::vector<std::string> files_below(const std::string& folder) {
    std::vector<std::string> files;
    std::error_code error;
    fs::recursive_directory_iterator at(folder, error);
    for (const fs::recursive_directory_iterator end; !error && at != end; at.increment(error)) {
        const std::string path = fs::relative(at->path(), folder).string();
        if (at->is_regular_file() && path != kDigest) {
            files.push_back(path);
        }
    }
    USER_CHECK(!error, "cannot list {}: {}.", folder, error.message());
    std::sort(files.begin(), files.end());
    return files;
}

std::string digest_lines(const std::string& folder) {
    std::string lines;
    for (const auto& path : files_below(folder)) {
        const MappedFile file(folder + "/" + path);
        const auto bytes = file.bytes();
        lines += fmt::format(
            "{} {} {}\n", hash_hex(hash64(bytes.data(), bytes.size())), bytes.size(), path
        );
    }
    return lines + hash_hex(hash64(lines.data(), lines.size())) + "\n";
}

// Folders after the files in them: a name is on disk when its folder is flushed.
void flush_tree(const std::string& folder) {
    std::set<std::string> folders = {folder};
    for (const auto& path : files_below(folder)) {
        fsync_path(folder + "/" + path);
        for (auto parent = fs::path(path).parent_path(); !parent.empty();
             parent = parent.parent_path()) {
            folders.insert(folder + "/" + parent.string());
        }
    }
    for (auto at = folders.rbegin(); at != folders.rend(); ++at) {
        fsync_path(*at);
    }
}

void write_content(
    const std::string& folder,
    const RunCheckpoint& checkpoint,
    const std::function<void(const std::string&)>& write_adapter
) {
    make_directories(folder + "/adapter");
    nlohmann::ordered_json header = {
        {"format", 1}, {"step", checkpoint.step}, {"tensors", nlohmann::json::array()}};
    std::vector<TensorToStore> tensors;
    for (const auto& [name, values] : checkpoint.tensors) {
        header["tensors"].push_back(name);
        tensors.push_back(
            {name,
             "F32",
             {static_cast<int64_t>(values.size())},
             values.data(),
             values.size() * sizeof(float)}
        );
    }
    write_file_atomic(folder + "/checkpoint.json", header.dump() + "\n");
    write_file_atomic(folder + "/state.json", checkpoint.state_json);
    write_safetensors(folder + "/tensors.safetensors", tensors, {});
    if (write_adapter) {
        write_adapter(folder + "/adapter");
    }
    write_file_atomic(folder + "/" + kDigest, digest_lines(folder));
    flush_tree(folder);
}

// Removes all but the newest `keep`, what a resume from an older checkpoint made stale, and
// leftovers.
void remove_old(const std::string& checkpoints, int64_t step, int64_t keep) {
    int64_t kept = 0;
    const auto steps = steps_in(checkpoints);
    for (auto at = steps.rbegin(); at != steps.rend(); ++at) {
        if (*at <= step && kept < keep) {
            ++kept;
            continue;
        }
        // Renamed first: a half-deleted checkpoint would be reported as a damaged one.
        const std::string doomed = checkpoints + "/" + kTemporary + step_name(*at);
        remove_all(doomed);
        rename_path(checkpoints + "/" + step_name(*at), doomed);
    }
    for (const auto& name : names_in(checkpoints)) {
        if (name.starts_with(kTemporary)) {
            remove_all(checkpoints + "/" + name);
        }
    }
}

// Puts the finished folder into its place. A folder that stands there (a damaged one, or the same
// step written again) is swapped out in one move, so that no moment is without a checkpoint.
void move_into_place(const std::string& building, const std::string& folder) {
    if (!is_directory(folder)) {
        rename_path(building, folder);
        return;
    }
    if (::renameat2(AT_FDCWD, building.c_str(), AT_FDCWD, folder.c_str(), RENAME_EXCHANGE) == 0) {
        return;  // remove_old() clears the old one away
    }
    const std::string replaced = building + "-replaced";  // a file system without the exchange
    remove_all(replaced);
    rename_path(folder, replaced);
    rename_path(building, folder);
}

void check_digest(const std::string& folder) {
    const std::string stored = read_file(folder + "/" + kDigest);
    const std::string actual = digest_lines(folder);
    if (stored == actual) {
        return;
    }
    std::istringstream old_lines(stored);
    std::istringstream new_lines(actual);
    std::string old_line;
    std::string new_line;
    while (std::getline(old_lines, old_line) && std::getline(new_lines, new_line)) {
        if (old_line != new_line) {
            break;
        }
    }
    throw UserError(fmt::format(
        "{} is damaged: its digest says \"{}\", its files say \"{}\".", folder, old_line, new_line
    ));
}

std::vector<float> read_values(const StoredTensor& stored) {
    USER_CHECK(
        stored.dtype == "F32",
        "{}: tensor \"{}\" is {}, not F32.",
        stored.file,
        stored.name,
        stored.dtype
    );
    std::vector<float> values(stored.bytes.size() / sizeof(float));
    if (!values.empty()) {
        std::memcpy(values.data(), stored.bytes.data(), stored.bytes.size());
    }
    return values;
}

}  // namespace

void write_checkpoint(
    const std::string& checkpoints,
    const RunCheckpoint& checkpoint,
    const std::function<void(const std::string&)>& write_adapter,
    int64_t keep
) {
    CHECK_GE(keep, 1);
    CHECK_GE(checkpoint.step, 0);
    make_directories(checkpoints);
    const std::string folder = checkpoints + "/" + step_name(checkpoint.step);
    const std::string building = checkpoints + "/" + kTemporary + "new";
    remove_all(building);
    try {
        write_content(building, checkpoint, write_adapter);
    } catch (...) {
        std::error_code ignored;  // the first error is the one to report
        fs::remove_all(building, ignored);
        throw;
    }
    move_into_place(building, folder);
    fsync_path(checkpoints);
    remove_old(checkpoints, checkpoint.step, keep);
}

RunCheckpoint load_checkpoint(const std::string& folder) {
    USER_CHECK(is_directory(folder), "there is no checkpoint {}.", folder);
    check_digest(folder);
    const std::string header_path = folder + "/checkpoint.json";
    const auto header = nlohmann::json::parse(read_file(header_path), nullptr, false);
    USER_CHECK(
        header.is_object() && header.value("format", 0) == 1 && header.contains("step") &&
            header["step"].is_number_unsigned() && header.contains("tensors") &&
            header["tensors"].is_array(),
        "{} is not of format 1, the one that this program reads.",
        header_path
    );
    RunCheckpoint checkpoint;
    checkpoint.path = folder;
    checkpoint.step = header["step"].get<int64_t>();
    checkpoint.state_json = read_file(folder + "/state.json");
    const SafetensorsFile file(folder + "/tensors.safetensors");
    for (const auto& name : header["tensors"]) {
        USER_CHECK(name.is_string(), "{} has a tensor name that is no string.", header_path);
        const auto& stored = file.tensor(name.get<std::string>());
        checkpoint.tensors.push_back({stored.name, read_values(stored)});
    }
    return checkpoint;
}

std::optional<RunCheckpoint> find_latest_checkpoint(const std::string& checkpoints) {
    const auto steps = steps_in(checkpoints);
    for (auto at = steps.rbegin(); at != steps.rend(); ++at) {
        try {
            return load_checkpoint(checkpoints + "/" + step_name(*at));
        } catch (const UserError& error) {
            warn_line(fmt::format("{} Taking the checkpoint before it.", error.what()));
        }
    }
    return std::nullopt;
}

}  // namespace orbit
