// The command line. Each command is described once here: its arguments, and examples to learn from.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <functional>
#include <new>

#include "base/error.h"
#include "cli/commands.h"
#include "run/config.h"

namespace orbit {
namespace {

constexpr int kUserErrorStatus = 2;

using Action = std::function<int()>;

void add_device(CLI::App* app, DeviceArgs& args) {
    app->add_option("--device", args.device, "auto, cpu or cuda:0")->capture_default_str();
    app->add_option("--cpu-isa", args.cpu_isa, "auto, reference, avx2, avx512 or amx")
        ->capture_default_str();
    app->add_option("--threads", args.threads, "worker threads; 0: one per processor")
        ->check(CLI::Range(0, 1024));
}

CLI::Option* add_host_layers(CLI::App* app, int64_t& layers) {
    return app
        ->add_option(
            "--host-layers", layers, "layers, from the last, whose experts stay in host memory"
        )
        ->check(CLI::Range(0, 1 << 16));
}

void add_model(CLI::App* app, ModelArgs& args, bool with_adapter) {
    app->add_option("MODEL", args.model, "Hugging Face folder or GGUF file")->required();
    if (with_adapter) {
        app->add_option("--adapter", args.adapter, "PEFT folder, or the folder of a finished run");
    }
    app->add_option("--quantize", args.quantize, "int4: quantise a BF16 base while loading");
    add_host_layers(app, args.host_layers);
    add_device(app, args.device);
}

// A synthetic model in place of MODEL.
void add_shape(CLI::App* app, std::string& shape, std::string& format) {
    app->add_option("--format", format, "of the synthetic linears: bf16, int4, fp8, mxfp4, nvfp4")
        ->capture_default_str();
    app->add_option("--shape", shape, "a synthetic model of a published shape instead");
}

void add_reward(CLI::App* app, RewardOptions& args) {
    app->add_option("--reward", args.name, "exact, number, regex, format or length")
        ->capture_default_str();
    app->add_option("--reward-command", args.command, "your own reward program instead");
    app->add_option("--marker", args.marker, "the answer is what follows the last marker")
        ->capture_default_str();
    app->add_option("--pattern", args.pattern, "pattern of the regex and format rewards");
    app->add_option("--timeout", args.timeout_s, "seconds that a score may take")
        ->capture_default_str()
        ->check(CLI::PositiveNumber);
    app->add_option("--workers", args.workers, "copies of the reward program")
        ->capture_default_str()
        ->check(CLI::Range(1, 256));
}

CLI::App* add_command(CLI::App& app, const char* name, const char* what, const char* examples) {
    CLI::App* command = app.add_subcommand(name, what);
    command->footer(std::string("\nExamples:\n") + examples);
    return command;
}

void add_train(CLI::App& app, TrainArgs& args, Action& action) {
    CLI::App* command = add_command(
        app,
        "train",
        "Train an adapter with reinforcement learning",
        "  orbit train examples/demo/run.toml\n"
        "  orbit train run.toml --set adapter.kind=lora --set train.lr=2e-3 --run runs/lora\n"
        "  orbit train run.toml --set data.train=my.jsonl --set reward.command='python3 score.py'\n"
        "A row of my.jsonl: {\"prompt\": \"What is 2 + 3?\", \"answer\": \"5\"}\n"
        "Every key is described in docs/CONFIG.md. Ctrl-C stops after the current step;\n"
        "orbit resume goes on."
    );
    command->add_option("CONFIG", args.config, "TOML file")->required();
    command->add_option("--set", args.overrides, "key=value, goes before the file; repeatable")
        ->allow_extra_args(false);
    command->add_option("--run", args.run, "run folder (default: a new one under runs/)");
    command->add_option("--device", args.device, "auto, cpu or cuda:0 (default: the config's)");
    command->callback([&] { action = [&] { return run_train(args); }; });
}

void add_resume(CLI::App& app, std::string& folder, Action& action) {
    CLI::App* command = add_command(
        app,
        "resume",
        "Go on with an interrupted run; the result is that of an uninterrupted one",
        "  orbit resume runs/demo\n"
        "After raising train.steps in runs/demo/config.toml, a finished run goes on too."
    );
    command->add_option("DIR", folder, "run folder")->required();
    command->callback([&] { action = [&] { return run_resume(folder); }; });
}

void add_eval(CLI::App& app, EvalArgs& args, Action& action) {
    CLI::App* command = add_command(
        app,
        "eval",
        "Accuracy of a model, with or without an adapter, on questions with answers",
        "  orbit eval models/mini-qwen3-int4 --data examples/demo/test.jsonl\n"
        "  orbit eval models/mini-qwen3-int4 --adapter runs/demo --data examples/demo/test.jsonl\n"
        "  orbit eval MODEL --data test.jsonl --samples 8 --k 1,4,8 --json | jq .accuracy"
    );
    add_model(command, args.model, true);
    command->add_option("--data", args.data, "JSON Lines file of questions")->required();
    command->add_option("--prompt-field", args.prompt_field, "field of the question")
        ->capture_default_str();
    command->add_option("--answer-field", args.answer_field, "field of the right answer")
        ->capture_default_str();
    command->add_option("--system", args.system, "system message before every question");
    add_reward(command, args.reward);
    command->add_option("--samples", args.samples, "also sample N answers a question for pass@k")
        ->check(CLI::Range(0, 1 << 16));
    command->add_option("--k", args.k, "pass@k for these k, as in --k 1,4")->delimiter(',');
    command->add_option("--temperature", args.temperature, "of the sampled answers")
        ->capture_default_str()
        ->check(CLI::Range(0.0f, 100.0f));
    command->add_option("--max-tokens", args.max_tokens, "longest answer, in tokens")
        ->capture_default_str()
        ->check(CLI::Range(1, 1 << 24));
    command->add_option("--max-questions", args.max_questions, "from the top; 0: all")
        ->check(CLI::NonNegativeNumber);
    command->add_option("--max-batch", args.max_batch, "answers made together")
        ->capture_default_str()
        ->check(CLI::Range(1, 1 << 20));
    command->add_option("--seed", args.seed, "of the sampled answers")->capture_default_str();
    command->add_flag("--json", args.json, "one JSON object on stdout");
    command->callback([&] { action = [&] { return run_eval(args); }; });
}

void add_generate(CLI::App& app, GenerateArgs& args, Action& action) {
    CLI::App* command = add_command(
        app,
        "generate",
        "Answer one prompt, or chat in the terminal",
        "  orbit generate models/mini-qwen3-int4 --prompt \"What is 47 + 85?\"\n"
        "  orbit generate models/mini-qwen3-int4 --adapter runs/demo\n"
        "  orbit generate model.gguf --raw --prompt \"Once upon a time\" --temperature 0.8"
    );
    add_model(command, args.model, true);
    CLI::Option* prompt =
        command->add_option("--prompt", args.prompt, "one user message; without it: a chat");
    command->add_option("--system", args.system, "system message");
    command->add_option("--max-tokens", args.max_tokens, "longest answer, in tokens")
        ->capture_default_str()
        ->check(CLI::Range(1, 1 << 24));
    command->add_option("--temperature", args.filter.temperature, "0: the likeliest token")
        ->capture_default_str()
        ->check(CLI::Range(0.0f, 100.0f));
    command->add_option("--top-p", args.filter.top_p, "1: off")->check(CLI::Range(1e-6f, 1.0f));
    command->add_option("--top-k", args.filter.top_k, "0: off")->check(CLI::NonNegativeNumber);
    command->add_option("--min-p", args.filter.min_p, "0: off")->check(CLI::Range(0.0f, 1.0f));
    command->add_option("--stop", args.stop, "text that ends an answer; repeatable")
        ->allow_extra_args(false);
    command->add_option("--seed", args.seed, "of the draws")->capture_default_str();
    command->add_flag("--raw", args.raw, "no chat template: go on with the prompt as it stands");
    command->callback([&args, prompt, &action] {
        args.has_prompt = prompt->count() > 0;
        action = [&] { return run_generate(args); };
    });
}

void add_verify(CLI::App& app, VerifyArgs& args, Action& action) {
    CLI::App* command = add_command(
        app,
        "verify",
        "Compare a model with a reference of transformers and PEFT",
        "  orbit verify models/mini-qwen3-int4 --reference models/mini-qwen3-int4 --activations "
        "f32\n"
        "  tools/make_reference.py my-model my-reference     (needs torch, transformers, peft)\n"
        "  orbit verify my-model --reference my-reference --activations f32\n"
        "Exit status 1: outside the tolerance."
    );
    add_model(command, args.model, false);
    command->add_option("--reference", args.reference, "folder with reference.json")->required();
    command
        ->add_option(
            "--activations", args.model.activations, "bf16 (as in training) or f32 (check mode)"
        )
        ->capture_default_str();
    command->add_option(
        "--tolerance", args.tolerance, "of log-probs; default in f32: 2e-4, GGUF 1e-3"
    );
    command->add_option(
        "--gradient-tolerance", args.gradient_tolerance, "of gradients; default in f32: 1e-3"
    );
    command->callback([&] { action = [&] { return run_verify(args); }; });
}

void add_parity(CLI::App& app, ParityArgs& args, Action& action) {
    CLI::App* command = add_command(
        app,
        "parity",
        "Do rollout and training, batches, chunks and the cache agree to the bit?",
        "  orbit parity models/mini-qwen3-int4\n"
        "  orbit parity model.gguf --adapter runs/demo --device cuda:0\n"
        "  orbit parity --shape qwen3-0.6b --longest 4096 --texts 8 --device cuda:0\n"
        "Without --adapter: the base, a random LoRA and a random OFT. Exit status 1: they do not."
    );
    add_model(command, args.model, true);
    command->get_option("MODEL")->required(false);
    add_shape(command, args.shape, args.format);
    command->add_option("--texts", args.num_texts, "number of texts")
        ->capture_default_str()
        ->check(CLI::Range(1, 4096));
    command->add_option("--longest", args.longest, "tokens of the longest text")
        ->capture_default_str()
        ->check(CLI::Range(2, 1 << 20));
    command->callback([&] { action = [&] { return run_parity(args); }; });
}

void add_score(CLI::App& app, ScoreArgs& args, Action& action) {
    CLI::App* command = add_command(
        app,
        "score",
        "Score stored responses with a reward",
        "  orbit score --reward exact --data answers.jsonl --json\n"
        "  orbit score --reward-command 'python3 score.py' --data answers.jsonl\n"
        "A row: {\"response\": \"4 + 4 = 8 #### 8\", \"answer\": \"8\"}"
    );
    add_reward(command, args.reward);
    command->add_option("--data", args.data, "JSON Lines file")->required();
    command->add_option("--response-field", args.response_field, "field of the response")
        ->capture_default_str();
    command->add_option("--answer-field", args.answer_field, "field of the right answer")
        ->capture_default_str();
    command->add_flag("--json", args.json, "one object a row: score and reason");
    command->callback([&] { action = [&] { return run_score(args); }; });
}

void add_quantize(CLI::App& app, QuantizeArgs& args, Action& action) {
    CLI::App* command = add_command(
        app,
        "quantize",
        "Write a quantised copy of a BF16 model, in a layout that others read too",
        "  orbit quantize models/qwen3-0.6b models/qwen3-0.6b-int4 --format int4\n"
        "int4, mxfp4, nvfp4: the layouts of compressed-tensors; fp8: blocks of 128 x 128, as the "
        "published Qwen3 FP8 models. Head, embedding and routers stay."
    );
    command->add_option("IN", args.in, "Hugging Face folder")->required();
    command->add_option("OUT", args.out, "new folder")->required();
    command->add_option("--format", args.format, "int4, fp8, mxfp4 or nvfp4")
        ->capture_default_str();
    command
        ->add_option(
            "--include", args.include, "only layers whose names hold this, such as experts"
        )
        ->delimiter(',');
    command->callback([&] { action = [&] { return run_quantize(args); }; });
}

void add_inspect(CLI::App& app, std::string& path, Action& action) {
    CLI::App* command = add_command(
        app,
        "inspect",
        "Describe a model, an adapter, a run or a checkpoint in words",
        "  orbit inspect models/mini-qwen3-int4\n"
        "  orbit inspect runs/demo\n"
        "  orbit inspect runs/demo/checkpoints/step-000020"
    );
    command->add_option("PATH", path, "folder or file")->required();
    command->callback([&] { action = [&] { return run_inspect(path); }; });
}

void add_recompute(CLI::App* command, std::string& recompute) {
    command
        ->add_option(
            "--recompute",
            recompute,
            "train.recompute: full, or selective, which keeps attention's outputs"
        )
        ->capture_default_str()
        ->check(CLI::IsMember({"selective", "full"}));
}

void add_bench(CLI::App& app, BenchArgs& args, Action& action) {
    CLI::App* command = add_command(
        app,
        "bench",
        "Time kernels, decode, training and the RL step, each beside its floor",
        "  orbit bench models/mini-qwen3-int4 --context 256 --rl-response 32\n"
        "  orbit bench --shape qwen3-0.6b --device cuda:0 --json bench.json\n"
        "  orbit bench --shape qwen3-8b --format int4 --device cuda:0 --only decode\n"
        "  orbit bench --shape qwen3-4b --device cuda:0 --only train --activation-offloading\n"
        "  orbit bench --shape qwen3-30b-a3b --format int4 --host-layers 24 --only decode,train"
    );
    BenchOptions& o = args.options;
    command->add_option("MODEL", args.model, "Hugging Face folder or GGUF file");
    add_shape(command, args.shape, args.format);
    add_host_layers(command, args.host_layers)
        ->description(
            "layers, from the last, whose experts stay in host memory; without as well, and both "
            "side by side"
        );
    command->add_option("--adapter", o.adapter, "lora, oft or none")
        ->capture_default_str()
        ->check(CLI::IsMember({"lora", "oft", "none"}));
    command->add_option("--decode-batches", o.decode_batches, "batches of the decode rows")
        ->delimiter(',');
    command->add_option("--context", o.context, "tokens before the decode rows")
        ->capture_default_str();
    command->add_option("--train-length", o.train_length, "tokens of a training sequence")
        ->capture_default_str();
    command->add_option("--train-tokens", o.train_tokens, "tokens of a training batch")
        ->capture_default_str();
    add_recompute(command, o.recompute);
    command->add_flag(
        "--activation-offloading",
        o.activation_offloading,
        "train and rl with train.activation_offloading"
    );
    command->add_option("--rl-prompts", o.rl_prompts)->capture_default_str();
    command->add_option("--rl-samples", o.rl_samples)->capture_default_str();
    command->add_option("--rl-prompt", o.rl_prompt_tokens, "tokens of a prompt")
        ->capture_default_str();
    command->add_option("--rl-response", o.rl_response_tokens, "tokens of a response")
        ->capture_default_str();
    command->add_option(
        "--copy-rate", o.copy_bytes_per_s, "ceiling of the floors in bytes/s; 0: measured"
    );
    command->add_option(
        "--matrix-rate", o.matrix_flops_per_s, "ceiling of the floors in FLOP/s; 0: none"
    );
    const auto* only =
        command->add_option("--only", args.only, "kernels, decode, train or rl")->delimiter(',');
    command->add_option("--json", args.json, "also write the table to this file");
    add_device(command, args.device);
    command->callback([&args, only, &action] {
        BenchOptions& options = args.options;
        const auto wanted = [&](const char* part) {
            return only->empty() ||
                   std::find(args.only.begin(), args.only.end(), part) != args.only.end();
        };
        options.kernels = wanted("kernels");
        options.decode = wanted("decode");
        options.train = wanted("train");
        options.rl = wanted("rl");
        action = [&args] { return run_bench(args); };
    });
}

void add_plan(CLI::App& app, PlanArgs& args, Action& action) {
    CLI::App* command = add_command(
        app,
        "plan",
        "What a model and its training take on each GPU, without loading anything",
        "  orbit plan Kimi-K2.6 --gpus 8xH200\n"
        "  orbit plan Qwen3-30B-A3B --format int4 --gpus 1xH100 --batch 256 --context 2048\n"
        "  orbit plan models/my-model --gpus RTX4090 --adapter lora --rank 32 --targets all\n"
        "A folder needs no more than its config.json. Exit status 1: it does not fit."
    );
    GpuPlanOptions& o = args.options;
    std::vector<std::string> gpus;
    for (const Gpu& gpu : known_gpus()) {
        gpus.emplace_back(gpu.name);
    }
    command
        ->add_option(
            "MODEL",
            args.model,
            fmt::format(
                "Hugging Face folder, GGUF file, or one of: {}", fmt::join(planned_models(), ", ")
            )
        )
        ->required();
    command
        ->add_option("--gpus", o.gpus, fmt::format("such as 8xH200; of {}", fmt::join(gpus, ", ")))
        ->capture_default_str();
    command->add_option("--batch", o.batch, "sequences that are decoded together")
        ->capture_default_str()
        ->check(CLI::Range(1, 1 << 20));
    command->add_option("--context", o.context, "tokens of each, prompt and answer")
        ->capture_default_str()
        ->check(CLI::Range(2, 1 << 24));
    command->add_option("--tokens", o.tokens, "tokens of a training batch")
        ->capture_default_str()
        ->check(CLI::Range(1, 1 << 28));
    add_recompute(command, o.recompute);
    command->add_flag(
        "--activation-offloading",
        o.activation_offloading,
        "train.activation_offloading: layer inputs in host memory"
    );
    command->add_option("--adapter", o.adapter.kind, "oft, lora or none")
        ->capture_default_str()
        ->check(CLI::IsMember({"oft", "lora", "none"}));
    command->add_option("--rank", o.adapter.rank, "of LoRA")
        ->capture_default_str()
        ->check(CLI::Range(1, 4096));
    command->add_option("--block-size", o.adapter.block_size, "of OFT")
        ->capture_default_str()
        ->check(CLI::Range(2, 4096));
    command
        ->add_option(
            "--targets",
            o.adapter.targets,
            "layers to adapt, such as q_proj,o_proj, or all; default: all, with experts attention"
        )
        ->delimiter(',');
    command->add_option(
        "--format",
        args.format,
        "bf16, int4, fp8, mxfp4 or nvfp4 for the routed experts, or for a dense model's layers; "
        "default: as published"
    );
    command->add_option("--dequant-bytes", o.dequant_bytes, "moe.dequant_bytes")
        ->capture_default_str()
        ->check(CLI::NonNegativeNumber);
    command->callback([&] { action = [&] { return run_plan(args); }; });
}

// The first word of the command line that is no command, when the commands do not have it.
void check_command_name(const CLI::App& app, int argc, char** argv) {
    const std::string word = argc > 1 ? argv[1] : "";
    if (word.empty() || word.starts_with('-')) {
        return;
    }
    std::vector<std::string> names;
    for (const CLI::App* command : app.get_subcommands({})) {
        names.push_back(command->get_name());
        if (names.back() == word) {
            return;
        }
    }
    const std::string nearest = nearest_name(word, names);
    throw UserError(fmt::format(
        "there is no command \"{}\"; {}",
        word,
        nearest.empty() ? "orbit --help lists them." : "did you mean \"" + nearest + "\"?"
    ));
}

int parse_and_run(int argc, char** argv) {
    CLI::App app(
        "Orbit: reinforcement learning of adapters on a frozen, quantised base. One forward "
        "serves\n"
        "rollout and training, so their log-probs agree to the bit.",
        "orbit"
    );
    app.footer("\nStart with:\n  orbit train examples/demo/run.toml\n  orbit COMMAND --help");
    app.set_version_flag("--version", "orbit 0.1.0");
    app.require_subcommand(1);
    Action action;
    TrainArgs train;
    std::string resume;
    EvalArgs eval;
    GenerateArgs generate;
    VerifyArgs verify;
    ParityArgs parity;
    ScoreArgs score;
    QuantizeArgs quantize;
    std::string inspect;
    BenchArgs bench;
    PlanArgs plan;
    add_train(app, train, action);
    add_resume(app, resume, action);
    add_eval(app, eval, action);
    add_generate(app, generate, action);
    add_verify(app, verify, action);
    add_parity(app, parity, action);
    add_score(app, score, action);
    add_quantize(app, quantize, action);
    add_inspect(app, inspect, action);
    add_bench(app, bench, action);
    add_plan(app, plan, action);
    app.add_subcommand("config-reference")->group("")->callback([&] {  // for ./run docs
        action = [] {
            fmt::print("{}", config_reference());
            return 0;
        };
    });
    check_command_name(app, argc, argv);
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
        if (error.get_exit_code() == 0) {
            return app.exit(error);  // --help, --version
        }
        throw UserError(fmt::format("{}; orbit COMMAND --help shows how.", error.what()));
    }
    const int status = action();
    USER_CHECK(std::fflush(stdout) == 0, "cannot write the results to stdout: is the disk full?");
    return status;
}

// One line: a message may quote the last words of a reward program.
void print_error(std::string sentence) {
    for (size_t at = 0; (at = sentence.find('\n', at)) != std::string::npos;) {
        sentence.replace(at, 1, " / ");
    }
    fmt::print(stderr, "error: {}\n", sentence);
}

int guarded_main(int argc, char** argv) {
    // A limit on file sizes shows up as a failed write, which has a sentence.
    std::signal(SIGXFSZ, SIG_IGN);
    try {
        return parse_and_run(argc, argv);
    } catch (const UserError& error) {
        print_error(error.what());
    } catch (const std::bad_alloc&) {
        print_error(
            "out of memory; use a smaller model, rollout.max_batch or train.tokens_per_batch."
        );
    } catch (const std::exception& error) {
        print_error(
            fmt::format("{} (this message should be clearer: please report it).", error.what())
        );
    }
    return kUserErrorStatus;
}

}  // namespace
}  // namespace orbit

int main(int argc, char** argv) {
    return orbit::guarded_main(argc, argv);
}
