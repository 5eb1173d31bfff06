#include "run/config.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "base/file.h"
#include "base/philox.h"

namespace orbit {
namespace {

std::string message_of(const std::function<void()>& call) {
    try {
        call();
    } catch (const UserError& error) {
        return error.what();
    }
    return "no error";
}

std::string parse_message(const std::string& text, const std::vector<std::string>& set = {}) {
    return message_of([&] { parse_config(text, "run.toml", set); });
}

std::string demo_text() {
    return read_file(std::string(ORBIT_SOURCE_DIR) + "/examples/demo/run.toml");
}

TEST(Config, DemoHasTheValuesOfTheContract) {
    const Config c = load_config(std::string(ORBIT_SOURCE_DIR) + "/examples/demo/run.toml");
    EXPECT_EQ(c.rollout.prompts_per_step, 32);
    EXPECT_EQ(c.rollout.samples_per_prompt, 8);
    EXPECT_EQ(c.rollout.max_tokens, 64);
    EXPECT_EQ(c.adapter.kind, "oft");
    EXPECT_EQ(c.adapter.block_size, 32);
    EXPECT_DOUBLE_EQ(c.train.lr, 1e-3);
    EXPECT_DOUBLE_EQ(c.train.beta1, 0.9);
    EXPECT_DOUBLE_EQ(c.train.beta2, 0.95);
    EXPECT_TRUE(is_directory(c.model)) << c.model;
    EXPECT_TRUE(file_exists(c.data.train)) << c.data.train;
    EXPECT_TRUE(file_exists(c.data.eval)) << c.data.eval;
}

TEST(Config, EveryKeyOfTheContractExists) {
    const auto keys = config_keys();
    for (const char* key : {
             "model",
             "algorithm",
             "seed",
             "device",
             "cpu.isa",
             "data.train",
             "data.eval",
             "data.prompt_field",
             "data.answer_field",
             "reward.name",
             "reward.command",
             "rollout.prompts_per_step",
             "rollout.samples_per_prompt",
             "rollout.temperature",
             "rollout.max_tokens",
             "adapter.kind",
             "adapter.block_size",
             "adapter.rank",
             "adapter.alpha",
             "adapter.targets",
             "train.steps",
             "train.lr",
             "train.tokens_per_batch",
             "train.max_staleness",
             "moe.dequant_bytes",
             "moe.host_layers",
             "checkpoint.every",
             "checkpoint.keep",
         }) {
        EXPECT_EQ(std::count(keys.begin(), keys.end(), key), 1) << key;
    }
}

// A new knob needs a reason (CONTRIBUTING.md): whoever adds one meets this line.
TEST(Config, NumberOfKeysIsGuarded) {
    EXPECT_LE(config_keys().size(), 70u);
}

TEST(Config, CompleteTextReadsBackTheSame) {
    Config c;
    c.model = "/a \"b\"\\c\n\x01\u00e9";
    c.train.lr = 0.1 + 0.2;
    c.rollout.temperature = 0.7f;
    c.rollout.min_p = 1e-30f;
    c.adapter.targets = {"q_proj", "a,b", ""};
    c.eval.k = {1, 2, 8};
    c.seed = 12345678901234567ull;
    const std::string text = to_toml(c);
    const Config back = parse_config(text, "x.toml");
    EXPECT_EQ(to_toml(back), text);
    EXPECT_EQ(back.model, c.model);
    EXPECT_EQ(back.train.lr, c.train.lr);
    EXPECT_EQ(back.rollout.temperature, 0.7f);
    EXPECT_EQ(back.rollout.min_p, 1e-30f);
    EXPECT_EQ(back.adapter.targets, c.adapter.targets);
    EXPECT_EQ(back.eval.k, c.eval.k);
    EXPECT_EQ(back.seed, c.seed);
    for (const auto& key : config_keys()) {
        const auto leaf = key.substr(key.find('.') + 1);
        EXPECT_NE(text.find("\n" + leaf + " = "), key == "model" ? 0 : std::string::npos) << key;
    }
}

TEST(Config, UnknownKeyNamesLineAndNearestKey) {
    EXPECT_EQ(
        parse_message("seed = 1\n[train]\nstepps = 2\n"),
        "run.toml:3: unknown key \"train.stepps\"; did you mean \"train.steps\"?"
    );
    EXPECT_EQ(
        parse_message("modl = 'x'"), "run.toml:1: unknown key \"modl\"; did you mean \"model\"?"
    );
    EXPECT_NE(
        parse_message("[rolout]\ntemperature = 1").find("did you mean [rollout]?"),
        std::string::npos
    );
    EXPECT_NE(
        parse_message("", {"train.lrr=1"}).find("did you mean \"train.lr\""), std::string::npos
    );
}

TEST(Config, WrongTypeNamesLineAndType) {
    EXPECT_EQ(
        parse_message("[train]\nsteps = 'ten'"), "run.toml:2: train.steps must be an integer."
    );
    EXPECT_EQ(parse_message("[train]\nsteps = 1.5"), "run.toml:2: train.steps must be an integer.");
    EXPECT_EQ(parse_message("[train]\nlr = '1e-3'"), "run.toml:2: train.lr must be a number.");
    EXPECT_EQ(parse_message("model = 3"), "run.toml:1: model must be a string.");
    EXPECT_EQ(parse_message("train = 3"), "run.toml:1: train must be a section: [train].");
    EXPECT_EQ(parse_message("[model]\nx = 3"), "run.toml:1: model must be a string.");
    EXPECT_EQ(
        parse_message("adapter.targets = 'q_proj'"),
        "run.toml:1: adapter.targets must be a list of strings."
    );
    EXPECT_EQ(
        parse_message("adapter.targets = [1]"),
        "run.toml:1: adapter.targets must be a list of strings."
    );
    EXPECT_NE(parse_message("seed = -1").find("range"), std::string::npos);
    EXPECT_NE(parse_message("rollout.top_k = 9999999999").find("range"), std::string::npos);
    EXPECT_NE(parse_message("train.lr = nan").find("finite"), std::string::npos);
    EXPECT_NE(parse_message("rollout.temperature = 1e39").find("finite"), std::string::npos);
}

TEST(Config, OverridesAreTypedAndWin) {
    const Config c = parse_config(
        "[train]\nlr = 1\n[adapter]\nkind = 'oft'",
        "run.toml",
        {"train.lr=2e-3",
         "adapter.kind=lora",
         "adapter.targets=q_proj,v_proj",
         "eval.k=1,2",
         "data.answer_field=123",
         "rollout.stop=[\"a,b\", \"c\"]",
         "rollout.prefix_cache=false",
         "reward.command=python3 score.py --x=1"}
    );
    EXPECT_DOUBLE_EQ(c.train.lr, 2e-3);
    EXPECT_EQ(c.adapter.kind, "lora");
    EXPECT_EQ(c.adapter.targets, (std::vector<std::string>{"q_proj", "v_proj"}));
    EXPECT_EQ(c.eval.k, (std::vector<int64_t>{1, 2}));
    EXPECT_EQ(c.data.answer_field, "123");
    EXPECT_EQ(c.rollout.stop, (std::vector<std::string>{"a,b", "c"}));
    EXPECT_FALSE(c.rollout.prefix_cache);
    EXPECT_EQ(c.reward.command, "python3 score.py --x=1");
    EXPECT_EQ(
        parse_message("", {"train.steps=ten"}),
        "--set train.steps=ten: train.steps must be an integer."
    );
    EXPECT_NE(parse_message("", {"train.steps"}).find("key=value"), std::string::npos);
    EXPECT_NE(parse_message("", {"=3"}).find("key=value"), std::string::npos);
    EXPECT_NE(parse_message("", {"train.steps=1\nseed=2"}).find("integer"), std::string::npos);
}

TEST(Config, RangesAreCheckedWithAPlace) {
    EXPECT_EQ(
        parse_message("\n[train]\nlr = 0"), "run.toml:3: train.lr must be above 0, but is 0."
    );
    EXPECT_EQ(
        parse_message("[rollout]\nprompts_per_step = 0"),
        "run.toml:2: rollout.prompts_per_step must be from 1 to 1048576, but is 0."
    );
    EXPECT_EQ(
        parse_message("adapter.kind = 'dora'"),
        "run.toml:1: adapter.kind must be one of oft, lora, but is \"dora\"."
    );
    EXPECT_NE(parse_message("device = 'gpu'").find("cuda:N"), std::string::npos);
    EXPECT_NE(parse_message("device = 'cuda:x'").find("cuda:N"), std::string::npos);
    EXPECT_EQ(parse_message("device = 'cuda:12'"), "no error");
    EXPECT_NE(parse_message("rollout.stop = ['']").find("empty"), std::string::npos);
    EXPECT_EQ(
        parse_message("", {"rollout.top_p=1.5"}),
        "--set rollout.top_p=1.5: rollout.top_p must be from 0 to 1, but is 1.5."
    );
    Config c;
    c.train.beta1 = 1;
    EXPECT_EQ(
        message_of([&] { check_config(c); }), "train.beta1 must be from 0 to 0.999999, but is 1."
    );
}

TEST(Config, BrokenTomlNamesTheLine) {
    const std::string message = parse_message("seed = 1\n[train\nlr = 2");
    EXPECT_TRUE(message.starts_with("run.toml:2: this is not valid TOML: ")) << message;
    EXPECT_NE(parse_message("seed = 1\nseed = 2").find("run.toml:2"), std::string::npos);
    EXPECT_NE(parse_message(std::string(2 << 20, ' ')).find("another file"), std::string::npos);
    EXPECT_NE(
        message_of([] { load_config("/nonexistent/run.toml"); }).find("/nonexistent/run.toml"),
        std::string::npos
    );
}

TEST(Config, PathsAreLookedForBesideTheConfigThenHere) {
    namespace fs = std::filesystem;
    const fs::path folder = fs::temp_directory_path() / fmt::format("orbit_config_{}", getpid());
    fs::create_directories(folder / "sub");
    std::ofstream(folder / "sub" / "train.jsonl") << "{}";
    const std::string config = (folder / "sub" / "run.toml").string();
    const Config c = parse_config("data.train = 'train.jsonl'\nmodel = '/abs'", config);
    EXPECT_EQ(c.data.train, (folder / "sub" / "train.jsonl").string());
    EXPECT_EQ(c.model, "/abs");
    const fs::path before = fs::current_path();
    fs::current_path(folder);
    std::ofstream("train.jsonl") << "{}";
    EXPECT_EQ(parse_config("data.train = 'train.jsonl'", config).data.train, c.data.train);
    EXPECT_EQ(
        parse_config("", config, {"data.train=train.jsonl"}).data.train,
        (folder / "train.jsonl").string()
    );
    fs::current_path(before);
    fs::remove_all(folder);
}

// Damaged configs end in a UserError or in a config, never in a crash.
TEST(Config, MutatedTextNeverCrashes) {
    const std::string original = demo_text();
    const std::string complete = to_toml(parse_config(original, "run.toml"));
    int errors = 0;
    for (uint32_t trial = 0; trial < 3000; ++trial) {
        std::string text = trial % 2 == 0 ? original : complete;
        const PhiloxWords draw = philox(trial, 0, 0, 0, 1, 2);
        const size_t at = draw.word[0] % text.size();
        switch (draw.word[1] % 4) {
            case 0:
                text[at] = static_cast<char>(draw.word[2] & 255u);
                break;
            case 1:
                text.resize(at);
                break;
            case 2:
                text.erase(at, draw.word[2] % 20);
                break;
            default:
                text.insert(at, text.substr(draw.word[2] % text.size(), draw.word[3] % 30));
        }
        try {
            parse_config(text, "run.toml");
        } catch (const UserError& error) {
            ++errors;
            EXPECT_TRUE(std::string(error.what()).starts_with("run.toml:")) << error.what();
        }
    }
    EXPECT_GT(errors, 500);
}

TEST(Config, ReferencePageIsUpToDate) {
    const std::string page = std::string(ORBIT_SOURCE_DIR) + "/docs/CONFIG.md";
    EXPECT_EQ(read_file(page), config_reference()) << "run ./run docs";
}

}  // namespace
}  // namespace orbit
