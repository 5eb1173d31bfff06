#include "run/verify.h"

#include <fmt/core.h>

#include "base/log.h"
#include "cli/commands.h"

namespace orbit {
namespace {

// The tolerances of the check mode; with bf16 activations the figures are reported, not judged.
constexpr double kLogprobTolerance = 2e-4;
constexpr double kGgufLogprobTolerance = 1e-3;  // block formats, and deeper models
constexpr double kGradientTolerance = 1e-3;

void print_rows(const VerifyReport& report) {
    for (const VerifyRow& row : report.rows) {
        fmt::print(
            "{:<5} {} documents, {} tokens: log-prob difference max {:.3g} mean {:.3g} (at {})\n",
            row.what,
            row.documents,
            row.tokens,
            row.logprob_difference,
            row.logprob_difference_mean,
            row.worst_place
        );
        if (row.has_gradients) {
            fmt::print(
                "{:<5} gradients: relative difference max {:.3g} ({})\n",
                row.what,
                row.gradient_difference,
                row.worst_tensor
            );
        }
    }
    fmt::print(
        "tokenizer: {} of {} documents give the reference's ids\n",
        report.tokenized_equal,
        report.tokenized
    );
}

}  // namespace

int run_verify(const VerifyArgs& args) {
    OpenModel open(args.model);
    const VerifyReport report = verify_model(open.stream, *open.model, args.reference);
    print_rows(report);
    const bool check_mode = args.model.activations == "f32";
    double tolerance = args.tolerance;
    double gradient_tolerance = args.gradient_tolerance;
    if (check_mode && tolerance < 0) {
        tolerance = args.model.model.ends_with(".gguf") ? kGgufLogprobTolerance : kLogprobTolerance;
    }
    if (check_mode && gradient_tolerance < 0) {
        gradient_tolerance = kGradientTolerance;
    }
    bool good = !check_mode || report.greedy_equal == report.greedy;
    good = good && report.tokenized_equal == report.tokenized;
    // Written so that a NaN fails.
    good = good && (tolerance < 0 || report.logprob_difference <= tolerance);
    good = good && (gradient_tolerance < 0 || report.gradient_difference <= gradient_tolerance);
    if (!good) {
        log_line(fmt::format(
            "verify: outside the tolerance (log-probs {:.3g}, gradients {:.3g})",
            tolerance,
            gradient_tolerance
        ));
    }
    fmt::print(
        "max log-prob difference {:.3g}, greedy {}/{}, max gradient difference {:.3g}\n",
        report.logprob_difference,
        report.greedy_equal,
        report.greedy,
        report.gradient_difference
    );
    return good ? 0 : 1;
}

}  // namespace orbit
