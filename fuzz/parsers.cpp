// libFuzzer over every parser of files that come from outside. The environment names the one to
// feed (ORBIT_FUZZ_TARGET); a UserError is a fine outcome, anything else that throws or aborts is a
// find. `./run fuzz safetensors 60`.
#include <fmt/core.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>

#include "adapter/peft_config.h"
#include "base/error.h"
#include "base/safetensors.h"
#include "data/dataset.h"
#include "model/checkpoint.h"
#include "run/config.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace orbit {
namespace {

using Target = std::function<void(const std::string&)>;

// For parsers that want a path: the bytes as a file that only lives in memory.
Target on_file(std::function<void(const std::string&)> parse) {
    return [parse = std::move(parse)](const std::string& bytes) {
        const int fd = memfd_create("fuzz", 0);
        CHECK(fd >= 0);
        CHECK(
            ::write(fd, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()),
            "memory file"
        );
        try {
            parse(fmt::format("/proc/self/fd/{}", fd));
        } catch (...) {
            ::close(fd);
            throw;
        }
        ::close(fd);
    };
}

const std::map<std::string, Target>& targets() {
    static const std::map<std::string, Target> table = {
        {"config", [](const std::string& text) { to_toml(parse_config(text, "fuzz.toml")); }},
        {"tokenizer",
         [](const std::string& text) {
             const auto tokenizer = Tokenizer::from_json_text(text, "fuzz.json");
             tokenizer.decode(tokenizer.encode("Hello, 123 wörld!\n", true), true);
         }},
        {"template",
         [](const std::string& text) {
             const ChatTemplate chat(text, "<s>", "</s>");
             const std::vector<ChatMessage> messages = {{"user", "Hi"}, {"assistant", "Hello"}};
             chat.render(messages, true);
         }},
        {"peft", [](const std::string& text) { parse_peft_config("fuzz.json", text); }},
        {"safetensors", on_file([](const std::string& path) { SafetensorsFile file(path); })},
        {"gguf", on_file([](const std::string& path) { open_gguf(path, OpenOptions()); })},
        {"data", on_file([](const std::string& path) { Dataset::load(path, DataOptions()); })},
    };
    return table;
}

}  // namespace
}  // namespace orbit

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const char* name = std::getenv("ORBIT_FUZZ_TARGET");
    const auto found = orbit::targets().find(name == nullptr ? "config" : name);
    CHECK(found != orbit::targets().end(), "no such fuzz target");
    try {
        found->second(std::string(data, data + size));
    } catch (const orbit::UserError&) {
        return 0;
    }
    return 0;
}
