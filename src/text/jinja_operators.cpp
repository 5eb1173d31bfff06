#include "text/jinja_operators.h"

#include <algorithm>
#include <cmath>

namespace orbit::jinja {

namespace {

constexpr std::string_view kTooLarge = "a whole number is too large";

bool is_whole(const Value& value) {
    return value.as<int64_t>() != nullptr || value.as<bool>() != nullptr;
}

// text * n and list * n
Value repeat(Runtime& rt, const Value& sequence, int64_t count) {
    count = std::max<int64_t>(count, 0);
    const bool text = sequence.is_string();
    const size_t size = text ? sequence.text().size() : sequence.list()->items.size();
    if (count > 0 && size > size_t{1} << 30) {
        rt.fail(kTooLarge);
    }
    rt.charge(static_cast<size_t>(std::min<int64_t>(count, int64_t{1} << 30)));
    rt.charge(
        size * static_cast<size_t>(std::min<int64_t>(count, int64_t{1} << 30)) / (text ? 16 : 1)
    );
    if (text) {
        std::string out;
        for (int64_t i = 0; i < count; ++i) {
            out += sequence.text();
        }
        return Value::string(std::move(out));
    }
    std::vector<Value> items;
    for (int64_t i = 0; i < count; ++i) {
        const std::vector<Value>& once = sequence.list()->items;
        items.insert(items.end(), once.begin(), once.end());
    }
    return make_list(rt, std::move(items), sequence.list()->tuple);
}

int64_t floor_divide(Runtime& rt, int64_t a, int64_t b) {
    if (b == 0) {
        rt.fail("division by zero");
    }
    if (b == -1) {
        int64_t out = 0;
        if (__builtin_sub_overflow(int64_t{0}, a, &out)) {
            rt.fail(kTooLarge);
        }
        return out;
    }
    const int64_t quotient = a / b;
    return a % b != 0 && ((a < 0) != (b < 0)) ? quotient - 1 : quotient;
}

int64_t floor_modulo(Runtime& rt, int64_t a, int64_t b) {
    if (b == 0) {
        rt.fail("division by zero");
    }
    const int64_t rest = b == -1 ? 0 : a % b;
    return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

int64_t power(Runtime& rt, int64_t base, int64_t exponent) {
    int64_t out = 1;
    if (base == 0 || base == 1) {
        return exponent == 0 ? 1 : base;
    }
    if (base == -1) {
        return exponent % 2 == 0 ? 1 : -1;
    }
    for (int64_t i = 0; i < exponent; ++i) {  // at most 63 rounds before it overflows
        if (__builtin_mul_overflow(out, base, &out)) {
            rt.fail(kTooLarge);
        }
    }
    return out;
}

Value whole_operation(Runtime& rt, std::string_view op, int64_t a, int64_t b) {
    int64_t out = 0;
    bool overflow = false;
    if (op == "+") {
        overflow = __builtin_add_overflow(a, b, &out);
    } else if (op == "-") {
        overflow = __builtin_sub_overflow(a, b, &out);
    } else if (op == "*") {
        overflow = __builtin_mul_overflow(a, b, &out);
    } else if (op == "//") {
        out = floor_divide(rt, a, b);
    } else if (op == "%") {
        out = floor_modulo(rt, a, b);
    } else if (op == "**" && b >= 0) {
        out = power(rt, a, b);
    } else if (op == "**") {
        return Value::real(std::pow(static_cast<double>(a), static_cast<double>(b)));
    } else {
        if (b == 0) {
            rt.fail("division by zero");
        }
        return Value::real(static_cast<double>(a) / static_cast<double>(b));
    }
    if (overflow) {
        rt.fail(kTooLarge);
    }
    return Value::integer(out);
}

Value real_operation(Runtime& rt, std::string_view op, double a, double b) {
    if (op == "+") {
        return Value::real(a + b);
    }
    if (op == "-") {
        return Value::real(a - b);
    }
    if (op == "*") {
        return Value::real(a * b);
    }
    if (op == "**") {
        return Value::real(std::pow(a, b));
    }
    if (b == 0.0) {
        rt.fail("division by zero");
    }
    if (op == "/") {
        return Value::real(a / b);
    }
    const double quotient = std::floor(a / b);
    return Value::real(op == "//" ? quotient : a - b * quotient);
}

Value add_lists(Runtime& rt, const List& a, const List& b) {
    std::vector<Value> items = a.items;
    items.insert(items.end(), b.items.begin(), b.items.end());
    return make_list(rt, std::move(items), a.tuple);
}

void require_defined(Runtime& rt, const Value& value) {
    if (const Undefined* undefined = value.as<Undefined>()) {
        rt.fail(undefined->reason != nullptr ? *undefined->reason : "a value is undefined");
    }
}

}  // namespace

Value binary_operation(Runtime& rt, std::string_view op, const Value& a, const Value& b) {
    if (op == "~") {
        return make_text(rt, to_text(rt, a) + to_text(rt, b));
    }
    require_defined(rt, a);
    require_defined(rt, b);
    if (op == "+" && a.is_string() && b.is_string()) {
        return make_text(rt, a.text() + b.text());
    }
    if (op == "+" && a.list() != nullptr && b.list() != nullptr &&
        a.list()->tuple == b.list()->tuple) {
        return add_lists(rt, *a.list(), *b.list());
    }
    if (op == "*" && (a.is_string() || a.list() != nullptr) && is_whole(b)) {
        return repeat(rt, a, to_integer(rt, b, "the factor"));
    }
    if (op == "*" && (b.is_string() || b.list() != nullptr) && is_whole(a)) {
        return repeat(rt, b, to_integer(rt, a, "the factor"));
    }
    if (is_whole(a) && is_whole(b)) {
        return whole_operation(rt, op, to_integer(rt, a, ""), to_integer(rt, b, ""));
    }
    if (a.is_number() && b.is_number()) {
        return real_operation(rt, op, to_double(rt, a, ""), to_double(rt, b, ""));
    }
    rt.fail(fmt::format("{} {} {} is not possible", type_name(a), op, type_name(b)));
}

bool comparison_operation(Runtime& rt, std::string_view op, const Value& a, const Value& b) {
    if (op == "==") {
        return equal(rt, a, b);
    }
    if (op == "!=") {
        return !equal(rt, a, b);
    }
    if (op == "in") {
        return contains(rt, b, a);
    }
    if (op == "not in") {
        return !contains(rt, b, a);
    }
    require_defined(rt, a);
    require_defined(rt, b);
    const int order = compare(rt, a, b);
    if (op == "<") {
        return order < 0;
    }
    if (op == "<=") {
        return order <= 0;
    }
    return op == ">" ? order > 0 : order >= 0;
}

Value negative(Runtime& rt, const Value& value) {
    require_defined(rt, value);
    if (const double* real = value.as<double>()) {
        return Value::real(-*real);
    }
    return whole_operation(rt, "-", 0, to_integer(rt, value, "the operand of '-'"));
}

}  // namespace orbit::jinja
