// Recursive descent over the tokens of a chat template; the grammar and its precedence are
// Jinja2's.
#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>

#include "text/jinja_ast.h"
#include "text/jinja_lexer.h"

namespace orbit::jinja {

namespace {

constexpr int kMaxTreeDepth = 120;
constexpr size_t kMaxSourceBytes = size_t{1} << 20;

class Parser {
  public:
    explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

    NodePtr run() {
        NodePtr block = statements({});
        if (current().kind != TokenKind::kEnd) {
            fail("this tag closes nothing");
        }
        return block;
    }

  private:
    // Guards the recursion of the parser itself, before any tree exists to be measured.
    struct Level {
        explicit Level(Parser& owner) : parser(owner) {
            if (++parser.level_ > kMaxTreeDepth) {
                parser.fail("the template is nested too deeply");
            }
        }

        ~Level() { --parser.level_; }

        Level(const Level&) = delete;
        Level& operator=(const Level&) = delete;

        Parser& parser;
    };

    [[noreturn]] void fail(std::string_view message) const {
        throw UserError(fmt::format("Chat template, line {}: {}.", current().line, message));
    }

    const Token& current() const { return tokens_[at_]; }

    const Token& ahead() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }

    bool is_op(std::string_view text) const {
        return current().kind == TokenKind::kOperator && current().text == text;
    }

    bool is_name(std::string_view text) const {
        return current().kind == TokenKind::kName && current().text == text;
    }

    bool skip_op(std::string_view text) {
        const bool found = is_op(text);
        at_ += found ? 1 : 0;
        return found;
    }

    bool skip_name(std::string_view text) {
        const bool found = is_name(text);
        at_ += found ? 1 : 0;
        return found;
    }

    void expect_op(std::string_view text) {
        if (!skip_op(text)) {
            fail(fmt::format("'{}' is expected", text));
        }
    }

    void expect_name(std::string_view text) {
        if (!skip_name(text)) {
            fail(fmt::format("'{}' is expected", text));
        }
    }

    std::string take_name(std::string_view what) {
        if (current().kind != TokenKind::kName) {
            fail(fmt::format("{} is expected", what));
        }
        return tokens_[at_++].text;
    }

    void expect_block_end() {
        if (current().kind != TokenKind::kBlockEnd) {
            fail("the end of the tag is expected");
        }
        ++at_;
    }

    NodePtr node(NodeKind kind, std::string text = "") const {
        auto out = std::make_unique<Node>();
        out->kind = kind;
        out->line = current().line;
        out->text = std::move(text);
        return out;
    }

    NodePtr literal(Value value) const {
        NodePtr out = node(NodeKind::kLiteral);
        out->value = std::move(value);
        return out;
    }

    // Measures a complete node. Evaluation and destruction recurse over the tree.
    NodePtr closed(NodePtr tree) const {
        const auto include = [&tree](const NodePtr& child) {
            if (child != nullptr) {
                tree->depth = std::max(tree->depth, child->depth + 1);
            }
        };
        std::for_each(tree->children.begin(), tree->children.end(), include);
        for (const Argument& arg : tree->args) {
            include(arg.value);
        }
        include(tree->condition);
        include(tree->otherwise);
        if (tree->depth > kMaxTreeDepth) {
            fail("the template is nested too deeply");
        }
        return tree;
    }

    NodePtr with_children(NodePtr tree, NodePtr first, NodePtr second = nullptr) const {
        tree->children.push_back(std::move(first));
        if (second != nullptr) {
            tree->children.push_back(std::move(second));
        }
        return closed(std::move(tree));
    }

    // Statements.
    NodePtr statements(std::initializer_list<std::string_view> ends);
    NodePtr body(std::initializer_list<std::string_view> ends);
    NodePtr statement();
    NodePtr if_statement();
    NodePtr for_statement();
    NodePtr set_statement();
    NodePtr macro_statement();
    NodePtr call_statement();
    NodePtr filter_statement();
    NodePtr with_statement();
    NodePtr target(bool allow_attribute);
    std::vector<Argument> parameters();

