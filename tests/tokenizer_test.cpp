// Tokenizers: ids of the reference models, a table of ids from the tokenizers library, damaged
// files, streaming.
#include "text/tokenizer.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "base/error.h"
#include "text/pretokenizer.h"
#include "text/utf8.h"

namespace orbit {

namespace {

using nlohmann::json;

std::string read_text(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    std::stringstream text;
    text << in.rdbuf();
    return text.str();
}

std::string models_folder() {
    const char* folder = std::getenv("ORBIT_MODELS");
    return folder == nullptr ? "" : folder;
}

// Without spaces, which some added tokens swallow.
std::string strip_white(const std::string& text) {
    std::string out;
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = utf8_step(text, at);
        if (!is_unicode_space(step.code_point)) {
            out.append(text, at, step.bytes);
        }
        at += step.bytes;
    }
    return out;
}

// A vocabulary of the 256 bytes and the words given, with merges from left to right.
json byte_model(const std::vector<std::string>& words) {
    json vocab = json::object();
    int32_t next = 0;
    uint32_t extra = 256;
    for (uint32_t byte = 0; byte < 256; ++byte) {
        const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) ||
                               (byte >= 174 && byte <= 255);
        std::string token;
        append_utf8(token, printable ? byte : extra++);
        vocab[token] = next++;
    }
    json merges = json::array();
    for (const std::string& word : words) {
        for (size_t length = 2; length <= word.size(); ++length) {
            if (!vocab.contains(word.substr(0, length))) {
                vocab[word.substr(0, length)] = next++;
                merges.push_back(word.substr(0, length - 1) + " " + word[length - 1]);
            }
        }
    }
    return {{"type", "BPE"}, {"vocab", vocab}, {"merges", merges}};
}

json byte_level() {
    return {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}};
}

json small_tokenizer() {
    json root;
    root["added_tokens"] = json::array();
    root["added_tokens"].push_back({{"id", 400}, {"content", "<|end|>"}, {"special", true}});
    root["added_tokens"].push_back({{"id", 401}, {"content", "<think>"}, {"special", false}});
    root["normalizer"] = nullptr;
    root["pre_tokenizer"] = byte_level();
    root["model"] = byte_model({"hello", "he", "lo"});
    return root;
}

Tokenizer load(const json& root) {
    return Tokenizer::from_json_text(root.dump(), "t.json");
}

std::string refusal(const json& root) {
    try {
        load(root);
    } catch (const UserError& error) {
        return error.what();
    }
    return "";
}

}  // namespace

TEST(Tokenizer, MergesInOrderOfRank) {
    const Tokenizer tokenizer = load(small_tokenizer());
    const std::vector<int32_t> ids = tokenizer.encode("hello", false);
    ASSERT_EQ(ids.size(), 1u);
    EXPECT_EQ(ids[0], tokenizer.id_of("hello"));
    EXPECT_EQ(tokenizer.token_bytes(ids[0]), "hello");
    EXPECT_EQ(tokenizer.encode("hell", false), std::vector<int32_t>{tokenizer.id_of("hell")});
    EXPECT_EQ(tokenizer.encode("elo", false).size(), 2u);
    EXPECT_EQ(tokenizer.id_of("missing"), -1);
    EXPECT_EQ(tokenizer.size(), 402);
    EXPECT_EQ(tokenizer.token_bytes(399), "");
    EXPECT_EQ(tokenizer.token_bytes(-1), "");
}

TEST(Tokenizer, AddedTokensAreCutOutFirst) {
    const Tokenizer tokenizer = load(small_tokenizer());
    const std::vector<int32_t> ids = tokenizer.encode("hello<|end|><think>lo", false);
    const std::vector<int32_t> expected = {
        tokenizer.id_of("hello"), 400, 401, tokenizer.id_of("lo")};
    EXPECT_EQ(ids, expected);
    EXPECT_EQ(tokenizer.decode(ids, false), "hello<|end|><think>lo");
    EXPECT_EQ(tokenizer.decode(ids, true), "hello<think>lo");
    EXPECT_TRUE(tokenizer.is_special(400));
    EXPECT_FALSE(tokenizer.is_special(401));
}

