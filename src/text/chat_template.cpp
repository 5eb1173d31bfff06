#include "text/chat_template.h"

#include <utility>

#include "text/jinja_eval.h"
#include "text/utf8.h"

namespace orbit {

struct ChatTemplate::State {
    jinja::NodePtr root;
    std::string bos;
    std::string eos;
};

namespace {

jinja::Value message_list(jinja::Runtime& rt, const std::vector<ChatMessage>& messages) {
    using jinja::Value;
    std::vector<Value> list;
    for (const ChatMessage& message : messages) {
        std::vector<std::pair<Value, Value>> fields;
        fields.emplace_back(
            Value::string("role"), Value::string(replace_invalid_utf8(message.role))
        );
        fields.emplace_back(
            Value::string("content"), Value::string(replace_invalid_utf8(message.content))
        );
        list.push_back(make_dict(rt, std::move(fields)));
    }
    return make_list(rt, std::move(list));
}

}  // namespace

ChatTemplate::ChatTemplate(std::string_view source, std::string bos, std::string eos)
    : state_(std::make_unique<State>()) {
    state_->root = jinja::parse_template(source);
    state_->bos = std::move(bos);
    state_->eos = std::move(eos);
}

ChatTemplate::~ChatTemplate() = default;
ChatTemplate::ChatTemplate(ChatTemplate&&) noexcept = default;
ChatTemplate& ChatTemplate::operator=(ChatTemplate&&) noexcept = default;

std::string ChatTemplate::render(
    const std::vector<ChatMessage>& messages, bool add_generation_prompt
) const {
    jinja::Runtime rt;
    jinja::Globals globals;
    globals.emplace_back("messages", message_list(rt, messages));
    globals.emplace_back("add_generation_prompt", jinja::Value::boolean(add_generation_prompt));
    globals.emplace_back("bos_token", jinja::Value::string(state_->bos));
    globals.emplace_back("eos_token", jinja::Value::string(state_->eos));
    // transformers always passes these two, so templates ask "is not none" and not "is defined".
    globals.emplace_back("tools", jinja::Value(jinja::None{}));
    globals.emplace_back("documents", jinja::Value(jinja::None{}));
    return jinja::render_template(*state_->root, globals, rt);
}

std::string ChatTemplate::text_after_assistant_turn() const {
    const std::string marker = "orbit-probe-7f3a";
    const std::string text = render({{"user", "probe"}, {"assistant", marker}}, false);
    const size_t at = text.rfind(marker);
    return at == std::string::npos ? "" : text.substr(at + marker.size());
}

}  // namespace orbit
