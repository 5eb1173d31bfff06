#include "text/jinja_value.h"

#include <algorithm>
#include <cmath>

#include "text/jinja_text.h"
#include "text/utf8.h"

namespace orbit::jinja {

int Value::depth() const {
    if (const List* values = list()) {
        return values->depth;
    }
    if (const Dict* values = dict()) {
        return values->depth;
    }
    if (const Callable* function = callable()) {
        return function->depth;
    }
    if (const Loop* state = loop()) {
        return state->items->depth + 1;
    }
    return 1;
}

const Value* Dict::find(std::string_view key) const {
    for (const auto& [name, value] : items) {
        if (name.is_string() && name.text() == key) {
            return &value;
        }
    }
    return nullptr;
}

const Value* Args::get(size_t index, std::string_view name) const {
    if (index < positional.size()) {
        return &positional[index];
    }
    for (const auto& [key, value] : named) {
        if (key == name) {
            return &value;
        }
    }
    return nullptr;
}

void Runtime::fail(std::string_view message) const {
    throw UserError(fmt::format("Chat template, line {}: {}.", line_, message));
}

void Runtime::charge(size_t work) {
    const auto cost = static_cast<int64_t>(std::min<size_t>(work, size_t{1} << 40));
    if (cost > work_left_) {
        fail("the template takes too many steps or makes too much text; simplify it");
    }
    work_left_ -= cost;
}

namespace {

void check_depth(Runtime& rt, int depth) {
    if (depth > kMaxValueDepth) {
        rt.fail(fmt::format("a value is nested more than {} levels deep", kMaxValueDepth));
    }
}

std::string real_text(double value) {
    if (std::isnan(value)) {
        return "nan";
    }
    if (std::isinf(value)) {
        return value < 0 ? "-inf" : "inf";
    }
    std::string text = fmt::format("{}", value);
    if (text.find_first_of(".e") == std::string::npos) {
        text += ".0";
    }
    return text;
}

std::string string_repr(std::string_view text) {
    const bool double_quotes =
        text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos;
    const char quote = double_quotes ? '"' : '\'';
    std::string out(1, quote);
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = utf8_step(text, at);
        const uint32_t c = step.code_point;
        if (c == static_cast<uint32_t>(quote) || c == '\\') {
            out += '\\';
            out += static_cast<char>(c);
        } else if (c == '\n') {
            out += "\\n";
        } else if (c == '\r') {
            out += "\\r";
        } else if (c == '\t') {
            out += "\\t";
        } else if (is_printable(c)) {
            out += text.substr(at, step.bytes);
        } else if (c < 0x100) {
            out += fmt::format("\\x{:02x}", c);
        } else {
            out += c < 0x10000 ? fmt::format("\\u{:04x}", c) : fmt::format("\\U{:08x}", c);
        }
        at += step.bytes;
    }
    return out + quote;
}

std::string list_repr(Runtime& rt, const List& list) {
    std::string out(1, list.tuple ? '(' : '[');
    for (size_t i = 0; i < list.items.size(); ++i) {
        out += i == 0 ? "" : ", ";
        out += repr(rt, list.items[i]);
    }
    if (list.tuple) {
        return out + (list.items.size() == 1 ? ",)" : ")");
    }
    return out + "]";
}

std::string dict_repr(Runtime& rt, const Dict& dict) {
    std::string out = "{";
    for (size_t i = 0; i < dict.items.size(); ++i) {
        out += i == 0 ? "" : ", ";
        out += repr(rt, dict.items[i].first) + ": " + repr(rt, dict.items[i].second);
    }
    return out + "}";
}

int order(double a, double b) {
    return a < b ? -1 : (a > b ? 1 : 0);
}

double number(const Value& value) {
    if (const bool* flag = value.as<bool>()) {
        return *flag ? 1.0 : 0.0;
    }
    if (const int64_t* whole = value.as<int64_t>()) {
        return static_cast<double>(*whole);
    }
    return *value.as<double>();
}

// Whole numbers, bools among them; false when either is a float.
bool both_whole(const Value& a, const Value& b, int64_t& x, int64_t& y) {
    const auto whole = [](const Value& value, int64_t& out) {
        if (const bool* flag = value.as<bool>()) {
            out = *flag ? 1 : 0;
            return true;
        }
        if (const int64_t* integer = value.as<int64_t>()) {
            out = *integer;
            return true;
        }
        return false;
    };
    return whole(a, x) && whole(b, y);
}

int numeric_order(const Value& a, const Value& b) {
    int64_t x = 0;
    int64_t y = 0;
    if (both_whole(a, b, x, y)) {
        return x < y ? -1 : (x > y ? 1 : 0);
    }
    return order(number(a), number(b));
}

bool equal_dicts(Runtime& rt, const Dict& a, const Dict& b) {
    if (a.items.size() != b.items.size()) {
        return false;
    }
    for (const auto& [key, value] : a.items) {
        bool found = false;
        for (const auto& [other_key, other_value] : b.items) {
            if (equal(rt, key, other_key)) {
                found = equal(rt, value, other_value);
                break;
            }
        }
        if (!found) {
            return false;
        }
    }
    return true;
}

}  // namespace

