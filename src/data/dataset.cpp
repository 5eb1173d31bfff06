#include "data/dataset.h"

#include <nlohmann/json.hpp>
#include <string_view>

#include "base/error.h"
#include "base/file.h"
#include "base/philox.h"
#include "text/utf8.h"

namespace orbit {
namespace {

using Json = nlohmann::json;

constexpr uint32_t kStreamDataOrder = 0x44415441;  // "DATA"

// One row on its way in: where it is, for messages.
struct Row {
    const std::string& file;
    int64_t line;
    std::string_view text;
    Json json;

    [[noreturn]] void fail(const std::string& what) const {
        throw UserError(fmt::format("{}:{}: {}", file, line, what));
    }
};

// Keeps the text of the number at a dotted path as the file has it: 1.50 stays 1.50.
class NumberText : public nlohmann::json_sax<Json> {
  public:
    explicit NumberText(const std::string& path) : path_(path) {}

    const std::string& found() const { return found_; }

    bool null() override { return true; }

    bool boolean(bool) override { return true; }

    bool number_integer(number_integer_t value) override { return take(std::to_string(value)); }

    bool number_unsigned(number_unsigned_t value) override { return take(std::to_string(value)); }

    bool number_float(number_float_t, const string_t& text) override { return take(text); }

    bool string(string_t&) override { return true; }

    bool binary(binary_t&) override { return true; }

    bool start_object(size_t) override {
        keys_.emplace_back();
        return true;
    }

    bool end_object() override {
        keys_.pop_back();
        return true;
    }

    bool start_array(size_t) override {
        keys_.emplace_back("[");  // nothing inside an array is an answer
        return true;
    }

    bool end_array() override {
        keys_.pop_back();
        return true;
    }

    bool key(string_t& name) override {
        keys_.back() = name;
        return true;
    }

    bool parse_error(size_t, const std::string&, const nlohmann::detail::exception&) override {
        return false;
    }

  private:
    bool take(const std::string& text) {
        std::string here;
        for (const std::string& key : keys_) {
            here += (here.empty() ? "" : ".") + key;
            if (here.size() > path_.size()) {
                return true;
            }
        }
        if (here == path_) {
            found_ = text;
        }
        return true;
    }