    // Expressions.
    NodePtr tuple(bool with_condition = true);
    NodePtr expression(bool with_condition = true);
    NodePtr or_expression();
    NodePtr and_expression();
    NodePtr not_expression();
    NodePtr comparison();
    std::optional<std::string> comparison_operator();
    NodePtr binary(size_t level);
    NodePtr unary(bool with_filter);
    NodePtr primary();
    NodePtr name_or_constant();
    NodePtr string_literal();
    NodePtr parenthesis();
    NodePtr list();
    NodePtr dict();
    NodePtr postfix(NodePtr value);
    NodePtr subscript(NodePtr value);
    NodePtr filters(NodePtr value);
    NodePtr filter(NodePtr value);
    NodePtr test(NodePtr value);
    NodePtr call(NodePtr callee);
    std::vector<Argument> arguments();

    std::vector<Token> tokens_;
    size_t at_ = 0;
    int level_ = 0;
};

// Up to a block tag that is one of `ends` (left for the caller) or the end of the template.
NodePtr Parser::statements(std::initializer_list<std::string_view> ends) {
    const Level level(*this);
    NodePtr block = node(NodeKind::kBlock);
    while (current().kind != TokenKind::kEnd) {
        if (current().kind == TokenKind::kData) {
            block->children.push_back(node(NodeKind::kText, current().text));
            ++at_;
        } else if (current().kind == TokenKind::kOutputBegin) {
            ++at_;
            NodePtr output = node(NodeKind::kOutput);
            block->children.push_back(with_children(std::move(output), tuple()));
            if (current().kind != TokenKind::kOutputEnd) {
                fail("'}}' is expected");
            }
            ++at_;
        } else {
            const bool ends_here =
                std::find(ends.begin(), ends.end(), ahead().text) != ends.end() ||
                (ends.size() == 0 && ahead().text.starts_with("end"));
            if (ends_here && ahead().kind == TokenKind::kName) {
                break;
            }
            ++at_;
            block->children.push_back(statement());
        }
    }
    return closed(std::move(block));
}

// The rest of the opening tag, the statements, and the "{%" of the tag that ends them.
NodePtr Parser::body(std::initializer_list<std::string_view> ends) {
    expect_block_end();
    const int line = current().line;
    NodePtr block = statements(ends);
    if (current().kind == TokenKind::kEnd) {
        throw UserError(fmt::format(
            "Chat template, line {}: the block is not closed with '{}'.", line, *(ends.end() - 1)
        ));
    }
    ++at_;
    return block;
}

NodePtr Parser::statement() {
    const std::string name = take_name("the name of a tag");
    --at_;
    if (name == "if") {
        return if_statement();
    }
    if (name == "for") {
        return for_statement();
    }
    if (name == "set") {
        return set_statement();
    }
    if (name == "macro") {
        return macro_statement();
    }
    if (name == "call") {
        return call_statement();
    }
    if (name == "filter") {
        return filter_statement();
    }
    if (name == "with") {
        return with_statement();
    }
    ++at_;
    if (name == "break" || name == "continue") {
        NodePtr out = node(name == "break" ? NodeKind::kBreak : NodeKind::kContinue);
        expect_block_end();
        return out;
    }
    if (name == "generation") {  // marks assistant text for training; renders as it is
        NodePtr out = body({"endgeneration"});
        ++at_;
        expect_block_end();
        return out;
    }
    fail(fmt::format("the tag '{}' is not supported", name));
}

NodePtr Parser::if_statement() {
    NodePtr out = node(NodeKind::kIf);
    do {
        ++at_;  // "if" or "elif"
        out->children.push_back(tuple(false));
        out->children.push_back(body({"elif", "else", "endif"}));
    } while (is_name("elif"));
    if (skip_name("else")) {
        out->children.push_back(body({"endif"}));
    }
    expect_name("endif");
    expect_block_end();
    return closed(std::move(out));
}

NodePtr Parser::for_statement() {
    NodePtr out = node(NodeKind::kFor);
    ++at_;
    out->children.push_back(target(false));
    expect_name("in");
    out->children.push_back(tuple(false));
    if (skip_name("if")) {
        out->condition = expression();
    }
    if (is_name("recursive")) {
        fail("recursive loops are not supported");
    }
    out->children.push_back(body({"else", "endfor"}));
    if (skip_name("else")) {
        out->otherwise = body({"endfor"});
    }
    expect_name("endfor");
    expect_block_end();
    return closed(std::move(out));
}

NodePtr Parser::set_statement() {
    NodePtr out = node(NodeKind::kSet);
    ++at_;
    out->children.push_back(target(true));
    if (skip_op("=")) {
        out->children.push_back(tuple());
        expect_block_end();
        return closed(std::move(out));
    }
    out->kind = NodeKind::kSetBlock;
    NodePtr captured = node(NodeKind::kCaptured);
    out->children.push_back(filters(std::move(captured)));
    out->children.push_back(body({"endset"}));
    expect_name("endset");
    expect_block_end();
    return closed(std::move(out));
}

NodePtr Parser::macro_statement() {
    ++at_;
    NodePtr out = node(NodeKind::kMacro);
    out->text = take_name("the name of the macro");
    out->args = parameters();
    out->children.push_back(body({"endmacro"}));
    expect_name("endmacro");
    expect_block_end();
    return closed(std::move(out));
}

NodePtr Parser::call_statement() {
    ++at_;
    NodePtr out = node(NodeKind::kCallBlock);
    if (is_op("(")) {
        out->args = parameters();
    }
    out->children.push_back(expression());
    if (out->children[0]->kind != NodeKind::kCall) {
        fail("'call' needs a call of a macro");
    }
    out->children.push_back(body({"endcall"}));
    expect_name("endcall");
    expect_block_end();
    return closed(std::move(out));
}

NodePtr Parser::filter_statement() {
    ++at_;
    NodePtr out = node(NodeKind::kFilterBlock);
    NodePtr captured = node(NodeKind::kCaptured);
    out->children.push_back(filters(filter(std::move(captured))));
    out->children.push_back(body({"endfilter"}));
    expect_name("endfilter");
    expect_block_end();
    return closed(std::move(out));
}

NodePtr Parser::with_statement() {
    ++at_;
    NodePtr out = node(NodeKind::kWith);
    while (current().kind != TokenKind::kBlockEnd) {
        if (!out->args.empty()) {
            expect_op(",");
        }
        Argument arg;
        arg.name = take_name("a name");
        expect_op("=");
        arg.value = expression();
        out->args.push_back(std::move(arg));
    }
    out->children.push_back(body({"endwith"}));
    expect_name("endwith");
    expect_block_end();
    return closed(std::move(out));
}

// A name, name.attribute of a namespace, or several names.
NodePtr Parser::target(bool allow_attribute) {
    const Level level(*this);
    std::vector<NodePtr> names;
    bool several = false;
    while (current().kind == TokenKind::kName || is_op("(")) {
        if (skip_op("(")) {
            names.push_back(target(false));
            expect_op(")");
        } else {
            NodePtr name = node(NodeKind::kName);
            name->text = take_name("a name");
            names.push_back(std::move(name));
        }
        if (!skip_op(",")) {
            break;
        }
        several = true;
    }
    if (names.empty()) {
        fail("a name is expected");
    }
    if (several) {
        NodePtr out = node(NodeKind::kTuple);
        out->children = std::move(names);
        return closed(std::move(out));
    }
    if (allow_attribute && names[0]->kind == NodeKind::kName && skip_op(".")) {
        NodePtr out = node(NodeKind::kAttribute);
        out->text = take_name("the name of an attribute");
        return with_children(std::move(out), std::move(names[0]));
    }
    return std::move(names[0]);
}

std::vector<Argument> Parser::parameters() {
    std::vector<Argument> out;
    expect_op("(");
    while (!is_op(")")) {
        if (!out.empty()) {
            expect_op(",");
        }
        Argument arg;
        arg.name = take_name("the name of a parameter");
        if (skip_op("=")) {
            arg.value = expression();
        }
        out.push_back(std::move(arg));
    }
    expect_op(")");
    return out;
}

NodePtr Parser::tuple(bool with_condition) {
    NodePtr first = expression(with_condition);
    if (!is_op(",")) {
        return first;
    }
    NodePtr out = node(NodeKind::kTuple);
    out->children.push_back(std::move(first));
    while (skip_op(",")) {
        const bool end = is_op(")") || current().kind == TokenKind::kBlockEnd ||
                         current().kind == TokenKind::kOutputEnd;
        if (end) {
            break;
        }
        out->children.push_back(expression(with_condition));
    }
    return closed(std::move(out));
}

NodePtr Parser::expression(bool with_condition) {
    const Level level(*this);
    NodePtr value = or_expression();
    while (with_condition && skip_name("if")) {
        NodePtr out = node(NodeKind::kCondition);
        NodePtr condition = or_expression();
        out = with_children(std::move(out), std::move(value), std::move(condition));
        if (skip_name("else")) {
            out->otherwise = expression();
        }
        value = closed(std::move(out));
    }
    return value;
}

NodePtr Parser::or_expression() {
    NodePtr left = and_expression();
    while (skip_name("or")) {
        NodePtr out = node(NodeKind::kOr);
        left = with_children(std::move(out), std::move(left), and_expression());
    }
    return left;
}

NodePtr Parser::and_expression() {
    NodePtr left = not_expression();
    while (skip_name("and")) {
        NodePtr out = node(NodeKind::kAnd);
        left = with_children(std::move(out), std::move(left), not_expression());
    }
    return left;
}

NodePtr Parser::not_expression() {
    if (!is_name("not")) {
        return comparison();
    }
    const Level level(*this);
    NodePtr out = node(NodeKind::kNot);
    ++at_;
    return with_children(std::move(out), not_expression());
}

std::optional<std::string> Parser::comparison_operator() {
    for (const std::string_view op : {"==", "!=", "<=", ">=", "<", ">"}) {
        if (skip_op(op)) {
            return std::string(op);
        }
    }
    if (skip_name("in")) {
        return "in";
    }
    if (is_name("not") && ahead().kind == TokenKind::kName && ahead().text == "in") {
        at_ += 2;
        return "not in";
    }
    return std::nullopt;
}

NodePtr Parser::comparison() {
    NodePtr first = binary(0);
    NodePtr out = node(NodeKind::kCompare);
    out->children.push_back(std::move(first));
    while (std::optional<std::string> op = comparison_operator()) {
        out->operators.push_back(std::move(*op));
        out->children.push_back(binary(0));
    }
    return out->operators.empty() ? std::move(out->children[0]) : closed(std::move(out));
}

// Weakest first: + -, then ~, then * / // %, then **.
NodePtr Parser::binary(size_t level) {
    static constexpr std::array<std::array<std::string_view, 4>, 4> kLevels = {{
        {"+", "-", "", ""},
        {"~", "", "", ""},
        {"*", "/", "//", "%"},
        {"**", "", "", ""},
    }};
    if (level == kLevels.size()) {
        return unary(true);
    }
    NodePtr left = binary(level + 1);
    while (true) {
        const auto& operators = kLevels[level];
        const bool found =
            current().kind == TokenKind::kOperator && !current().text.empty() &&
            std::find(operators.begin(), operators.end(), current().text) != operators.end();
        if (!found) {
            return left;
        }
        NodePtr out = node(NodeKind::kBinary, current().text);
        ++at_;
        left = with_children(std::move(out), std::move(left), binary(level + 1));
    }
}

NodePtr Parser::unary(bool with_filter) {
    const Level level(*this);
    NodePtr value;
    if (is_op("-") || is_op("+")) {
        NodePtr out = node(is_op("-") ? NodeKind::kNegative : NodeKind::kPositive);
        ++at_;
        value = with_children(std::move(out), unary(false));
    } else {
        value = primary();
    }
    value = postfix(std::move(value));
    return with_filter ? filters(std::move(value)) : std::move(value);
}

NodePtr Parser::primary() {
    switch (current().kind) {
        case TokenKind::kName:
            return name_or_constant();
        case TokenKind::kString:
            return string_literal();
        case TokenKind::kInteger:
        case TokenKind::kReal: {
            const Token& token = current();
            NodePtr out = literal(
                token.kind == TokenKind::kReal ? Value::real(token.real)
                                               : Value::integer(token.integer)
            );
            ++at_;
            return out;
        }
        default:
            break;
    }
    if (is_op("(")) {
        return parenthesis();
    }
    if (is_op("[")) {
        return list();
    }
    if (is_op("{")) {
        return dict();
    }
    fail("an expression is expected");
}

NodePtr Parser::name_or_constant() {
    const std::string name = current().text;
    NodePtr out = node(NodeKind::kLiteral);
    ++at_;
    if (name == "true" || name == "True") {
        out->value = Value::boolean(true);
    } else if (name == "false" || name == "False") {
        out->value = Value::boolean(false);
    } else if (name == "none" || name == "None") {
        out->value = None{};
    } else {
        out->kind = NodeKind::kName;
        out->text = name;
    }
    return out;
}

NodePtr Parser::string_literal() {
    NodePtr out = node(NodeKind::kLiteral);
    std::string text;
    while (current().kind == TokenKind::kString) {
        text += current().text;
        ++at_;
    }
    out->value = Value::string(std::move(text));
    return out;
}

NodePtr Parser::parenthesis() {
    expect_op("(");
    if (skip_op(")")) {
        return node(NodeKind::kTuple);
    }
    NodePtr out = tuple();
    expect_op(")");
    return out;
}

NodePtr Parser::list() {
    NodePtr out = node(NodeKind::kList);
    expect_op("[");
    while (!is_op("]")) {
        if (!out->children.empty()) {
            expect_op(",");
            if (is_op("]")) {
                break;
            }
        }
        out->children.push_back(expression());
    }
    expect_op("]");
    return closed(std::move(out));
}

NodePtr Parser::dict() {
    NodePtr out = node(NodeKind::kDict);
    expect_op("{");
    while (!is_op("}")) {
        if (!out->children.empty()) {
            expect_op(",");
            if (is_op("}")) {
                break;
            }
        }
        out->children.push_back(expression());
        expect_op(":");
        out->children.push_back(expression());
    }
    expect_op("}");
    return closed(std::move(out));
}

NodePtr Parser::postfix(NodePtr value) {
    while (true) {
        if (is_op(".")) {
            NodePtr out = node(NodeKind::kAttribute);
            ++at_;
            if (current().kind == TokenKind::kInteger) {  // x.0
                out->kind = NodeKind::kItem;
                NodePtr index = literal(Value::integer(current().integer));
                ++at_;
                value = with_children(std::move(out), std::move(value), std::move(index));
                continue;
            }
            out->text = take_name("the name of an attribute");
            value = with_children(std::move(out), std::move(value));
        } else if (is_op("[")) {
            value = subscript(std::move(value));
        } else if (is_op("(")) {
            value = call(std::move(value));
        } else {
            return value;
        }
    }
}

NodePtr Parser::subscript(NodePtr value) {
    NodePtr out = node(NodeKind::kItem);
    expect_op("[");
    out->children.push_back(std::move(value));
    std::array<NodePtr, 3> parts;
    size_t part = 0;
    while (!is_op("]")) {
        if (skip_op(":")) {
            if (++part == parts.size()) {
                fail("a slice has at most three parts");
            }
        } else if (parts[part] == nullptr) {
            parts[part] = expression();
        } else {
            fail("']' is expected");
        }
    }
    expect_op("]");
    if (part == 0) {
        if (parts[0] == nullptr) {
            fail("a key is expected");
        }
        out->children.push_back(std::move(parts[0]));
        return closed(std::move(out));
    }
    out->kind = NodeKind::kSlice;
    for (NodePtr& each : parts) {
        out->children.push_back(each == nullptr ? literal(None{}) : std::move(each));
    }
    return closed(std::move(out));
}

NodePtr Parser::filters(NodePtr value) {
    while (true) {
        if (skip_op("|")) {
            value = filter(std::move(value));
        } else if (is_name("is")) {
            value = test(std::move(value));
        } else if (is_op("(")) {
            value = call(std::move(value));
        } else {
            return value;
        }
    }
}

// At the filter's name.
NodePtr Parser::filter(NodePtr value) {
    NodePtr out = node(NodeKind::kFilter);
    out->text = take_name("the name of a filter");
    if (!is_filter(out->text)) {
        fail(fmt::format("there is no filter named '{}'", out->text));
    }
    if (is_op("(")) {
        out->args = arguments();
    }
    return with_children(std::move(out), std::move(value));
}

NodePtr Parser::test(NodePtr value) {
    NodePtr out = node(NodeKind::kTest);
    expect_name("is");
    out->flag = skip_name("not");
    out->text = take_name("the name of a test");
    if (!is_test(out->text)) {
        fail(fmt::format("there is no test named '{}'", out->text));
    }
    const Token& next = current();
    const bool word = next.kind == TokenKind::kName && next.text != "else" && next.text != "or" &&
                      next.text != "and" && next.text != "is" && next.text != "if" &&
                      next.text != "in" && next.text != "not";
    const bool literal_next = next.kind == TokenKind::kString || next.kind == TokenKind::kInteger ||
                              next.kind == TokenKind::kReal;
    if (is_op("(")) {
        out->args = arguments();
    } else if (word || literal_next || is_op("[") || is_op("{")) {
        const Level level(*this);
        Argument arg;
        arg.value = postfix(primary());
        out->args.push_back(std::move(arg));
    }
    return with_children(std::move(out), std::move(value));
}

NodePtr Parser::call(NodePtr callee) {
    NodePtr out = node(NodeKind::kCall);
    out->args = arguments();
    return with_children(std::move(out), std::move(callee));
}

std::vector<Argument> Parser::arguments() {
    std::vector<Argument> out;
    expect_op("(");
    while (!is_op(")")) {
        if (!out.empty()) {
            expect_op(",");
            if (is_op(")")) {
                break;
            }
        }
        if (is_op("*") || is_op("**")) {
            fail("arguments with * are not supported");
        }
        Argument arg;
        const bool named = current().kind == TokenKind::kName &&
                           ahead().kind == TokenKind::kOperator && ahead().text == "=";
        if (named) {
            arg.name = current().text;
            at_ += 2;
        } else if (!out.empty() && !out.back().name.empty()) {
            fail("an argument without a name follows one with a name");
        }
        arg.value = expression();
        out.push_back(std::move(arg));
    }
    expect_op(")");
    return out;
}

}  // namespace

NodePtr parse_template(std::string_view source) {
    USER_CHECK(
        source.size() <= kMaxSourceBytes,
        "The chat template has {} bytes; at most {} are supported.",
        source.size(),
        kMaxSourceBytes
    );
    return Parser(tokenize_template(source)).run();
}

}  // namespace orbit::jinja
