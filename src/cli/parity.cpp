#include "run/parity.h"

#include <fmt/core.h>

#include "cli/commands.h"

namespace orbit {

int run_parity(const ParityArgs& args) {
    const DeviceArgs& on = args.model.device;
    const Device device = make_device(on.device, on.cpu_isa, on.threads);
    Stream stream(device);
    LoadOptions load;
    load.quantize = args.model.quantize;
    load.host_layers = args.model.host_layers;
    const std::unique_ptr<Model> model =
        load_or_make_model(stream, args.model.model, load, args.shape, args.format);
    ParityOptions options;
    options.num_texts = args.num_texts;
    options.longest = args.longest;
    const auto rows = parity_table(stream, *model, adapter_folder(args.model.adapter), options);
    int64_t different = 0;
    fmt::print("{} on {}\n", model->name, device.name);
    fmt::print("{:<10} {:<28} {:>9} {:>9}\n", "adapter", "comparison", "tokens", "different");
    for (const ParityRow& row : rows) {
        fmt::print(
            "{:<10} {:<28} {:>9} {:>9}\n", row.adapter, row.comparison, row.tokens, row.different
        );
        if (row.different > 0) {
            fmt::print("           first: {}\n", row.first);
        }
        different += row.different;
    }
    fmt::print("differing tokens: {}\n", different);
    return different == 0 ? 0 : 1;
}

}  // namespace orbit
