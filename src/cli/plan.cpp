#include <fmt/core.h>

#include <algorithm>

#include "base/error.h"
#include "cli/commands.h"

namespace orbit {
namespace {

// Attention alone for models with experts: adapters on every expert outweigh the optimiser's room
// of most machines, so they are asked for by name.
std::vector<std::string> default_targets(const PlanModel& model) {
    std::vector<std::string> targets;
    for (const PlanMatrix& matrix : model.matrices) {
        const bool listed = std::find(targets.begin(), targets.end(), matrix.leaf) != targets.end();
        if (model.experts > 0 && matrix.attention && matrix.linear && !listed) {
            targets.push_back(matrix.leaf);
        }
    }
    return targets;
}

}  // namespace

int run_plan(const PlanArgs& args) {
    const PlanModel model = plan_model(args.model, args.format);
    GpuPlanOptions options = args.options;
    std::vector<std::string>& targets = options.adapter.targets;
    if (targets.empty()) {
        targets = default_targets(model);
    } else if (targets == std::vector<std::string>{"all"}) {
        targets.clear();
    }
    for (const std::string& target : targets) {
        std::vector<std::string> leaves;
        for (const PlanMatrix& matrix : model.matrices) {
            if (matrix.linear) {
                leaves.push_back(matrix.leaf);
            }
        }
        USER_CHECK(
            std::find(leaves.begin(), leaves.end(), target) != leaves.end(),
            "--targets: \"{}\" names no linear layer of {}; did you mean \"{}\"?",
            target,
            model.name,
            nearest_name(target, leaves)
        );
    }
    const GpuPlan plan = plan_gpus(model, options);
    fmt::print("{}", gpu_plan_text(model, options, plan));
    return plan.fits() ? 0 : 1;
}

}  // namespace orbit
