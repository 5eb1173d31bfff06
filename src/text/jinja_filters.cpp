// Filters (`value | name(...)`) and tests (`value is name`).
#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <optional>

#include "text/jinja_text.h"
#include "text/jinja_value.h"
#include "text/utf8.h"

namespace orbit::jinja {

namespace {

using Filter = Value (*)(Runtime& rt, const Value& value, const Args& args);
using Test = bool (*)(Runtime& rt, const Value& value, const Args& args);

constexpr int64_t kMaxIndent = 64;
constexpr size_t kNamedOnly = SIZE_MAX;  // no position: given by name

bool flag_arg(const Args& args, size_t index, std::string_view name, bool fallback) {
    const Value* value = args.get(index, name);
    return value == nullptr ? fallback : truth(*value);
}

const Value& need(Runtime& rt, const Args& args, size_t index, std::string_view name) {
    const Value* value = args.get(index, name);
    if (value == nullptr) {
        rt.fail(fmt::format("the argument '{}' is missing", name));
    }
    return *value;
}

// "a.b.0": attributes and indices in a row.
Value attribute_path(Runtime& rt, Value value, const Value& path) {
    if (!path.is_string()) {
        return item(rt, value, path);
    }
    for (const std::string_view part : split_text(path.text(), ".", -1)) {
        int64_t index = 0;
        const auto parsed = std::from_chars(part.data(), part.data() + part.size(), index);
        const bool whole = parsed.ec == std::errc() && parsed.ptr == part.data() + part.size();
        value = item(rt, value, whole ? Value::integer(index) : make_text(rt, std::string(part)));
    }
    return value;
}

Args rest_of(const Args& args, size_t skip) {
    Args rest;
    const size_t from = std::min(skip, args.positional.size());
    rest.positional.assign(
        args.positional.begin() + static_cast<std::ptrdiff_t>(from), args.positional.end()
    );
    rest.named = args.named;
    return rest;
}

Value tojson(Runtime& rt, const Value& value, const Args& args) {
    JsonStyle style;
    style.ascii = flag_arg(args, kNamedOnly, "ensure_ascii", false);
    style.sort_keys = flag_arg(args, kNamedOnly, "sort_keys", false);
    const Value* indent = args.get(0, "indent");
    if (indent != nullptr && !indent->is_none()) {
        const int64_t width = to_integer(rt, *indent, "the indent of tojson");
        style.indent = static_cast<int>(std::clamp<int64_t>(width, 0, kMaxIndent));
        style.item_separator.resize(1);  // ","
    }
    const Value* separators = args.get(kNamedOnly, "separators");
    if (separators != nullptr && !separators->is_none()) {
        const std::vector<Value> pair = iterate(rt, *separators);
        if (pair.size() != 2) {
            rt.fail("the separators of tojson are a pair");
        }
        style.item_separator = to_string_ref(rt, pair[0], "a separator of tojson");
        style.key_separator = to_string_ref(rt, pair[1], "a separator of tojson");
    }
    return Value::string(to_json(rt, value, style));
}

Value trim(Runtime& rt, const Value& value, const Args& args) {
    const std::string text = to_text(rt, value);
    const Value* chars = args.get(0, "chars");
    if (chars == nullptr || chars->is_none()) {
        return make_text(rt, std::string(strip_space(text, true, true)));
    }
    const std::string& set = to_string_ref(rt, *chars, "the argument of trim");
    rt.charge_bytes(text.size() * (1 + set.size() / 8));
    return make_text(rt, std::string(strip_chars(text, set, true, true)));
}

Value length(Runtime& rt, const Value& value, const Args&) {
    return Value::integer(length_of(rt, value));
}

Value default_value(Runtime&, const Value& value, const Args& args) {
    const bool falsy = flag_arg(args, 1, "boolean", false) && !truth(value);
    if (!value.is_undefined() && !falsy) {
        return value;
    }
    const Value* fallback = args.get(0, "default_value");
    return fallback == nullptr ? Value::string("") : *fallback;
}

Value join(Runtime& rt, const Value& value, const Args& args) {
    const Value* separator = args.get(0, "d");
    const Value* path = args.get(1, "attribute");
    const std::string between = separator == nullptr ? "" : to_text(rt, *separator);
    std::string out;
    bool first = true;
    for (const Value& each : iterate(rt, value)) {
        out += first ? "" : between;
        out += to_text(rt, path == nullptr ? each : attribute_path(rt, each, *path));
        rt.charge_bytes(between.size());
        first = false;
    }
    return make_text(rt, std::move(out));
}

Value upper(Runtime& rt, const Value& value, const Args&) {
    return make_text(rt, to_upper_utf8(to_text(rt, value)));
}

Value lower(Runtime& rt, const Value& value, const Args&) {
    return make_text(rt, to_lower_utf8(to_text(rt, value)));
}

Value capitalize(Runtime& rt, const Value& value, const Args&) {
    return make_text(rt, capitalize_text(to_text(rt, value)));
}

// Unlike str.title(), words begin after spaces, dashes and opening brackets only.
Value title(Runtime& rt, const Value& value, const Args&) {
    const std::string text = to_text(rt, value);
    std::string out;
    std::string word;
    const auto flush = [&] {
        out += capitalize_text(word);
        word.clear();
    };
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = utf8_step(text, at);
        const uint32_t c = step.code_point;
        const bool cut =
            is_python_space(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<';
        if (cut) {
            flush();
        }
        (cut ? out : word).append(text, at, step.bytes);
        at += step.bytes;
    }
    flush();
    return make_text(rt, std::move(out));
}

Value map(Runtime& rt, const Value& value, const Args& args) {
    std::vector<Value> out;
    const Value* path = args.get(kNamedOnly, "attribute");
    const Value* fallback = args.get(kNamedOnly, "default");
    const std::string filter =
        path != nullptr ? ""
                        : to_string_ref(rt, need(rt, args, 0, "name"), "the filter name of map");
    const Args rest = rest_of(args, 1);
    for (const Value& each : iterate(rt, value)) {
        Value mapped = path != nullptr ? attribute_path(rt, each, *path)
                                       : apply_filter(rt, filter, each, rest);
        if (mapped.is_undefined() && path != nullptr && fallback != nullptr) {
            mapped = *fallback;
        }
        out.push_back(std::move(mapped));
    }
    return make_list(rt, std::move(out));
}

// select, reject, selectattr, rejectattr.
template <bool kAttribute, bool kKeep>
Value choose(Runtime& rt, const Value& value, const Args& args) {
    constexpr size_t kTestAt = kAttribute ? 1 : 0;
    std::string test;
    if (args.positional.size() > kTestAt) {
        test = to_string_ref(rt, args.positional[kTestAt], "the test name");
    }
    const Args rest = rest_of(args, kTestAt + 1);
    std::vector<Value> out;
    for (const Value& each : iterate(rt, value)) {
        const Value subject =
            kAttribute ? attribute_path(rt, each, need(rt, args, 0, "attribute")) : each;
        const bool passed = test.empty() ? truth(subject) : apply_test(rt, test, subject, rest);
        if (passed == kKeep) {
            out.push_back(each);
        }
    }
    return make_list(rt, std::move(out));
}

Value to_list(Runtime& rt, const Value& value, const Args&) {
    return make_list(rt, iterate(rt, value));
}

Value string(Runtime& rt, const Value& value, const Args&) {
    return value.is_string() ? value : make_text(rt, to_text(rt, value));
}

std::optional<double> parse_double(std::string_view text) {
    text = strip_space(text, true, true);
    if (text.starts_with('+')) {
        text.remove_prefix(1);
    }
    double out = 0.0;
    const auto result = std::from_chars(text.data(), text.data() + text.size(), out);
    if (text.empty() || result.ec != std::errc() || result.ptr != text.data() + text.size()) {
        return std::nullopt;
    }
    return out;
}

Value to_int(Runtime& rt, const Value& value, const Args& args) {
    const Value* fallback = args.get(0, "default");
    const Value otherwise = fallback == nullptr ? Value::integer(0) : *fallback;
    if (value.as<int64_t>() != nullptr || value.as<bool>() != nullptr) {
        return Value::integer(to_integer(rt, value, "the value"));
    }
    std::optional<double> real;
    if (value.is_string()) {
        const std::string_view text = strip_space(value.text(), true, true);
        int64_t whole = 0;
        const auto result = std::from_chars(text.data(), text.data() + text.size(), whole);
        if (!text.empty() && result.ec == std::errc() && result.ptr == text.data() + text.size()) {
            return Value::integer(whole);
        }
        real = parse_double(text);
    } else if (const double* number = value.as<double>()) {
        real = *number;
    }
    if (!real || !(std::fabs(*real) < 9e18)) {
        return otherwise;
    }
    return Value::integer(static_cast<int64_t>(*real));
}

Value to_float(Runtime& rt, const Value& value, const Args& args) {
    const Value* fallback = args.get(0, "default");
    if (value.is_number()) {
        return Value::real(to_double(rt, value, "the value"));
    }
    const std::optional<double> real =
        value.is_string() ? parse_double(value.text()) : std::nullopt;
    if (real) {
        return Value::real(*real);
    }
    return fallback == nullptr ? Value::real(0.0) : *fallback;
}

template <bool kFirst>
Value end_item(Runtime& rt, const Value& value, const Args&) {
    const std::vector<Value> items = iterate(rt, value);
    if (items.empty()) {
        return Value::undefined("an empty list has no first or last item");
    }
    return kFirst ? items.front() : items.back();
}

Value reverse(Runtime& rt, const Value& value, const Args&) {
    if (value.is_string()) {
        return slice(rt, value, None{}, None{}, Value::integer(-1));
    }
    std::vector<Value> items = iterate(rt, value);
    std::reverse(items.begin(), items.end());
    return make_list(rt, std::move(items));
}

// What sort, unique, min and max compare: strings without case unless asked otherwise.
Value sort_key(Runtime& rt, const Value& value, const Value* path, bool case_sensitive) {
    Value key = path == nullptr || path->is_none() ? value : attribute_path(rt, value, *path);
    if (!case_sensitive && key.is_string()) {
        return make_text(rt, to_lower_utf8(key.text()));
    }
    return key;
}

using Keyed = std::pair<Value, Value>;  // key, value

std::vector<Keyed> keyed(
    Runtime& rt, const std::vector<Value>& items, const Value* path, bool case_sensitive
) {
    std::vector<Keyed> out;
    for (const Value& each : items) {
        out.emplace_back(sort_key(rt, each, path, case_sensitive), each);
    }
    return out;
}

void stable_sort_keyed(Runtime& rt, std::vector<Keyed>& items, bool descending) {
    std::stable_sort(items.begin(), items.end(), [&](const Keyed& a, const Keyed& b) {
        return descending ? compare(rt, b.first, a.first) < 0 : compare(rt, a.first, b.first) < 0;
    });
}

Value values_of(Runtime& rt, const std::vector<Keyed>& items) {
    std::vector<Value> out;
    for (const Keyed& each : items) {
        out.push_back(each.second);
    }
    return make_list(rt, std::move(out));
}

Value sort(Runtime& rt, const Value& value, const Args& args) {
    std::vector<Keyed> items = keyed(
        rt, iterate(rt, value), args.get(2, "attribute"), flag_arg(args, 1, "case_sensitive", false)
    );
    stable_sort_keyed(rt, items, flag_arg(args, 0, "reverse", false));
    return values_of(rt, items);
}

Value dictsort(Runtime& rt, const Value& value, const Args& args) {
    if (value.dict() == nullptr) {
        rt.fail("dictsort needs a dict");
    }
    const Value pairs = call_method(rt, value, "items", {});
    const Value* by = args.get(1, "by");
    const bool by_value = by != nullptr && by->is_string() && by->text() == "value";
    const Value index = Value::integer(by_value ? 1 : 0);
    std::vector<Keyed> items =
        keyed(rt, pairs.list()->items, &index, flag_arg(args, 0, "case_sensitive", false));
    stable_sort_keyed(rt, items, flag_arg(args, 2, "reverse", false));
    return values_of(rt, items);
}

Value unique(Runtime& rt, const Value& value, const Args& args) {
    std::vector<Keyed> kept;
    for (const Keyed& each : keyed(
             rt,
             iterate(rt, value),
             args.get(1, "attribute"),
             flag_arg(args, 0, "case_sensitive", false)
         )) {
        const auto same = [&](const Keyed& other) { return equal(rt, other.first, each.first); };
        if (std::none_of(kept.begin(), kept.end(), same)) {
            kept.push_back(each);
        }
    }
    return values_of(rt, kept);
}

template <int kSign>
Value extreme(Runtime& rt, const Value& value, const Args& args) {
    const std::vector<Keyed> items = keyed(
        rt, iterate(rt, value), args.get(1, "attribute"), flag_arg(args, 0, "case_sensitive", false)
    );
    if (items.empty()) {
        return Value::undefined("an empty list has no smallest or largest item");
    }
    const Keyed* best = &items[0];
    for (const Keyed& each : items) {
        if (kSign * compare(rt, each.first, best->first) > 0) {
            best = &each;
        }
    }
    return best->second;
}

Value sum(Runtime& rt, const Value& value, const Args& args) {
    const Value* path = args.get(0, "attribute");
    const Value* start = args.get(1, "start");
    double real = start == nullptr ? 0.0 : to_double(rt, *start, "the start of sum");
    bool whole = start == nullptr || start->as<double>() == nullptr;
    for (const Value& each : iterate(rt, value)) {
        const Value part = path == nullptr ? each : attribute_path(rt, each, *path);
        real += to_double(rt, part, "a part of sum");
        whole = whole && part.as<double>() == nullptr;
    }
    const bool exact = whole && std::fabs(real) < 9007199254740992.0;
    return exact ? Value::integer(static_cast<int64_t>(real)) : Value::real(real);
}

Value replace(Runtime& rt, const Value& value, const Args& args) {
    const std::string text = to_text(rt, value);
    const std::string from = to_text(rt, need(rt, args, 0, "old"));
    const std::string to = to_text(rt, need(rt, args, 1, "new"));
    const Value* count = args.get(2, "count");
    const int64_t limit =
        count == nullptr || count->is_none() ? -1 : to_integer(rt, *count, "the count of replace");
    return make_text(rt, replace_text(rt, text, from, to, limit));
}

Value items(Runtime& rt, const Value& value, const Args&) {
    if (value.is_undefined()) {
        return make_list(rt, {});
    }
    if (value.dict() == nullptr) {
        rt.fail("items needs a dict");
    }
    return call_method(rt, value, "items", {});
}

Value indent(Runtime& rt, const Value& value, const Args& args) {
    const Value* width = args.get(0, "width");
    std::string pad = "    ";
    if (width != nullptr && width->is_string()) {
        pad = width->text();
    } else if (width != nullptr) {
        const int64_t spaces = to_integer(rt, *width, "the width of indent");
        pad.assign(static_cast<size_t>(std::clamp<int64_t>(spaces, 0, kMaxIndent)), ' ');
    }
    const bool blank = flag_arg(args, 2, "blank", false);
    std::string text = to_text(rt, value);
    text += '\n';
    std::vector<std::string_view> lines = split_lines(text, false);
    std::string out;
    if (flag_arg(args, 1, "first", false)) {
        out = pad;
    }
    for (size_t i = 0; i < lines.size(); ++i) {
        if (i > 0) {
            out += '\n';
            out += blank || !lines[i].empty() ? pad : "";
        }
        out += lines[i];
        rt.charge_bytes(pad.size() + lines[i].size());
    }
    return make_text(rt, std::move(out));
}

Value absolute(Runtime& rt, const Value& value, const Args&) {
    if (const double* real = value.as<double>()) {
        return Value::real(std::fabs(*real));
    }
    const int64_t whole = to_integer(rt, value, "the value of abs");
    if (whole == INT64_MIN) {
        rt.fail("the number is too large");
    }
    return Value::integer(whole < 0 ? -whole : whole);
}

Value round_value(Runtime& rt, const Value& value, const Args& args) {
    const double real = to_double(rt, value, "the value of round");
    const Value* precision = args.get(0, "precision");
    const Value* method = args.get(1, "method");
    const int64_t digits =
        precision == nullptr ? 0 : to_integer(rt, *precision, "the precision of round");
    const double scale = std::pow(10.0, static_cast<double>(std::clamp<int64_t>(digits, 0, 15)));
    const std::string how = method == nullptr ? "common" : to_text(rt, *method);
    if (how == "ceil") {
        return Value::real(std::ceil(real * scale) / scale);
    }
    if (how == "floor") {
        return Value::real(std::floor(real * scale) / scale);
    }
    return Value::real(std::nearbyint(real * scale) / scale);
}

Value escape(Runtime& rt, const Value& value, const Args&) {
    std::string out;
    for (const char c : to_text(rt, value)) {
        switch (c) {
            case '&':
                out += "&amp;";
                break;
            case '<':
                out += "&lt;";
                break;
            case '>':
                out += "&gt;";
                break;
            case '"':
                out += "&#34;";
                break;
            case '\'':
                out += "&#39;";
                break;
            default:
                out += c;
        }
    }
    return make_text(rt, std::move(out));
}

Value attr(Runtime& rt, const Value& value, const Args& args) {
    return attribute(rt, value, to_string_ref(rt, need(rt, args, 0, "name"), "the attribute name"));
}

Value same(Runtime&, const Value& value, const Args&) {
    return value;
}

struct FilterEntry {
    std::string_view name;
    Filter call;
};

constexpr std::array<FilterEntry, 38> kFilters = {{
    {"tojson", tojson},
    {"trim", trim},
    {"length", length},
    {"count", length},
    {"default", default_value},
    {"d", default_value},
    {"join", join},
    {"upper", upper},
    {"lower", lower},
    {"capitalize", capitalize},
    {"title", title},
    {"map", map},
    {"select", choose<false, true>},
    {"reject", choose<false, false>},
    {"selectattr", choose<true, true>},
    {"rejectattr", choose<true, false>},
    {"list", to_list},
    {"string", string},
    {"int", to_int},
    {"float", to_float},
    {"first", end_item<true>},
    {"last", end_item<false>},
    {"reverse", reverse},
    {"sort", sort},
    {"dictsort", dictsort},
    {"unique", unique},
    {"min", extreme<-1>},
    {"max", extreme<1>},
    {"sum", sum},
    {"replace", replace},
    {"items", items},
    {"indent", indent},
    {"abs", absolute},
    {"round", round_value},
    {"escape", escape},
    {"e", escape},
    {"attr", attr},
    {"safe", same},
}};

Filter find_filter(std::string_view name) {
    for (const FilterEntry& entry : kFilters) {
        if (entry.name == name) {
            return entry.call;
        }
    }
    return nullptr;
}

bool is_defined(Runtime&, const Value& value, const Args&) {
    return !value.is_undefined();
}

bool is_undefined(Runtime&, const Value& value, const Args&) {
    return value.is_undefined();
}

bool is_none(Runtime&, const Value& value, const Args&) {
    return value.is_none();
}

bool is_string(Runtime&, const Value& value, const Args&) {
    return value.is_string();
}

bool is_number(Runtime&, const Value& value, const Args&) {
    return value.is_number();
}

bool is_integer(Runtime&, const Value& value, const Args&) {
    return value.as<int64_t>() != nullptr;
}

bool is_float(Runtime&, const Value& value, const Args&) {
    return value.as<double>() != nullptr;
}

bool is_boolean(Runtime&, const Value& value, const Args&) {
    return value.as<bool>() != nullptr;
}

template <bool kWanted>
bool is_flag(Runtime&, const Value& value, const Args&) {
    const bool* flag = value.as<bool>();
    return flag != nullptr && *flag == kWanted;
}

bool is_mapping(Runtime&, const Value& value, const Args&) {
    return value.dict() != nullptr;
}

bool is_iterable(Runtime&, const Value& value, const Args&) {
    return value.dict() != nullptr || value.list() != nullptr || value.is_string() ||
           value.is_undefined();
}

bool is_sequence(Runtime&, const Value& value, const Args&) {
    return value.dict() != nullptr || value.list() != nullptr || value.is_string() ||
           value.is_undefined();
}

bool is_callable(Runtime&, const Value& value, const Args&) {
    return value.callable() != nullptr;
}

bool is_odd(Runtime& rt, const Value& value, const Args&) {
    return to_integer(rt, value, "the value of 'odd'") % 2 != 0;
}

bool is_even(Runtime& rt, const Value& value, const Args& args) {
    return !is_odd(rt, value, args);
}

bool is_divisible(Runtime& rt, const Value& value, const Args& args) {
    const int64_t by = to_integer(rt, need(rt, args, 0, "num"), "the argument of 'divisibleby'");
    if (by == 0 || by == -1) {
        if (by == 0) {
            rt.fail("division by zero");
        }
        return true;
    }
    return to_integer(rt, value, "the value of 'divisibleby'") % by == 0;
}

bool is_equal(Runtime& rt, const Value& value, const Args& args) {
    return equal(rt, value, need(rt, args, 0, "other"));
}

bool is_unequal(Runtime& rt, const Value& value, const Args& args) {
    return !is_equal(rt, value, args);
}

bool is_less(Runtime& rt, const Value& value, const Args& args) {
    return compare(rt, value, need(rt, args, 0, "other")) < 0;
}

bool is_greater(Runtime& rt, const Value& value, const Args& args) {
    return compare(rt, value, need(rt, args, 0, "other")) > 0;
}

bool is_at_most(Runtime& rt, const Value& value, const Args& args) {
    return !is_greater(rt, value, args);
}

bool is_at_least(Runtime& rt, const Value& value, const Args& args) {
    return !is_less(rt, value, args);
}

bool is_in(Runtime& rt, const Value& value, const Args& args) {
    return contains(rt, need(rt, args, 0, "seq"), value);
}

bool is_same(Runtime& rt, const Value& value, const Args& args) {
    const Value& other = need(rt, args, 0, "other");
    return type_name(value) == type_name(other) && equal(rt, value, other);
}

bool is_lower(Runtime& rt, const Value& value, const Args&) {
    return is_lower_text(rt, to_text(rt, value));
}

bool is_upper(Runtime& rt, const Value& value, const Args&) {
    return is_upper_text(rt, to_text(rt, value));
}

bool is_filter_name(Runtime&, const Value& value, const Args&) {
    return value.is_string() && is_filter(value.text());
}

bool is_test_name(Runtime&, const Value& value, const Args&) {
    return value.is_string() && is_test(value.text());
}

struct TestEntry {
    std::string_view name;
    Test call;
};

constexpr std::array<TestEntry, 38> kTests = {{
    {"defined", is_defined},
    {"undefined", is_undefined},
    {"none", is_none},
    {"string", is_string},
    {"number", is_number},
    {"integer", is_integer},
    {"float", is_float},
    {"boolean", is_boolean},
    {"true", is_flag<true>},
    {"false", is_flag<false>},
    {"mapping", is_mapping},
    {"iterable", is_iterable},
    {"sequence", is_sequence},
    {"callable", is_callable},
    {"odd", is_odd},
    {"even", is_even},
    {"divisibleby", is_divisible},
    {"equalto", is_equal},
    {"eq", is_equal},
    {"==", is_equal},
    {"ne", is_unequal},
    {"!=", is_unequal},
    {"lt", is_less},
    {"<", is_less},
    {"lessthan", is_less},
    {"gt", is_greater},
    {">", is_greater},
    {"greaterthan", is_greater},
    {"le", is_at_most},
    {"<=", is_at_most},
    {"ge", is_at_least},
    {">=", is_at_least},
    {"in", is_in},
    {"sameas", is_same},
    {"lower", is_lower},
    {"upper", is_upper},
    {"filter", is_filter_name},
    {"test", is_test_name},
}};

Test find_test(std::string_view name) {
    for (const TestEntry& entry : kTests) {
        if (entry.name == name) {
            return entry.call;
        }
    }
    return nullptr;
}

}  // namespace

bool is_filter(std::string_view name) {
    return find_filter(name) != nullptr;
}

bool is_test(std::string_view name) {
    return find_test(name) != nullptr;
}

Value apply_filter(Runtime& rt, std::string_view name, const Value& value, const Args& args) {
    rt.charge(1);
    const Filter filter = find_filter(name);
    if (filter == nullptr) {
        rt.fail(fmt::format("there is no filter named '{}'", name));
    }
    const Runtime::Nesting nesting(rt);  // map('map', ...) calls itself
    return filter(rt, value, args);
}

bool apply_test(Runtime& rt, std::string_view name, const Value& value, const Args& args) {
    rt.charge(1);
    const Test test = find_test(name);
    if (test == nullptr) {
        rt.fail(fmt::format("there is no test named '{}'", name));
    }
    return test(rt, value, args);
}

}  // namespace orbit::jinja
