// Damaged and hostile model files: whatever the bytes, opening and loading gives a UserError or a
// model, never a crash, a hang or a huge allocation. Mutations are seeded, so a failure repeats.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cstring>

#include "base/safetensors.h"
#include "model/checkpoint.h"
#include "model/model.h"
#include "model_files.h"

namespace orbit {
namespace {

using namespace model_files;

TinyModel smallest_model(const std::string& family) {
    TinyModel size;
    size.width = 32;
    size.mlp = 32;
    size.layers = 1;
    size.heads = 2;
    size.kv_heads = 1;
    size.vocab = 258;
    return tiny_model(family, true, size);
}

// Flips, overwrites with telling values, cuts, duplicates or drops a piece within [0, limit).
std::string mutated(std::string bytes, size_t limit, std::mt19937& random) {
    const auto below = [&](size_t n) { return n == 0 ? 0 : random() % n; };
    limit = std::min(limit, bytes.size());
    const size_t changes = 1 + below(3);
    for (size_t change = 0; change < changes && !bytes.empty(); ++change) {
        const size_t at = below(std::min(limit, bytes.size()));
        switch (below(7)) {
            case 0:
                bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
                break;
            case 1:
                bytes[at] = static_cast<char>(random());
                break;
            case 2: {  // a number with many bits, or few
                const uint64_t values[] = {
                    0,
                    1,
                    ~uint64_t{0},
                    uint64_t{1} << 63,
                    0x7fffffff,
                    0xffffffff,
                    uint64_t{1} << 40,
                    random()};
                const uint64_t value = values[below(8)];
                const size_t size = std::min<size_t>(below(2) == 0 ? 4 : 8, bytes.size() - at);
                std::memcpy(bytes.data() + at, &value, size);
                break;
            }
            case 3:
                bytes.resize(at);
                break;
            case 4:
                bytes.erase(at, 1 + below(8));
                break;
            case 5:
                bytes.insert(at, bytes.substr(below(bytes.size()), 1 + below(16)));
                break;
            default: {  // JSON and numbers in text
                const char* pieces[] = {
                    "-1",
                    "null",
                    "[",
                    "{",
                    "\"",
                    "1e999",
                    "99999999999999999999",
                    "true",
                    ",",
                    "\xff",
                    "0.5",
                    "[]"};
                const std::string piece = pieces[below(12)];
                bytes.replace(at, std::min(piece.size(), bytes.size() - at), piece);
                break;
            }
        }
    }
    return bytes;
}

struct Outcome {
    int loaded = 0;
    int refused = 0;
};

long peak_memory_kib() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss;
}

class Hostile : public testing::Test {
  protected:
    // Mutates the file `name` of a whole folder, `rounds` times; `limit`: only its first bytes.
    Outcome attack(
        const std::string& name, const std::string& model, int rounds, size_t limit = SIZE_MAX
    ) {
        const std::string file = folder_.path(name);
        const std::string good = read_file(file);
        std::mt19937 random(17);
        Outcome outcome;
        for (int round = 0; round < rounds; ++round) {
            write_plain(file, mutated(good, limit, random));
            // Opening is cheap and refuses most; what it lets through is loaded.
            std::string sentence = refusal([&] { open_checkpoint(model); });
            if (sentence.empty()) {
                sentence = refusal([&] { load_model(stream_, model); });
            }
            ++(sentence.empty() ? outcome.loaded : outcome.refused);
        }
        write_plain(file, good);
        EXPECT_EQ(refusal([&] { load_model(stream_, model); }), "") << "the whole file loads";
        return outcome;
    }

    void SetUp() override { before_kib_ = peak_memory_kib(); }

    void TearDown() override {
        EXPECT_LT(peak_memory_kib() - before_kib_, 512 * 1024) << "a size was believed";
    }

    Folder folder_;
    Device device_ = make_device("cpu", "reference", 1);
    Stream stream_{device_};
    long before_kib_ = 0;
};

TEST_F(Hostile, Config) {
    write_hf(folder_.path(), smallest_model("qwen3"));
    const Outcome outcome = attack("config.json", folder_.path(), 4000);
    EXPECT_GT(outcome.refused, 500);
    EXPECT_GT(outcome.loaded, 10);
}

TEST_F(Hostile, SafetensorsHeader) {
    write_hf(folder_.path(), smallest_model("qwen3"));
    const Outcome outcome = attack("model.safetensors", folder_.path(), 4000, 2600);
    EXPECT_GT(outcome.refused, 1000);
}

TEST_F(Hostile, SafetensorsAnywhere) {
    write_hf(folder_.path(), smallest_model("llama"));
    const Outcome outcome = attack("model.safetensors", folder_.path(), 300);
    EXPECT_GT(outcome.loaded, 30) << "weights may have any finite value";
}

TEST_F(Hostile, Index) {
    const TinyModel tiny = smallest_model("llama");
    write_hf(folder_.path(), tiny);
    std::filesystem::rename(folder_.path("model.safetensors"), folder_.path("a.safetensors"));
    nlohmann::json map = nlohmann::json::object();
    for (const auto& [name, dense] : tiny.weights) {
        map[name] = "a.safetensors";
    }
    write_plain(
        folder_.path("model.safetensors.index.json"), nlohmann::json{{"weight_map", map}}.dump()
    );
    const Outcome outcome = attack("model.safetensors.index.json", folder_.path(), 1000);
    EXPECT_GT(outcome.refused, 500);
}

TEST_F(Hostile, TokenizerConfigAndGenerationConfig) {
    write_hf(folder_.path(), smallest_model("llama"));
    write_plain(
        folder_.path("tokenizer_config.json"),
        R"({"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>",)"
        R"( "chat_template": [{"name": "default", "template": "{{ messages[0]['content'] }}"}]})"
    );
    write_plain(folder_.path("generation_config.json"), R"({"eos_token_id": [1, 2, 256]})");
    attack("tokenizer_config.json", folder_.path(), 500);
    attack("generation_config.json", folder_.path(), 500);
}

TEST_F(Hostile, GgufHeader) {
    const std::string path = folder_.path("m.gguf");
    const std::string good = gguf_file(smallest_model("llama"));
    write_plain(path, good);
    const size_t header = good.find("output_norm") + 100;
    const Outcome outcome = attack("m.gguf", path, 6000, header);
    EXPECT_GT(outcome.refused, 500);
}

// The first kilobyte holds the counts and the sizes.
TEST_F(Hostile, GgufFront) {
    const std::string path = folder_.path("m.gguf");
    write_plain(path, gguf_file(smallest_model("qwen3"), 0));
    const Outcome outcome = attack("m.gguf", path, 4000, 700);
    EXPECT_GT(outcome.refused, 700);
}

TEST_F(Hostile, EveryTruncationOfAHeader) {
    const std::string gguf = folder_.path("m.gguf");
    const std::string good = gguf_file(smallest_model("llama"));
    for (size_t length = 0; length < 9000; length += 13) {
        write_plain(gguf, good.substr(0, length));
        EXPECT_NE(refusal([&] { load_model(stream_, gguf); }), "") << length;
    }
    const std::string tensors = safetensors_text(raw_tensors(smallest_model("llama"), "BF16"));
    const std::string path = folder_.path("t.safetensors");
    for (size_t length = 0; length < 3000; length += 7) {
        write_plain(path, tensors.substr(0, length));
        EXPECT_NE(refusal([&] { SafetensorsFile file(path); }), "") << length;
    }
}

}  // namespace
}  // namespace orbit
