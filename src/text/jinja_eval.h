// Runs a parsed chat template.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "text/jinja_ast.h"

namespace orbit::jinja {

using Globals = std::vector<std::pair<std::string, Value>>;

// The rendered text. `rt` holds the budget; UserError with the line of what went wrong.
std::string render_template(const Node& root, const Globals& globals, Runtime& rt);

}  // namespace orbit::jinja
