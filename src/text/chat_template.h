// Chat templates: the subset of Jinja2 that published templates use (for, if, set, macros,
// namespaces, filters, tests, slices, string methods, loop variables, white-space control),
// interpreted without any Python.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace orbit {

struct ChatMessage {
    std::string role;
    std::string content;
};

class ChatTemplate {
  public:
    // UserError with the template's line when it cannot be parsed. `bos`, `eos`: token texts (may
    // be empty).
    ChatTemplate(std::string_view source, std::string bos, std::string eos);
    ~ChatTemplate();
    ChatTemplate(ChatTemplate&&) noexcept;
    ChatTemplate& operator=(ChatTemplate&&) noexcept;

    // UserError with the line for a run-time error, including the template's own
    // raise_exception(...).
    std::string render(const std::vector<ChatMessage>& messages, bool add_generation_prompt) const;
    // Literal texts that the template writes right after a message's content and that are special
    // tokens, such as
    // "<|im_end|>": found by rendering a probe conversation. Used to collect end-of-turn ids.
    std::string text_after_assistant_turn() const;

  private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace orbit
