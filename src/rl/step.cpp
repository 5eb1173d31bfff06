#include "rl/step.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/hash.h"
#include "base/log.h"
#include "model/score.h"

namespace orbit {
namespace {

// A request's random stream is a function of (step, prompt of the step, sample) and the run's seed,
// of nothing else.
uint64_t request_id(int64_t step, int64_t prompt, int64_t sample) {
    const int64_t key[3] = {step, prompt, sample};
    return hash64(key, sizeof key);
}

// The rows of step `step`: the data set is walked epoch by epoch in its seeded order.
std::vector<int64_t> rows_of_step(const Session& s, int64_t step) {
    std::vector<int64_t> rows;
    int64_t epoch = -1;
    std::vector<int64_t> order;
    for (int64_t i = 0; i < s.rollout_options.prompts_per_step; ++i) {
        const int64_t visit = step * s.rollout_options.prompts_per_step + i;
        if (visit / s.data.size() != epoch) {
            epoch = visit / s.data.size();
            order = s.data.order(s.seed, epoch);
        }
        rows.push_back(order[static_cast<size_t>(visit % s.data.size())]);
    }
    return rows;
}

SamplingFilter sampling_filter(const RolloutOptions& options) {
    return {options.temperature, options.top_p, options.top_k, options.min_p};
}

std::vector<Group> roll_out(Session& s, int64_t step) {
    const std::vector<int64_t> rows = rows_of_step(s, step);
    std::vector<Group> groups(rows.size());
    std::map<int64_t, size_t> group_of_ticket;
    std::vector<std::vector<int32_t>> prompts;
    for (size_t g = 0; g < rows.size(); ++g) {
        groups[g].example = &s.data[rows[g]];
        groups[g].samples.resize(static_cast<size_t>(s.rollout_options.samples_per_prompt));
        prompts.push_back(prompt_ids(s.model, *groups[g].example, s.system_prompt));
        Request request;
        request.prompt = prompts.back();
        request.num_samples = static_cast<int32_t>(s.rollout_options.samples_per_prompt);
        for (int32_t sample = 0; sample < request.num_samples; ++sample) {
            request.request_ids.push_back(request_id(step, static_cast<int64_t>(g), sample));
        }
        request.seed = s.seed;
        request.filter = sampling_filter(s.rollout_options);
        request.max_tokens = s.rollout_options.max_tokens;
        request.stop = s.rollout_options.stop;
        group_of_ticket[s.rollout.submit(std::move(request))] = g;
    }
    while (s.rollout.step()) {
    }
    for (Completion& done : s.rollout.take_finished()) {
        const size_t g = group_of_ticket.at(done.ticket);
        Trajectory& t = groups[g].samples[static_cast<size_t>(done.sample)];
        t.step = step;
        t.prompt = rows[g];
        t.slot = static_cast<int32_t>(g);
        t.sample = done.sample;
        t.ids = prompts[g];
        t.prompt_length = static_cast<int32_t>(t.ids.size());
        t.ids.insert(t.ids.end(), done.ids.begin(), done.ids.end());
        t.logprobs = std::move(done.logprobs);
        t.routing = std::move(done.routing);
        t.adapter_version = done.adapter_version;
        t.finish = done.finish;
        t.response = response_text(s.model, done.ids, s.rollout_options.stop);
    }
    return groups;
}

void score(std::vector<Group>& groups, Reward& reward) {
    std::vector<RewardJob> jobs;
    for (const auto& group : groups) {
        for (const auto& t : group.samples) {
            jobs.push_back(
                {group.example, t.response, static_cast<int64_t>(t.logprobs.size()), t.finish}
            );
        }
    }
    std::vector<Score> scores = reward.score(jobs);
    size_t at = 0;
    for (auto& group : groups) {
        for (auto& t : group.samples) {
            t.score = std::move(scores[at++]);
        }
    }
}

// Sums over the tokens that were trained on.
struct TokenSums {
    double entropy = 0;
    double gap = 0;  // |training - rollout| log-prob
    double gap_max = 0;
    double kl = 0;  // k3 against the base
    double loss = 0;
    int64_t clipped = 0;
    int64_t tokens = 0;
};

// The groups that have a gradient, as packed batches of whole sequences in canonical order.
std::vector<std::vector<TrainSequence>> pack(
    const std::vector<Group>& groups, const TrainOptions& options
) {
    std::vector<std::vector<TrainSequence>> batches;
    int64_t tokens = 0;
    int64_t index = 0;
    for (const auto& group : groups) {
        const bool flat =
            std::all_of(group.samples.begin(), group.samples.end(), [](const Trajectory& t) {
                return t.advantage == 0;
            });
        for (const auto& t : group.samples) {
            const auto length = static_cast<int64_t>(t.ids.size());
            const int64_t here = index++;
            if (flat && options.kl_coef == 0) {
                continue;
            }
            if (batches.empty() || tokens + length > options.tokens_per_batch) {
                batches.emplace_back();
                tokens = 0;
            }
            batches.back().push_back({&t.ids, t.prompt_length, here, &t.routing});
            tokens += length;
        }
    }
    return batches;
}

class Accumulation {
  public:
    Accumulation(Session& session, StepReport& report) : s_(&session), report_(&report) {
        for (const auto& group : report.groups) {
            for (const auto& t : group.samples) {
                trajectories_.push_back(&t);
                denominator_ += static_cast<double>(t.logprobs.size());
            }
        }
        options_ = {
            session.train_options.clip_low,
            session.train_options.clip_high,
            session.train_options.kl_coef};
    }

