// Plain records: what a user brings (Example) and what a rollout produces (Trajectory).
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace orbit {

struct Message {
    std::string role;
    std::string content;
};

struct Example {
    std::vector<Message> messages;  // a string prompt is one user message
    std::string answer;
    std::string row_json;  // the whole row, for reward programs
    std::string file;      // where it came from
    int64_t line = 0;      // counts from 1
};

enum class FinishReason : uint8_t { kStop, kLength, kAbort };

struct RewardPart {
    std::string name;
    double value;
};

enum class ScoreStatus : uint8_t {
    kScored,
    kCrashed,    // the reward program ended
    kTimeout,    // no answer in time
    kBadOutput,  // an answer that is not understood
};

// "scored", "crashed", "timeout" or "bad_output": the word that files and results use.
inline const char* status_name(ScoreStatus status) {
    switch (status) {
        case ScoreStatus::kScored:
            return "scored";
        case ScoreStatus::kCrashed:
            return "crashed";
        case ScoreStatus::kTimeout:
            return "timeout";
        case ScoreStatus::kBadOutput:
            return "bad_output";
    }
    return "unknown";
}

struct Score {
    ScoreStatus status = ScoreStatus::kScored;
    double value = 0;    // valid only when scored
    std::string reason;  // one phrase: why this score
    std::vector<RewardPart> parts;
};

struct Trajectory {
    int64_t step = 0;
    int64_t prompt = 0;        // index of the prompt within the data set
    int32_t slot = 0;          // index of the prompt within the step
    int32_t sample = 0;        // 0 .. samples_per_prompt - 1
    std::vector<int32_t> ids;  // prompt then response
    int32_t prompt_length = 0;
    std::vector<float> logprobs;  // one per response token, as sampled
    int64_t adapter_version = 0;
    std::vector<uint8_t> routing;  // the experts of ids[0 .. size - 1); empty: not recorded
    FinishReason finish = FinishReason::kStop;
    std::string response;  // decoded, special tokens skipped
    Score score;
    double advantage = 0;
};

}  // namespace orbit
