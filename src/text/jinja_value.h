// Values of the chat-template interpreter, with Python's meaning: what Jinja2 templates compute on.
// Values are immutable and shared, except namespaces. Not thread safe; each render has its own.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "base/error.h"

namespace orbit::jinja {

class Value;
struct Node;
struct Scope;

struct Undefined {
    std::shared_ptr<const std::string> reason;  // for the message when it is used; may be null
};

struct None {};

struct List;
struct Dict;
struct Namespace;
struct Callable;
struct Loop;

// Nesting of lists and dicts that one value may have; it bounds every recursion over values.
constexpr int kMaxValueDepth = 64;

class Value {
  public:
    using Text = std::shared_ptr<const std::string>;
    using ListRef = std::shared_ptr<const List>;
    using DictRef = std::shared_ptr<const Dict>;
    using NamespaceRef = std::shared_ptr<Namespace>;
    using CallableRef = std::shared_ptr<const Callable>;
    using LoopRef = std::shared_ptr<const Loop>;

    Value() = default;

    Value(None value) : data_(value) {}  // NOLINT(google-explicit-constructor)

    Value(ListRef value) : data_(std::move(value)) {}  // NOLINT(google-explicit-constructor)

    Value(DictRef value) : data_(std::move(value)) {}  // NOLINT(google-explicit-constructor)

    Value(NamespaceRef value) : data_(std::move(value)) {}  // NOLINT(google-explicit-constructor)

    Value(CallableRef value) : data_(std::move(value)) {}  // NOLINT(google-explicit-constructor)

    Value(LoopRef value) : data_(std::move(value)) {}  // NOLINT(google-explicit-constructor)

    static Value boolean(bool value) { return Value(Data(value)); }

    static Value integer(int64_t value) { return Value(Data(value)); }

    static Value real(double value) { return Value(Data(value)); }

    static Value string(std::string value) {
        return Value(Data(std::make_shared<const std::string>(std::move(value))));
    }

    static Value undefined(std::string reason) {
        return Value(Data(Undefined{std::make_shared<const std::string>(std::move(reason))}));
    }

    template <typename T>
    const T* as() const {
        return std::get_if<T>(&data_);
    }

    bool is_undefined() const { return as<Undefined>() != nullptr; }

    bool is_none() const { return as<None>() != nullptr; }

    bool is_string() const { return as<Text>() != nullptr; }

    bool is_number() const { return as<bool>() || as<int64_t>() || as<double>(); }

    const std::string& text() const { return **as<Text>(); }

    const List* list() const { return as<ListRef>() ? as<ListRef>()->get() : nullptr; }

    const Dict* dict() const { return as<DictRef>() ? as<DictRef>()->get() : nullptr; }

    Namespace* name_space() const {
        return as<NamespaceRef>() ? as<NamespaceRef>()->get() : nullptr;
    }

    const Callable* callable() const {
        return as<CallableRef>() ? as<CallableRef>()->get() : nullptr;
    }

    const Loop* loop() const { return as<LoopRef>() ? as<LoopRef>()->get() : nullptr; }

    int depth() const;

  private:
    using Data = std::variant<
        Undefined,
        None,
        bool,
        int64_t,
        double,
        Text,
        ListRef,
        DictRef,
        NamespaceRef,
        CallableRef,
        LoopRef>;

    explicit Value(Data data) : data_(std::move(data)) {}

    Data data_;
};

struct List {
    std::vector<Value> items;
    bool tuple = false;
    int depth = 1;
};

// Keeps the order of insertion, as Python does. Look-up is linear: message dicts are small.
struct Dict {
    std::vector<std::pair<Value, Value>> items;
    int depth = 1;

    const Value* find(std::string_view key) const;
};

struct Namespace {
    std::vector<std::pair<std::string, Value>> items;
};

// A method bound to `self`, a macro, or (neither) a global function.
struct Callable {
    std::string name;
    Value self;
    const Node* macro = nullptr;
    Scope* scope = nullptr;  // where the macro was defined
    int depth = 1;
};

// The `loop` variable.
struct Loop {
    std::shared_ptr<const List> items;
    size_t index0 = 0;
};

struct Args {
    std::vector<Value> positional;
    std::vector<std::pair<std::string, Value>> named;

    // Argument `index`, or the one called `name`; nullptr when neither was given.
    const Value* get(size_t index, std::string_view name) const;
};

// What every operation may do besides computing: count its work and fail with the template's line.
// The budget makes sure that no template runs or grows without end.
class Runtime {
  public:
    [[noreturn]] void fail(std::string_view message) const;
    void charge(size_t work);

    void charge_bytes(size_t bytes) { charge(1 + bytes / 16); }

    void set_line(int line) { line_ = line; }

    int line() const { return line_; }

    // One level of evaluation, so that no template exhausts the stack.
    class Nesting {
      public:
        explicit Nesting(Runtime& rt) : rt_(rt) {
            if (++rt.nesting_ > kMaxNesting) {
                --rt.nesting_;
                rt.fail("the template is nested too deeply or calls itself without end");
            }
        }

        ~Nesting() { --rt_.nesting_; }

        Nesting(const Nesting&) = delete;
        Nesting& operator=(const Nesting&) = delete;

      private:
        static constexpr int kMaxNesting = 400;
        Runtime& rt_;
    };

  private:
    int line_ = 1;
    int nesting_ = 0;
    int64_t work_left_ = 20'000'000;
};

Value make_list(Runtime& rt, std::vector<Value> items, bool tuple = false);
Value make_dict(Runtime& rt, std::vector<std::pair<Value, Value>> items);
Value make_text(Runtime& rt, std::string text);
Value bound_method(Runtime& rt, const Value& self, std::string_view name);

// Python's view of a value.
std::string_view type_name(const Value& value);
bool truth(const Value& value);
bool equal(Runtime& rt, const Value& a, const Value& b);
int compare(Runtime& rt, const Value& a, const Value& b);  // fails for types without an order
bool contains(Runtime& rt, const Value& container, const Value& item);
std::string to_text(Runtime& rt, const Value& value);  // str(value); "" for an undefined one
std::string repr(Runtime& rt, const Value& value);
std::vector<Value> iterate(Runtime& rt, const Value& value);
int64_t length_of(Runtime& rt, const Value& value);
// Bool, int or float as double. `what` stands in the message when it is none.
double to_double(Runtime& rt, const Value& value, std::string_view what);
int64_t to_integer(Runtime& rt, const Value& value, std::string_view what);
const std::string& to_string_ref(Runtime& rt, const Value& value, std::string_view what);

struct JsonStyle {
    int indent = -1;  // -1: on one line
    bool ascii = false;
    bool sort_keys = false;
    std::string item_separator = ", ";
    std::string key_separator = ": ";
};

std::string to_json(Runtime& rt, const Value& value, const JsonStyle& style);

// `value.name` and `value[key]`; undefined when there is no such thing.
Value attribute(Runtime& rt, const Value& value, const std::string& name);
Value item(Runtime& rt, const Value& value, const Value& key);
Value slice(
    Runtime& rt, const Value& value, const Value& begin, const Value& end, const Value& step
);

bool has_method(const Value& self, std::string_view name);
Value call_method(Runtime& rt, const Value& self, std::string_view name, const Args& args);
Value apply_filter(Runtime& rt, std::string_view name, const Value& value, const Args& args);
bool apply_test(Runtime& rt, std::string_view name, const Value& value, const Args& args);
bool is_filter(std::string_view name);
bool is_test(std::string_view name);

}  // namespace orbit::jinja
