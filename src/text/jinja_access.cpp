// Attributes, items, slices and the JSON form of values.
#include <algorithm>
#include <cmath>

#include "text/jinja_value.h"
#include "text/utf8.h"

namespace orbit::jinja {

namespace {

Value missing(const Value& value, std::string_view name) {
    return Value::undefined(
        fmt::format("a value of type {} has no attribute '{}'", type_name(value), name)
    );
}

Value loop_attribute(const Loop& loop, const std::string& name) {
    const std::vector<Value>& items = loop.items->items;
    const auto index0 = static_cast<int64_t>(loop.index0);
    const auto length = static_cast<int64_t>(items.size());
    if (name == "index0") {
        return Value::integer(index0);
    }
    if (name == "index") {
        return Value::integer(index0 + 1);
    }
    if (name == "revindex") {
        return Value::integer(length - index0);
    }
    if (name == "revindex0") {
        return Value::integer(length - index0 - 1);
    }
    if (name == "first") {
        return Value::boolean(index0 == 0);
    }
    if (name == "last") {
        return Value::boolean(index0 + 1 == length);
    }
    if (name == "length") {
        return Value::integer(length);
    }
    if (name == "depth") {
        return Value::integer(1);  // only recursive loops, which are not supported, go deeper
    }
    if (name == "depth0") {
        return Value::integer(0);
    }
    if (name == "previtem") {
        return loop.index0 > 0 ? items[loop.index0 - 1]
                               : Value::undefined("there is no previous item");
    }
    if (name == "nextitem") {
        return loop.index0 + 1 < items.size() ? items[loop.index0 + 1]
                                              : Value::undefined("there is no next item");
    }
    return Value::undefined(fmt::format("loop has no attribute '{}'", name));
}

const Value* find_key(Runtime& rt, const Dict& dict, const Value& key) {
    rt.charge(dict.items.size());
    for (const auto& entry : dict.items) {
        if (equal(rt, entry.first, key)) {
            return &entry.second;
        }
    }
    return nullptr;
}

// Start, stop and step as Python resolves them.
struct Bounds {
    int64_t begin = 0;
    int64_t end = 0;
    int64_t step = 1;
};

Bounds resolve(
    Runtime& rt, int64_t length, const Value& begin, const Value& end, const Value& step
) {
    Bounds bounds;
    bounds.step = step.is_none() ? 1 : to_integer(rt, step, "a slice step");
    if (bounds.step == 0) {
        rt.fail("a slice step cannot be zero");
    }
    // A step beyond the length takes one item; clamping keeps the sums below from overflowing.
    bounds.step = std::clamp<int64_t>(bounds.step, -length - 1, length + 1);
    const bool forward = bounds.step > 0;
    const auto place = [&](const Value& value, int64_t fallback) {
        if (value.is_none()) {
            return fallback;
        }
        int64_t at = to_integer(rt, value, "a slice bound");
        if (at < 0) {
            at = at < -length ? -1 : at + length;
            return std::max<int64_t>(at, forward ? 0 : -1);
        }
        return std::min<int64_t>(at, forward ? length : length - 1);
    };
    bounds.begin = place(begin, forward ? 0 : length - 1);
    bounds.end = place(end, forward ? length : -1);
    return bounds;
}

void append_escape(std::string& out, uint32_t unit) {
    out += fmt::format("\\u{:04x}", unit);
}

void append_json_string(std::string& out, std::string_view text, bool ascii) {
    out += '"';
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = utf8_step(text, at);
        const uint32_t c = step.code_point;
        if (c == '"' || c == '\\') {
            out += '\\';
            out += static_cast<char>(c);
        } else if (c == '\n') {
            out += "\\n";
        } else if (c == '\r') {
            out += "\\r";
        } else if (c == '\t') {
            out += "\\t";
        } else if (c == '\b') {
            out += "\\b";
        } else if (c == '\f') {
            out += "\\f";
        } else if (c < 0x20 || (ascii && c > 0x7F && c < 0x10000)) {
            append_escape(out, c);
        } else if (ascii && c >= 0x10000) {
            append_escape(out, 0xD800 + ((c - 0x10000) >> 10));
            append_escape(out, 0xDC00 + ((c - 0x10000) & 0x3FF));
        } else {
            out += text.substr(at, step.bytes);
        }
        at += step.bytes;
    }
    out += '"';
}

class JsonWriter {
  public:
    JsonWriter(Runtime& rt, const JsonStyle& style) : rt_(rt), style_(style) {}

    void write(const Value& value, int level) {
        const size_t before = out.size();
        if (value.is_none()) {
            out += "null";
        } else if (const bool* flag = value.as<bool>()) {
            out += *flag ? "true" : "false";
        } else if (value.is_string()) {
            append_json_string(out, value.text(), style_.ascii);
        } else if (const double* real = value.as<double>(); real && std::isnan(*real)) {
            out += "NaN";
        } else if (real != nullptr && std::isinf(*real)) {
            out += *real < 0 ? "-Infinity" : "Infinity";
        } else if (value.is_number()) {
            out += repr(rt_, value);
        } else if (const List* list = value.list()) {
            write_list(*list, level);
        } else if (const Dict* dict = value.dict()) {
            write_dict(*dict, level);
        } else {
            rt_.fail(fmt::format("a value of type {} has no JSON form", type_name(value)));
        }
        rt_.charge_bytes(out.size() - before);
    }

