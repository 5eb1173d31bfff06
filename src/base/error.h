// Two kinds of failure, kept apart (docs: CONTRIBUTING.md, "Errors").
//
// CHECK: our own bug. Prints the condition, both values, file and line, and aborts. On in release
// builds. USER_CHECK: bad input. Throws UserError with one sentence that names the setting or file
// and the fix; only cli/main.cpp turns it into exit code 2.
#pragma once

#include <fmt/core.h>

#include <stdexcept>
#include <string>
#include <string_view>

namespace orbit {

class UserError : public std::runtime_error {
  public:
    explicit UserError(const std::string& sentence) : std::runtime_error(sentence) {}
};

[[noreturn]] void check_failed(const char* file, int line, const std::string& message);

// The candidate nearest to `word` by edit distance, or "" when none is close; for "did you mean".
template <typename Range>
std::string nearest_name(std::string_view word, const Range& candidates);

size_t edit_distance(std::string_view a, std::string_view b);

template <typename Range>
std::string nearest_name(std::string_view word, const Range& candidates) {
    std::string best;
    size_t best_distance = word.size() / 2 + 2;
    for (const auto& candidate : candidates) {
        const size_t distance = edit_distance(word, candidate);
        if (distance < best_distance) {
            best_distance = distance;
            best = std::string(candidate);
        }
    }
    return best;
}

}  // namespace orbit

#define CHECK(condition, ...)                                                      \
    do {                                                                           \
        if (!(condition)) {                                                        \
            ::orbit::check_failed(__FILE__, __LINE__, #condition " " __VA_ARGS__); \
        }                                                                          \
    } while (0)

#define ORBIT_CHECK_OP(a, op, b)                                                   \
    do {                                                                           \
        const auto& check_a_ = (a);                                                \
        const auto& check_b_ = (b);                                                \
        if (!(check_a_ op check_b_)) {                                             \
            ::orbit::check_failed(                                                 \
                __FILE__,                                                          \
                __LINE__,                                                          \
                fmt::format("{} {} {}: {} vs {}", #a, #op, #b, check_a_, check_b_) \
            );                                                                     \
        }                                                                          \
    } while (0)

#define CHECK_EQ(a, b) ORBIT_CHECK_OP(a, ==, b)
#define CHECK_LE(a, b) ORBIT_CHECK_OP(a, <=, b)
#define CHECK_LT(a, b) ORBIT_CHECK_OP(a, <, b)
#define CHECK_GE(a, b) ORBIT_CHECK_OP(a, >=, b)
#define CHECK_GT(a, b) ORBIT_CHECK_OP(a, >, b)

#define USER_CHECK(condition, ...)                              \
    do {                                                        \
        if (!(condition)) {                                     \
            throw ::orbit::UserError(fmt::format(__VA_ARGS__)); \
        }                                                       \
    } while (0)