    const std::string& path_;
    std::vector<std::string> keys_;
    std::string found_;
};

// The value of a field; dots go into objects ("reward_model.ground_truth"). Null when absent.
const Json* field_of(const Json& object, std::string_view path) {
    if (!object.is_object()) {
        return nullptr;
    }
    const auto whole = object.find(std::string(path));
    if (whole != object.end()) {
        return &*whole;
    }
    const size_t dot = path.find('.');
    if (dot == std::string_view::npos) {
        return nullptr;
    }
    const auto outer = object.find(std::string(path.substr(0, dot)));
    return outer == object.end() ? nullptr : field_of(*outer, path.substr(dot + 1));
}

const Json& required_field(const Row& row, const std::string& name, const char* option) {
    const Json* value = field_of(row.json, name);
    if (value == nullptr) {
        std::string names;
        int count = 0;
        for (const auto& [key, unused] : row.json.items()) {
            names +=
                ++count > 12 ? "" : fmt::format("{}{}", count > 1 ? ", " : "", key.substr(0, 40));
        }
        row.fail(fmt::format(
            "the row has no field \"{}\" (it has {}); set {} to the right name.",
            name,
            names.empty() ? "none" : names,
            option
        ));
    }
    return *value;
}

std::vector<Message> messages_of(const Row& row, const DataOptions& options) {
    const std::string& name = options.prompt_field;
    const Json& prompt = required_field(row, name, "data.prompt_field");
    std::vector<Message> messages;
    if (prompt.is_string()) {
        messages.push_back({"user", prompt.get<std::string>()});
    } else if (prompt.is_array() && !prompt.empty()) {
        for (const Json& message : prompt) {
            const bool good = message.is_object() && message.contains("role") &&
                              message["role"].is_string() && message.contains("content") &&
                              message["content"].is_string();
            if (!good) {
                row.fail(fmt::format(
                    "a message in \"{}\" is not of the form {{\"role\": text, \"content\": text}}.",
                    name
                ));
            }
            messages.push_back(
                {message["role"].get<std::string>(), message["content"].get<std::string>()}
            );
        }
    } else {
        row.fail(fmt::format(
            "\"{}\" is {}; it must be a string or a list of messages.",
            name,
            prompt.is_array() ? "an empty list" : prompt.type_name()
        ));
    }
    if (!options.system.empty() && messages.front().role != "system") {
        messages.insert(messages.begin(), {"system", options.system});
    }
    return messages;
}

std::string answer_of(const Row& row, const std::string& name) {
    if (name.empty()) {
        return "";
    }
    const Json& answer = required_field(row, name, "data.answer_field (empty: no answers)");
    if (answer.is_string()) {
        return answer.get<std::string>();
    }
    if (answer.is_number()) {
        NumberText text(name);
        Json::sax_parse(row.text, &text);
        return text.found();
    }
    row.fail(fmt::format("\"{}\" is {}; it must be a string or a number.", name, answer.type_name())
    );
}

Example parse_row(Row& row, const DataOptions& options) {
    if (!is_valid_utf8(row.text)) {
        row.fail("the line is not UTF-8; convert the file.");
    }
    row.json = Json::parse(row.text, nullptr, false);
    if (!row.json.is_object()) {
        row.fail(
            row.json.is_discarded() ? "the line is not valid JSON; each line must be one object."
                                    : "the line is JSON but no object; write one object a line."
        );
    }
    Example example;
    example.messages = messages_of(row, options);
    example.answer = answer_of(row, options.answer_field);
    example.row_json = std::string(row.text);
    example.file = row.file;
    example.line = row.line;
    return example;
}

std::string_view without_edge_space(std::string_view line) {
    const auto first = line.find_first_not_of(" \t\r");
    if (first == std::string_view::npos) {
        return {};
    }
    return line.substr(first, line.find_last_not_of(" \t\r") - first + 1);
}

// Uniform in [0, bound), from 64 random bits: the bias is below bound / 2^64.
uint64_t draw_below(uint64_t seed, uint64_t epoch, uint64_t index, uint64_t bound) {
    const PhiloxWords words = philox(
        static_cast<uint32_t>(index),
        kStreamDataOrder ^ static_cast<uint32_t>(index >> 32),
        static_cast<uint32_t>(epoch),
        static_cast<uint32_t>(epoch >> 32),
        static_cast<uint32_t>(seed),
        static_cast<uint32_t>(seed >> 32)
    );
    const uint64_t bits = (static_cast<uint64_t>(words.word[1]) << 32) | words.word[0];
    __extension__ using Wide = unsigned __int128;
    return static_cast<uint64_t>((static_cast<Wide>(bits) * bound) >> 64);
}

}  // namespace

Dataset Dataset::load(const std::string& path, const DataOptions& options) {
    const std::string content = read_file(path);
    std::string_view rest = content;
    if (rest.starts_with("\xef\xbb\xbf")) {
        rest.remove_prefix(3);
    }
    Dataset dataset;
    dataset.shuffle_ = options.shuffle;
    int64_t line = 0;
    while (!rest.empty()) {
        const size_t end = rest.find('\n');
        const std::string_view text = without_edge_space(rest.substr(0, end));
        rest.remove_prefix(end == std::string_view::npos ? rest.size() : end + 1);
        ++line;
        if (!text.empty()) {
            Row row{path, line, text, {}};
            dataset.rows_.push_back(parse_row(row, options));
        }
    }
    USER_CHECK(
        dataset.size() > 0,
        "{} has no rows; it must be JSON Lines with at least one object, one a line.",
        path
    );
    return dataset;
}

std::vector<int64_t> Dataset::order(uint64_t seed, int64_t epoch) const {
    std::vector<int64_t> order(rows_.size());
    for (size_t i = 0; i < order.size(); ++i) {
        order[i] = static_cast<int64_t>(i);
    }
    for (size_t i = order.size(); shuffle_ && i > 1; --i) {
        const uint64_t other = draw_below(seed, static_cast<uint64_t>(epoch), i - 1, i);
        std::swap(order[i - 1], order[static_cast<size_t>(other)]);
    }
    return order;
}

}  // namespace orbit