TEST(Tokenizer, AddedTokenFlags) {
    json root = small_tokenizer();
    root["added_tokens"] = json::array();
    root["added_tokens"].push_back(
        {{"id", 400}, {"content", "<m>"}, {"special", true}, {"lstrip", true}, {"rstrip", true}}
    );
    root["added_tokens"].push_back(
        {{"id", 401}, {"content", "word"}, {"special", false}, {"single_word", true}}
    );
    const Tokenizer tokenizer = load(root);
    const int32_t a = tokenizer.id_of("a");
    EXPECT_EQ(tokenizer.encode("a \n<m>\u3000 a", false), (std::vector<int32_t>{a, 400, a}));
    EXPECT_EQ(tokenizer.encode("word", false), std::vector<int32_t>{401});
    EXPECT_EQ(tokenizer.encode("words", false).size(), 5u);
    EXPECT_EQ(tokenizer.encode("\u00e9word", false).size(), 6u);
}

TEST(Tokenizer, NormalisesToNfcWhenAsked) {
    json root = small_tokenizer();
    const std::string decomposed = "e\u0301";
    EXPECT_EQ(load(root).encode(decomposed, false).size(), 3u);
    root["normalizer"] = {{"type", "NFC"}};
    const Tokenizer tokenizer = load(root);
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(decomposed, false), false), "\u00e9");
}

