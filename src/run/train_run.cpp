#include "run/train_run.h"

#include <csignal>
#include <ctime>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/log.h"
#include "rl/step.h"
#include "run/host_experts.h"
#include "run/memory_plan.h"
#include "run/run_folder.h"

namespace orbit {
namespace {

using nlohmann::ordered_json;

volatile std::sig_atomic_t interrupted = 0;

void on_signal(int) {
    if (interrupted != 0) {
        std::_Exit(130);
    }
    interrupted = 1;
}

std::string default_folder(const Config& config) {
    const std::time_t now = std::time(nullptr);
    std::tm local{};
    localtime_r(&now, &local);
    char date[32];
    std::strftime(date, sizeof date, "%Y%m%d-%H%M%S", &local);
    const std::string name = std::filesystem::path(config.model).stem().string();
    const std::string first = fmt::format("runs/{}-{}-{}", name, config.adapter.kind, date);
    std::string folder = first;
    for (int i = 2; std::filesystem::exists(folder); ++i) {
        folder = fmt::format("{}-{}", first, i);
    }
    return folder;
}

// Everything a run is made of, in the order it is built.
struct Run {
    Config config;
    std::optional<RunFolder> folder;  // created once everything else is known to be good
    Device device;
    Stream stream;
    MemoryPlan plan;
    size_t available = 0;  // before anything was loaded
    std::unique_ptr<Model> model;
    std::unique_ptr<AdapterStore> adapter;
    Dataset data;
    std::optional<Dataset> questions;
    Reward reward;
    std::optional<RolloutEngine> engine;
    std::optional<Trainer> trainer;
    int64_t step = 0;    // steps that are done
    double seconds = 0;  // of training steps
    int64_t tokens = 0;
    int64_t parity_mismatches = 0;
    double accuracy_before = -1;

    explicit Run(const Config& c)
        : config(c),
          device(make_device(c.device, c.cpu.isa, c.cpu.threads)),
          stream(device),
          data(Dataset::load(c.data.train, c.data)),
          reward(c.reward) {
        if (!c.data.eval.empty()) {
            questions = Dataset::load(c.data.eval, c.data);
        }
        const Checkpoint checkpoint = open_checkpoint(c.model);
        model = make_model(device, checkpoint);
        const int64_t longest = longest_prompt();
        available = memory_info(device).available;
        plan = plan_run(c, device, checkpoint, longest, available);
        if (available > 0) {  // 0: the system does not say
            check_fits(plan, c, available, host_memory_info().available);
        }
        LoadOptions load;
        load.quantize = c.quantize;
        load.dequant = {c.moe.dequant_bytes, c.moe.dequant_rows};
        load.host_layers = plan.host_layers;
        load_weights(stream, checkpoint, load, *model);
        stream.scratch.reserve(plan.scratch);
        adapter = std::make_unique<AdapterStore>(
            device, c.adapter, model->sites, model->compute, 2, c.seed
        );
        const SamplingFilter filter{
            c.rollout.temperature, c.rollout.top_p, c.rollout.top_k, c.rollout.min_p};
        const int64_t most = largest_batch(c, model->config, longest).tokens;
        trainer.emplace(stream, *model, *adapter, c.train, filter, c.moe.replay_routing, most);
        engine.emplace(stream, *model, adapter.get(), engine_options(c, longest));
    }

    // Also finds prompts that cannot be used before any work is done.
    int64_t longest_prompt() const {
        int64_t longest = 0;
        for (const Dataset* set : {&data, questions ? &*questions : nullptr}) {
            for (int64_t i = 0; set != nullptr && i < set->size(); ++i) {
                const Example& row = (*set)[i];
                const auto length =
                    static_cast<int64_t>(prompt_ids(*model, row, config.data.system).size());
                USER_CHECK(
                    length < model->config.max_positions,
                    "{} line {}: the prompt has {} tokens, the model reads at most {}; shorten or "
                    "remove it.",
                    row.file,
                    row.line,
                    length,
                    model->config.max_positions
                );
                longest = std::max(longest, length);
            }
        }
        return longest;
    }