    std::string out;

  private:
    void new_line(int level) {
        if (style_.indent >= 0) {
            out += '\n';
            out.append(static_cast<size_t>(style_.indent) * static_cast<size_t>(level), ' ');
        }
    }

    void write_list(const List& list, int level) {
        out += '[';
        for (size_t i = 0; i < list.items.size(); ++i) {
            out += i == 0 ? "" : style_.item_separator;
            new_line(level + 1);
            write(list.items[i], level + 1);
        }
        if (!list.items.empty()) {
            new_line(level);
        }
        out += ']';
    }

    void write_dict(const Dict& dict, int level) {
        std::vector<std::pair<Value, Value>> items = dict.items;
        if (style_.sort_keys) {
            std::stable_sort(items.begin(), items.end(), [this](const auto& a, const auto& b) {
                return compare(rt_, a.first, b.first) < 0;
            });
        }
        out += '{';
        for (size_t i = 0; i < items.size(); ++i) {
            out += i == 0 ? "" : style_.item_separator;
            new_line(level + 1);
            write_key(items[i].first);
            out += style_.key_separator;
            write(items[i].second, level + 1);
        }
        if (!items.empty()) {
            new_line(level);
        }
        out += '}';
    }

    void write_key(const Value& key) {
        if (key.is_string()) {
            append_json_string(out, key.text(), style_.ascii);
            return;
        }
        if (!key.is_number() && !key.is_none()) {
            rt_.fail(fmt::format("a JSON key cannot be of type {}", type_name(key)));
        }
        out += '"';
        write(key, 0);
        out += '"';
    }

    Runtime& rt_;
    const JsonStyle& style_;
};

}  // namespace

std::string to_json(Runtime& rt, const Value& value, const JsonStyle& style) {
    JsonWriter writer(rt, style);
    writer.write(value, 0);
    return std::move(writer.out);
}

Value attribute(Runtime& rt, const Value& value, const std::string& name) {
    rt.charge(1);
    if (const Undefined* undefined = value.as<Undefined>()) {
        rt.fail(
            undefined->reason != nullptr ? *undefined->reason
                                         : fmt::format("'{}' is taken of an undefined value", name)
        );
    }
    if (const Loop* loop = value.loop()) {
        return name == "cycle" ? bound_method(rt, value, name) : loop_attribute(*loop, name);
    }
    if (const Namespace* space = value.name_space()) {
        for (const auto& entry : space->items) {
            if (entry.first == name) {
                return entry.second;
            }
        }
        return missing(value, name);
    }
    if (has_method(value, name)) {
        return bound_method(rt, value, name);
    }
    if (const Dict* dict = value.dict()) {
        rt.charge(dict->items.size());
        if (const Value* found = dict->find(name)) {
            return *found;
        }
    }
    return missing(value, name);
}

Value item(Runtime& rt, const Value& value, const Value& key) {
    rt.charge(1);
    if (const Dict* dict = value.dict()) {
        if (const Value* found = find_key(rt, *dict, key)) {
            return *found;
        }
    }
    const bool sequence = value.list() != nullptr || value.is_string();
    if (sequence && (key.as<int64_t>() != nullptr || key.as<bool>() != nullptr)) {
        const int64_t length = length_of(rt, value);
        int64_t at = to_integer(rt, key, "an index");
        at += at < 0 ? length : 0;
        if (at < 0 || at >= length) {
            return Value::undefined(fmt::format("index {} is out of range", repr(rt, key)));
        }
        if (const List* list = value.list()) {
            return list->items[static_cast<size_t>(at)];
        }
        size_t byte = 0;
        for (int64_t i = 0; i < at; ++i) {
            byte += utf8_step(value.text(), byte).bytes;
        }
        return make_text(rt, value.text().substr(byte, utf8_step(value.text(), byte).bytes));
    }
    if (key.is_string()) {
        return attribute(rt, value, key.text());
    }
    if (value.is_undefined()) {
        return attribute(rt, value, repr(rt, key));
    }
    return missing(value, repr(rt, key));
}

Value slice(
    Runtime& rt, const Value& value, const Value& begin, const Value& end, const Value& step
) {
    if (value.is_undefined()) {
        attribute(rt, value, "a slice");
    }
    if (value.list() == nullptr && !value.is_string()) {
        rt.fail(fmt::format("a value of type {} cannot be sliced", type_name(value)));
    }
    const std::vector<Value> all = iterate(rt, value);
    const Bounds bounds = resolve(rt, static_cast<int64_t>(all.size()), begin, end, step);
    std::vector<Value> taken;
    for (int64_t at = bounds.begin; bounds.step > 0 ? at < bounds.end : at > bounds.end;
         at += bounds.step) {
        taken.push_back(all[static_cast<size_t>(at)]);
    }
    if (const List* list = value.list()) {
        return make_list(rt, std::move(taken), list->tuple);
    }
    std::string text;
    for (const Value& letter : taken) {
        text += letter.text();
    }
    return make_text(rt, std::move(text));
}

}  // namespace orbit::jinja
