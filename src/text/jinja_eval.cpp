#include "text/jinja_eval.h"

#include <array>
#include <ctime>
#include <unordered_map>

#include "text/jinja_operators.h"

namespace orbit::jinja {

struct Scope {
    std::unordered_map<std::string, Value> names;
    Scope* parent = nullptr;
    bool kept = false;  // a macro defined here looks its names up later
};

namespace {

enum class Flow { kNext, kBreak, kContinue };

constexpr int64_t kMaxRange = 100'000;  // of Jinja's sandbox

std::string local_time(Runtime& rt, const std::string& format) {
    if (format.empty()) {
        return "";
    }
    const std::time_t now = std::time(nullptr);
    std::tm fields{};
    localtime_r(&now, &fields);
    std::array<char, 512> text{};
    const size_t length = std::strftime(text.data(), text.size(), format.c_str(), &fields);
    if (length == 0) {
        rt.fail("strftime_now: the format gives no text or too long a text");
    }
    return {text.data(), length};
}

class Evaluator {
  public:
    Evaluator(Runtime& rt, const Globals& globals) : rt_(rt) {
        for (const char* name : {"range", "dict", "namespace", "raise_exception", "strftime_now"}) {
            Callable function;
            function.name = name;
            top_.names[name] = Value(std::make_shared<const Callable>(std::move(function)));
        }
        for (const auto& [name, value] : globals) {
            top_.names[name] = value;
        }
    }

    ~Evaluator() {
        // A namespace may hold itself; emptying all of them breaks such rings.
        for (const Value::NamespaceRef& space : namespaces_) {
            space->items.clear();
        }
    }

    Evaluator(const Evaluator&) = delete;
    Evaluator& operator=(const Evaluator&) = delete;

    std::string run(const Node& root) {
        std::string text;
        out_ = &text;
        run_statement(root);
        return text;
    }

  private:
    // A scope of its own for the lifetime of the object.
    class ScopeFrame {
      public:
        ScopeFrame(Evaluator& owner, Scope* parent)
            : owner_(owner), before_(owner.scope_), scope_(std::make_unique<Scope>()) {
            scope_->parent = parent;
            owner_.scope_ = scope_.get();
        }

        ~ScopeFrame() {
            owner_.scope_ = before_;
            if (scope_->kept) {
                owner_.kept_scopes_.push_back(std::move(scope_));
            }
        }

        ScopeFrame(const ScopeFrame&) = delete;
        ScopeFrame& operator=(const ScopeFrame&) = delete;

      private:
        Evaluator& owner_;
        Scope* before_;
        std::unique_ptr<Scope> scope_;
    };

    // Statements.
    Flow run_statement(const Node& node);
    Flow run_block(const Node& node);
    Flow run_if(const Node& node);
    Flow run_for(const Node& node);
    Flow run_with(const Node& node);
    void run_macro(const Node& node);
    void run_call_block(const Node& node);
    void run_filter_block(const Node& node);
    void run_set_block(const Node& node);
    std::vector<Value> loop_items(const Node& node);
    std::string capture(const Node& body);
    Value filtered(const Node& chain, std::string text);
    void write(std::string_view text);

    void set_name(const std::string& name, Value value) {
        scope_->names.insert_or_assign(name, std::move(value));
    }

    void assign(const Node& target, const Value& value);
    Value look_up(const std::string& name) const;

    // Expressions.
    Value evaluate(const Node& node);
    Value evaluate_dict(const Node& node);
    Value evaluate_compare(const Node& node);
    Value evaluate_condition(const Node& node);
    Value evaluate_call(const Node& node);
    std::vector<Value> evaluate_children(const Node& node);
    Args evaluate_args(const std::vector<Argument>& arguments);
    Value call(const Value& callee, Args args);
    Value call_macro(const Callable& macro, Args& args);
    Value call_global(const std::string& name, const Args& args);
    Value make_range(const Args& args);
    Value make_namespace(const Args& args);
    Value dict_of(const Args& args);

