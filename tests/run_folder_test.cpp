#include "run/run_folder.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "base/file.h"
#include "base/philox.h"

namespace orbit {
namespace {

namespace fs = std::filesystem;

class Folder {
  public:
    Folder() {
        std::string pattern = (fs::temp_directory_path() / "orbit_run_XXXXXX").string();
        path_ = mkdtemp(pattern.data());
    }

    ~Folder() { fs::remove_all(path_); }

    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;

    std::string path(const std::string& name = "") const {
        return name.empty() ? path_ : path_ + "/" + name;
    }

  private:
    std::string path_;
};

constexpr int64_t kCount = 300;

// What a checkpoint of a step holds is a function of the step, so any mixture shows.
std::vector<float> values_of(int64_t step) {
    std::vector<float> values(kCount);
    for (size_t i = 0; i < values.size(); ++i) {
        values[i] = uniform_from_word(
            philox(static_cast<uint32_t>(i), static_cast<uint32_t>(step), 0, 0, 1, 2).word[0]
        );
    }
    return values;
}

RunCheckpoint checkpoint_of(int64_t step) {
    RunCheckpoint checkpoint;
    checkpoint.step = step;
    checkpoint.tensors = {{"z_first", values_of(step)}, {"a_second", values_of(step + 1)}};
    checkpoint.state_json = fmt::format("{{\"cursor\": {}}}", step);
    return checkpoint;
}

void write_adapter(const std::string& folder) {
    write_file_atomic(folder + "/config.json", "{\"r\": 1}");
}

void write_step(const std::string& folder, int64_t step, int64_t keep) {
    write_checkpoint(folder, checkpoint_of(step), write_adapter, keep);
}

void expect_whole(const RunCheckpoint& checkpoint) {
    ASSERT_EQ(checkpoint.tensors.size(), 2u);
    EXPECT_EQ(checkpoint.tensors[0].name, "z_first");
    EXPECT_EQ(checkpoint.tensors[0].values, values_of(checkpoint.step));
    EXPECT_EQ(checkpoint.tensors[1].name, "a_second");
    EXPECT_EQ(checkpoint.tensors[1].values, values_of(checkpoint.step + 1));
    EXPECT_EQ(checkpoint.state_json, fmt::format("{{\"cursor\": {}}}", checkpoint.step));
    EXPECT_EQ(read_file(checkpoint.path + "/adapter/config.json"), "{\"r\": 1}");
}

TEST(Checkpoint, ReadsBackAndKeepsTheNewest) {
    const Folder folder;
    EXPECT_FALSE(find_latest_checkpoint(folder.path("none")).has_value());
    for (const int64_t step : {5, 10, 15, 20}) {
        write_step(folder.path("c"), step, 2);
    }
    const auto latest = find_latest_checkpoint(folder.path("c"));
    ASSERT_TRUE(latest.has_value());
    EXPECT_EQ(latest->step, 20);
    expect_whole(*latest);
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder.path("c"))) {
        names.push_back(entry.path().filename().string());
    }
    std::sort(names.begin(), names.end());
    EXPECT_EQ(names, (std::vector<std::string>{"step-000015", "step-000020"}));
    write_step(folder.path("c"), 20, 2);  // the same step again
    EXPECT_EQ(find_latest_checkpoint(folder.path("c"))->step, 20);
    write_step(folder.path("c"), 17, 1);  // after a resume from 15: 20 is stale
    EXPECT_EQ(find_latest_checkpoint(folder.path("c"))->step, 17);
}

