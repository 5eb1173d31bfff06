#include "reward/command.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/error.h"
#include "base/log.h"
#include "text/utf8.h"

extern char** environ;

namespace orbit {
namespace {

using Json = nlohmann::json;

constexpr size_t kAnswerBytesMax = 1 << 20;
constexpr size_t kStderrTailBytes = 2000;
constexpr double kStartCheck_s = 0.5;  // a program that cannot run at all ends within this
constexpr double kStopGrace_s = 1.0;

std::string quoted_start(std::string_view text) {
    constexpr size_t kShown = 80;
    std::string shown(text.substr(0, kShown));
    return Json(shown).dump(-1, ' ', false, Json::error_handler_t::replace) +
           (text.size() > kShown ? "..." : "");
}

std::string request_line(const RewardJob& job, size_t id) {
    const Example& example = *job.example;
    Json request;
    request["id"] = id;
    request["messages"] = Json::array();
    request["prompt"] = "";
    for (const Message& message : example.messages) {
        request["messages"].push_back({{"role", message.role}, {"content", message.content}});
        if (message.role == "user") {
            request["prompt"] = message.content;
        }
    }
    request["response"] = job.response;
    request["answer"] = example.answer;
    request["file"] = example.file;
    request["line"] = example.line;
    request["tokens"] = job.response_tokens;
    request["finish"] = job.finish == FinishReason::kStop     ? "stop"
                        : job.finish == FinishReason::kLength ? "length"
                                                              : "abort";
    std::string text = request.dump(-1, ' ', false, Json::error_handler_t::replace);
    // The row goes in as the file has it, so that its numbers keep every digit.
    text.pop_back();
    text += ",\"row\":" + (example.row_json.empty() ? "null" : example.row_json) + "}\n";
    return text;
}

Score failure(ScoreStatus status, std::string reason) {
    Score score;
    score.status = status;
    score.reason = std::move(reason);
    return score;
}

Score parse_answer(const std::string& line, size_t id) {
    const auto bad = [&](const char* what) {
        return failure(
            ScoreStatus::kBadOutput,
            fmt::format("the reward program printed {}, {}", quoted_start(line), what)
        );
    };
    const Json answer = Json::parse(line, nullptr, false);
    if (!answer.is_object()) {
        return bad("where a line {\"score\": number} was expected");
    }
    const auto value = answer.find("score");
    if (value == answer.end() || !(value->is_number() || value->is_boolean())) {
        return bad("which has no number \"score\"");
    }
    if (answer.contains("id") && answer["id"] != id) {
        return bad("which answers another \"id\" than the one asked");
    }
    Score score;
    score.value = value->is_boolean() ? (value->get<bool>() ? 1.0 : 0.0) : value->get<double>();
    if (!std::isfinite(score.value)) {
        return bad("whose \"score\" is not finite");
    }
    if (answer.contains("reason") && answer["reason"].is_string()) {
        score.reason = answer["reason"].get<std::string>();
    }
    if (answer.contains("parts") && answer["parts"].is_object()) {
        for (const auto& [name, part] : answer["parts"].items()) {
            if (part.is_number()) {
                score.parts.push_back({name, part.get<double>()});
            }
        }
    }
    return score;
}

struct Pipe {
    int read = -1;
    int write = -1;
};

Pipe make_pipe() {
    std::array<int, 2> ends{};
    USER_CHECK(
        ::pipe2(ends.data(), O_CLOEXEC) == 0,
        "cannot open a pipe to the reward program: {}; use fewer reward.workers.",
        std::strerror(errno)
    );
    return {ends[0], ends[1]};
}

void close_if_open(int& fd) {
    if (fd >= 0) {
        ::close(fd);
        fd = -1;
    }
}

// The shell steps aside for a single command, so that the program itself is our child and its exit
// status and its end are seen at first hand.
std::string shell_text(const std::string& command) {
    const std::string first_word = command.substr(0, command.find(' '));
    const bool single = command.find_first_of(";&|<>()`\n!") == std::string::npos &&
                        first_word.find('=') == std::string::npos;
    return single ? "exec " + command : command;
}

std::string exit_text(int status) {
    if (WIFSIGNALED(status)) {
        return fmt::format("was ended by signal {}", WTERMSIG(status));
    }
    return fmt::format("ended with status {}", WEXITSTATUS(status));
}

// Writing to a program that has ended raises SIGPIPE; on this thread it shall be an error code
// only.
void block_sigpipe() {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &set, nullptr);
}

}  // namespace

// One running copy of the program. Used by one thread at a time.
class CommandReward::Program {
  public:
    Program(const std::string& command, double timeout_s)
        : command_(shell_text(command)), timeout_s_(timeout_s) {}

