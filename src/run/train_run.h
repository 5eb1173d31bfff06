// orbit train and orbit resume: a whole run in a run folder.
#pragma once

#include <string>

#include "run/config.h"

namespace orbit {

struct RunResult {
    std::string folder;
    bool interrupted = false;     // Ctrl-C: ended at a step boundary with a checkpoint
    double accuracy_before = -1;  // -1: no evaluation
    double accuracy_after = -1;
    int64_t parity_mismatches = 0;
};

// `folder` empty: runs/NAME-DATE.
RunResult start_run(const Config& config, std::string folder);
// Goes on after the last whole checkpoint. A finished run says so and changes nothing.
RunResult resume_run(const std::string& folder);

// Makes Ctrl-C (SIGINT) and SIGTERM set a flag that the run looks at between steps; a second one
// ends the process.
void install_interrupt_handler();

}  // namespace orbit