TEST(Checkpoint, AnyDamageFallsBackToTheOneBefore) {
    const Folder folder;
    const std::string original = folder.path("original");
    write_step(original, 1, 2);
    write_step(original, 2, 2);
    const std::vector<std::string> files = {
        "checkpoint.json", "state.json", "tensors.safetensors", "adapter/config.json", "digest"};
    int damaged = 0;
    for (const auto& name : files) {
        for (int kind = 0; kind < 6; ++kind) {
            fs::remove_all(folder.path("c"));
            fs::copy(original, folder.path("c"), fs::copy_options::recursive);
            const std::string path = folder.path("c/step-000002/") + name;
            std::string text = read_file(path);
            switch (kind) {
                case 0:
                    fs::remove(path);
                    break;
                case 1:
                    std::ofstream(path, std::ios::trunc) << text.substr(0, text.size() / 2);
                    break;
                case 2:
                    std::ofstream(path, std::ios::trunc) << "";
                    break;
                case 3:
                    text[text.size() / 2] = static_cast<char>(text[text.size() / 2] ^ 1);
                    std::ofstream(path, std::ios::trunc) << text;
                    break;
                case 4:
                    std::ofstream(path, std::ios::trunc) << std::string(text.size(), '\0');
                    break;
                default:
                    std::ofstream(path, std::ios::app) << "x";
            }
            testing::internal::CaptureStderr();
            const auto latest = find_latest_checkpoint(folder.path("c"));
            const std::string warning = testing::internal::GetCapturedStderr();
            ASSERT_TRUE(latest.has_value()) << name << " " << kind;
            EXPECT_EQ(latest->step, 1) << name << " " << kind;
            expect_whole(*latest);
            EXPECT_NE(warning.find("step-000002"), std::string::npos) << warning;
            ++damaged;
        }
    }
    EXPECT_EQ(damaged, 30);
    std::ofstream(original + "/step-000002/extra") << "a file nobody wrote";
    testing::internal::CaptureStderr();
    EXPECT_EQ(find_latest_checkpoint(original)->step, 1);
    testing::internal::GetCapturedStderr();
}

// A child writes checkpoints without end; it is killed at a random moment; what it reported as
// written must be there, whole. The next child goes on from it.
TEST(Checkpoint, SurvivesKillAtAnyMoment) {
    const Folder folder;
    int64_t last = 0;
    for (uint32_t round = 0; round < 25; ++round) {
        int ends[2];
        ASSERT_EQ(pipe(ends), 0);
        const pid_t child = fork();
        ASSERT_GE(child, 0);
        if (child == 0) {
            close(ends[0]);
            for (int64_t step = last + 1;; ++step) {
                write_step(folder.path("c"), step, 1 + step % 2);
                if (write(ends[1], &step, sizeof step) != sizeof step) {
                    _exit(1);
                }
            }
        }
        close(ends[1]);
        usleep(2000 + philox(round, 0, 0, 0, 3, 4).word[0] % 150000);
        kill(child, SIGKILL);
        int status = 0;
        waitpid(child, &status, 0);
        EXPECT_TRUE(WIFSIGNALED(status));
        int64_t reported = last;
        for (int64_t step = 0; read(ends[0], &step, sizeof step) == sizeof step;) {
            reported = step;
        }
        close(ends[0]);
        const auto latest = find_latest_checkpoint(folder.path("c"));
        if (reported > 0) {
            ASSERT_TRUE(latest.has_value()) << "round " << round;
            EXPECT_GE(latest->step, reported);
            EXPECT_LE(latest->step, reported + 1);
            expect_whole(*latest);
        }
        last = latest ? latest->step : last;
    }
    EXPECT_GT(last, 2);  // flushing to disk sets the pace
}

// Runs `body` in a child whose files may not grow past `bytes`: what a full disk does to a write.
std::string error_with_file_limit(rlim_t bytes, const std::function<void()>& body) {
    int ends[2];
    if (pipe(ends) != 0) {
        return "no pipe";
    }
    const pid_t child = fork();
    if (child == 0) {
        std::signal(SIGXFSZ, SIG_IGN);
        const rlimit limit{bytes, bytes};
        setrlimit(RLIMIT_FSIZE, &limit);
        std::string message = "no error";
        try {
            body();
        } catch (const UserError& error) {
            message = error.what();
        }
        const bool told = write(ends[1], message.data(), message.size()) > 0;
        _exit(told ? 0 : 1);
    }
    close(ends[1]);
    std::string message(4096, ' ');
    const ssize_t got = read(ends[0], message.data(), message.size());
    close(ends[0]);
    waitpid(child, nullptr, 0);
    message.resize(static_cast<size_t>(std::max<ssize_t>(got, 0)));
    return message;
}