    void add(std::span<const TrainSequence> batch, int slot) {
        std::vector<TokenScores> reference;
        if (options_.kl_coef != 0) {
            std::vector<std::vector<int32_t>> texts;
            for (const auto& sequence : batch) {
                texts.push_back(*sequence.ids);
            }
            ScoreOptions score;
            score.filter = sampling_filter(s_->rollout_options);
            score.tokens_per_batch = s_->train_options.tokens_per_batch;
            reference = score_texts(s_->stream, s_->model, nullptr, kNoAdapter, texts, score);
        }
        const auto fill_batch = [&](auto sequences, auto columns, auto coefficients) {
            for (size_t i = 0; i < sequences.size(); ++i) {
                const float* base = nullptr;
                if (!reference.empty()) {
                    base = reference[i].logprobs.data() + sequences[i].prompt_length - 1;
                }
                fill(sequences[i], columns[i], base, coefficients[i]);
            }
        };
        const RoutingCheck check = s_->trainer.accumulate(batch, slot, fill_batch);
        if (report_->routing.mismatches == 0) {
            report_->routing.first = check.first;
        }
        report_->routing.pairs += check.pairs;
        report_->routing.mismatches += check.mismatches;
    }

    TokenSums sums;

  private:
    void fill(
        const TrainSequence& sequence,
        const TokenColumns& columns,
        const float* base,
        TokenCoefficients& out
    ) {
        const Trajectory& t = *trajectories_[static_cast<size_t>(sequence.index)];
        const bool scored = t.score.status == ScoreStatus::kScored;
        for (size_t i = 0; i < columns.logprob.size(); ++i) {
            compare(t, i, columns.logprob[i]);
            const double l = static_cast<double>(columns.logprob[i]);
            const double old = static_cast<double>(t.logprobs[i]);
            const double ref = base != nullptr ? static_cast<double>(base[i]) : 0.0;
            const GrpoToken token = grpo_token(options_, t.advantage, l, old, ref);
            if (scored) {
                out.d_logprob[i] = static_cast<float>(token.d_logprob / denominator_);
            }
            sums.loss += token.loss / denominator_;
            sums.clipped += token.clipped ? 1 : 0;
            sums.entropy += static_cast<double>(columns.entropy[i]);
            sums.kl += base != nullptr ? std::exp(ref - l) - 1.0 - (ref - l) : 0.0;
            ++sums.tokens;
        }
    }

