// Rewards: built-in ones as tables of cases, and the user's program with every way to fail.
#include "reward/reward.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <filesystem>

#include "base/error.h"
#include "base/file.h"
#include "base/log.h"

namespace orbit {
namespace {

Example example_with(const std::string& answer) {
    Example example;
    example.messages = {{"user", "question"}};
    example.answer = answer;
    example.row_json = "{\"answer\": \"" + answer + "\", \"big\": 1.50}";
    example.file = "rows.jsonl";
    example.line = 3;
    return example;
}

Score score_one(
    const RewardOptions& options,
    const std::string& answer,
    const std::string& response,
    int64_t tokens = 0
) {
    Reward reward(options);
    const Example example = example_with(answer);
    const RewardJob job{&example, response, tokens, FinishReason::kStop};
    return reward.score({&job, 1}).at(0);
}

RewardOptions named(const std::string& name, const std::string& pattern = "") {
    RewardOptions options;
    options.name = name;
    options.pattern = pattern;
    return options;
}

struct Case {
    const char* answer;
    const char* response;
    double value;
};

void expect_cases(const RewardOptions& options, std::initializer_list<Case> cases) {
    for (const Case& each : cases) {
        const Score score = score_one(options, each.answer, each.response);
        EXPECT_EQ(score.status, ScoreStatus::kScored) << each.response;
        EXPECT_EQ(score.value, each.value) << each.response << " against " << each.answer;
        EXPECT_FALSE(score.reason.empty());
    }
}

TEST(Reward, ExactComparesWhatFollowsTheLastMarker) {
    expect_cases(
        named("exact"),
        {{"42", "so #### 42", 1},
         {"42", "#### 41 no #### 42 \n", 1},
         {"42", "#### 42 #### 41", 0},
         {"42", "42", 0},
         {"42", "####", 0},
         {"42", "####42", 1},
         {"42", "#### 42.", 0},
         {"42", "#### 42.0", 0},
         {" 42 ", "#### 42", 1},
         {"long text #### 42", "#### 42", 1},
         {"", "", 0}}
    );
    RewardOptions whole = named("exact");
    whole.marker = "";
    expect_cases(whole, {{"yes", " yes\n", 1}, {"yes", "#### yes", 0}});
    RewardOptions other = named("exact");
    other.marker = "Answer:";
    expect_cases(other, {{"B", "I think. Answer: B", 1}, {"B", "#### B", 0}});
}

TEST(Reward, NumberComparesValues) {
    expect_cases(
        named("number"),
        {{"18", "#### 18", 1},
         {"18", "#### 18.00", 1},
         {"18.0", "#### +18", 1},
         {"1234.5", "#### $1,234.50", 1},
         {"-3", "#### -3", 1},
         {"0", "#### -0.0", 1},
         {"0.5", "#### .5", 1},
         {"5", "#### 05", 1},
         {"1,000", "#### 1000", 1},
         {"18", "#### 19", 0},
         {"18", "#### 18 apples", 0},
         {"18", "#### 1,8", 0},
         {"1234", "#### 12,34", 0},
         {"18", "#### ", 0},
         {"18", "#### -", 0},
         {"18", "#### .", 0},
         {"18", "#### 18#19", 0},
         {"work #### 72", "#### 72", 1}}
    );
    EXPECT_EQ(score_one(named("number"), "1", "#### " + std::string(1000000, '1')).value, 0);
    const Score bad = score_one(named("number"), "seven", "#### 7");
    EXPECT_EQ(bad.status, ScoreStatus::kBadOutput);
}

TEST(Reward, RegexComparesGroupOneOfTheLastMatch) {
    expect_cases(
        named("regex", R"(\\boxed\{([^}]*)\})"),
        {{"7", "\\boxed{6} then \\boxed{7}", 1},
         {"7", "\\boxed{7} then \\boxed{6}", 0},
         {"7", "7", 0},
         {"7", "\xff \\boxed{ 7 }", 1}}
    );
    expect_cases(named("regex", "cat|dog"), {{"", "a dog", 1}, {"", "a cow", 0}});
    expect_cases(named("regex", "(x)*"), {{"x", "xx", 0}, {"", "", 1}});
    const Score slow = score_one(named("regex", "(a+)+$"), "", std::string(5000, 'a') + "b");
    EXPECT_EQ(slow.status, ScoreStatus::kBadOutput);  // ends, and is not called wrong
}

TEST(Reward, FormatWantsEachTagOnce) {
    expect_cases(
        named("format"),
        {{"", "<think>a\nb</think>\n<answer>1</answer>\n", 1},
         {"", "<think>a</think><answer>1</answer>", 1},
         {"", "<think>a</think> x <answer>1</answer>", 0},
         {"", "<think>a</think><answer>1</answer> more", 0},
         {"", "<think>a</think><think>a</think><answer>1</answer>", 0},
         {"", "<answer>1</answer>", 0},
         {"", "", 0}}
    );
    expect_cases(named("format", "^A: "), {{"", "A: b", 1}, {"", "B: A: b", 0}});
}

TEST(Reward, LengthIsTakenOffAndNamed) {
    RewardOptions options = named("exact");
    options.length_penalty = 0.25;
    options.length_target = 10;
    Score score = score_one(options, "1", "#### 1", 14);
    EXPECT_EQ(score.value, 0.0);
    ASSERT_EQ(score.parts.size(), 2u);
    EXPECT_EQ(score.parts[0].name, "exact");
    EXPECT_EQ(score.parts[0].value, 1.0);
    EXPECT_EQ(score.parts[1].name, "length");
    EXPECT_EQ(score.parts[1].value, -1.0);
    EXPECT_EQ(score_one(options, "1", "#### 1", 10).value, 1.0);
    options.name = "length";
    score = score_one(options, "1", "x", 11);
    EXPECT_EQ(score.value, -0.25);
    EXPECT_EQ(score.parts.size(), 1u);
}

std::string error_of(const RewardOptions& options) {
    try {
        Reward reward(options);
    } catch (const UserError& error) {
        return error.what();
    }
    return "";
}

TEST(Reward, OptionErrorsNameTheFix) {
    EXPECT_NE(error_of(named("numbr")).find("did you mean \"number\""), std::string::npos);
    EXPECT_NE(error_of(named("regex")).find("reward.pattern"), std::string::npos);
    EXPECT_NE(error_of(named("regex", "(")).find("regular expression"), std::string::npos);
    EXPECT_NE(error_of(named("length")).find("reward.length_penalty"), std::string::npos);
    EXPECT_EQ(error_of(named("exact")), "");
}

// A python program file that is removed with the object.
class Script {
  public:
    explicit Script(const std::string& body) {
        path_ = fmt::format(
            "{}/orbit_reward_{}_{}.py",
            std::filesystem::temp_directory_path().string(),
            getpid(),
            counter_++
        );
        write_file_atomic(path_, "import sys, json, os, time\n" + body);
    }

