// The chat-template interpreter: what Jinja2 renders (tests/text_cases), limits, damaged templates.
#include "text/chat_template.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "base/error.h"

namespace orbit {

namespace {

using nlohmann::json;

std::string read_text(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    std::stringstream text;
    text << in.rdbuf();
    return text.str();
}

json read_cases() {
    const std::string folder = ORBIT_SOURCE_DIR "/tests/text_cases/";
    return json::parse(read_text(folder + "chat_cases.json"));
}

std::vector<ChatMessage> messages_of(const json& list) {
    std::vector<ChatMessage> messages;
    for (const json& each : list) {
        messages.push_back({each["role"].get<std::string>(), each["content"].get<std::string>()});
    }
    return messages;
}

std::string render(const std::string& source) {
    return ChatTemplate(source, "<s>", "</s>").render({{"user", "hi"}}, true);
}

std::string failure(const std::string& source) {
    try {
        render(source);
    } catch (const UserError& error) {
        return error.what();
    }
    return "";
}

std::string repeat(const std::string& text, int count) {
    std::string out;
    for (int i = 0; i < count; ++i) {
        out += text;
    }
    return out;
}

}  // namespace

TEST(ChatTemplate, RendersWhatJinja2Renders) {
    const json file = read_cases();
    int texts = 0;
    int errors = 0;
    for (const json& each : file["cases"]) {
        const auto source = each["template"].get<std::string>();
        for (const json& wanted : each["renders"]) {
            const auto messages =
                messages_of(file["conversations"][wanted["messages"].get<size_t>()]);
            const auto run = [&] {
                return ChatTemplate(source, "<s>", "</s>").render(messages, wanted["prompt"]);
            };
            if (wanted.contains("error")) {
                EXPECT_THROW(run(), UserError) << source;
                ++errors;
                continue;
            }
            ++texts;
            std::string text;
            EXPECT_NO_THROW(text = run()) << source;
            EXPECT_EQ(text, wanted["text"].get<std::string>()) << source;
        }
    }
    EXPECT_GT(texts, 80);
    EXPECT_GT(errors, 15);
}

TEST(ChatTemplate, EndOfTurn) {
    const json file = read_cases();
    std::map<std::string, std::string> ends;
    for (const json& each : file["cases"]) {
        if (!each["name"].get<std::string>().starts_with("small")) {
            const ChatTemplate chat(each["template"].get<std::string>(), "<s>", "</s>");
            ends[each["name"].get<std::string>()] = chat.text_after_assistant_turn();
        }
    }
    EXPECT_EQ(ends["chatml"], "<|im_end|>\n");
    EXPECT_EQ(ends["thinking"], "<|im_end|>\n");
    EXPECT_EQ(ends["headers"], "<|eot_id|>");
    EXPECT_EQ(ends["bars"], "<\uff5cend\u2581of\u2581sentence\uff5c>");
    EXPECT_EQ(ends["roles"], "<|im_end|>");
    EXPECT_EQ(ends["ws1"], "");  // writes no message at all
}

TEST(ChatTemplate, ErrorsNameTheLine) {
    EXPECT_NE(failure("a\n\n{{ 1 + }}").find("line 3"), std::string::npos);
    EXPECT_NE(
        failure("a\n{{ nothing.x }}").find("line 2: 'nothing' is undefined"), std::string::npos
    );
    EXPECT_NE(failure("\n{{ raise_exception('roles!') }}").find("roles!"), std::string::npos);
    EXPECT_NE(failure("{% if true %}").find("endif"), std::string::npos);
    EXPECT_NE(failure("{% include 'x' %}").find("include"), std::string::npos);
}

TEST(ChatTemplate, StrftimeGivesADate) {
    const std::string date = render("{{ strftime_now('%Y-%m-%d') }}");
    ASSERT_EQ(date.size(), 10u);
    EXPECT_EQ(date[4], '-');
    EXPECT_GE(std::stoi(date.substr(0, 4)), 2024);
    EXPECT_NE(failure("{{ strftime_now('%9999d') }}"), "");
}

TEST(ChatTemplate, HostileTemplatesStop) {
    const std::vector<std::string> sources = {
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(99999) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}",
        "{{ 'x' * 99999999999 }}",
        "{{ [0] * 99999999999 }}",
        "{{ '' * 99999999999 }}",
        "{{ 2 ** 99 }}",
        "{{ 9223372036854775807 + 1 }}",
        "{{ -9223372036854775807 - 2 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l] %}"
        "{% endfor %}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(9999) %}{% for x in ns.l %}"
        "{% set ns.l = [loop] %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(f='a') %}{% for i in range(9999) %}{% set ns.f = [ns.f.upper] %}"
        "{% set ns.f = ns.f.count %}{% endfor %}{{ ns.f }}" +
            repeat("{{ [", 1),
        "{{ " + repeat("(", 100000) + "1" + repeat(")", 100000) + " }}",
        "{{ " + repeat("[", 100000) + "1" + repeat("]", 100000) + " }}",
        "{{ " + repeat("not ", 100000) + "1 }}",
        "{{ " + repeat("-", 100000) + "1 }}",
        "{{ 1" + repeat(" + 1", 100000) + " }}",
        "{{ a" + repeat(".b", 100000) + " }}",
        "{{ a" + repeat("|string", 100000) + " }}",
        "{{ 1" + repeat(" if 1 else 1", 50000) + " }}",
        repeat("{% if 1 %}", 50000) + repeat("{% endif %}", 50000),
        "{{ 'aa' | map(" + repeat("'map',", 5000) + "'upper') | list }}",
        "{{ range(1, 2, 0) }}",
        "{{ range(-9223372036854775807, 9223372036854775807) }}",
        "{{ 'abcabc'.replace('', 'x' * 1000000).replace('', 'y' * 1000000) }}",
        std::string(2000000, 'x'),
    };
    for (const std::string& source : sources) {
        EXPECT_NE(failure(source), "") << source.substr(0, 100);
    }
    // Rings of values are released (seen by the address sanitizer).
    EXPECT_EQ(render("{% set a = namespace() %}{% set a.self = [a] %}{{ a.self | length }}"), "1");
    // Long templates are fine as long as they are flat.
    EXPECT_EQ(render(repeat("{% if 1 %}a{% endif %}", 5000)), repeat("a", 5000));
    EXPECT_EQ(
        render("{% macro d(n) %}{% if n %}{{ d(n - 1) }}{% endif %}{{ n }}{% endmacro %}"
               "{{ d(15) }}"),
        "0123456789101112131415"
    );
}

