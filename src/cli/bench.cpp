#include "run/bench.h"

#include <fmt/core.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "cli/commands.h"
#include "model/base_bytes.h"

namespace orbit {
namespace {

using nlohmann::ordered_json;

ordered_json print_table(const std::string& title, const std::vector<BenchRow>& rows) {
    ordered_json table = ordered_json::array();
    fmt::print("{}\n", title);
    fmt::print(
        "| what | shape | time us | floor us | floor / time | tokens/s | memory MiB | note |\n"
    );
    fmt::print("|---|---|---|---|---|---|---|---|\n");
    for (const BenchRow& r : rows) {
        const double ratio = r.floor_us > 0 ? r.floor_us / r.time_us : 0.0;
        fmt::print(
            "| {} | {} | {:.1f} | {:.1f} | {:.2f} | {:.0f} | {:.0f} | {} |\n",
            r.what,
            r.shape,
            r.time_us,
            r.floor_us,
            ratio,
            r.tokens_per_s,
            r.memory_bytes / (1 << 20),
            r.note
        );
        table.push_back(
            {{"what", r.what},
             {"shape", r.shape},
             {"time_us", r.time_us},
             {"floor_us", r.floor_us},
             {"tokens_per_s", r.tokens_per_s},
             {"memory_bytes", r.memory_bytes},
             {"streamed_us", r.streamed_us},
             {"digest", r.digest},
             {"note", r.note}}
        );
    }
    return table;
}

// Slow-downs and bits of experts in host memory; false when a row's bits differ.
bool print_comparison(const std::vector<HostExpertsRow>& rows, int64_t host_layers) {
    fmt::print("\nexperts of {} layers in host memory beside all on the device\n", host_layers);
    fmt::print(
        "| what | shape | device us | host us | slow-down | predicted | bits |\n"
        "|---|---|---|---|---|---|---|\n"
    );
    for (const HostExpertsRow& r : rows) {
        fmt::print(
            "| {} | {} | {:.1f} | {:.1f} | {:.2f} | {} | {} |\n",
            r.what,
            r.shape,
            r.device_us,
            r.host_us,
            r.host_us / r.device_us,
            r.predicted_us > 0 ? fmt::format("{:.2f}", r.predicted_us / r.device_us) : "",
            r.equal_bits ? "equal" : "DIFFERENT"
        );
    }
    return std::all_of(rows.begin(), rows.end(), [](const auto& r) { return r.equal_bits; });
}

}  // namespace

int run_bench(const BenchArgs& args) {
    const Device device = make_device(args.device.device, args.device.cpu_isa, args.device.threads);
    Stream stream(device);
    BenchOptions options = args.options;
    const MemoryInfo before = memory_info(device);
    options.memory_before = before.total - before.available;
    std::string name;
    const auto measure = [&](int64_t host_layers) {
        LoadOptions load;
        load.host_layers = host_layers;
        const auto model = load_or_make_model(stream, args.model, load, args.shape, args.format);
        name = model->name;
        check_host_layers(model->config, args.host_layers);
        const auto rows = run_bench_table(stream, *model, options);
        stream.scratch.reserve(0);
        return rows;
    };
    const auto whole = measure(0);
    ordered_json all = {{"model", name}, {"device", device.name}};
    all["rows"] = print_table(name + " on " + device.name, whole);
    bool equal = true;
    if (args.host_layers > 0) {
        const auto rows = measure(args.host_layers);
        const std::string where = fmt::format(", {} layers in host memory", args.host_layers);
        all["host_rows"] = print_table("\n" + name + " on " + device.name + where, rows);
        equal = print_comparison(compare_host_experts(whole, rows), args.host_layers);
    }
    if (!args.json.empty()) {
        write_file_atomic(args.json, all.dump(2) + "\n");
    }
    return equal ? 0 : 1;
}

}  // namespace orbit