    // The product's promise: the training forward gives the bits that the sampler recorded.
    void compare(const Trajectory& t, size_t i, float logprob) {
        const double gap =
            std::abs(static_cast<double>(logprob) - static_cast<double>(t.logprobs[i]));
        sums.gap += gap;
        sums.gap_max = std::max(sums.gap_max, gap);
        ++report_->parity_tokens;
        if (std::bit_cast<uint32_t>(logprob) == std::bit_cast<uint32_t>(t.logprobs[i])) {
            return;
        }
        if (report_->parity_mismatches++ == 0) {
            report_->first_mismatch = fmt::format(
                "prompt {} sample {} response token {} (id {}): rollout {:.9g}, training {:.9g}",
                t.slot,
                t.sample,
                i,
                t.ids[static_cast<size_t>(t.prompt_length) + i],
                t.logprobs[i],
                logprob
            );
        }
    }

    Session* s_;
    StepReport* report_;
    GrpoOptions options_;
    std::vector<const Trajectory*> trajectories_;
    double denominator_ = 0;  // response tokens of the whole step
};

struct PhaseTimes {
    double rollout = 0;
    double reward = 0;
    double train = 0;
    double update = 0;
};

// Runs `body` and returns its seconds.
template <typename Body>
double timed(Body&& body) {
    const double start = now_s();
    body();
    return now_s() - start;
}

void report_rewards(StepReport& report) {
    auto& m = report.metrics;
    double sum = 0;
    double squares = 0;
    double scored = 0;
    double length = 0;
    double truncated = 0;
    double count = 0;
    double flat = 0;
    double failures[4] = {0, 0, 0, 0};
    std::map<std::string, double> parts;
    for (const auto& group : report.groups) {
        bool any = false;
        for (const auto& t : group.samples) {
            ++count;
            length += static_cast<double>(t.logprobs.size());
            truncated += t.finish == FinishReason::kLength ? 1 : 0;
            any = any || t.advantage != 0;
            failures[static_cast<size_t>(t.score.status)] += 1;
            if (t.score.status == ScoreStatus::kScored) {
                ++scored;
                sum += t.score.value;
                squares += t.score.value * t.score.value;
                for (const auto& part : t.score.parts) {
                    parts["reward/part/" + part.name] += part.value;
                }
            }
        }
        flat += any ? 0 : 1;
    }
    const double mean = scored > 0 ? sum / scored : 0;
    m["reward/mean"] = mean;
    m["reward/std"] = scored > 0 ? std::sqrt(std::max(0.0, squares / scored - mean * mean)) : 0;
    m["reward/crashed"] = failures[static_cast<size_t>(ScoreStatus::kCrashed)];
    m["reward/timeouts"] = failures[static_cast<size_t>(ScoreStatus::kTimeout)];
    m["reward/bad_output"] = failures[static_cast<size_t>(ScoreStatus::kBadOutput)];
    for (const auto& [name, total] : parts) {
        m[name] = scored > 0 ? total / scored : 0;
    }
    m["response/length_mean"] = length / count;
    m["response/truncated_share"] = truncated / count;
    m["group/flat_share"] = flat / static_cast<double>(report.groups.size());
    report.num_tokens = static_cast<int64_t>(length);
}

// How evenly the recorded tokens spread over the experts. Shares of the routed rows of a layer.
void report_routing(const Session& s, StepReport& report) {
    const ModelConfig& c = s.model.config;
    const int64_t layers = c.num_expert_layers();
    const int64_t each = layers * c.experts_per_token;
    std::vector<int64_t> rows(static_cast<size_t>(layers * c.num_experts), 0);
    int64_t tokens = 0;
    const size_t width = c.num_experts > 256 ? 2 : 1;
    for (const auto& group : report.groups) {
        for (const auto& t : group.samples) {
            const auto ids = static_cast<int64_t>(t.routing.size() / width);
            tokens += each > 0 ? ids / each : 0;
            for (int64_t i = 0; i < ids; ++i) {
                const int64_t layer = i % each / c.experts_per_token;
                int64_t expert = t.routing[static_cast<size_t>(i) * width];
                if (width == 2) {
                    expert += int64_t{t.routing[static_cast<size_t>(i) * width + 1]} << 8;
                }
                ++rows[static_cast<size_t>(layer * c.num_experts + expert)];
            }
        }
    }
    if (tokens == 0) {
        return;
    }
    const int64_t most = *std::max_element(rows.begin(), rows.end());
    const auto idle = static_cast<double>(std::count(rows.begin(), rows.end(), 0));
    auto& m = report.metrics;
    m["routing/max_share"] =
        static_cast<double>(most) / static_cast<double>(tokens * c.experts_per_token);
    m["routing/idle_share"] = idle / static_cast<double>(rows.size());
    m["routing/pairs"] = static_cast<double>(report.routing.pairs);
    m["routing/mismatches"] = static_cast<double>(report.routing.mismatches);
    m["routing/mismatch"] = static_cast<double>(report.routing.mismatches) /
                            std::max(1.0, static_cast<double>(report.routing.pairs));
}

void report_training(Session& s, StepReport& report, const TokenSums& sums, const Update& update) {
    auto& m = report.metrics;
    const double tokens = std::max<double>(1, static_cast<double>(sums.tokens));
    m["entropy"] = sums.entropy / tokens;
    m["loss"] = sums.loss;
    m["clip_share"] = static_cast<double>(sums.clipped) / tokens;
    m["logprob_gap/mean"] = sums.gap / tokens;
    m["logprob_gap/max"] = sums.gap_max;
    m["parity/mismatches"] = static_cast<double>(report.parity_mismatches);
    m["parity/tokens"] = static_cast<double>(report.parity_tokens);
    m["grad_norm"] = update.grad_norm;
    m["grad_scale"] = update.grad_scale;
    m["grad_skipped"] = update.skipped ? 1 : 0;
    m["lr"] = update.lr;
    if (s.train_options.kl_coef != 0) {
        m["kl_base"] = sums.kl / tokens;
    }
    if (s.adapter.options().kind == "oft") {
        const OftHealth health = s.adapter.oft_health(s.stream);
        m["oft/block_norm_max"] = health.block_norm_max;
        m["oft/theta_max"] = health.theta_max;
    }
}

void report_times(Session& s, StepReport& report, const PhaseTimes& times) {
    auto& m = report.metrics;
    const double total = times.rollout + times.reward + times.train + times.update;
    m["time/rollout_s"] = times.rollout;
    m["time/reward_s"] = times.reward;
    m["time/train_s"] = times.train;
    m["time/update_s"] = times.update;
    m["time/step_s"] = total;
    m["time/tokens_per_s"] = static_cast<double>(report.num_tokens) / std::max(1e-9, total);
    m["mem/scratch_bytes"] = static_cast<double>(s.stream.scratch.peak_bytes());
    if (s.model.config.num_experts > 0) {
        m["mem/dequant_bytes"] =
            static_cast<double>(dequant_bytes(s.model, s.train_options.tokens_per_batch));
    }
    m["mem/kv_bytes"] = static_cast<double>(s.rollout.kv_bytes());
}

}  // namespace

StepReport rl_step(Session& s, int64_t step) {
    StepReport report;
    report.step = step;
    PhaseTimes times;
    times.rollout = timed([&] { report.groups = roll_out(s, step); });
    times.reward = timed([&] { score(report.groups, s.reward); });
    for (auto& group : report.groups) {
        grpo_advantages(group
        );  // canonical order: from here on nothing depends on who finished first
    }
    Accumulation accumulation(s, report);
    times.train = timed([&] {
        const int slot = s.adapter.pin_current();
        for (const auto& batch : pack(report.groups, s.train_options)) {
            accumulation.add(batch, slot);  // forward on a tape, parity check, backward
        }
        s.adapter.unpin(slot);
    });
    Update update;
    times.update = timed([&] {
        update = s.trainer.apply();             // clip, AdamW
        s.adapter.publish(s.stream, step + 1);  // inactive slot, then one switch
    });
    report_rewards(report);
    report_training(s, report, accumulation.sums, update);
    report_routing(s, report);
    report_times(s, report, times);
    return report;
}

}  // namespace orbit