TEST(Tokenizer, PostProcessorWritesBos) {
    json root = small_tokenizer();
    root["post_processor"] = {
        {"type", "Sequence"},
        {"processors",
         {{{"type", "ByteLevel"}},
          {{"type", "TemplateProcessing"},
           {"single",
            {{{"SpecialToken", {{"id", "<|end|>"}, {"type_id", 0}}}},
             {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}},
           {"special_tokens", {{"<|end|>", {{"id", "<|end|>"}, {"ids", {400}}}}}}}}}};
    const Tokenizer tokenizer = load(root);
    EXPECT_EQ(tokenizer.encode("lo", true), (std::vector<int32_t>{400, tokenizer.id_of("lo")}));
    EXPECT_EQ(tokenizer.encode("lo", false), std::vector<int32_t>{tokenizer.id_of("lo")});
}

TEST(Tokenizer, InvalidUtf8IsReplaced) {
    const Tokenizer tokenizer = load(small_tokenizer());
    const std::string broken =
        "a\xF0\x9F\x98"
        "b\xC0\xAF\xED\xA0\x80\xFF";
    const std::string repaired =
        "a\uFFFD"
        "b\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD";
    EXPECT_EQ(replace_invalid_utf8(broken), repaired);
    EXPECT_EQ(tokenizer.encode(broken, false), tokenizer.encode(repaired, false));
}

TEST(Tokenizer, SizeOfALongPieceIsNoProblem) {
    const Tokenizer tokenizer = load(small_tokenizer());
    std::string text;
    for (int i = 0; i < 100000; ++i) {
        text += "hello";
    }
    const std::vector<int32_t> ids = tokenizer.encode(text, false);  // one piece: all letters
    EXPECT_EQ(ids.size(), 100000u);
    EXPECT_EQ(tokenizer.decode(ids, false), text);
    EXPECT_EQ(tokenizer.encode(std::string(500000, ' '), false).size(), 500000u);
    EXPECT_EQ(tokenizer.encode(std::string(500000, '\n') + "x", false).size(), 500001u);
}

TEST(Tokenizer, StreamingEqualsDecoding) {
    const Tokenizer tokenizer = load(small_tokenizer());
    std::mt19937 random(7);
    const std::string letters = "h\u00e9\U0001F600\u4e2d e\xE2\x82";
    for (int round = 0; round < 300; ++round) {
        std::vector<int32_t> ids;
        for (int i = 0; i < 20; ++i) {
            const bool byte = random() % 8 != 0;
            const auto mapped = tokenizer.encode(letters, false);
            ids.push_back(
                byte ? mapped[random() % mapped.size()] : static_cast<int32_t>(random() % 402)
            );
        }
        for (const bool skip : {false, true}) {
            StreamDecoder stream(tokenizer, skip);
            std::string text;
            for (const int32_t id : ids) {
                text += stream.push(id);
                EXPECT_TRUE(is_valid_utf8(text));
            }
            text += stream.finish();
            EXPECT_EQ(text, tokenizer.decode(ids, skip));
        }
    }
}

TEST(Tokenizer, StreamHoldsBackHalfACharacter) {
    const Tokenizer tokenizer = load(small_tokenizer());
    StreamDecoder stream(tokenizer);
    const std::vector<int32_t> ids = tokenizer.encode("\U0001F600", false);
    ASSERT_EQ(ids.size(), 4u);
    EXPECT_EQ(stream.push(ids[0]), "");
    EXPECT_EQ(stream.push(ids[1]), "");
    EXPECT_EQ(stream.push(ids[2]), "");
    EXPECT_EQ(stream.push(ids[3]), "\U0001F600");
    EXPECT_EQ(stream.push(ids[0]), "");
    EXPECT_EQ(stream.finish(), "\uFFFD");
}

TEST(Tokenizer, DigestChangesWithTheContent) {
    const std::string digest = load(small_tokenizer()).digest();
    EXPECT_EQ(digest.size(), 16u);
    EXPECT_EQ(digest, load(small_tokenizer()).digest());
    json other = small_tokenizer();
    other["added_tokens"][1]["content"] = "<thinks>";
    EXPECT_NE(digest, load(other).digest());
    other = small_tokenizer();
    std::swap(other["model"]["merges"][0], other["model"]["merges"][1]);
    EXPECT_NE(digest, load(other).digest());
    other = small_tokenizer();
    other["normalizer"] = {{"type", "NFC"}};
    EXPECT_NE(digest, load(other).digest());
}

TEST(Tokenizer, RefusesWhatItDoesNotKnow) {
    EXPECT_EQ(refusal(small_tokenizer()), "");
    json root = small_tokenizer();
    root["model"]["type"] = "Unigram";
    EXPECT_NE(refusal(root).find("Unigram"), std::string::npos);
    root = small_tokenizer();
    root["pre_tokenizer"] = {{"type", "Metaspace"}};
    EXPECT_NE(refusal(root).find("Metaspace"), std::string::npos);
    root["pre_tokenizer"] = nullptr;
    EXPECT_NE(refusal(root).find("ByteLevel"), std::string::npos);
    root = small_tokenizer();
    root["model"]["byte_fallback"] = true;
    EXPECT_NE(refusal(root).find("byte_fallback"), std::string::npos);
    root = small_tokenizer();
    root["added_tokens"][0]["id"] = 2000000000;
    EXPECT_NE(refusal(root).find("whole number"), std::string::npos);
    root = small_tokenizer();
    root["model"]["merges"].push_back("zz yy");
    EXPECT_NE(refusal(root).find("merges["), std::string::npos);
    root = small_tokenizer();
    root["pre_tokenizer"] = {
        {"type", "Split"}, {"pattern", {{"Regex", "(a"}}}, {"behavior", "Isolated"}};
    EXPECT_NE(refusal(root).find("cannot be compiled"), std::string::npos);
    EXPECT_THROW(Tokenizer::from_json_text("{", "t.json"), UserError);
    EXPECT_THROW(Tokenizer::from_json_text("[]", "t.json"), UserError);
}

TEST(Tokenizer, RunawayPatternIsAUserError) {
    json root = small_tokenizer();
    root["pre_tokenizer"] = {
        {"type", "Sequence"},
        {"pretokenizers",
         {{{"type", "Split"}, {"pattern", {{"Regex", "(a+)+$"}}}, {"behavior", "Isolated"}},
          byte_level()}}};
    const Tokenizer tokenizer = load(root);
    EXPECT_EQ(tokenizer.encode("aaa", false).size(), 3u);
    EXPECT_THROW(tokenizer.encode(std::string(60, 'a') + "b", false), UserError);
}

TEST(Tokenizer, TranslatesPatterns) {
    EXPECT_EQ(translate_pattern("\\p{Han}+\\p{L}", "t"), "\\p{sc:Han}+\\p{L}");
    EXPECT_EQ(translate_pattern("[a&&[^b]]+", "t"), "(?:(?=[^b])[a])+");
    EXPECT_EQ(translate_pattern("[ab[cd]]", "t"), "[abcd]");
    EXPECT_EQ(translate_pattern("[[:alpha:]\\]x]", "t"), "[[:alpha:]\\]x]");
    EXPECT_THROW(translate_pattern("[a", "t"), UserError);
    EXPECT_THROW(translate_pattern("[a&&]", "t"), UserError);
    EXPECT_THROW(translate_pattern("[a[^b]]", "t"), UserError);
    EXPECT_THROW(translate_pattern("a\\", "t"), UserError);
}

TEST(Tokenizer, SurvivesMutatedFiles) {
    json root = small_tokenizer();
    root["normalizer"] = {{"type", "Sequence"}, {"normalizers", {{{"type", "NFC"}}}}};
    json split = {{"type", "Split"}, {"behavior", "Isolated"}, {"invert", false}};
    split["pattern"]["Regex"] =
        "(?i:'s|'t)|[^\\r\\n\\p{L}]?\\p{L}+|[\\p{L}&&[^\\p{Han}]]*|\\s+(?!\\S)";
    root["pre_tokenizer"] = {
        {"type", "Sequence"},
        {"pretokenizers",
         {{{"type", "Digits"}, {"individual_digits", true}}, split, byte_level()}}};
    // The interesting parts come first, so that most mutations hit them.
    json model = root["model"];
    root.erase("model");
    std::string text = root.dump();
    text.pop_back();
    text += ",\"model\":" + model.dump() + "}";
    ASSERT_NO_THROW(Tokenizer::from_json_text(text, "t.json"));
    const size_t front = text.find("\"model\"");
    std::mt19937 random(11);
    int accepted = 0;
    for (int round = 0; round < 3000; ++round) {
        std::string mutated = text;
        for (uint32_t change = 0; change < 1 + random() % 3; ++change) {
            const size_t range = random() % 4 == 0 ? mutated.size() : front;
            const size_t at = random() % range;
            switch (random() % 3) {
                case 0:
                    mutated[at] = static_cast<char>(random());
                    break;
                case 1:
                    mutated.erase(at, 1 + random() % 8);
                    break;
                default:
                    mutated.insert(at, 1, "[]{}\\\"()+*?^&0p,"[random() % 16]);
            }
        }
        try {
            const Tokenizer tokenizer = Tokenizer::from_json_text(mutated, "t.json");
            const std::string sample = "Hello 123 it's\t \u4e2d\u6587<|end|> e\u0301\n\n x";
            tokenizer.decode(tokenizer.encode(sample, true), false);
            ++accepted;
        } catch (const UserError&) {
        }
    }
    EXPECT_GT(accepted, 100);  // otherwise the loop tests nothing but the JSON parser
}

TEST(Tokenizer, GgufFields) {
    GgufTokenizerFields fields;
    fields.model = "gpt2";
    fields.pre = "smollm";
    const json model = byte_model({"hello"});
    fields.tokens.resize(model["vocab"].size());
    for (const auto& [token, id] : model["vocab"].items()) {
        fields.tokens[id.get<size_t>()] = token;
    }
    for (const json& merge : model["merges"]) {
        fields.merges.push_back(merge.get<std::string>());
    }
    fields.tokens.push_back("<|im_end|>");
    fields.token_type.assign(fields.tokens.size(), 1);
    fields.token_type.back() = 3;
    const auto end_id = static_cast<int32_t>(fields.tokens.size()) - 1;
    fields.bos_id = end_id;
    fields.add_bos = true;
    const Tokenizer tokenizer = Tokenizer::from_gguf(fields, "m.gguf");
    const std::vector<int32_t> ids = tokenizer.encode("hello\u00BD1<|im_end|>", true);
    ASSERT_EQ(ids.size(), 6u);
    EXPECT_EQ(ids.front(), end_id);
    EXPECT_EQ(ids[1], tokenizer.id_of("hello"));
    EXPECT_EQ(ids.back(), end_id);
    EXPECT_EQ(tokenizer.decode(ids, true), "hello\u00BD1");

    GgufTokenizerFields wrong = fields;
    wrong.pre = "mystery";
    EXPECT_THROW(Tokenizer::from_gguf(wrong, "m.gguf"), UserError);
    wrong = fields;
    wrong.model = "llama";
    EXPECT_THROW(Tokenizer::from_gguf(wrong, "m.gguf"), UserError);
    wrong = fields;
    wrong.token_type.pop_back();
    EXPECT_THROW(Tokenizer::from_gguf(wrong, "m.gguf"), UserError);
    wrong = fields;
    wrong.merges.push_back("nospace");
    EXPECT_THROW(Tokenizer::from_gguf(wrong, "m.gguf"), UserError);
    for (const char* pre :
         {"gpt-2", "qwen2", "llama-bpe", "deepseek-v3", "kimi-k2", "gpt-4o", "smaug-bpe"}) {
        wrong = fields;
        wrong.pre = pre;
        const Tokenizer other = Tokenizer::from_gguf(wrong, "m.gguf");
        EXPECT_EQ(
            other.decode(other.encode("It's 12345 \u4e2d\u6587 ok", false), false),
            "It's 12345 \u4e2d\u6587 ok"
        );
    }
}

TEST(Tokenizer, TiktokenRanks) {
    // All bytes, then "ab", "bc", "abc", "abcd"; ranks are ids.
    const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string ranks;
    for (uint32_t byte = 0; byte < 256; ++byte) {
        ranks += digits[byte >> 2];
        ranks += digits[(byte & 3) << 4];
        ranks += "== " + std::to_string(byte) + "\n";
    }
    ranks += "YWI= 256\nYmM= 257\nYWJj 258\nYWJjZA== 259\n";
    const std::string config =
        R"({"added_tokens_decoder": {"260": {"content": "[BOS]", "special": true},
            "261": {"content": "<think>", "special": false}}})";
    const Tokenizer tokenizer = Tokenizer::from_tiktoken(ranks, config, "tiktoken.model");
    const auto encode = [&](const std::string& text) { return tokenizer.encode(text, false); };
    EXPECT_EQ(encode("abcd"), std::vector<int32_t>{259});         // the whole piece
    EXPECT_EQ(encode("xabc"), (std::vector<int32_t>{'x', 258}));  // ab, then abc
    EXPECT_EQ(encode("xbcd"), (std::vector<int32_t>{'x', 257, 'd'}));
    EXPECT_EQ(encode("xbcbc"), (std::vector<int32_t>{'x', 257, 257}));
    EXPECT_EQ(encode("[BOS]<think>"), (std::vector<int32_t>{260, 261}));
    EXPECT_EQ(tokenizer.decode({260, 261, 258, 515}, true), "<think>abc");
    EXPECT_EQ(tokenizer.token_bytes(515), "<|reserved_token_515|>");
    EXPECT_EQ(tokenizer.size(), 516);
    for (const std::string bad :
         {"YWI=", "YWI= x", "Y*I= 1", "YWI= 1\nYmM= 1", "YWI= 99999999", ""}) {
        EXPECT_THROW(Tokenizer::from_tiktoken(bad, config, "tiktoken.model"), UserError) << bad;
    }
    EXPECT_THROW(Tokenizer::from_tiktoken(ranks, "{}", "tiktoken.model"), UserError);
}

