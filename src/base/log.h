// Words about progress go to stderr, results to stdout. A progress bar (rate, ETA) is drawn only on
// a terminal; in a log each call prints at most a plain line now and then.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace orbit {

void log_line(std::string_view text);   // "text\n" on stderr, above a bar if one is drawn
void warn_line(std::string_view text);  // "warning: text\n"

class ProgressBar {
  public:
    ProgressBar(std::string label, int64_t total, std::string unit);
    ~ProgressBar();  // finishes the line
    void set(int64_t done);

    void add(int64_t count) { set(done_ + count); }

  private:
    std::string label_;
    std::string unit_;
    int64_t total_;
    int64_t done_ = 0;
    double started_s_;
    double drawn_s_ = 0;
    bool drawn_ = false;
};

double now_s();  // monotonic seconds

}  // namespace orbit
