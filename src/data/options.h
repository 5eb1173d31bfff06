// Options of the data set (config section [data]).
#pragma once

#include <string>

namespace orbit {

struct DataOptions {
    std::string train;
    std::string eval;
    std::string prompt_field = "prompt";
    std::string answer_field = "answer";
    std::string system;
    bool shuffle = true;

    void visit(auto&& field) {
        field("train", train, "JSON Lines file of training questions");
        field("eval", eval, "JSON Lines file of evaluation questions; empty: no evaluation");
        field(
            "prompt_field",
            prompt_field,
            "field that holds the question: a string (one user message) or a list of messages"
        );
        field("answer_field", answer_field, "field that holds the right answer");
        field("system", system, "system message put before every question; empty: none");
        field("shuffle", shuffle, "draw questions in a seeded random order");
    }
};

}  // namespace orbit
