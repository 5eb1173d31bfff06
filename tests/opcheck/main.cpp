// opcheck [--op NAME] [--case TEXT] [--mode MODE] [--isa ISA] [--device DEVICE] [--threads N]
//     [--part I/N]
#include <fmt/core.h>

#include <cstdlib>
#include <string>
#include <string_view>

#include "opcheck/cases.h"
#include "opcheck/checks.h"

namespace orbit::opcheck {
namespace {

// One line per file of cases.
constexpr void (*kRegistrations[])(CaseList&) = {
    add_linear_cases,
    add_attention_cases,
    add_norm_cases,
    add_rope_cases,
    add_activation_cases,
    add_logprob_cases,
    add_embed_cases,
    add_optimizer_cases,
    add_oft_transform_cases,
    add_moe_cases,
    // In the end: the random numbers of a case depend on how many come before it.
    add_fused_cases,
    add_rotated_attention_cases,
    add_linear_group_cases,
};

struct Options {
    std::string op;
    std::string name;  // a part of a case's name
    std::string mode;
    std::string isa = "auto";
    std::string device = "cpu";
    int threads = 0;
    size_t part = 0;  // of `parts`: every case whose number leaves this remainder
    size_t parts = 1;
};

// "2/8"
void parse_part(const std::string& value, Options& options) {
    const size_t slash = value.find('/');
    USER_CHECK(slash != std::string::npos, "--part needs I/N, as in 2/8.");
    options.part = static_cast<size_t>(std::atoi(value.substr(0, slash).c_str()));
    options.parts = static_cast<size_t>(std::atoi(value.substr(slash + 1).c_str()));
    USER_CHECK(options.part < options.parts, "--part {}: I must be less than N.", value);
}

Options parse(int argc, char** argv) {
    Options options;
    for (int i = 1; i < argc; i += 2) {
        const std::string_view flag = argv[i];
        USER_CHECK(i + 1 < argc, "{} needs a value.", flag);
        const std::string value = argv[i + 1];
        if (flag == "--op") {
            options.op = value;
        } else if (flag == "--case") {
            options.name = value;
        } else if (flag == "--mode") {
            options.mode = value;
        } else if (flag == "--isa") {
            options.isa = value;
        } else if (flag == "--device") {
            options.device = value;
        } else if (flag == "--threads") {
            options.threads = std::atoi(value.c_str());
        } else if (flag == "--part") {
            parse_part(value, options);
        } else {
            throw UserError(fmt::format(
                "{} is unknown; the flags are --op, --case, --mode, --isa, --device, --threads and "
                "--part.",
                flag
            ));
        }
    }
    return options;
}

struct Tally {
    int passed = 0;
    int failed = 0;
    int skipped = 0;

    void add(const Case& c, const char* mode, const Verdict& verdict) {
        ++(verdict.passed ? passed : failed);
        fmt::print(
            "{:<16} {:<44} {:<12} {:<5} {}\n",
            c.op,
            c.name,
            mode,
            verdict.passed ? "ok" : "FAIL",
            verdict.detail
        );
    }
};

void check_case(Case c, const Options& options, Stream& stream, Stream& other, Tally& tally) {
    if ((c.perf_only && options.mode != "perf") || (c.gpu_only && stream.is_cpu())) {
        return;
    }
    if (const auto prepare = c.prepare; prepare) {  // a copy: it may assign the whole case
        prepare(c);
    }
    const auto wanted = [&](const char* mode) {
        return options.mode == mode || (options.mode.empty() && std::string_view(mode) != "perf");
    };
    if (!c.perf_only && c.reference && wanted("forward")) {
        tally.add(c, "forward", check_forward(c, stream));
    }
    if (!c.perf_only && c.reference && c.backward && wanted("grad")) {
        tally.add(c, "grad", check_grad(c, stream));
    }
    bool has_rows = false;
    for (const auto& in : c.inputs) {
        has_rows = has_rows || in.per_row;
    }
    if (!c.perf_only && has_rows && wanted("invariance")) {
        tally.add(c, "invariance", check_invariance(c, stream, other));
    }
    if (!c.perf_only && wanted("determinism")) {
        tally.add(c, "determinism", check_determinism(c, stream));
    }
    if (c.flops + c.bytes > 0 && wanted("perf")) {
        tally.add(c, "perf", measure(c, stream));
    }
}

// A GPU refuses some cases (the f32 check mode, odd head widths): these are counted, not failed.
void check_case_on_gpu(
    const Case& c, const Options& options, Stream& stream, Stream& other, Tally& tally
) {
    try {
        check_case(c, options, stream, other, tally);
    } catch (const UserError& refusal) {
        ++tally.skipped;
        fmt::print("{:<16} {:<44} skipped: {}\n", c.op, c.name, refusal.what());
    }
}

int run(int argc, char** argv) {
    const Options options = parse(argc, argv);
    CaseList cases;
    for (const auto add : kRegistrations) {
        add(cases);
    }
    const Device device = make_device(options.device, options.isa, options.threads);
    const Device other_device =
        make_device(options.device, options.isa, device.threads->num_threads() == 3 ? 2 : 3);
    Stream stream(device);
    Stream other(other_device);
    fmt::print("device: {}\n", device.name);
    Tally tally;
    for (size_t i = options.part; i < cases.size(); i += options.parts) {
        const Case& c = cases[i];
        if ((options.op.empty() || c.op == options.op) &&
            c.name.find(options.name) != std::string::npos) {
            if (stream.is_cpu()) {
                check_case(c, options, stream, other, tally);
            } else {
                check_case_on_gpu(c, options, stream, other, tally);
            }
        }
    }
    USER_CHECK(
        tally.passed + tally.failed > 0,
        "--op \"{}\" --case \"{}\" --mode \"{}\" selects nothing; modes are forward, grad, "
        "invariance, determinism, perf.",
        options.op,
        options.name,
        options.mode
    );
    if (tally.skipped > 0) {
        fmt::print("{} cases skipped\n", tally.skipped);
    }
    fmt::print("{} passed, {} failed\n", tally.passed, tally.failed);
    return tally.failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace orbit::opcheck

int main(int argc, char** argv) {
    try {
        return orbit::opcheck::run(argc, argv);
    } catch (const orbit::UserError& error) {
        fmt::print(stderr, "{}\n", error.what());
        return 2;
    }
}
