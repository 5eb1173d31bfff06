// Methods of str, list and dict that templates call.
#include <algorithm>
#include <array>

#include "text/jinja_text.h"
#include "text/jinja_value.h"
#include "text/utf8.h"

namespace orbit::jinja {

namespace {

using Method = Value (*)(Runtime& rt, const Value& self, const Args& args);

struct MethodEntry {
    std::string_view name;
    Method call;
};

const std::string& text_arg(Runtime& rt, const Args& args, size_t index, std::string_view name) {
    const Value* value = args.get(index, name);
    if (value == nullptr) {
        rt.fail(fmt::format("the argument '{}' is missing", name));
    }
    return to_string_ref(rt, *value, fmt::format("the argument '{}'", name));
}

int64_t count_arg(Runtime& rt, const Args& args, size_t index, std::string_view name) {
    const Value* value = args.get(index, name);
    return value == nullptr ? -1 : to_integer(rt, *value, fmt::format("the argument '{}'", name));
}

template <bool kLeft, bool kRight>
Value strip(Runtime& rt, const Value& self, const Args& args) {
    const Value* chars = args.get(0, "chars");
    if (chars == nullptr || chars->is_none()) {
        return make_text(rt, std::string(strip_space(self.text(), kLeft, kRight)));
    }
    const std::string& set = to_string_ref(rt, *chars, "the argument of strip");
    rt.charge_bytes(self.text().size() * (1 + set.size() / 8));
    return make_text(rt, std::string(strip_chars(self.text(), set, kLeft, kRight)));
}

Value text_list(Runtime& rt, const std::vector<std::string_view>& parts) {
    std::vector<Value> values;
    values.reserve(parts.size());
    for (const std::string_view part : parts) {
        values.push_back(make_text(rt, std::string(part)));
    }
    return make_list(rt, std::move(values));
}

Value split(Runtime& rt, const Value& self, const Args& args) {
    const Value* separator = args.get(0, "sep");
    const int64_t limit = count_arg(rt, args, 1, "maxsplit");
    rt.charge_bytes(self.text().size());
    if (separator == nullptr || separator->is_none()) {
        return text_list(rt, split_space(self.text(), limit));
    }
    const std::string& text = to_string_ref(rt, *separator, "the separator");
    if (text.empty()) {
        rt.fail("split needs a separator that is not empty");
    }
    return text_list(rt, split_text(self.text(), text, limit));
}

Value rsplit(Runtime& rt, const Value& self, const Args& args) {
    const std::string& separator = text_arg(rt, args, 0, "sep");
    int64_t limit = count_arg(rt, args, 1, "maxsplit");
    if (separator.empty()) {
        rt.fail("rsplit needs a separator that is not empty");
    }
    rt.charge_bytes(self.text().size());
    std::vector<std::string_view> parts;
    std::string_view rest = self.text();
    for (size_t at = rest.rfind(separator); at != std::string_view::npos && limit != 0; --limit) {
        parts.push_back(rest.substr(at + separator.size()));
        rest = rest.substr(0, at);
        at = rest.rfind(separator);
    }
    parts.push_back(rest);
    std::reverse(parts.begin(), parts.end());
    return text_list(rt, parts);
}

Value splitlines(Runtime& rt, const Value& self, const Args& args) {
    const Value* keep = args.get(0, "keepends");
    rt.charge_bytes(self.text().size());
    return text_list(rt, split_lines(self.text(), keep != nullptr && truth(*keep)));
}

template <bool kAtStart>
Value affix(Runtime& rt, const Value& self, const Args& args) {
    const Value* wanted = args.get(0, "prefix");
    if (wanted == nullptr) {
        rt.fail("startswith and endswith need an argument");
    }
    const std::vector<Value> options =
        wanted->list() != nullptr ? wanted->list()->items : std::vector<Value>{*wanted};
    for (const Value& option : options) {
        const std::string& text = to_string_ref(rt, option, "the argument of startswith/endswith");
        if (kAtStart ? self.text().starts_with(text) : self.text().ends_with(text)) {
            return Value::boolean(true);
        }
    }
    return Value::boolean(false);
}

Value upper(Runtime& rt, const Value& self, const Args&) {
    return make_text(rt, to_upper_utf8(self.text()));
}

Value lower(Runtime& rt, const Value& self, const Args&) {
    return make_text(rt, to_lower_utf8(self.text()));
}

Value capitalize(Runtime& rt, const Value& self, const Args&) {
    return make_text(rt, capitalize_text(self.text()));
}

Value title(Runtime& rt, const Value& self, const Args&) {
    return make_text(rt, title_text(self.text()));
}

Value replace(Runtime& rt, const Value& self, const Args& args) {
    return make_text(
        rt,
        replace_text(
            rt,
            self.text(),
            text_arg(rt, args, 0, "old"),
            text_arg(rt, args, 1, "new"),
            count_arg(rt, args, 2, "count")
        )
    );
}

Value join(Runtime& rt, const Value& self, const Args& args) {
    const Value* parts = args.get(0, "iterable");
    if (parts == nullptr) {
        rt.fail("join needs a list");
    }
    std::string out;
    bool first = true;
    for (const Value& part : iterate(rt, *parts)) {
        const std::string& text = to_string_ref(rt, part, "a part of join");
        rt.charge_bytes(text.size() + self.text().size());
        out += first ? "" : self.text();
        out += text;
        first = false;
    }
    return make_text(rt, std::move(out));
}

template <bool kFromEnd>
Value find(Runtime& rt, const Value& self, const Args& args) {
    const std::string& needle = text_arg(rt, args, 0, "sub");
    rt.charge_bytes(self.text().size());
    const size_t at = kFromEnd ? self.text().rfind(needle) : self.text().find(needle);
    if (at == std::string::npos) {
        return Value::integer(-1);
    }
    const size_t letters = count_code_points(std::string_view(self.text()).substr(0, at));
    return Value::integer(static_cast<int64_t>(letters));
}

Value text_index(Runtime& rt, const Value& self, const Args& args) {
    Value at = find<false>(rt, self, args);
    if (*at.as<int64_t>() < 0) {
        rt.fail("index: the text is not found");
    }
    return at;
}

Value text_count(Runtime& rt, const Value& self, const Args& args) {
    const std::string& needle = text_arg(rt, args, 0, "sub");
    rt.charge_bytes(self.text().size());
    if (needle.empty()) {
        return Value::integer(length_of(rt, self) + 1);
    }
    const auto parts = split_text(self.text(), needle, -1).size();
    return Value::integer(static_cast<int64_t>(parts) - 1);
}

Value removeprefix(Runtime& rt, const Value& self, const Args& args) {
    const std::string& prefix = text_arg(rt, args, 0, "prefix");
    return self.text().starts_with(prefix) ? make_text(rt, self.text().substr(prefix.size()))
                                           : self;
}

Value removesuffix(Runtime& rt, const Value& self, const Args& args) {
    const std::string& suffix = text_arg(rt, args, 0, "suffix");
    return self.text().ends_with(suffix)
               ? make_text(rt, self.text().substr(0, self.text().size() - suffix.size()))
               : self;
}

template <bool (*kIs)(uint32_t)>
Value all_letters(Runtime& rt, const Value& self, const Args&) {
    rt.charge_bytes(self.text().size());
    bool all = !self.text().empty();
    for (size_t at = 0; at < self.text().size() && all;) {
        const Utf8Step step = utf8_step(self.text(), at);
        all = kIs(step.code_point);
        at += step.bytes;
    }
    return Value::boolean(all);
}

Value isupper(Runtime& rt, const Value& self, const Args&) {
    return Value::boolean(is_upper_text(rt, self.text()));
}

Value islower(Runtime& rt, const Value& self, const Args&) {
    return Value::boolean(is_lower_text(rt, self.text()));
}

Value dict_items(Runtime& rt, const Value& self, const Args&) {
    std::vector<Value> pairs;
    for (const auto& [key, value] : self.dict()->items) {
        pairs.push_back(make_list(rt, {key, value}, true));
    }
    return make_list(rt, std::move(pairs));
}

Value dict_keys(Runtime& rt, const Value& self, const Args&) {
    return make_list(rt, iterate(rt, self));
}

Value dict_values(Runtime& rt, const Value& self, const Args&) {
    std::vector<Value> values;
    for (const auto& entry : self.dict()->items) {
        values.push_back(entry.second);
    }
    return make_list(rt, std::move(values));
}

Value dict_get(Runtime& rt, const Value& self, const Args& args) {
    const Value* key = args.get(0, "key");
    if (key == nullptr) {
        rt.fail("get needs a key");
    }
    rt.charge(self.dict()->items.size());
    for (const auto& entry : self.dict()->items) {
        if (equal(rt, entry.first, *key)) {
            return entry.second;
        }
    }
    const Value* fallback = args.get(1, "default");
    return fallback == nullptr ? Value(None{}) : *fallback;
}

Value list_count(Runtime& rt, const Value& self, const Args& args) {
    const Value* wanted = args.get(0, "value");
    int64_t count = 0;
    for (const Value& value : self.list()->items) {
        count += wanted != nullptr && equal(rt, value, *wanted) ? 1 : 0;
    }
    return Value::integer(count);
}

Value list_index(Runtime& rt, const Value& self, const Args& args) {
    const Value* wanted = args.get(0, "value");
    const std::vector<Value>& items = self.list()->items;
    for (size_t i = 0; i < items.size(); ++i) {
        if (wanted != nullptr && equal(rt, items[i], *wanted)) {
            return Value::integer(static_cast<int64_t>(i));
        }
    }
    rt.fail("index: the value is not in the list");
}

Value refuse_change(Runtime& rt, const Value& self, const Args&) {
    rt.fail(fmt::format(
        "a {} cannot be changed in a chat template; build a new one with +", type_name(self)
    ));
}

constexpr std::array<MethodEntry, 29> kTextMethods = {{
    {"strip", strip<true, true>},
    {"lstrip", strip<true, false>},
    {"rstrip", strip<false, true>},
    {"split", split},
    {"rsplit", rsplit},
    {"splitlines", splitlines},
    {"startswith", affix<true>},
    {"endswith", affix<false>},
    {"upper", upper},
    {"lower", lower},
    {"capitalize", capitalize},
    {"title", title},
    {"replace", replace},
    {"join", join},
    {"find", find<false>},
    {"rfind", find<true>},
    {"index", text_index},
    {"count", text_count},
    {"removeprefix", removeprefix},
    {"removesuffix", removesuffix},
    {"isdigit", all_letters<is_decimal>},
    {"isdecimal", all_letters<is_decimal>},
    {"isnumeric", all_letters<is_unicode_numeric>},
    {"isalpha", all_letters<is_letter>},
    {"isalnum", all_letters<is_letter_or_number>},
    {"isspace", all_letters<is_python_space>},
    {"isupper", isupper},
    {"islower", islower},
    {"casefold", lower},
}};

constexpr std::array<MethodEntry, 5> kDictMethods = {{
    {"items", dict_items},
    {"keys", dict_keys},
    {"values", dict_values},
    {"get", dict_get},
    {"update", refuse_change},
}};

constexpr std::array<MethodEntry, 6> kListMethods = {{
    {"count", list_count},
    {"index", list_index},
    {"append", refuse_change},
    {"extend", refuse_change},
    {"insert", refuse_change},
    {"pop", refuse_change},
}};

template <typename Table>
Method look_up(const Table& table, std::string_view name) {
    for (const MethodEntry& entry : table) {
        if (entry.name == name) {
            return entry.call;
        }
    }
    return nullptr;
}

Method method_of(const Value& self, std::string_view name) {
    if (self.is_string()) {
        return look_up(kTextMethods, name);
    }
    if (self.dict() != nullptr) {
        return look_up(kDictMethods, name);
    }
    return self.list() != nullptr ? look_up(kListMethods, name) : nullptr;
}

}  // namespace

bool has_method(const Value& self, std::string_view name) {
    return method_of(self, name) != nullptr;
}

Value call_method(Runtime& rt, const Value& self, std::string_view name, const Args& args) {
    rt.charge(1);
    if (const Loop* loop = self.loop(); loop != nullptr && name == "cycle") {
        if (args.positional.empty()) {
            rt.fail("loop.cycle needs at least one value");
        }
        return args.positional[loop->index0 % args.positional.size()];
    }
    const Method method = method_of(self, name);
    if (method == nullptr) {
        rt.fail(fmt::format("a value of type {} has no method '{}'", type_name(self), name));
    }
    return method(rt, self, args);
}

}  // namespace orbit::jinja