    Runtime& rt_;
    Scope top_;
    Scope* scope_ = &top_;
    std::vector<std::unique_ptr<Scope>> kept_scopes_;
    std::vector<Value::NamespaceRef> namespaces_;
    Value captured_;
    std::string* out_ = nullptr;
};

void Evaluator::write(std::string_view text) {
    rt_.charge_bytes(text.size());
    *out_ += text;
}

Flow Evaluator::run_statement(const Node& node) {
    const Runtime::Nesting nesting(rt_);
    rt_.set_line(node.line);
    rt_.charge(1);
    switch (node.kind) {
        case NodeKind::kText:
            write(node.text);
            return Flow::kNext;
        case NodeKind::kOutput:
            write(to_text(rt_, evaluate(*node.children[0])));
            return Flow::kNext;
        case NodeKind::kBlock:
            return run_block(node);
        case NodeKind::kIf:
            return run_if(node);
        case NodeKind::kFor:
            return run_for(node);
        case NodeKind::kSet:
            assign(*node.children[0], evaluate(*node.children[1]));
            return Flow::kNext;
        case NodeKind::kSetBlock:
            run_set_block(node);
            return Flow::kNext;
        case NodeKind::kMacro:
            run_macro(node);
            return Flow::kNext;
        case NodeKind::kCallBlock:
            run_call_block(node);
            return Flow::kNext;
        case NodeKind::kFilterBlock:
            run_filter_block(node);
            return Flow::kNext;
        case NodeKind::kWith:
            return run_with(node);
        case NodeKind::kBreak:
            return Flow::kBreak;
        case NodeKind::kContinue:
            return Flow::kContinue;
        default:
            CHECK(false, "an expression is no statement");
    }
    return Flow::kNext;
}

Flow Evaluator::run_block(const Node& node) {
    for (const NodePtr& child : node.children) {
        const Flow flow = run_statement(*child);
        if (flow != Flow::kNext) {
            return flow;
        }
    }
    return Flow::kNext;
}

Flow Evaluator::run_if(const Node& node) {
    size_t at = 0;
    for (; at + 1 < node.children.size(); at += 2) {
        if (truth(evaluate(*node.children[at]))) {
            return run_statement(*node.children[at + 1]);
        }
    }
    return at < node.children.size() ? run_statement(*node.children[at]) : Flow::kNext;
}

// The items that a loop visits: those for which its `if` holds.
std::vector<Value> Evaluator::loop_items(const Node& node) {
    std::vector<Value> items = iterate(rt_, evaluate(*node.children[1]));
    if (node.condition == nullptr) {
        return items;
    }
    std::vector<Value> kept;
    for (const Value& each : items) {
        const ScopeFrame frame(*this, scope_);
        assign(*node.children[0], each);
        if (truth(evaluate(*node.condition))) {
            kept.push_back(each);
        }
    }
    return kept;
}

Flow Evaluator::run_for(const Node& node) {
    const Value items = make_list(rt_, loop_items(node));
    const size_t count = items.list()->items.size();
    if (count == 0 && node.otherwise != nullptr) {
        const ScopeFrame frame(*this, scope_);
        return run_statement(*node.otherwise);
    }
    for (size_t i = 0; i < count; ++i) {
        const ScopeFrame frame(*this, scope_);
        rt_.charge(8);
        Loop loop;
        loop.items = *items.as<Value::ListRef>();
        loop.index0 = i;
        set_name("loop", Value(std::make_shared<const Loop>(std::move(loop))));
        assign(*node.children[0], items.list()->items[i]);
        if (run_statement(*node.children[2]) == Flow::kBreak) {
            break;
        }
    }
    return Flow::kNext;
}

Flow Evaluator::run_with(const Node& node) {
    Args values = evaluate_args(node.args);
    const ScopeFrame frame(*this, scope_);
    for (auto& [name, value] : values.named) {
        set_name(name, std::move(value));
    }
    return run_statement(*node.children[0]);
}

std::string Evaluator::capture(const Node& body) {
    const ScopeFrame frame(*this, scope_);
    std::string text;
    std::string* before = out_;
    out_ = &text;
    run_statement(body);
    out_ = before;
    return text;
}

Value Evaluator::filtered(const Node& chain, std::string text) {
    // The chain may call a macro that captures text of its own; its kCaptured comes first, though.
    captured_ = Value::string(std::move(text));
    return evaluate(chain);
}

void Evaluator::run_filter_block(const Node& node) {
    write(to_text(rt_, filtered(*node.children[0], capture(*node.children[1]))));
}

void Evaluator::run_set_block(const Node& node) {
    assign(*node.children[0], filtered(*node.children[1], capture(*node.children[2])));
}

void Evaluator::run_macro(const Node& node) {
    Callable macro;
    macro.name = node.text;
    macro.macro = &node;
    macro.scope = scope_;
    scope_->kept = true;
    rt_.charge(32);
    set_name(node.text, Value(std::make_shared<const Callable>(std::move(macro))));
}

void Evaluator::run_call_block(const Node& node) {
    const Node& call_node = *node.children[0];
    Callable caller;
    caller.name = "caller";
    caller.macro = &node;
    caller.scope = scope_;
    scope_->kept = true;
    const Value callee = evaluate(*call_node.children[0]);
    Args args = evaluate_args(call_node.args);
    args.named.emplace_back("caller", Value(std::make_shared<const Callable>(std::move(caller))));
    write(to_text(rt_, call(callee, std::move(args))));
}

void Evaluator::assign(const Node& target, const Value& value) {
    if (target.kind == NodeKind::kName) {
        set_name(target.text, value);
        return;
    }
    if (target.kind == NodeKind::kAttribute) {
        const Value owner = look_up(target.children[0]->text);
        Namespace* space = owner.name_space();
        if (space == nullptr) {
            rt_.fail(fmt::format(
                "'{}' is no namespace, so its attribute cannot be set", target.children[0]->text
            ));
        }
        rt_.charge(1 + space->items.size());
        for (auto& [name, held] : space->items) {
            if (name == target.text) {
                held = value;
                return;
            }
        }
        space->items.emplace_back(target.text, value);
        return;
    }
    const std::vector<Value> parts = iterate(rt_, value);
    if (parts.size() != target.children.size()) {
        rt_.fail(fmt::format(
            "{} values cannot be unpacked into {} names", parts.size(), target.children.size()
        ));
    }
    for (size_t i = 0; i < parts.size(); ++i) {
        assign(*target.children[i], parts[i]);
    }
}

Value Evaluator::look_up(const std::string& name) const {
    for (const Scope* scope = scope_; scope != nullptr; scope = scope->parent) {
        const auto it = scope->names.find(name);
        if (it != scope->names.end()) {
            return it->second;
        }
    }
    return Value::undefined(fmt::format("'{}' is undefined", name));
}

Value Evaluator::evaluate(const Node& node) {
    const Runtime::Nesting nesting(rt_);
    rt_.charge(1);
    rt_.set_line(node.line);
    const auto child = [&](size_t i) { return evaluate(*node.children[i]); };
    switch (node.kind) {
        case NodeKind::kLiteral:
            return node.value;
        case NodeKind::kName:
            return look_up(node.text);
        case NodeKind::kCaptured:
            return captured_;
        case NodeKind::kList:
        case NodeKind::kTuple:
            return make_list(rt_, evaluate_children(node), node.kind == NodeKind::kTuple);
        case NodeKind::kDict:
            return evaluate_dict(node);
        case NodeKind::kNot:
            return Value::boolean(!truth(child(0)));
        case NodeKind::kNegative:
            return negative(rt_, child(0));
        case NodeKind::kPositive:
            return child(0);
        case NodeKind::kBinary: {
            const Value left = child(0);
            return binary_operation(rt_, node.text, left, child(1));
        }
        case NodeKind::kAnd:
        case NodeKind::kOr: {
            Value left = child(0);
            return truth(left) == (node.kind == NodeKind::kAnd) ? child(1) : left;
        }
        case NodeKind::kCompare:
            return evaluate_compare(node);
        case NodeKind::kCondition:
            return evaluate_condition(node);
        case NodeKind::kFilter: {
            const Value value = child(0);
            return apply_filter(rt_, node.text, value, evaluate_args(node.args));
        }
        case NodeKind::kTest: {
            const Value value = child(0);
            const Args args = evaluate_args(node.args);
            return Value::boolean(apply_test(rt_, node.text, value, args) != node.flag);
        }
        case NodeKind::kCall:
            return evaluate_call(node);
        case NodeKind::kAttribute:
            return attribute(rt_, child(0), node.text);
        case NodeKind::kItem: {
            const Value value = child(0);
            return item(rt_, value, child(1));
        }
        case NodeKind::kSlice: {
            const std::vector<Value> parts = evaluate_children(node);
            return slice(rt_, parts[0], parts[1], parts[2], parts[3]);
        }
        default:
            CHECK(false, "a statement is no expression");
    }
    return {};
}

std::vector<Value> Evaluator::evaluate_children(const Node& node) {
    std::vector<Value> values;
    values.reserve(node.children.size());
    for (const NodePtr& child : node.children) {
        values.push_back(evaluate(*child));
    }
    return values;
}

Value Evaluator::evaluate_dict(const Node& node) {
    std::vector<std::pair<Value, Value>> items;
    for (size_t i = 0; i + 1 < node.children.size(); i += 2) {
        Value key = evaluate(*node.children[i]);
        Value value = evaluate(*node.children[i + 1]);
        bool replaced = false;
        for (auto& [held_key, held] : items) {
            if (equal(rt_, held_key, key)) {
                held = value;
                replaced = true;
            }
        }
        if (!replaced) {
            items.emplace_back(std::move(key), std::move(value));
        }
    }
    return make_dict(rt_, std::move(items));
}

Value Evaluator::evaluate_compare(const Node& node) {
    Value left = evaluate(*node.children[0]);
    for (size_t i = 0; i < node.operators.size(); ++i) {
        Value right = evaluate(*node.children[i + 1]);
        if (!comparison_operation(rt_, node.operators[i], left, right)) {
            return Value::boolean(false);
        }
        left = std::move(right);
    }
    return Value::boolean(true);
}

Value Evaluator::evaluate_condition(const Node& node) {
    if (truth(evaluate(*node.children[1]))) {
        return evaluate(*node.children[0]);
    }
    return node.otherwise != nullptr
               ? evaluate(*node.otherwise)
               : Value::undefined("an 'if' without 'else' has no value when it does not hold");
}

Args Evaluator::evaluate_args(const std::vector<Argument>& arguments) {
    Args args;
    for (const Argument& argument : arguments) {
        Value value = evaluate(*argument.value);
        if (argument.name.empty()) {
            args.positional.push_back(std::move(value));
        } else {
            args.named.emplace_back(argument.name, std::move(value));
        }
    }
    return args;
}

Value Evaluator::evaluate_call(const Node& node) {
    const Value callee = evaluate(*node.children[0]);
    Args args = evaluate_args(node.args);
    rt_.set_line(node.line);
    return call(callee, std::move(args));
}

Value Evaluator::call(const Value& callee, Args args) {
    if (const Undefined* undefined = callee.as<Undefined>()) {
        rt_.fail(
            undefined->reason != nullptr ? *undefined->reason : "an undefined value is called"
        );
    }
    const Callable* function = callee.callable();
    if (function == nullptr) {
        rt_.fail(fmt::format("a value of type {} cannot be called", type_name(callee)));
    }
    if (function->macro != nullptr) {
        return call_macro(*function, args);
    }
    return function->self.is_undefined() ? call_global(function->name, args)
                                         : call_method(rt_, function->self, function->name, args);
}

Value Evaluator::call_macro(const Callable& macro, Args& args) {
    const Node& node = *macro.macro;
    const bool caller_block = node.kind == NodeKind::kCallBlock;
    const ScopeFrame frame(*this, macro.scope);
    size_t next = 0;
    for (const Argument& parameter : node.args) {
        Value value = Value::undefined(fmt::format("parameter '{}' was not given", parameter.name));
        const Value* given = args.get(next++, parameter.name);
        if (given != nullptr) {
            value = *given;
        } else if (parameter.value != nullptr) {
            value = evaluate(*parameter.value);
        }
        set_name(parameter.name, std::move(value));
    }
    std::vector<Value> extra;
    for (size_t i = node.args.size(); i < args.positional.size(); ++i) {
        extra.push_back(args.positional[i]);
    }
    set_name("varargs", make_list(rt_, std::move(extra), true));
    for (const auto& [name, value] : args.named) {
        if (name == "caller") {
            set_name(name, value);
        }
    }
    return make_text(rt_, capture(*node.children[caller_block ? 1 : 0]));
}

Value Evaluator::call_global(const std::string& name, const Args& args) {
    if (name == "range") {
        return make_range(args);
    }
    if (name == "namespace") {
        return make_namespace(args);
    }
    if (name == "dict") {
        return dict_of(args);
    }
    const Value* text = args.get(0, name == "raise_exception" ? "message" : "format");
    const std::string shown = text == nullptr ? "" : to_text(rt_, *text);
    if (name == "raise_exception") {
        rt_.fail(fmt::format("the template refuses these messages ({})", shown));
    }
    return make_text(rt_, local_time(rt_, shown));
}

Value Evaluator::make_range(const Args& args) {
    std::array<int64_t, 3> bounds = {0, 0, 1};
    const size_t count = args.positional.size();
    if (count == 0 || count > 3) {
        rt_.fail("range takes one to three whole numbers");
    }
    for (size_t i = 0; i < count; ++i) {
        bounds[count == 1 ? 1 : i] = to_integer(rt_, args.positional[i], "an argument of range");
    }
    const auto [begin, end, step] = bounds;
    if (step == 0) {
        rt_.fail("the step of range cannot be zero");
    }
    std::vector<Value> items;
    for (int64_t at = begin; step > 0 ? at < end : at > end;) {
        if (static_cast<int64_t>(items.size()) == kMaxRange) {
            rt_.fail(fmt::format("range gives more than {} numbers", kMaxRange));
        }
        items.push_back(Value::integer(at));
        if (__builtin_add_overflow(at, step, &at)) {
            break;
        }
    }
    return make_list(rt_, std::move(items));
}

Value Evaluator::dict_of(const Args& args) {
    std::vector<std::pair<Value, Value>> items;
    if (!args.positional.empty() && args.positional[0].dict() != nullptr) {
        items = args.positional[0].dict()->items;
    }
    for (const auto& [name, value] : args.named) {
        const Value key = make_text(rt_, name);
        bool replaced = false;
        for (auto& [held_key, held] : items) {
            if (equal(rt_, held_key, key)) {
                held = value;
                replaced = true;
            }
        }
        if (!replaced) {
            items.emplace_back(key, value);
        }
    }
    return make_dict(rt_, std::move(items));
}

Value Evaluator::make_namespace(const Args& args) {
    rt_.charge(64);
    auto space = std::make_shared<Namespace>();
    const Value fields = dict_of(args);
    for (const auto& [name, value] : fields.dict()->items) {
        space->items.emplace_back(to_text(rt_, name), value);
    }
    namespaces_.push_back(space);
    return Value(space);
}

}  // namespace

std::string render_template(const Node& root, const Globals& globals, Runtime& rt) {
    return Evaluator(rt, globals).run(root);
}

}  // namespace orbit::jinja
