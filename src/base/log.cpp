#include "base/log.h"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

namespace orbit {
namespace {

bool on_terminal() {
    static const bool terminal = isatty(STDERR_FILENO) == 1;
    return terminal;
}

std::string duration(double seconds) {
    const auto whole = static_cast<int64_t>(std::max(0.0, seconds) + 0.5);
    return whole >= 3600 ? fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60)
                         : fmt::format("{}:{:02}", whole / 60, whole % 60);
}

}  // namespace

double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

void log_line(std::string_view text) {
    fmt::print(stderr, "{}{}\n", on_terminal() ? "\r\033[K" : "", text);
    std::fflush(stderr);
}

void warn_line(std::string_view text) {
    log_line(fmt::format("warning: {}", text));
}

ProgressBar::ProgressBar(std::string label, int64_t total, std::string unit)
    : label_(std::move(label)), unit_(std::move(unit)), total_(total), started_s_(now_s()) {}

ProgressBar::~ProgressBar() {
    if (drawn_) {
        fmt::print(stderr, "\r\033[K");
        std::fflush(stderr);
    }
}

void ProgressBar::set(int64_t done) {
    done_ = done;
    const double now = now_s();
    if (!on_terminal() || (now - drawn_s_ < 0.1 && done < total_)) {
        return;
    }
    drawn_s_ = now;
    drawn_ = true;
    const double elapsed = std::max(1e-9, now - started_s_);
    const double rate = static_cast<double>(done) / elapsed;
    const double fraction =
        total_ > 0 ? std::min(1.0, static_cast<double>(done) / static_cast<double>(total_)) : 0.0;
    constexpr int kWidth = 24;
    const int filled = static_cast<int>(fraction * kWidth);
    const double left = rate > 0 ? static_cast<double>(total_ - done) / rate : 0.0;
    fmt::print(
        stderr,
        "\r\033[K{} [{}{}] {}/{} {}  {:.0f} {}/s  ETA {}",
        label_,
        std::string(static_cast<size_t>(filled), '#'),
        std::string(static_cast<size_t>(kWidth - filled), '.'),
        done,
        total_,
        unit_,
        rate,
        unit_,
        duration(left)
    );
    std::fflush(stderr);
}

}  // namespace orbit
