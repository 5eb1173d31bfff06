// Byte-level BPE tokenizers (tokenizer.json of Hugging Face, or the tokenizer.ggml.* fields of a
// GGUF file). Immutable after construction; encode and decode are thread safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace orbit {

// The tokenizer fields of a GGUF file (models.md 10.8).
struct GgufTokenizerFields {
    std::string model;                // tokenizer.ggml.model; must be "gpt2"
    std::string pre;                  // tokenizer.ggml.pre: which split pattern
    std::vector<std::string> tokens;  // mapped (printable) form
    std::vector<int32_t> token_type;  // 3 control, 4 user defined
    std::vector<std::string> merges;  // "left right"
    int32_t bos_id = -1;
    int32_t eos_id = -1;
    bool add_bos = false;
};

class Tokenizer {
  public:
    // UserError names the file and the part that is not understood (SentencePiece, unknown
    // pre-tokenizer, ...).
    static Tokenizer from_json_text(std::string_view json, const std::string& file_name);
    static Tokenizer from_gguf(const GgufTokenizerFields& fields, const std::string& file_name);
    // tiktoken.model (lines "base64 rank") of Kimi-K2 folders without tokenizer.json, and the text
    // of their tokenizer_config.json, which names the special tokens.
    static Tokenizer from_tiktoken(
        std::string_view ranks, std::string_view config_json, const std::string& file_name
    );
    ~Tokenizer();
    Tokenizer(Tokenizer&&) noexcept;
    Tokenizer& operator=(Tokenizer&&) noexcept;

    // Added (special) tokens in the text become their ids. add_special_tokens: apply the
    // post-processor (BOS).
    std::vector<int32_t> encode(std::string_view text, bool add_special_tokens) const;
    // Text of the ids; invalid UTF-8 becomes U+FFFD. skip_special: leave out added tokens marked
    // special.
    std::string decode(const std::vector<int32_t>& ids, bool skip_special) const;
    // The raw bytes of one token (added tokens: their content). Empty for an id that is not
    // defined.
    std::string token_bytes(int32_t id) const;
    bool is_special(int32_t id) const;
    int32_t id_of(std::string_view token
    ) const;                     // by content (added token) or mapped form; -1 when absent
    int32_t size() const;        // largest defined id + 1
    std::string digest() const;  // hash of vocabulary and merges, for the run folder

  private:
    struct State;
    explicit Tokenizer(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

// Incremental decoding that holds back incomplete UTF-8 sequences.
class StreamDecoder {
  public:
    explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special = true)
        : tokenizer_(&tokenizer), skip_special_(skip_special) {}

    std::string push(int32_t id);  // text that became complete
    std::string finish();          // what is left, with U+FFFD for broken bytes

  private:
    const Tokenizer* tokenizer_;
    bool skip_special_;
    std::string held_;
};

}  // namespace orbit
