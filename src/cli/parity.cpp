#include "run/parity.h"

#include <fmt/core.h>

#include "cli/commands.h"

namespace orbit {

int run_parity(const ParityArgs& args) {
    ModelArgs base = args.model;
    base.adapter.clear();  // the table loads it itself
    OpenModel open(base);
    ParityOptions options;
    options.num_texts = args.num_texts;
    options.longest = args.longest;
    const auto rows =
        parity_table(open.stream, *open.model, adapter_folder(args.model.adapter), options);
    int64_t different = 0;
    fmt::print("{} on {}\n", open.model->name, open.device.name);
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
