#include <fmt/format.h>

#include "base/error.h"
#include "base/file.h"
#include "cli/commands.h"
#include "model/synthetic.h"

namespace orbit {

std::string adapter_folder(const std::string& path) {
    if (path.empty() || file_exists(path + "/adapter_config.json")) {
        return path;
    }
    if (file_exists(path + "/adapter/adapter_config.json")) {
        return path + "/adapter";
    }
    USER_CHECK(
        !file_exists(path + "/config.toml"),
        "the run {} has no final adapter yet; finish it with orbit resume {}, or name the adapter/ "
        "folder of one of its checkpoints.",
        path,
        path
    );
    return path;  // load_peft says what is missing
}

std::unique_ptr<Model> load_or_make_model(
    Stream& stream,
    const std::string& path,
    const LoadOptions& load,
    const std::string& shape,
    const std::string& format
) {
    USER_CHECK(
        path.empty() != shape.empty(),
        "this command needs either a MODEL or --shape (one of {}).",
        fmt::join(synthetic_shapes(), ", ")
    );
    return shape.empty() ? load_model(stream, path, load)
                         : make_synthetic_model(stream, shape, format, load.host_layers);
}

OpenModel::OpenModel(const ModelArgs& args)
    : device(make_device(args.device.device, args.device.cpu_isa, args.device.threads)),
      stream(device) {
    USER_CHECK(
        args.activations == "bf16" || args.activations == "f32",
        "--activations must be bf16 or f32, but is \"{}\".",
        args.activations
    );
    LoadOptions load;
    load.quantize = args.quantize;
    load.host_layers = args.host_layers;
    if (args.activations == "f32") {
        USER_CHECK(device.is_cpu(), "--activations f32 runs on the CPU only; add --device cpu.");
        load.compute = DType::kF32;
    }
    model = load_model(stream, args.model, load);
    if (!args.adapter.empty()) {
        adapter = AdapterStore::load_peft(
            device, adapter_folder(args.adapter), model->sites, model->compute, 2
        );
    }
}

}  // namespace orbit
