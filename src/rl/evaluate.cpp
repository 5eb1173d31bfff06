#include <algorithm>

#include "base/hash.h"
#include "base/log.h"
#include "rl/step.h"

namespace orbit {
namespace {

constexpr double kRight = 1.0 - 1e-9;

// Asks every question `samples` times and scores the answers; results[question][sample].
std::vector<std::vector<RewardJob>> ask(
    const Model& model,
    RolloutEngine& engine,
    const Dataset& data,
    int64_t questions,
    int32_t samples,
    const SamplingFilter& filter,
    const RolloutOptions& rollout,
    const std::string& system_prompt,
    uint64_t seed,
    bool use_adapter
) {
    std::vector<std::vector<RewardJob>> answers(
        static_cast<size_t>(questions), std::vector<RewardJob>(static_cast<size_t>(samples))
    );
    std::map<int64_t, int64_t> question_of;
    for (int64_t q = 0; q < questions; ++q) {
        Request request;
        request.prompt = prompt_ids(model, data[q], system_prompt);
        request.num_samples = samples;
        for (int32_t i = 0; i < samples; ++i) {
            const int64_t key[3] = {-1, q, i};  // step -1: never a training stream
            request.request_ids.push_back(hash64(key, sizeof key));
        }
        request.seed = seed;
        request.filter = filter;
        request.max_tokens = rollout.max_tokens;
        request.stop = rollout.stop;
        request.use_adapter = use_adapter;
        question_of[engine.submit(std::move(request))] = q;
    }
    ProgressBar bar("evaluate", questions * samples, "answers");
    bool more = true;
    while (more) {
        more = engine.step();
        for (Completion& done : engine.take_finished()) {
            const int64_t q = question_of.at(done.ticket);
            answers[static_cast<size_t>(q)][static_cast<size_t>(done.sample)] = {
                &data[q],
                response_text(model, done.ids, rollout.stop),
                static_cast<int64_t>(done.ids.size()),
                done.finish};
            bar.add(1);
        }
    }
    return answers;
}

}  // namespace

std::vector<int32_t> prompt_ids(
    const Model& model, const Example& example, const std::string& system_prompt
) {
    std::vector<ChatMessage> messages;
    const bool has_system = !example.messages.empty() && example.messages.front().role == "system";
    if (!system_prompt.empty() && !has_system) {
        messages.push_back({"system", system_prompt});
    }
    for (const auto& message : example.messages) {
        messages.push_back({message.role, message.content});
    }
    return encode_chat(model, messages, false);
}

std::string response_text(
    const Model& model, const std::vector<int32_t>& ids, const std::vector<std::string>& stop
) {
    std::string text = model.tokenizer->decode(ids, true);
    size_t end = text.size();
    for (const auto& s : stop) {
        end = std::min(end, text.find(s));
    }
    text.resize(end);
    return text;
}

double pass_at_k(int64_t n, int64_t c, int64_t k) {
    if (n - c < k) {
        return 1.0;
    }
    double miss = 1.0;
    for (int64_t i = 0; i < k; ++i) {
        miss *= static_cast<double>(n - c - i) / static_cast<double>(n - i);
    }
    return 1.0 - miss;
}

EvalReport evaluate(
    const Model& model,
    RolloutEngine& engine,
    Reward& reward,
    const Dataset& data,
    const EvalOptions& options,
    const RolloutOptions& rollout,
    const std::string& system_prompt,
    uint64_t seed,
    bool use_adapter
) {
    EvalReport report;
    report.questions =
        options.max_questions > 0 ? std::min(options.max_questions, data.size()) : data.size();
    SamplingFilter greedy;
    greedy.temperature = 0;
    const auto answers = ask(
        model, engine, data, report.questions, 1, greedy, rollout, system_prompt, seed, use_adapter
    );
    std::vector<RewardJob> jobs;
    for (const auto& answer : answers) {
        jobs.push_back(answer[0]);
        report.response_length +=
            static_cast<double>(answer[0].response_tokens) / static_cast<double>(report.questions);
        report.truncated_share += (answer[0].finish == FinishReason::kLength ? 1.0 : 0.0) /
                                  static_cast<double>(report.questions);
    }
    const std::vector<Score> scores = reward.score(jobs);
    int64_t right = 0;
    for (size_t q = 0; q < scores.size(); ++q) {
        const bool scored = scores[q].status == ScoreStatus::kScored;
        const bool correct = scored && scores[q].value >= kRight;
        right += correct ? 1 : 0;
        report.unscored += scored ? 0 : 1;
        report.answers.push_back({jobs[q].response, correct, scores[q].status});
    }
    report.accuracy = static_cast<double>(right) / static_cast<double>(report.questions);
    if (options.samples <= 0) {
        return report;
    }
    SamplingFilter sampled;
    sampled.temperature = options.temperature;
    const auto draws =
        ask(model,
            engine,
            data,
            report.questions,
            static_cast<int32_t>(options.samples),
            sampled,
            rollout,
            system_prompt,
            seed,
            use_adapter);
    for (const auto& question : draws) {
        int64_t c = 0;
        for (const Score& s : reward.score(question)) {
            c += s.status == ScoreStatus::kScored && s.value >= kRight ? 1 : 0;
        }
        for (const int64_t k : options.k) {
            report.pass_at_k[k] +=
                pass_at_k(options.samples, c, k) / static_cast<double>(report.questions);
        }
    }
    return report;
}

}  // namespace orbit
