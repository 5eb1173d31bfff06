// JSON Lines data sets: fields, errors with file and line, seeded orders.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>

#include "base/error.h"
#include "base/file.h"
#include "base/philox.h"
#include "data/dataset.h"

namespace orbit {
namespace {

// Without write_file_atomic's fsyncs, which cost more than the tests.
void write_plain(const std::string& path, const std::string& content) {
    std::ofstream(path, std::ios::binary) << content;
}

class DataFile {
  public:
    explicit DataFile(const std::string& content)
        : path_(fmt::format(
              "{}/orbit_data_{}_{}.jsonl",
              std::filesystem::temp_directory_path().string(),
              getpid(),
              counter_++
          )) {
        write_plain(path_, content);
    }

    ~DataFile() { std::filesystem::remove(path_); }

    DataFile(const DataFile&) = delete;
    DataFile& operator=(const DataFile&) = delete;

    const std::string& path() const { return path_; }

  private:
    static int counter_;
    std::string path_;
};

int DataFile::counter_ = 0;

Dataset load(const std::string& content, const DataOptions& options = {}) {
    const DataFile file(content);
    return Dataset::load(file.path(), options);
}

std::string error_of(const std::string& content, const DataOptions& options = {}) {
    const DataFile file(content);
    try {
        Dataset::load(file.path(), options);
    } catch (const UserError& error) {
        std::string message = error.what();
        const size_t at = message.find(file.path());
        return at == std::string::npos ? message : message.replace(at, file.path().size(), "F");
    }
    return "";
}

TEST(Dataset, ReadsRowsInFileOrder) {
    const auto data = load(
        "\xef\xbb\xbf{\"prompt\": \"1+1?\", \"answer\": \"2\", \"kind\": \"add\"}\r\n"
        "\n"
        "  {\"prompt\": [{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"user\", "
        "\"content\": \"\\u00fc\"}], \"answer\": 1.50}  "
    );
    ASSERT_EQ(data.size(), 2);
    EXPECT_EQ(data[0].messages.size(), 1u);
    EXPECT_EQ(data[0].messages[0].role, "user");
    EXPECT_EQ(data[0].messages[0].content, "1+1?");
    EXPECT_EQ(data[0].answer, "2");
    EXPECT_EQ(data[0].line, 1);
    EXPECT_EQ(data[0].row_json, R"({"prompt": "1+1?", "answer": "2", "kind": "add"})");
    EXPECT_EQ(data[1].messages[1].content, "\xc3\xbc");
    EXPECT_EQ(data[1].answer, "1.50");
    EXPECT_EQ(data[1].line, 3);
}

TEST(Dataset, NestedFieldsAndNumbersAsWritten) {
    DataOptions options;
    options.prompt_field = "q.text";
    options.answer_field = "reward_model.ground_truth";
    options.system = "be short";
    const auto data = load(
        R"({"ground_truth": 7, "q": {"text": "a"}, "reward_model": {"x": [1, {"ground_truth": 9}], "ground_truth": 1e3}}
{"q": {"text": "b"}, "reward_model.ground_truth": -42, "reward_model": {"ground_truth": 5}}
{"q": {"text": "c"}, "reward_model": {"ground_truth": 18446744073709551615}}
)",
        options
    );
    EXPECT_EQ(data[0].answer, "1e3");
    EXPECT_EQ(data[0].messages[0].content, "be short");
    EXPECT_EQ(data[0].messages[1].content, "a");
    EXPECT_EQ(data[2].answer, "18446744073709551615");
    options.answer_field = "";
    EXPECT_EQ(load("{\"q\": {\"text\": \"b\"}}", options)[0].answer, "");
}

TEST(Dataset, ErrorsNameFileAndLine) {
    const std::string good = "{\"prompt\": \"a\", \"answer\": \"b\"}\n";
    const std::pair<std::string, std::string> cases[] = {
        {good + "{\"prompt\": \"a\"", "F:2: the line is not valid JSON"},
        {good + good + "[1]\n", "F:3: the line is JSON but no object"},
        {good + "{\"prompt\": \"a\", \"anwser\": 1}",
         "F:2: the row has no field \"answer\" (it has anwser, prompt)"},
        {"{}", "F:1: the row has no field \"prompt\" (it has none)"},
        {"{\"prompt\": 3, \"answer\": 1}", "\"prompt\" is number"},
        {"{\"prompt\": [], \"answer\": 1}", "\"prompt\" is an empty list"},
        {"{\"prompt\": [{\"role\": \"user\"}], \"answer\": 1}", "a message in \"prompt\""},
        {"{\"prompt\": [\"x\"], \"answer\": 1}", "a message in \"prompt\""},
        {"{\"prompt\": \"a\", \"answer\": [1]}", "\"answer\" is array"},
        {"{\"prompt\": \"a\", \"answer\": null}", "\"answer\" is null"},
        {"\n\n{\"prompt\": \"\xff\", \"answer\": 1}", "F:3: the line is not UTF-8"},
        {"", "has no rows"},
        {"\n \r\n", "has no rows"},
    };
    for (const auto& [content, expected] : cases) {
        const std::string message = error_of(content);
        EXPECT_NE(message.find(expected), std::string::npos) << message;
    }
    EXPECT_EQ(error_of(good), "");
    EXPECT_THROW(Dataset::load("/nonexistent/x.jsonl", {}), UserError);
}

TEST(Dataset, MutatedFilesNeverCrash) {
    const std::string good =
        "{\"prompt\": [{\"role\": \"user\", \"content\": \"x\"}], \"answer\": {\"a\": 1}}\n"
        "{\"prompt\": \"a\", \"answer\": \"b\"}\n";
    for (uint32_t round = 0; round < 100; ++round) {
        std::string bad = good;
        const PhiloxWords dice = philox(round, 9, 0, 0, 1, 1);
        bad[dice.word[0] % bad.size()] = static_cast<char>(dice.word[1]);
        bad.insert(dice.word[2] % bad.size(), dice.word[3] % 2 == 0 ? "{\"a\":" : "\"");
        error_of(bad);
    }
    EXPECT_NE(error_of(std::string(200000, '[')), "");
    EXPECT_NE(error_of("{\"a\":" + std::string(200000, '[') + std::string(200000, ']') + "}"), "");
}

TEST(Dataset, OrdersAreSeededPermutations) {
    std::string content;
    for (int i = 0; i < 1000; ++i) {
        content += "{\"prompt\": \"a\", \"answer\": " + std::to_string(i) + "}\n";
    }
    DataOptions options;
    const auto data = load(content, options);
    const auto order = data.order(42, 0);
    EXPECT_EQ(order, data.order(42, 0));
    EXPECT_NE(order, data.order(42, 1));
    EXPECT_NE(order, data.order(43, 0));
    auto sorted = order;
    std::sort(sorted.begin(), sorted.end());
    int fixed_points = 0;
    for (int64_t i = 0; i < 1000; ++i) {
        EXPECT_EQ(sorted[static_cast<size_t>(i)], i);
        fixed_points += order[static_cast<size_t>(i)] == i ? 1 : 0;
    }
    EXPECT_LT(fixed_points, 8);  // about one is expected
    options.shuffle = false;
    EXPECT_EQ(load(content, options).order(42, 3), sorted);
}

TEST(Dataset, FirstPlacesAreUniform) {
    const auto data = load(
        "{\"prompt\": \"a\", \"answer\": 0}\n{\"prompt\": \"a\", \"answer\": 1}\n"
        "{\"prompt\": \"a\", \"answer\": 2}\n"
    );
    int counts[6] = {};
    for (int64_t epoch = 0; epoch < 6000; ++epoch) {
        const auto order = data.order(1, epoch);
        ++counts[order[0] * 2 + (order[1] > order[2] ? 1 : 0)];
    }
    double chi_square = 0;
    for (const int count : counts) {
        chi_square += (count - 1000.0) * (count - 1000.0) / 1000.0;
    }
    EXPECT_LT(chi_square, 20.5);  // 5 degrees of freedom, p = 0.001; the draws are fixed
}

TEST(Dataset, ReadsTheArithmeticQuestions) {
    const char* models = std::getenv("ORBIT_MODELS");
    if (models == nullptr) {
        GTEST_SKIP() << "ORBIT_MODELS is not set";
    }
    const auto data = Dataset::load(std::string(models) + "/arithmetic/train.jsonl", {});
    EXPECT_EQ(data.size(), 4096);
    EXPECT_EQ(data[4095].line, 4096);
}

}  // namespace
}  // namespace orbit