// ORBIT_TOKENIZER_CASES names a longer table (tests/text_cases/make_tokenizer_cases.py 10000).
TEST(Tokenizer, GivesTheIdsOfTheTokenizersLibrary) {
    const char* longer = std::getenv("ORBIT_TOKENIZER_CASES");
    const std::string path =
        longer != nullptr ? longer : ORBIT_SOURCE_DIR "/tests/text_cases/tokenizer_cases.json";
    const json file = json::parse(read_text(path));
    size_t cases = 0;
    for (const json& variant : file["variants"]) {
        json root = file["tokenizer"];
        root["normalizer"] = variant["normalizer"];
        root["pre_tokenizer"] = variant["pre_tokenizer"];
        root["model"]["ignore_merges"] = variant["ignore_merges"];
        const Tokenizer tokenizer = load(root);
        const auto name = variant["name"].get<std::string>();
        for (const json& each : variant["cases"]) {
            const auto text = each[0].get<std::string>();
            const auto wanted = each[1].get<std::vector<int32_t>>();
            const std::vector<int32_t> ids = tokenizer.encode(text, false);
            EXPECT_EQ(ids, wanted) << name << ": " << text;
            if (name == "llama3") {  // no normalizer and nothing removed: the text comes back
                EXPECT_EQ(strip_white(tokenizer.decode(ids, false)), strip_white(text));
            }
            std::vector<int32_t> with_bos = tokenizer.encode(text, true);
            EXPECT_EQ(with_bos.front(), 0);
            with_bos.erase(with_bos.begin());
            EXPECT_EQ(with_bos, ids);
            ++cases;
        }
    }
    EXPECT_GE(cases, 15u * 38u);
}

TEST(Tokenizer, ReferenceModels) {
    const std::string models = models_folder();
    if (models.empty()) {
        GTEST_SKIP() << "ORBIT_MODELS is not set";
    }
    int folders = 0;
    int documents = 0;
    for (const std::string& parent : {models, models + "/packed"}) {
        for (const auto& entry : std::filesystem::directory_iterator(parent)) {
            const std::string folder = entry.path().string();
            if (!std::filesystem::exists(folder + "/tokenizer.json")) {
                continue;
            }
            ++folders;
            const Tokenizer tokenizer = Tokenizer::from_json_text(
                read_text(folder + "/tokenizer.json"), folder + "/tokenizer.json"
            );
            const json reference = json::parse(read_text(folder + "/reference.json"));
            for (const json& document : reference["documents"]) {
                const auto text = document["text"].get<std::string>();
                const auto ids = document["ids"].get<std::vector<int32_t>>();
                EXPECT_EQ(tokenizer.encode(text, false), ids) << folder;
                EXPECT_EQ(tokenizer.decode(ids, false), text) << folder;
                ++documents;
            }
        }
    }
    EXPECT_GE(folders, 5);
    EXPECT_GE(documents, 5 * 24);
}

}  // namespace orbit
