#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iostream>

#include "base/error.h"
#include "base/log.h"
#include "cli/commands.h"
#include "rl/step.h"
#include "rollout/engine.h"

namespace orbit {
namespace {

constexpr int64_t kChatTokensMax = 8192;  // keys and values that a chat may take

// Prints an answer while it is made, and holds back a token's half character.
struct Printer {
    explicit Printer(const Tokenizer& tokenizer) : decoder(tokenizer) {}

    void push(int32_t id) { print(decoder.push(id)); }

    void finish() { print(decoder.finish() + "\n"); }

    static void print(const std::string& text) {
        std::fwrite(text.data(), 1, text.size(), stdout);
        std::fflush(stdout);
    }

    StreamDecoder decoder;
};

Completion answer(
    RolloutEngine& engine,
    const Model& model,
    const std::vector<int32_t>& prompt,
    const GenerateArgs& args,
    uint64_t turn
) {
    Request request;
    request.prompt = prompt;
    request.request_ids = {turn};
    request.seed = args.seed;
    request.filter = args.filter;
    request.max_tokens = args.max_tokens;
    request.stop = args.stop;
    request.use_adapter = !args.model.adapter.empty();
    Printer printer(*model.tokenizer);
    // With stop strings the text ends before its last tokens do, so it is printed when it is whole.
    const bool stream = args.stop.empty();
    if (stream) {
        engine.on_token = [&](int64_t, int32_t, int32_t id) { printer.push(id); };
    }
    engine.submit(std::move(request));
    std::vector<Completion> done;
    while (done.empty()) {
        engine.step();
        done = engine.take_finished();
    }
    engine.on_token = nullptr;
    if (stream) {
        printer.finish();
    } else {
        Printer::print(response_text(model, done[0].ids, args.stop) + "\n");
    }
    if (done[0].finish == FinishReason::kLength) {
        warn_line(fmt::format(
            "the answer was cut after {} tokens; --max-tokens allows more", done[0].ids.size()
        ));
    }
    return std::move(done[0]);
}

void chat(RolloutEngine& engine, const Model& model, const GenerateArgs& args) {
    const bool terminal = isatty(STDIN_FILENO) != 0;
    log_line("A chat: one line is one message; /new starts over, Ctrl-D ends.");
    std::vector<ChatMessage> messages;
    const auto start_over = [&] {
        messages.clear();
        if (!args.system.empty()) {
            messages.push_back({"system", args.system});
        }
    };
    start_over();
    uint64_t turn = 0;
    for (std::string line;;) {
        if (terminal) {
            fmt::print(stderr, "> ");
        }
        if (!std::getline(std::cin, line)) {
            return;
        }
        if (line == "/new") {
            start_over();
            continue;
        }
        if (line.empty()) {
            continue;
        }
        messages.push_back({"user", line});
        const auto prompt = encode_chat(model, messages, args.raw);
        const Completion done = answer(engine, model, prompt, args, turn++);
        messages.push_back({"assistant", response_text(model, done.ids, args.stop)});
    }
}

}  // namespace

int run_generate(const GenerateArgs& args) {
    OpenModel open(args.model);
    std::vector<int32_t> prompt;
    if (args.has_prompt) {
        std::vector<ChatMessage> messages;
        if (!args.system.empty()) {
            messages.push_back({"system", args.system});
        }
        messages.push_back({"user", args.prompt});
        prompt = encode_chat(*open.model, messages, args.raw);
        USER_CHECK(!prompt.empty(), "--prompt is empty, and with --raw nothing is put around it.");
    }
    EngineOptions options;
    options.max_batch = 1;
    options.kv_tokens = args.has_prompt ? static_cast<int64_t>(prompt.size()) + args.max_tokens
                                        : kChatTokensMax + args.max_tokens;
    options.kv_tokens =
        std::min(options.kv_tokens, open.model->config.max_positions) + 2 * kPageTokens;
    RolloutEngine engine(open.stream, *open.model, open.adapter.get(), options);
    if (args.has_prompt) {
        answer(engine, *open.model, prompt, args, 0);
    } else {
        chat(engine, *open.model, args);
    }
    return 0;
}

}  // namespace orbit