Value make_list(Runtime& rt, std::vector<Value> items, bool tuple) {
    rt.charge(1 + items.size());
    List list;
    for (const Value& value : items) {
        list.depth = std::max(list.depth, 1 + value.depth());
    }
    check_depth(rt, list.depth);
    list.items = std::move(items);
    list.tuple = tuple;
    return Value(std::make_shared<const List>(std::move(list)));
}

Value make_dict(Runtime& rt, std::vector<std::pair<Value, Value>> items) {
    rt.charge(1 + 2 * items.size());
    Dict dict;
    for (const auto& [key, value] : items) {
        dict.depth = std::max({dict.depth, 1 + key.depth(), 1 + value.depth()});
    }
    check_depth(rt, dict.depth);
    dict.items = std::move(items);
    return Value(std::make_shared<const Dict>(std::move(dict)));
}

Value make_text(Runtime& rt, std::string text) {
    rt.charge_bytes(text.size());
    return Value::string(std::move(text));
}

Value bound_method(Runtime& rt, const Value& self, std::string_view name) {
    Callable method;
    method.name = std::string(name);
    method.self = self;
    method.depth = 1 + self.depth();
    check_depth(rt, method.depth);
    return Value(std::make_shared<const Callable>(std::move(method)));
}

std::string_view type_name(const Value& value) {
    if (value.is_undefined()) {
        return "undefined";
    }
    if (value.is_none()) {
        return "None";
    }
    if (value.as<bool>() != nullptr) {
        return "bool";
    }
    if (value.as<int64_t>() != nullptr) {
        return "int";
    }
    if (value.as<double>() != nullptr) {
        return "float";
    }
    if (value.is_string()) {
        return "str";
    }
    if (const List* list = value.list()) {
        return list->tuple ? "tuple" : "list";
    }
    if (value.dict() != nullptr) {
        return "dict";
    }
    if (value.name_space() != nullptr) {
        return "namespace";
    }
    return value.loop() != nullptr ? "loop" : "function";
}

bool truth(const Value& value) {
    if (value.is_undefined() || value.is_none()) {
        return false;
    }
    if (value.is_number()) {
        return number(value) != 0.0;
    }
    if (value.is_string()) {
        return !value.text().empty();
    }
    if (const List* list = value.list()) {
        return !list->items.empty();
    }
    if (const Dict* dict = value.dict()) {
        return !dict->items.empty();
    }
    return true;
}

bool equal(Runtime& rt, const Value& a, const Value& b) {
    rt.charge(1);
    if (a.is_number() && b.is_number()) {
        return numeric_order(a, b) == 0 && !std::isnan(number(a)) && !std::isnan(number(b));
    }
    if (a.is_string() && b.is_string()) {
        return a.text() == b.text();
    }
    if (a.list() != nullptr && b.list() != nullptr) {
        const std::vector<Value>& x = a.list()->items;
        const std::vector<Value>& y = b.list()->items;
        const auto same = [&rt](const Value& p, const Value& q) { return equal(rt, p, q); };
        return a.list()->tuple == b.list()->tuple && x.size() == y.size() &&
               std::equal(x.begin(), x.end(), y.begin(), same);
    }
    if (a.dict() != nullptr && b.dict() != nullptr) {
        return equal_dicts(rt, *a.dict(), *b.dict());
    }
    if (a.name_space() != nullptr || a.callable() != nullptr || a.loop() != nullptr) {
        return a.name_space() == b.name_space() && a.callable() == b.callable() &&
               a.loop() == b.loop();
    }
    return (a.is_none() && b.is_none()) || (a.is_undefined() && b.is_undefined());
}