    ~Program() { stop(kStopGrace_s); }

    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    void start();
    void stop(double grace_s);
    Score score(const RewardJob& job, size_t id);

    // Waits up to `seconds` for an early end; true when the program has ended.
    bool ends_within(double seconds);

    // "ended with status 1: last lines of stderr".
    std::string death() const {
        std::string_view words = stderr_tail_;
        while (words.ends_with('\n')) {
            words.remove_suffix(1);
        }
        const bool in_peace = WIFEXITED(exit_status_) && WEXITSTATUS(exit_status_) == 0;
        return exit_text(exit_status_) +
               (in_peace ? " (it must answer until its stdin ends)" : "") +
               (words.empty() ? "" : "; its last words: " + replace_invalid_utf8(words));
    }

  private:
    enum class Event : uint8_t { kLine, kEnded, kTimeout, kTooLong };

    bool reap(bool wait);
    bool has_unasked_output() const;
    void read_stderr();
    Event exchange(std::string_view request, std::string& line);
    bool wait_ready(std::string_view request, double seconds, std::array<pollfd, 3>& fds) const;

    std::string command_;
    double timeout_s_;
    pid_t pid_ = -1;    // not collected yet
    pid_t group_ = -1;  // may outlive the program
    int in_ = -1;       // its stdin
    int out_ = -1;      // its stdout
    int err_ = -1;
    int exit_status_ = 0;
    std::string pending_;  // bytes of stdout that are no answer yet
    std::string stderr_tail_;
};

void CommandReward::Program::start() {
    Pipe in = make_pipe();
    Pipe out = make_pipe();
    Pipe err = make_pipe();
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in.read, STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, out.write, STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&actions, err.write, STDERR_FILENO);
    // Its own process group: Ctrl-C reaches Orbit alone, and a kill reaches all of the program.
    posix_spawnattr_t attributes;
    posix_spawnattr_init(&attributes);
    sigset_t none;
    sigset_t defaults;
    sigemptyset(&none);
    sigemptyset(&defaults);
    sigaddset(&defaults, SIGPIPE);
    sigaddset(&defaults, SIGINT);
    sigaddset(&defaults, SIGTERM);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &defaults);
    posix_spawnattr_setpgroup(&attributes, 0);
    posix_spawnattr_setflags(
        &attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF
    );
    std::string shell = "/bin/sh";
    std::string flag = "-c";
    std::array<char*, 4> arguments = {shell.data(), flag.data(), command_.data(), nullptr};
    const int error =
        posix_spawn(&pid_, shell.c_str(), &actions, &attributes, arguments.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    ::close(in.read);
    ::close(out.write);
    ::close(err.write);
    in_ = in.write;
    out_ = out.read;
    err_ = err.read;
    for (const int fd : {in_, out_, err_}) {
        ::fcntl(fd, F_SETFL, O_NONBLOCK);
    }
    pending_.clear();
    stderr_tail_.clear();
    group_ = error == 0 ? pid_ : -1;
    if (error != 0) {
        pid_ = -1;
        stop(0);
        throw UserError(
            fmt::format("reward.command: cannot start a program: {}.", std::strerror(error))
        );
    }
}

// True once the program has ended and been collected.
bool CommandReward::Program::reap(bool wait) {
    if (pid_ < 0) {
        return true;
    }
    pid_t done = 0;
    do {
        done = ::waitpid(pid_, &exit_status_, wait ? 0 : WNOHANG);
    } while (done < 0 && errno == EINTR);
    if (done == 0) {
        return false;
    }
    pid_ = -1;
    return true;
}

bool CommandReward::Program::has_unasked_output() const {
    pollfd fd{out_, POLLIN, 0};
    return !pending_.empty() || ::poll(&fd, 1, 0) > 0;
}

