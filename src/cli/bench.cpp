#include "run/bench.h"

#include <fmt/core.h>
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "base/file.h"
#include "cli/commands.h"
#include "model/synthetic.h"

namespace orbit {

int run_bench(const BenchArgs& args) {
    const Device device = make_device(args.device.device, args.device.cpu_isa, args.device.threads);
    Stream stream(device);
    BenchOptions options = args.options;
    const MemoryInfo before = memory_info(device);
    options.memory_before = before.total - before.available;
    const std::unique_ptr<Model> model =
        load_or_make_model(stream, args.model, {}, args.shape, args.format);
    const auto rows = run_bench_table(stream, *model, options);
    nlohmann::ordered_json table = nlohmann::ordered_json::array();
    fmt::print("{} on {}\n", model->name, device.name);
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
             {"note", r.note}}
        );
    }
    if (!args.json.empty()) {
        const nlohmann::ordered_json all = {
            {"model", model->name}, {"device", device.name}, {"rows", table}};
        write_file_atomic(args.json, all.dump(2) + "\n");
    }
    return 0;
}

}  // namespace orbit
