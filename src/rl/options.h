// Options of evaluation (config section [eval]).
#pragma once

#include <cstdint>
#include <vector>

namespace orbit {

struct EvalOptions {
    int64_t every = 0;
    int64_t max_questions = 0;
    int64_t samples = 0;
    std::vector<int64_t> k = {1, 4};
    float temperature = 1.0f;

    void visit(auto&& field) {
        field("every", every, "steps between evaluations; 0: only before and after training");
        field("max_questions", max_questions, "questions asked, from the top; 0: all");
        field("samples", samples, "answers sampled per question for pass@k; 0: greedy only");
        field("k", k, "pass@k for these k");
        field("temperature", temperature, "temperature of the sampled answers");
    }
};

}  // namespace orbit