TEST(ChatTemplate, LongConversations) {
    std::string source;
    const json file = read_cases();
    for (const json& each : file["cases"]) {
        if (each["name"] == "thinking") {
            source = each["template"].get<std::string>();
        }
    }
    const ChatTemplate chat(source, "", "");
    std::vector<ChatMessage> messages;
    for (int i = 0; i < 500; ++i) {
        messages.push_back({"user", std::string(20000, 'q')});
        messages.push_back({"assistant", "<think>x</think>" + std::string(20000, 'a')});
    }
    EXPECT_GT(chat.render(messages, true).size(), 20'000'000u);
}

TEST(ChatTemplate, MessagesMayHoldAnyBytes) {
    const ChatTemplate chat("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", "", "");
    EXPECT_EQ(chat.render({{"user", "a\xFF\"b"}}, false), "\"a\uFFFD\\\"b\"");
    EXPECT_EQ(chat.render({{"user", "{{ 1 }}"}}, false), "\"{{ 1 }}\"");
}

TEST(ChatTemplate, SurvivesMutatedTemplates) {
    std::vector<std::string> sources;
    const json file = read_cases();
    for (const json& each : file["cases"]) {
        sources.push_back(each["template"].get<std::string>());
    }
    const std::string pieces[] = {
        "{{",
        "}}",
        "{%",
        "%}",
        "|",
        "(",
        ")",
        "[",
        "]",
        "'",
        "-",
        "~",
        "if",
        "in",
        "for",
        "loop",
        "**",
        "\xFF"};
    std::mt19937 random(5);
    int rendered = 0;
    for (int round = 0; round < 4000; ++round) {
        std::string source = sources[random() % sources.size()];
        for (uint32_t change = 0; change < 1 + random() % 3; ++change) {
            const size_t at = random() % (source.size() + 1);
            switch (random() % 4) {
                case 0:
                    source.insert(at, pieces[random() % std::size(pieces)]);
                    break;
                case 1:
                    source.erase(at, random() % 6);
                    break;
                case 2:
                    source.insert(at, 1, static_cast<char>(random()));
                    break;
                default: {
                    const std::string& other = sources[random() % sources.size()];
                    source.insert(at, other.substr(random() % (other.size() + 1), 40));
                }
            }
        }
        try {
            const ChatTemplate chat(source, "<s>", "</s>");
            chat.render({{"system", "s"}, {"user", "u"}, {"assistant", "a"}}, true);
            ++rendered;
        } catch (const UserError&) {
        }
    }
    EXPECT_GT(rendered, 300);
}

TEST(ChatTemplate, ReferenceModels) {
    const char* folder = std::getenv("ORBIT_MODELS");
    if (folder == nullptr) {
        GTEST_SKIP() << "ORBIT_MODELS is not set";
    }
    int checked = 0;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        const std::string path = entry.path().string() + "/chat_template.jinja";
        if (!std::filesystem::exists(path)) {
            continue;
        }
        const ChatTemplate chat(read_text(path), "", "<|im_end|>");
        EXPECT_EQ(
            chat.render({{"user", "What is 1 + 1?"}}, true),
            "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
        );
        EXPECT_EQ(chat.text_after_assistant_turn(), "<|im_end|>\n");
        ++checked;
    }
    EXPECT_GE(checked, 5);
}

}  // namespace orbit
