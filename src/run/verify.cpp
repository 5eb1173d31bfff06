#include "run/verify.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/file.h"
#include "base/log.h"
#include "base/safetensors.h"
#include "model/score.h"
#include "rollout/engine.h"
#include "train/trainer.h"

namespace orbit {
namespace {

using nlohmann::json;

json read_json(const std::string& path) {
    json value = json::parse(read_file(path), nullptr, false);
    USER_CHECK(
        value.is_object(),
        "{} is not a JSON object; write it anew with tools/make_reference.py.",
        path
    );
    return value;
}

template <typename T>
std::vector<T> numbers(const json& value, const std::string& path, const std::string& field) {
    USER_CHECK(value.is_array(), "{}: field \"{}\" must be a list of numbers.", path, field);
    std::vector<T> result;
    for (const auto& item : value) {
        USER_CHECK(item.is_number(), "{}: field \"{}\" must be a list of numbers.", path, field);
        result.push_back(item.get<T>());
    }
    return result;
}

struct Document {
    std::string text;
    std::vector<int32_t> ids;
    std::vector<double> logprobs;
};

std::vector<Document> read_documents(
    const Model& model, const json& reference, const std::string& path
) {
    USER_CHECK(
        reference.contains("documents") && reference["documents"].is_array(),
        "{}: field \"documents\" is missing or no list.",
        path
    );
    std::vector<Document> documents;
    for (const auto& item : reference["documents"]) {
        USER_CHECK(
            item.is_object() && item.contains("ids") && item.contains("logprobs"),
            "{}: document {} lacks ids or logprobs.",
            path,
            documents.size()
        );
        Document document;
        document.text = item.value("text", "");
        document.ids = numbers<int32_t>(item["ids"], path, "ids");
        document.logprobs = numbers<double>(item["logprobs"], path, "logprobs");
        USER_CHECK(
            document.ids.size() == document.logprobs.size() + 1,
            "{}: document {} has {} ids and {} logprobs; there must be one less of these.",
            path,
            documents.size(),
            document.ids.size(),
            document.logprobs.size()
        );
        for (const int32_t id : document.ids) {
            USER_CHECK(
                id >= 0 && id < model.config.vocab_size,
                "{}: document {} holds the id {}, the model has {}; this reference is of another "
                "model.",
                path,
                documents.size(),
                id,
                model.config.vocab_size
            );
        }
        documents.push_back(std::move(document));
    }
    return documents;
}

void compare_logprobs(
    VerifyRow& row,
    const std::vector<TokenScores>& scores,
    const std::vector<std::vector<double>>& reference
) {
    double sum = 0;
    for (size_t d = 0; d < reference.size(); ++d) {
        ++row.documents;
        for (size_t i = 0; i < reference[d].size(); ++i) {
            const double difference =
                std::abs(static_cast<double>(scores[d].logprobs[i]) - reference[d][i]);
            sum += difference;
            ++row.tokens;
            // A NaN must never pass as the smallest difference.
            if (!(difference <= row.logprob_difference)) {
                row.logprob_difference = difference;
                row.worst_place = fmt::format(
                    "document {} token {}: {:.6f}, reference {:.6f}",
                    d,
                    i + 1,
                    scores[d].logprobs[i],
                    reference[d][i]
                );
            }
        }
    }
    row.logprob_difference_mean = row.tokens > 0 ? sum / static_cast<double>(row.tokens) : 0;
}

// loss = -sum w logp with w = ((7919 t) mod 13 - 6) / 6, t the index of the predicted token in its
// document.
void reference_gradient(
    Stream& stream,
    const Model& model,
    AdapterStore& adapter,
    const std::vector<std::vector<int32_t>>& texts
) {
    std::vector<TrainSequence> sequences;
    for (size_t i = 0; i < texts.size(); ++i) {
        sequences.push_back({&texts[i], 1, static_cast<int64_t>(i)});
    }
    Trainer trainer(stream, model, adapter, TrainOptions{}, SamplingFilter{});
    const int slot = adapter.pin_current();
    trainer.accumulate(sequences, slot, [](auto, auto columns, auto coefficients) {
        for (size_t s = 0; s < columns.size(); ++s) {
            for (size_t i = 0; i < columns[s].logprob.size(); ++i) {
                const auto t = static_cast<int64_t>(i) + 1;
                coefficients[s].d_logprob[i] = -static_cast<float>((7919 * t) % 13 - 6) / 6.0f;
            }
        }
    });
    adapter.unpin(slot);
    adapter.finish_gradients(stream);
}

std::vector<float> read_floats(const StoredTensor& tensor, const std::string& path) {
    USER_CHECK(tensor.dtype == "F32", "{}: tensor \"{}\" must be F32.", path, tensor.name);
    std::vector<float> values(static_cast<size_t>(tensor.numel()));
    std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
    return values;
}

void compare_gradients(
    VerifyRow& row, Stream& stream, AdapterStore& adapter, const std::string& path
) {
    const SafetensorsFile file(path);
    std::vector<float> ours(static_cast<size_t>(adapter.num_parameters()));
    copy_to_host(stream, ours.data(), adapter.gradients(), ours.size() * sizeof(float));
    row.has_gradients = true;
    // PEFT's exact Cayley transform turns the other way for the same numbers; masters hold ours.
    const double sign =
        adapter.options().kind == "oft" && adapter.options().exact_cayley ? -1.0 : 1.0;
    for (const auto& range : adapter.tensors()) {
        const std::vector<float> reference = read_floats(file.tensor(range.name), path);
        double difference = 0;
        double norm = 0;
        for (size_t i = 0; i < reference.size(); ++i) {
            const double r = static_cast<double>(reference[i]);
            const double d =
                sign * static_cast<double>(ours[static_cast<size_t>(range.offset) + i]) - r;
            difference += d * d;
            norm += r * r;
        }
        const double relative = std::sqrt(difference) / std::max(1e-30, std::sqrt(norm));
        if (!(relative <= row.gradient_difference)) {
            row.gradient_difference = relative;
            row.worst_tensor = range.name;
        }
    }
}

VerifyRow verify_adapter(
    Stream& stream,
    const Model& model,
    const std::string& folder,
    const std::string& kind,
    const std::vector<Document>& documents
) {
    VerifyRow row;
    row.what = kind;
    const auto adapter =
        AdapterStore::load_peft(model.arena.device(), folder, model.sites, model.compute, 2);
    const std::string path = folder + "/reference.json";
    const json reference = read_json(path);
    USER_CHECK(
        reference.contains("logprobs") && reference["logprobs"].is_array() &&
            reference["logprobs"].size() <= documents.size(),
        "{}: field \"logprobs\" is missing or has more texts than the reference of the base.",
        path
    );
    std::vector<std::vector<double>> expected;
    std::vector<std::vector<int32_t>> texts;
    for (const auto& item : reference["logprobs"]) {
        expected.push_back(numbers<double>(item, path, "logprobs"));
        texts.push_back(documents[texts.size()].ids);
        USER_CHECK(
            expected.back().size() + 1 == texts.back().size(),
            "{}: text {} has a wrong length.",
            path,
            texts.size() - 1
        );
    }
    const int slot = adapter->pin_current();
    compare_logprobs(row, score_texts(stream, model, adapter.get(), slot, texts), expected);
    adapter->unpin(slot);
    const std::string gradients = folder + "/gradients.safetensors";
    if (file_exists(gradients)) {
        reference_gradient(stream, model, *adapter, texts);
        compare_gradients(row, stream, *adapter, gradients);
    }
    return row;
}

void verify_greedy(
    Stream& stream,
    const Model& model,
    const json& reference,
    const std::string& path,
    VerifyReport& report
) {
    if (!reference.contains("greedy")) {
        return;
    }
    std::vector<std::vector<int32_t>> expected;
    std::vector<double> gaps;
    std::vector<Request> requests;
    int64_t tokens = 0;
    for (const auto& item : reference["greedy"]) {
        USER_CHECK(item.contains("greedy_ids"), "{}: a greedy text lacks greedy_ids.", path);
        expected.push_back(numbers<int32_t>(item["greedy_ids"], path, "greedy_ids"));
        gaps.push_back(item.value("smallest_gap", 1.0));
        Request request;
        request.prompt = item.contains("prompt_ids")
                             ? numbers<int32_t>(item["prompt_ids"], path, "prompt_ids")
                             : model.tokenizer->encode(item.value("prompt", ""), false);
        USER_CHECK(!request.prompt.empty(), "{}: a greedy text has no prompt.", path);
        request.request_ids = {0};
        request.filter.temperature = 0;
        request.max_tokens = static_cast<int64_t>(expected.back().size());
        tokens += static_cast<int64_t>(request.prompt.size()) + request.max_tokens + kPageTokens;
        requests.push_back(std::move(request));
    }
    EngineOptions options;
    options.kv_tokens = tokens + kPageTokens;
    RolloutEngine engine(stream, model, nullptr, options);
    for (auto& request : requests) {
        engine.submit(std::move(request));
    }
    while (engine.step()) {
    }
    report.greedy = static_cast<int64_t>(expected.size());
    for (const Completion& done : engine.take_finished()) {
        const auto i = static_cast<size_t>(done.ticket);
        const bool equal = done.ids == expected[i];
        report.greedy_equal += equal || gaps[i] < 1e-3 ? 1 : 0;
        if (!equal) {
            log_line(fmt::format(
                "greedy text {} differs: \"{}\", reference \"{}\" (smallest gap {:.4g})",
                i,
                model.tokenizer->decode(done.ids, false),
                model.tokenizer->decode(expected[i], false),
                gaps[i]
            ));
        }
    }
}

}  // namespace

VerifyReport verify_model(Stream& stream, const Model& model, const std::string& folder) {
    const std::string path = folder + "/reference.json";
    USER_CHECK(file_exists(path), "{} is missing; write it with tools/make_reference.py.", path);
    const json reference = read_json(path);
    const std::vector<Document> documents = read_documents(model, reference, path);
    VerifyReport report;
    VerifyRow base;
    base.what = "base";
    std::vector<std::vector<int32_t>> texts;
    std::vector<std::vector<double>> expected;
    for (const auto& document : documents) {
        texts.push_back(document.ids);
        expected.push_back(document.logprobs);
        if (!document.text.empty()) {
            ++report.tokenized;
            report.tokenized_equal +=
                model.tokenizer->encode(document.text, false) == document.ids ? 1 : 0;
        }
    }
    compare_logprobs(base, score_texts(stream, model, nullptr, kNoAdapter, texts), expected);
    report.rows.push_back(base);
    verify_greedy(stream, model, reference, path, report);
    for (const char* kind : {"lora", "oft"}) {
        const std::string adapter = folder + "/" + kind;
        if (file_exists(adapter + "/reference.json")) {
            report.rows.push_back(verify_adapter(stream, model, adapter, kind, documents));
        }
    }
    for (const auto& row : report.rows) {
        // !(a <= b) rather than a > b: a NaN counts as the largest.
        if (!(row.logprob_difference <= report.logprob_difference)) {
            report.logprob_difference = row.logprob_difference;
        }
        if (!(row.gradient_difference <= report.gradient_difference)) {
            report.gradient_difference = row.gradient_difference;
        }
    }
    return report;
}

}  // namespace orbit