    Session session() {
        return {
            stream,
            *model,
            *adapter,
            *engine,
            *trainer,
            reward,
            data,
            config.rollout,
            config.train,
            config.data.system,
            config.seed};
    }
};

// Which experts stay in host memory, and what streaming them is going to cost at the rate of this
// machine's link.
void print_host_experts(Run& run) {
    const ModelConfig& config = run.model->config;
    const auto bytes = static_cast<int64_t>(run.model->host.total_bytes());
    if (bytes == 0) {
        return;
    }
    const double rate = host_link_rate(run.stream, run.model->staged_bytes);
    const int64_t batch = run.config.rollout.max_batch;
    const int64_t tokens = run.config.train.tokens_per_batch;
    log_line(fmt::format(
        "the experts of {} of {} layers stay in host memory: {:.1f} MiB, read at {:.1f} GB/s. That "
        "adds at the most {:.3f} s to a decode step of {} and {:.3f} s to a training batch of {} "
        "tokens",
        run.plan.host_layers,
        config.num_expert_layers(),
        static_cast<double>(bytes) / (1 << 20),
        rate * 1e-9,
        streamed_bytes(config, bytes, batch) / rate,
        batch,
        2 * streamed_bytes(config, bytes, tokens) / rate,
        tokens
    ));
}

void print_ledger(const Run& run) {
    const auto mib = [](size_t bytes) { return static_cast<double>(bytes) / (1 << 20); };
    std::string line = fmt::format(
        "{} on {}: base {:.1f} MiB",
        run.model->name,
        run.device.name,
        mib(run.model->arena.total_bytes())
    );
    for (const auto& entry : run.adapter->ledger()) {
        line += fmt::format(", {} {:.1f} MiB", entry.name, mib(entry.bytes));
    }
    line += fmt::format(", KV pages {:.1f} MiB", mib(run.engine->kv_bytes()));
    if (const int64_t bytes = run.trainer->offloaded_bytes(); bytes > 0) {
        line += fmt::format(
            ", layer inputs in host memory {:.1f} MiB", mib(static_cast<size_t>(bytes))
        );
    }
    log_line(line);
    log_line(fmt::format(
        "memory at the most {:.1f} of {:.1f} MiB: {}",
        mib(run.plan.total()),
        mib(run.available),
        plan_text(run.plan)
    ));
    log_line(fmt::format(
        "{} parameters learn ({} on {} layers); {} questions; run folder {}",
        run.adapter->num_parameters(),
        run.config.adapter.kind,
        run.model->sites.size(),
        run.data.size(),
        run.folder->path()
    ));
}

EvalReport evaluate_run(Run& run, bool use_adapter) {
    return evaluate(
        *run.model,
        *run.engine,
        run.reward,
        *run.questions,
        run.config.eval,
        run.config.rollout,
        run.config.data.system,
        run.config.seed,
        use_adapter
    );
}

// "device/..." of the state: equal bits are promised on the same instruction set or GPU only.
std::string numerics_name(const Run& run) {
    return run.device.is_cpu() ? fmt::format("cpu {}", isa_name(run.device.isa)) : run.device.name;
}

void save_checkpoint(Run& run) {
    RunCheckpoint checkpoint;
    checkpoint.step = run.step;
    ordered_json state;
    state["step"] = run.step;
    state["optimizer_step"] = run.trainer->optimizer_step();
    state["seconds"] = run.seconds;
    state["tokens"] = run.tokens;
    state["parity_mismatches"] = run.parity_mismatches;
    state["accuracy_before"] = run.accuracy_before;
    state["device"] = numerics_name(run);
    state["weights"] = run.model->weights_digest;
    checkpoint.state_json = state.dump(2);
    const auto count = static_cast<size_t>(run.adapter->num_parameters());
    const std::pair<const char*, const float*> parts[] = {
        {"masters", run.adapter->masters()},
        {"moments_m", run.adapter->moments_m()},
        {"moments_v", run.adapter->moments_v()},
    };
    for (const auto& [name, data] : parts) {
        CheckpointTensor tensor{name, std::vector<float>(count)};
        copy_to_host(run.stream, tensor.values.data(), data, count * sizeof(float));
        checkpoint.tensors.push_back(std::move(tensor));
    }
    run.folder->write_checkpoint(
        checkpoint,
        [&](const std::string& folder) {
            run.adapter->save_peft(run.stream, folder, run.config.model);
        },
        run.config.checkpoint.keep
    );
}

void restore_checkpoint(Run& run, const RunCheckpoint& checkpoint) {
    const auto state = ordered_json::parse(checkpoint.state_json, nullptr, false);
    USER_CHECK(
        state.is_object() && state.contains("optimizer_step") && state.contains("device"),
        "{}/state.json is damaged; remove this checkpoint folder to go on from the one before.",
        checkpoint.path
    );
    USER_CHECK(
        state.value("weights", "") == run.model->weights_digest,
        "{} was written with other base weights than {} holds now; put the original model back.",
        checkpoint.path,
        run.config.model
    );
    if (state.value("device", "") != numerics_name(run)) {
        warn_line(fmt::format(
            "the checkpoint was written on {}, this is {}: the run goes on, but not with equal "
            "bits",
            state.value("device", "?"),
            numerics_name(run)
        ));
    }
    run.step = checkpoint.step;
    run.seconds = state.value("seconds", 0.0);
    run.tokens = state.value("tokens", int64_t{0});
    run.parity_mismatches = state.value("parity_mismatches", int64_t{0});
    run.accuracy_before = state.value("accuracy_before", -1.0);
    run.trainer->set_optimizer_step(state.value("optimizer_step", int64_t{0}));
    const auto count = static_cast<size_t>(run.adapter->num_parameters());
    float* parts[] = {run.adapter->masters(), run.adapter->moments_m(), run.adapter->moments_v()};
    USER_CHECK(
        checkpoint.tensors.size() == 3,
        "{} lacks tensors; remove this checkpoint folder.",
        checkpoint.path
    );
    for (size_t i = 0; i < 3; ++i) {
        USER_CHECK(
            checkpoint.tensors[i].values.size() == count,
            "{}: {} has {} values, the adapter of config.toml has {}; config.toml was changed "
            "since.",
            checkpoint.path,
            checkpoint.tensors[i].name,
            checkpoint.tensors[i].values.size(),
            count
        );
        copy_to_device(
            run.stream, parts[i], checkpoint.tensors[i].values.data(), count * sizeof(float)
        );
    }
    run.adapter->publish(run.stream, run.step);
}

std::string metrics_line(const StepReport& report) {
    ordered_json line;
    line["step"] = report.step;
    for (const auto& [name, value] : report.metrics) {
        // Counts print as whole numbers; a value that is not finite has no JSON form and becomes
        // null.
        if (value == std::floor(value) && std::abs(value) < 1e15) {
            line[name] = static_cast<int64_t>(value);
        } else {
            line[name] = value;
        }
    }
    return line.dump() + "\n";
}

const char* finish_name(FinishReason reason) {
    return reason == FinishReason::kStop     ? "stop"
           : reason == FinishReason::kLength ? "length"
                                             : "abort";
}

std::string rollout_lines(const StepReport& report) {
    std::string lines;
    for (const auto& group : report.groups) {
        for (const auto& t : group.samples) {
            ordered_json row;
            row["step"] = t.step;
            row["row"] = t.prompt;
            row["prompt"] = t.slot;
            row["sample"] = t.sample;
            row["version"] = t.adapter_version;
            row["finish"] = finish_name(t.finish);
            row["status"] = status_name(t.score.status);
            row["reward"] = t.score.status == ScoreStatus::kScored ? ordered_json(t.score.value)
                                                                   : ordered_json(nullptr);
            row["reason"] = t.score.reason;
            row["advantage"] = t.advantage;
            row["response"] = t.response;
            row["prompt_length"] = t.prompt_length;
            row["ids"] = t.ids;
            row["logprobs"] = t.logprobs;
            lines += row.dump(-1, ' ', false, ordered_json::error_handler_t::replace) + "\n";
        }
    }
    return lines;
}

void print_step(const Run& run, const StepReport& report) {
    const auto& m = report.metrics;
    std::string line = fmt::format(
        "step {:>3}/{}  reward {:.3f}  length {:.1f}  entropy {:.3f}  grad {:.3g}",
        report.step + 1,
        run.config.train.steps,
        m.at("reward/mean"),
        m.at("response/length_mean"),
        m.at("entropy"),
        m.at("grad_norm")
    );
    if (m.contains("oft/block_norm_max")) {
        line += fmt::format("  |Q| {:.3f}", m.at("oft/block_norm_max"));
    }
    const double failed =
        m.at("reward/crashed") + m.at("reward/timeouts") + m.at("reward/bad_output");
    if (failed > 0) {
        line += fmt::format(
            "  UNSCORED {:.0f} (crashed {:.0f}, timeout {:.0f}, bad output {:.0f})",
            failed,
            m.at("reward/crashed"),
            m.at("reward/timeouts"),
            m.at("reward/bad_output")
        );
    }
    line += fmt::format("  parity {}/{}", report.parity_mismatches, report.parity_tokens);
    if (report.routing.pairs > 0) {
        line += fmt::format("  routing {}/{}", report.routing.mismatches, report.routing.pairs);
    }
    line += fmt::format("  {:.1f} s  {:.0f} tok/s", m.at("time/step_s"), m.at("time/tokens_per_s"));
    log_line(line);
}

// One of the two promises: log-probs with equal bits, and the same choice of experts.
void check_promise(
    const Run& run,
    const StepReport& report,
    const std::string& what,
    int64_t mismatches,
    int64_t of,
    const std::string& first
) {
    if (mismatches == 0) {
        return;
    }
    const std::string sentence =
        fmt::format("{} {}/{} in step {}: {}", what, mismatches, of, report.step + 1, first);
    USER_CHECK(
        run.config.train.on_parity_mismatch == "warn",
        "{}; rollout and training must agree: please report this, or set train.on_parity_mismatch "
        "= \"warn\" to go on.",
        sentence
    );
    warn_line(sentence);
}

void check_parity(const Run& run, const StepReport& report) {
    check_promise(
        run, report, "parity", report.parity_mismatches, report.parity_tokens, report.first_mismatch
    );
    const RoutingCheck& routing = report.routing;
    check_promise(run, report, "routing", routing.mismatches, routing.pairs, routing.first);
}

void check_rewards(const StepReport& report) {
    const auto& m = report.metrics;
    const double failed =
        m.at("reward/crashed") + m.at("reward/timeouts") + m.at("reward/bad_output");
    double total = 0;
    std::string reason;
    for (const auto& group : report.groups) {
        for (const auto& t : group.samples) {
            ++total;
            if (t.score.status != ScoreStatus::kScored && reason.empty()) {
                reason = t.score.reason;
            }
        }
    }
    USER_CHECK(
        failed < total,
        "no answer of step {} could be scored (crashed {:.0f}, timeout {:.0f}, bad output {:.0f}; "
        "first: {}); mend the "
        "reward program, then orbit resume.",
        report.step + 1,
        m.at("reward/crashed"),
        m.at("reward/timeouts"),
        m.at("reward/bad_output"),
        reason
    );
}

void show_samples(const Run& run, const EvalReport& before, const EvalReport& after) {
    int shown = 0;
    for (size_t q = 0; q < after.answers.size() && shown < 3; ++q) {
        if (before.answers[q].correct || !after.answers[q].correct) {
            continue;
        }
        ++shown;
        const Example& example = (*run.questions)[static_cast<int64_t>(q)];
        log_line(fmt::format("\n  question: {}", example.messages.back().content));
        log_line(fmt::format("  before:   {}", ordered_json(before.answers[q].response).dump()));
        log_line(fmt::format(
            "  after:    {}   (right answer: {})",
            ordered_json(after.answers[q].response).dump(),
            example.answer
        ));
    }
}

void write_summary(const Run& run, double accuracy_after) {
    ordered_json summary;
    summary["model"] = run.config.model;
    summary["steps"] = run.step;
    summary["seconds"] = run.seconds;
    summary["tokens"] = run.tokens;
    const auto accuracy = [](double value) {
        return value < 0 ? ordered_json(nullptr) : ordered_json(value);
    };
    summary["accuracy_before"] = accuracy(run.accuracy_before);
    summary["accuracy_after"] = accuracy(accuracy_after);
    summary["parity_mismatches"] = run.parity_mismatches;
    run.folder->write_summary(summary.dump(2) + "\n");
}

// The steps. Returns false when the user asked to stop.
bool train_steps(Run& run) {
    Session session = run.session();
    ProgressBar bar("train", run.config.train.steps, "steps");
    while (run.step < run.config.train.steps) {
        const double start = now_s();
        const StepReport report = rl_step(session, run.step);
        run.seconds += now_s() - start;
        run.tokens += report.num_tokens;
        run.parity_mismatches += report.parity_mismatches;
        run.folder->append_rollouts(rollout_lines(report));
        run.folder->append_metrics(metrics_line(report));
        print_step(run, report);
        check_parity(run, report);
        check_rewards(report);
        ++run.step;
        bar.set(run.step);
        const bool last = run.step == run.config.train.steps;
        const int64_t every = run.config.checkpoint.every;
        if (last || interrupted != 0 || (every > 0 && run.step % every == 0)) {
            save_checkpoint(run);
        }
        if (interrupted != 0 && !last) {
            return false;
        }
        if (run.questions && run.config.eval.every > 0 && !last &&
            run.step % run.config.eval.every == 0) {
            log_line(fmt::format(
                "accuracy after {} steps: {:.3f}", run.step, evaluate_run(run, true).accuracy
            ));
        }
    }
    return true;
}

RunResult finish_run(Run& run, const std::optional<EvalReport>& before) {
    RunResult result;
    result.folder = run.folder->path();
    result.accuracy_before = run.accuracy_before;
    result.parity_mismatches = run.parity_mismatches;
    run.adapter->save_peft(run.stream, run.folder->path() + "/adapter", run.config.model);
    if (run.questions) {
        const EvalReport after = evaluate_run(run, true);
        result.accuracy_after = after.accuracy;
        if (before) {
            show_samples(run, *before, after);
        }
        log_line(fmt::format(
            "\naccuracy on {} questions: {:.3f} before, {:.3f} after {} steps in {:.1f} s of "
            "training",
            after.questions,
            run.accuracy_before,
            after.accuracy,
            run.step,
            run.seconds
        ));
        if (after.unscored > 0) {
            warn_line(fmt::format(
                "{} evaluation answers could not be scored and count as wrong", after.unscored
            ));
        }
    }
    write_summary(run, result.accuracy_after);
    log_line(fmt::format("adapter: {}/adapter", run.folder->path()));
    return result;
}

RunResult run_steps(Run& run, const std::optional<EvalReport>& before) {
    if (!train_steps(run)) {
        log_line(fmt::format(
            "stopped after step {}; go on with: orbit resume {}", run.step, run.folder->path()
        ));
        RunResult result;
        result.folder = run.folder->path();
        result.interrupted = true;
        result.parity_mismatches = run.parity_mismatches;
        return result;
    }
    return finish_run(run, before);
}

}  // namespace

void install_interrupt_handler() {
    struct sigaction action {};

    action.sa_handler = on_signal;
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
}

RunResult start_run(const Config& config, std::string path) {
    if (path.empty()) {
        path = default_folder(config);
    }
    USER_CHECK(
        !file_exists(path + "/config.toml"),
        "{} already holds a run; go on with orbit resume {}, or give --run another folder.",
        path,
        path
    );
    Run run(config);
    run.folder = RunFolder::create(path);
    run.folder->write_config(to_toml(config));
    print_ledger(run);
    print_host_experts(run);
    std::optional<EvalReport> before;
    if (run.questions) {
        before = evaluate_run(run, false);
        run.accuracy_before = before->accuracy;
        log_line(fmt::format(
            "accuracy before: {:.3f} ({} questions, greedy)", before->accuracy, before->questions
        ));
    }
    save_checkpoint(run);
    return run_steps(run, before);
}

RunResult resume_run(const std::string& path) {
    RunFolder folder = RunFolder::open(path);
    const Config config = load_config(folder.config_path());
    const auto checkpoint = folder.latest_checkpoint();
    USER_CHECK(
        checkpoint.has_value(),
        "{} holds no whole checkpoint; start the run again: orbit train {} --run OTHER_FOLDER",
        path,
        folder.config_path()
    );
    if (checkpoint->step >= config.train.steps && file_exists(path + "/summary.json")) {
        log_line(fmt::format(
            "{} is finished ({} steps); raise train.steps in its config.toml to go on",
            path,
            checkpoint->step
        ));
        RunResult result;
        result.folder = path;
        return result;
    }
    Run run(config);
    run.folder = std::move(folder);
    restore_checkpoint(run, *checkpoint);
    run.folder->truncate_after(run.step);
    print_ledger(run);
    print_host_experts(run);
    log_line(fmt::format("going on after step {} of {}", run.step, config.train.steps));
    return run_steps(run, std::nullopt);
}

}  // namespace orbit