TEST(Checkpoint, FullDiskIsASentenceAndTheOldOneStays) {
    const Folder folder;
    write_step(folder.path("c"), 1, 1);
    for (const rlim_t bytes : {0, 10, 100, 1000, 2000}) {
        const auto message =
            error_with_file_limit(bytes, [&] { write_step(folder.path("c"), 2, 1); });
        EXPECT_NE(message.find("cannot write"), std::string::npos) << message;
        const auto latest = find_latest_checkpoint(folder.path("c"));
        ASSERT_TRUE(latest.has_value());
        EXPECT_EQ(latest->step, 1);
        expect_whole(*latest);
    }
    EXPECT_EQ(
        error_with_file_limit(1 << 20, [&] { write_step(folder.path("c"), 2, 1); }), "no error"
    );
    EXPECT_EQ(find_latest_checkpoint(folder.path("c"))->step, 2);
}

TEST(RunFolder, ResumeCutsLinesAfterTheCheckpoint) {
    const Folder folder;
    const std::string path = folder.path("run");
    const std::string kept = "{\"step\": 0}\n{\"a\": [1], \"step\": 1}\n";
    {
        const RunFolder run = RunFolder::create(path);
        run.write_config("seed = 1\n");
        run.append_metrics("{\"step\": 0}");
        run.append_metrics("{\"a\": [1], \"step\": 1}\n");
        run.append_rollouts("{\"step\":0}\n{\"step\":0}\n{\"step\":1}\n");
        run.write_checkpoint(checkpoint_of(2), write_adapter, 2);
        run.append_metrics("{\"step\": 2}");
        run.append_rollouts("{\"step\":2}\n");
        EXPECT_THROW(RunFolder::open(path), UserError) << "locked";
    }
    EXPECT_EQ(read_file(path + "/metrics.jsonl"), kept + "{\"step\": 2}\n");
    std::ofstream(path + "/rollouts.jsonl", std::ios::app) << "{\"step\":1, \"torn";
    const RunFolder run = RunFolder::open(path);
    const auto checkpoint = run.latest_checkpoint();
    ASSERT_TRUE(checkpoint.has_value());
    EXPECT_EQ(checkpoint->step, 2);
    expect_whole(*checkpoint);
    run.truncate_after(checkpoint->step);
    EXPECT_EQ(read_file(path + "/metrics.jsonl"), kept);
    EXPECT_EQ(read_file(path + "/rollouts.jsonl"), "{\"step\":0}\n{\"step\":0}\n{\"step\":1}\n");
    std::ofstream(path + "/metrics.jsonl", std::ios::app) << "{\"step\": 1, \"torn\": 1}";
    run.truncate_after(checkpoint->step);
    EXPECT_EQ(read_file(path + "/metrics.jsonl"), kept) << "a line without its newline";
    run.append_metrics("{\"step\": 2}");
    EXPECT_EQ(read_file(path + "/metrics.jsonl"), kept + "{\"step\": 2}\n");
    run.truncate_after(0);
    EXPECT_EQ(read_file(path + "/metrics.jsonl"), "");
    run.write_summary("{\"steps\": 3}");
    EXPECT_EQ(read_file(path + "/summary.json"), "{\"steps\": 3}\n");
    EXPECT_EQ(read_file(run.config_path()), "seed = 1\n");
}

TEST(RunFolder, BadFoldersAreSentences) {
    const Folder folder;
    EXPECT_THROW(RunFolder::open(folder.path("none")), UserError);
    EXPECT_THROW(RunFolder::open(folder.path()), UserError);
    std::ofstream(folder.path("file")) << "x";
    EXPECT_THROW(RunFolder::create(folder.path("file/run")), UserError);
    { RunFolder::create(folder.path("run")).write_config(""); }
    EXPECT_THROW(RunFolder::create(folder.path("run")), UserError);
    EXPECT_EQ(read_file(folder.path("file")), "x");
}

TEST(RunFolder, FullDiskLeavesWholeLines) {
    const Folder folder;
    const std::string path = folder.path("run");
    const std::string line(100, 'x');
    const auto message = error_with_file_limit(250, [&] {
        const RunFolder run = RunFolder::create(path);
        for (int i = 0; i < 10; ++i) {
            run.append_metrics(line);
        }
    });
    EXPECT_NE(message.find("metrics.jsonl"), std::string::npos) << message;
    EXPECT_NE(message.find("orbit resume"), std::string::npos) << message;
    EXPECT_EQ(read_file(path + "/metrics.jsonl"), line + "\n" + line + "\n");
}

}  // namespace
}  // namespace orbit
