#include "base/error.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace orbit {

void check_failed(const char* file, int line, const std::string& message) {
    std::fprintf(
        stderr, "orbit: internal error at %s:%d: CHECK(%s)\n", file, line, message.c_str()
    );
    std::fflush(stderr);
    std::abort();
}

size_t edit_distance(std::string_view a, std::string_view b) {
    std::vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) {
        row[j] = j;
    }
    for (size_t i = 1; i <= a.size(); ++i) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b.size(); ++j) {
            const size_t above = row[j];
            row[j] = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
            diagonal = above;
        }
    }
    return row[b.size()];
}

}  // namespace orbit