    ~Script() { std::filesystem::remove(path_); }

    Script(const Script&) = delete;
    Script& operator=(const Script&) = delete;

    RewardOptions options(int64_t workers = 2, double timeout_s = 20) const {
        RewardOptions options;
        options.command = "python3 " + path_;
        options.workers = workers;
        options.timeout_s = timeout_s;
        return options;
    }

  private:
    static int counter_;
    std::string path_;
};

int Script::counter_ = 0;

const char* const kScorer = R"(
for line in sys.stdin:
    r = json.loads(line)
    what = r["response"]
    if what == "crash":
        sys.stderr.write("I give up\n")
        sys.exit(3)
    if what == "abort":
        os.abort()
    if what == "hang":
        time.sleep(1000)
    if what == "garbage":
        print("nonsense", flush=True)
    elif what == "noscore":
        print("{}", flush=True)
    elif what == "nan":
        print('{"score": NaN}', flush=True)
    elif what == "wrong id":
        print(json.dumps({"score": 1, "id": r["id"] + 1}), flush=True)
    elif what == "two lines":
        sys.stdout.write('{"score": 0.5}\n{"score": 0.25}\n')
        sys.stdout.flush()
    elif what == "endless":
        while True:
            sys.stdout.write("x" * 1000)
    elif what == "pid":
        print(json.dumps({"score": os.getpid()}), flush=True)
    else:
        print(json.dumps({"score": float(what == r["answer"]), "id": r["id"],
                          "reason": "len %d" % len(what), "parts": {"a": 2}}), flush=True)
)";

std::vector<Score> score_all(
    Reward& reward, const Example& example, const std::vector<std::string>& responses
) {
    std::vector<RewardJob> jobs;
    for (const std::string& response : responses) {
        jobs.push_back({&example, response, 1, FinishReason::kStop});
    }
    return reward.score(jobs);
}

TEST(RewardCommand, ScoresInJobOrder) {
    const Script script(kScorer);
    Reward reward(script.options(3));
    const Example example = example_with("yes");
    for (int round = 0; round < 3; ++round) {
        std::vector<std::string> responses;
        for (int i = 0; i < 50; ++i) {
            responses.push_back(i % 3 == 0 ? "yes" : std::string(static_cast<size_t>(i), 'n'));
        }
        responses.push_back(std::string(1 << 20, 'n'));  // larger than any pipe
        const auto scores = score_all(reward, example, responses);
        for (size_t i = 0; i < scores.size(); ++i) {
            ASSERT_EQ(scores[i].status, ScoreStatus::kScored) << scores[i].reason;
            ASSERT_EQ(scores[i].value, i < 50 && i % 3 == 0 ? 1.0 : 0.0);
            ASSERT_EQ(scores[i].reason, fmt::format("len {}", responses[i].size()));
            ASSERT_EQ(scores[i].parts.at(0).name, "a");
        }
    }
}

TEST(RewardCommand, SeesTheWholeRequest) {
    const Script script(R"(
for line in sys.stdin:
    r = json.loads(line)
    ok = (r["prompt"] == "question" and r["messages"] == [{"role": "user", "content": "question"}]
          and r["answer"] == "a\u00fc" and r["row"]["big"] == 1.5 and '1.50' in line
          and r["file"] == "rows.jsonl" and r["line"] == 3 and r["tokens"] == 7
          and r["finish"] == "length" and r["response"] == "x\n\ufffd")
    print(json.dumps({"score": ok}), flush=True)
)");
    Reward reward(script.options(1));
    const Example example = example_with("a\xc3\xbc");
    const RewardJob job{&example, "x\n\xff", 7, FinishReason::kLength};
    const auto scores = reward.score({&job, 1});
    EXPECT_EQ(scores[0].status, ScoreStatus::kScored) << scores[0].reason;
    EXPECT_EQ(scores[0].value, 1.0);
}

TEST(RewardCommand, FailuresAreReportedApartAndTheNextRowIsScored) {
    const Script script(kScorer);
    Reward reward(script.options(1));
    const Example example = example_with("yes");
    const std::pair<const char*, ScoreStatus> cases[] = {
        {"crash", ScoreStatus::kCrashed},
        {"abort", ScoreStatus::kCrashed},
        {"garbage", ScoreStatus::kBadOutput},
        {"noscore", ScoreStatus::kBadOutput},
        {"nan", ScoreStatus::kBadOutput},
        {"wrong id", ScoreStatus::kBadOutput},
        {"endless", ScoreStatus::kBadOutput},
        {"two lines", ScoreStatus::kScored}};
    for (const auto& [response, status] : cases) {
        const auto scores = score_all(reward, example, {"yes", response, "yes", "no"});
        EXPECT_EQ(scores[0].value, 1.0) << response;
        EXPECT_EQ(scores[1].status, status) << response << ": " << scores[1].reason;
        EXPECT_EQ(scores[2].status, ScoreStatus::kScored) << response << ": " << scores[2].reason;
        EXPECT_EQ(scores[2].value, 1.0) << response;
        EXPECT_EQ(scores[3].value, 0.0) << response;
        if (std::string(response) == "crash") {
            EXPECT_NE(scores[1].reason.find("status 3"), std::string::npos);
            EXPECT_NE(scores[1].reason.find("I give up"), std::string::npos);
        }
    }
}

TEST(RewardCommand, AHangingProgramIsKilledAndStartedAgain) {
    const Script script(kScorer);
    Reward reward(script.options(1, 1.5));
    const Example example = example_with("yes");
    const auto before = score_all(reward, example, {"pid"});
    const double start = now_s();
    const auto scores = score_all(reward, example, {"hang", "yes", "pid"});
    EXPECT_LT(now_s() - start, 10);
    EXPECT_EQ(scores[0].status, ScoreStatus::kTimeout);
    EXPECT_NE(scores[0].reason.find("reward.timeout_s"), std::string::npos);
    EXPECT_EQ(scores[1].value, 1.0);
    EXPECT_NE(scores[2].value, before[0].value);
    EXPECT_EQ(::kill(static_cast<pid_t>(before[0].value), 0), -1);  // the old one is gone
}

TEST(RewardCommand, NothingIsLeftBehind) {
    pid_t pid = 0;
    {
        const Script script(kScorer);
        Reward reward(script.options(2));
        const Example example = example_with("yes");
        pid = static_cast<pid_t>(score_all(reward, example, {"pid"}).at(0).value);
        EXPECT_EQ(::kill(pid, 0), 0);
    }
    EXPECT_EQ(::kill(pid, 0), -1);
    EXPECT_EQ(::waitpid(-1, nullptr, WNOHANG), -1);  // no children, no zombies
    RewardOptions stubborn;  // ignores its stdin's end, and has a child of its own
    stubborn.command = "trap '' TERM; sleep 1000 & echo $! >&2; sleep 1000";
    stubborn.timeout_s = 0.2;
    const double start = now_s();
    {
        Reward reward(stubborn);
        const Example example = example_with("yes");
        EXPECT_EQ(score_all(reward, example, {"x"}).at(0).status, ScoreStatus::kTimeout);
    }
    EXPECT_LT(now_s() - start, 8);
    EXPECT_EQ(::waitpid(-1, nullptr, WNOHANG), -1);
}

TEST(RewardCommand, AProgramThatCannotStartIsAUserError) {
    RewardOptions options;
    options.command = "no-such-program-orbit --x";
    EXPECT_NE(error_of(options).find("not found"), std::string::npos) << error_of(options);
    options.command = "A=1 no-such-program-orbit";
    EXPECT_NE(error_of(options).find("not found"), std::string::npos) << error_of(options);
    options.command = "echo 'cannot import torch' >&2; exit 1";
    EXPECT_NE(error_of(options).find("cannot import torch"), std::string::npos);
    options.command = "exit 0;";
    EXPECT_NE(error_of(options).find("stdin"), std::string::npos);
}

TEST(RewardCommand, AProgramThatEndsWhileIdleIsStartedAgain) {
    const Script script(kScorer);
    Reward reward(script.options(1));
    const Example example = example_with("yes");
    const auto pid = static_cast<pid_t>(score_all(reward, example, {"pid"}).at(0).value);
    ASSERT_EQ(::kill(pid, SIGKILL), 0);
    ::usleep(200000);
    const auto scores = score_all(reward, example, {"yes"});
    EXPECT_EQ(scores[0].status, ScoreStatus::kScored) << scores[0].reason;
    EXPECT_EQ(scores[0].value, 1.0);
}

TEST(RewardCommand, FloodsOfStderrDoNotBlock) {
    const Script script(R"(
for line in sys.stdin:
    sys.stderr.write("e" * 300000)
    sys.stderr.flush()
    print('{"score": 1}', flush=True)
)");
    Reward reward(script.options(1));
    const Example example = example_with("yes");
    for (const Score& score : score_all(reward, example, {"a", "b", "c"})) {
        EXPECT_EQ(score.value, 1.0);
    }
    const Script closed(R"(
os.close(2)
for line in sys.stdin:
    print('{"score": 1}', flush=True)
)");
    Reward quiet(closed.options(1));
    EXPECT_EQ(score_all(quiet, example, {"a"}).at(0).value, 1.0);
}

}  // namespace
}  // namespace orbit
