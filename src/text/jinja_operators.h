// Arithmetic of the chat-template interpreter.
#pragma once

#include <string_view>

#include "text/jinja_value.h"

namespace orbit::jinja {

// `op`: + - * / // % ** ~
Value binary_operation(Runtime& rt, std::string_view op, const Value& a, const Value& b);
// `op`: == != < <= > >= in "not in"
bool comparison_operation(Runtime& rt, std::string_view op, const Value& a, const Value& b);
Value negative(Runtime& rt, const Value& value);

}  // namespace orbit::jinja