void CommandReward::Program::stop(double grace_s) {
    close_if_open(in_);
    const double start = now_s();
    while (!reap(false) && now_s() - start < grace_s) {
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    if (group_ >= 0) {
        ::kill(-group_, SIGKILL);  // what the program started ends with it
        group_ = -1;
    }
    reap(true);
    if (err_ >= 0) {
        read_stderr();
    }
    close_if_open(out_);
    close_if_open(err_);
}

bool CommandReward::Program::ends_within(double seconds) {
    const double start = now_s();
    while (!reap(false)) {
        if (now_s() - start > seconds) {
            return false;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    read_stderr();
    return true;
}

void CommandReward::Program::read_stderr() {
    std::array<char, 4096> buffer{};
    for (int rounds = 0; rounds < 64; ++rounds) {
        const ssize_t got = ::read(err_, buffer.data(), buffer.size());
        if (got <= 0) {
            break;
        }
        stderr_tail_.append(buffer.data(), static_cast<size_t>(got));
        if (stderr_tail_.size() > 2 * kStderrTailBytes) {
            stderr_tail_.erase(0, stderr_tail_.size() - kStderrTailBytes);
        }
    }
}

bool CommandReward::Program::wait_ready(
    std::string_view request, double seconds, std::array<pollfd, 3>& fds
) const {
    fds = {{{out_, POLLIN, 0}, {err_, POLLIN, 0}, {request.empty() ? -1 : in_, POLLOUT, 0}}};
    const int ms = static_cast<int>(std::ceil(std::min(seconds, 86400.0) * 1000));
    return ::poll(fds.data(), fds.size(), ms) > 0;
}

// Writes the request and reads up to the end of the first line, within the time limit.
CommandReward::Program::Event CommandReward::Program::exchange(
    std::string_view request, std::string& line
) {
    const double deadline = now_s() + timeout_s_;
    bool stderr_open = true;
    while (true) {
        const size_t end = pending_.find('\n');
        if (end != std::string::npos) {
            line = pending_.substr(0, end);
            pending_.erase(0, end + 1);
            return Event::kLine;
        }
        if (pending_.size() > kAnswerBytesMax) {
            line = pending_.substr(0, 200);
            return Event::kTooLong;
        }
        const double left = deadline - now_s();
        if (left <= 0) {
            return Event::kTimeout;
        }
        std::array<pollfd, 3> fds{};
        if (!wait_ready(request, left, fds)) {
            continue;
        }
        if (fds[1].revents != 0 && stderr_open) {
            read_stderr();
            stderr_open = (fds[1].revents & POLLHUP) == 0;
        }
        if (fds[2].revents != 0) {
            const ssize_t sent = ::write(in_, request.data(), request.size());
            if (sent > 0) {
                request.remove_prefix(static_cast<size_t>(sent));
            } else if (sent < 0 && errno != EAGAIN && errno != EINTR) {
                return Event::kEnded;
            }
        }
        if (fds[0].revents != 0) {
            std::array<char, 65536> buffer{};
            const ssize_t got = ::read(out_, buffer.data(), buffer.size());
            if (got > 0) {
                pending_.append(buffer.data(), static_cast<size_t>(got));
            } else if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
                return Event::kEnded;
            }
        }
        if (!stderr_open && fds[0].revents == 0 && fds[2].revents == 0) {
            // A closed stderr keeps poll awake; the program may go on without it.
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }
}

Score CommandReward::Program::score(const RewardJob& job, size_t id) {
    // Bytes after the last answer belong to no request: start afresh rather than read them as one.
    if (pid_ < 0 || has_unasked_output() || reap(false)) {
        stop(0);
        start();
    }
    std::string line;
    const Event event = exchange(request_line(job, id), line);
    if (event == Event::kLine) {
        Score score = parse_answer(line, id);
        if (score.status != ScoreStatus::kScored) {
            stop(0);
        }
        return score;
    }
    if (event == Event::kTimeout) {
        stop(0);
        return failure(
            ScoreStatus::kTimeout,
            fmt::format("the reward program gave no answer in {} s (reward.timeout_s)", timeout_s_)
        );
    }
    if (event == Event::kTooLong) {
        stop(0);
        return failure(
            ScoreStatus::kBadOutput,
            fmt::format("the reward program printed {} without a line end", quoted_start(line))
        );
    }
    stop(kStopGrace_s);  // it closed its stdout or stdin: let it end by itself, to see why
    return failure(ScoreStatus::kCrashed, "the reward program " + death());
}

CommandReward::CommandReward(const std::string& command, int64_t workers, double timeout_s) {
    for (int64_t i = 0; i < workers; ++i) {
        programs_.push_back(std::make_unique<Program>(command, timeout_s));
        programs_.back()->start();
    }
    USER_CHECK(
        !programs_.front()->ends_within(kStartCheck_s),
        "reward.command: the program \"{}\" {}; mend it, it must read JSON Lines on stdin until "
        "they "
        "end.",
        command,
        programs_.front()->death()
    );
}

CommandReward::~CommandReward() = default;

std::vector<Score> CommandReward::score(std::span<const RewardJob> jobs) {
    std::vector<Score> scores(jobs.size());
    std::atomic<size_t> next{0};
    const auto work = [&](Program& program) {
        block_sigpipe();
        for (size_t i = next++; i < jobs.size(); i = next++) {
            try {
                scores[i] = program.score(jobs[i], i);
            } catch (const UserError& error) {  // no more processes or files
                scores[i] = failure(ScoreStatus::kCrashed, error.what());
            }
        }
    };
    std::vector<std::thread> threads;
    for (size_t i = 0; i < std::min(programs_.size(), jobs.size()); ++i) {
        threads.emplace_back(work, std::ref(*programs_[i]));
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    return scores;
}

}  // namespace orbit
