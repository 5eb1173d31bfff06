// Syntax tree of a chat template.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text/jinja_value.h"

namespace orbit::jinja {

enum class NodeKind {
    // Expressions; operands in `children`, left to right.
    kLiteral,    // value
    kName,       // text
    kList,       // children
    kTuple,      // children
    kDict,       // key, value, key, value, ...
    kNot,        // one child, as the next two
    kNegative,   //
    kPositive,   //
    kBinary,     // text is one of + - * / // % ** ~
    kAnd,        // two children, as kOr
    kOr,         //
    kCompare,    // operands; `operators` between them
    kCondition,  // value, condition, otherwise (may be absent)
    kFilter,     // text(value, args)
    kTest,       // value is text(args); `flag`: is not
    kCall,       // callee; args
    kAttribute,  // value.text
    kItem,       // value[key]
    kSlice,      // value, begin, end, step; kLiteral none where left out
    kCaptured,   // the text captured by the statement around (filter and set blocks)
    // Statements.
    kText,         // text
    kOutput,       // expression
    kBlock,        // statements
    kIf,           // condition, body, condition, body, ..., and the else body when the count is odd
    kFor,          // target, iterable, body, then `condition` and `otherwise`, which may be null
    kSet,          // target, value
    kSetBlock,     // target, filter chain on kCaptured, body
    kMacro,        // text(args with defaults); body
    kCallBlock,    // call, body; args are the parameters of caller()
    kFilterBlock,  // filter chain on kCaptured, body
    kWith,         // args, body
    kBreak,
    kContinue,
};

struct Node;
using NodePtr = std::unique_ptr<Node>;

struct Argument {
    std::string name;  // empty: positional
    NodePtr value;     // null: a parameter without default
};

struct Node {
    NodeKind kind = NodeKind::kBlock;
    int line = 1;
    int depth = 1;  // of the tree below; the parser bounds it
    bool flag = false;
    std::string text;
    Value value;
    std::vector<NodePtr> children;
    std::vector<Argument> args;
    std::vector<std::string> operators;
    NodePtr condition;
    NodePtr otherwise;
};

// UserError with the line of the mistake.
NodePtr parse_template(std::string_view source);

}  // namespace orbit::jinja
