// Options of the rollout engine (config section [rollout]).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace orbit {

struct RolloutOptions {
    int64_t prompts_per_step = 32;
    int64_t samples_per_prompt = 8;
    float temperature = 1.0f;
    float top_p = 1.0f;
    int32_t top_k = 0;
    float min_p = 0.0f;
    int64_t max_tokens = 256;
    int64_t max_batch = 256;      // sequences decoded together
    int64_t prefill_chunk = 512;  // prompt tokens computed in one forward
    bool prefix_cache = true;
    std::vector<std::string> stop;  // stop strings

    void visit(auto&& field) {
        field("prompts_per_step", prompts_per_step, "prompts in one step");
        field(
            "samples_per_prompt", samples_per_prompt, "answers sampled for each prompt (the group)"
        );
        field("temperature", temperature, "softmax temperature; 0 means greedy");
        field("top_p", top_p, "keep the smallest set of tokens with this probability; 1 is off");
        field("top_k", top_k, "keep the k most likely tokens; 0 is off");
        field("min_p", min_p, "drop tokens less likely than this share of the likeliest; 0 is off");
        field("max_tokens", max_tokens, "longest answer, in tokens");
        field("max_batch", max_batch, "sequences decoded together");
        field("prefill_chunk", prefill_chunk, "prompt tokens computed in one forward");
        field("prefix_cache", prefix_cache, "keep the keys and values of common prompt beginnings");
        field("stop", stop, "texts that end an answer");
    }
};

}  // namespace orbit