int compare(Runtime& rt, const Value& a, const Value& b) {
    rt.charge(1);
    if (a.is_number() && b.is_number()) {
        return numeric_order(a, b);
    }
    if (a.is_string() && b.is_string()) {
        const int sign = a.text().compare(b.text());  // UTF-8 keeps the order of code points
        return sign < 0 ? -1 : (sign > 0 ? 1 : 0);
    }
    if (a.list() != nullptr && b.list() != nullptr && a.list()->tuple == b.list()->tuple) {
        const std::vector<Value>& x = a.list()->items;
        const std::vector<Value>& y = b.list()->items;
        for (size_t i = 0; i < std::min(x.size(), y.size()); ++i) {
            if (!equal(rt, x[i], y[i])) {
                return compare(rt, x[i], y[i]);
            }
        }
        return x.size() < y.size() ? -1 : (x.size() > y.size() ? 1 : 0);
    }
    rt.fail(fmt::format("{} and {} cannot be put in order", type_name(a), type_name(b)));
}

bool contains(Runtime& rt, const Value& container, const Value& item) {
    if (container.is_string()) {
        rt.charge_bytes(container.text().size());
        const std::string& needle = to_string_ref(rt, item, "the left side of 'in <string>'");
        return container.text().find(needle) != std::string::npos;
    }
    for (const Value& value : iterate(rt, container)) {
        if (equal(rt, value, item)) {
            return true;
        }
    }
    return false;
}

std::string to_text(Runtime& rt, const Value& value) {
    if (value.is_string()) {
        rt.charge_bytes(value.text().size());
        return value.text();
    }
    return value.is_undefined() ? "" : repr(rt, value);
}

std::string repr(Runtime& rt, const Value& value) {
    std::string out;
    if (value.is_undefined()) {
        out = "Undefined";
    } else if (value.is_none()) {
        out = "None";
    } else if (const bool* flag = value.as<bool>()) {
        out = *flag ? "True" : "False";
    } else if (const int64_t* whole = value.as<int64_t>()) {
        out = fmt::format("{}", *whole);
    } else if (const double* real = value.as<double>()) {
        out = real_text(*real);
    } else if (value.is_string()) {
        out = string_repr(value.text());
    } else if (const List* list = value.list()) {
        out = list_repr(rt, *list);
    } else if (const Dict* dict = value.dict()) {
        out = dict_repr(rt, *dict);
    } else {
        out = fmt::format("<{}>", type_name(value));
    }
    rt.charge_bytes(out.size());
    return out;
}

std::vector<Value> iterate(Runtime& rt, const Value& value) {
    std::vector<Value> out;
    if (const List* list = value.list()) {
        rt.charge(list->items.size());
        return list->items;
    }
    if (const Dict* dict = value.dict()) {
        rt.charge(dict->items.size());
        for (const auto& entry : dict->items) {
            out.push_back(entry.first);
        }
        return out;
    }
    if (value.is_string()) {
        const std::string& text = value.text();
        rt.charge(4 * text.size());
        for (size_t at = 0; at < text.size();) {
            const size_t bytes = utf8_step(text, at).bytes;
            out.push_back(Value::string(text.substr(at, bytes)));
            at += bytes;
        }
        return out;
    }
    if (!value.is_undefined()) {
        rt.fail(fmt::format("a value of type {} cannot be looped over", type_name(value)));
    }
    return out;
}

int64_t length_of(Runtime& rt, const Value& value) {
    if (value.is_string()) {
        rt.charge_bytes(value.text().size());
        return static_cast<int64_t>(count_code_points(value.text()));
    }
    if (const List* list = value.list()) {
        return static_cast<int64_t>(list->items.size());
    }
    if (const Dict* dict = value.dict()) {
        return static_cast<int64_t>(dict->items.size());
    }
    if (!value.is_undefined()) {
        rt.fail(fmt::format("a value of type {} has no length", type_name(value)));
    }
    return 0;
}

namespace {

[[noreturn]] void wrong_type(
    Runtime& rt, const Value& value, std::string_view what, std::string_view wanted
) {
    if (const Undefined* missing = value.as<Undefined>()) {
        rt.fail(
            missing->reason != nullptr ? *missing->reason : fmt::format("{} is undefined", what)
        );
    }
    rt.fail(fmt::format("{} is of type {}, not {}", what, type_name(value), wanted));
}

}  // namespace

double to_double(Runtime& rt, const Value& value, std::string_view what) {
    if (!value.is_number()) {
        wrong_type(rt, value, what, "a number");
    }
    return number(value);
}

int64_t to_integer(Runtime& rt, const Value& value, std::string_view what) {
    if (const bool* flag = value.as<bool>()) {
        return *flag ? 1 : 0;
    }
    if (const int64_t* whole = value.as<int64_t>()) {
        return *whole;
    }
    wrong_type(rt, value, what, "int");
}

const std::string& to_string_ref(Runtime& rt, const Value& value, std::string_view what) {
    if (!value.is_string()) {
        wrong_type(rt, value, what, "str");
    }
    return value.text();
}

}  // namespace orbit::jinja
