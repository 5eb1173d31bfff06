#include "base/error.h"
#include "cli/commands.h"
#include "run/train_run.h"

namespace orbit {
namespace {

constexpr int kInterruptedStatus = 130;

int status_of(const RunResult& result) {
    return result.interrupted ? kInterruptedStatus : 0;
}

}  // namespace

int run_train(const TrainArgs& args) {
    std::vector<std::string> overrides = args.overrides;
    if (!args.device.empty()) {
        overrides.push_back("device=" + args.device);
    }
    const Config config = load_config(args.config, overrides);
    USER_CHECK(!config.model.empty(), "{} sets no model.", args.config);
    USER_CHECK(!config.data.train.empty(), "{} sets no data.train.", args.config);
    install_interrupt_handler();
    return status_of(start_run(config, args.run));
}

int run_resume(const std::string& folder) {
    install_interrupt_handler();
    return status_of(resume_run(folder));
}

}  // namespace orbit
