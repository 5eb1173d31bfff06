// PEFT folders in and out (algorithms.md 1.10). The tensors of a file are the truth: ranks and
// block sizes come from their shapes, and every tensor must find its place.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>

#include "adapter/experts.h"
#include "adapter/peft_config.h"
#include "base/file.h"
#include "base/log.h"
#include "base/safetensors.h"

namespace orbit {
namespace {

constexpr std::string_view kPrefix = "base_model.model.";
constexpr std::string_view kLoraA = ".lora_A.weight";
constexpr std::string_view kLoraB = ".lora_B.weight";
constexpr std::string_view kOftR = ".oft_R.weight";
constexpr const char* kConfigName = "/adapter_config.json";
constexpr const char* kWeightsName = "/adapter_model.safetensors";

struct SiteTensors {
    const StoredTensor* a = nullptr;
    const StoredTensor* b = nullptr;
    const StoredTensor* r = nullptr;
};

std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text;
    for (const int64_t dim : shape) {
        text += fmt::format("{}{}", text.empty() ? "" : ", ", dim);
    }
    return "[" + text + "]";
}

[[noreturn]] void refuse_tensor(const StoredTensor& tensor, const std::string& why) {
    throw UserError(fmt::format("{}: tensor \"{}\" {}.", tensor.file, tensor.name, why));
}

void check_shape(const StoredTensor& tensor, bool fits, const std::string& expected) {
    if (!fits) {
        refuse_tensor(
            tensor,
            fmt::format(
                "has the shape {}, and this model needs {}; the adapter belongs to another model",
                shape_text(tensor.shape),
                expected
            )
        );
    }
}

// Why a tensor that is no LoRA or OFT weight cannot be used.
std::string foreign_reason(const std::string& name) {
    if (name.find("lora_magnitude_vector") != std::string::npos) {
        return "is a DoRA magnitude, and DoRA is not computed here";
    }
    if (name.find("_embedding_") != std::string::npos) {
        return "adapts an embedding, and Orbit adapts linear layers only";
    }
    if (name.find(".oft_r.") != std::string::npos) {
        return "is of an older OFT format that current PEFT refuses too; train the adapter again";
    }
    if (name.ends_with(".bias")) {
        return "is a trained bias, and Orbit trains none";
    }
    return "is no LoRA or OFT weight on a linear layer";
}

// The module path of a tensor, without prefix and suffix.
std::string module_of(const StoredTensor& tensor, AdapterKind kind) {
    const std::string& name = tensor.name;
    std::string_view suffix;
    for (const std::string_view candidate : {kLoraA, kLoraB, kOftR}) {
        if (name.starts_with(kPrefix) && name.ends_with(candidate) &&
            name.size() > kPrefix.size() + candidate.size()) {
            suffix = candidate;
        }
    }
    if (suffix.empty()) {
        refuse_tensor(tensor, foreign_reason(name));
    }
    if ((suffix == kOftR) != (kind == AdapterKind::kOft)) {
        refuse_tensor(tensor, "does not fit \"peft_type\" in adapter_config.json");
    }
    return name.substr(kPrefix.size(), name.size() - kPrefix.size() - suffix.size());
}

std::vector<SiteTensors> assign_tensors(
    const AdapterTensors& tensors, const PeftConfig& config, const std::vector<AdapterSite>& sites
) {
    std::map<std::string, size_t> index;
    for (size_t i = 0; i < sites.size(); ++i) {
        index[sites[i].module] = i;
    }
    std::vector<SiteTensors> parts(sites.size());
    for (const auto& [name, tensor] : tensors) {
        const std::string module = module_of(tensor, config.kind);
        const auto found = index.find(module);
        if (found == index.end()) {
            refuse_tensor(
                tensor,
                fmt::format(
                    "adapts \"{}\", and this model has no such linear layer; the adapter belongs "
                    "to another model",
                    module
                )
            );
        }
        SiteTensors& site = parts[found->second];
        (name.ends_with(kLoraA) ? site.a : name.ends_with(kLoraB) ? site.b : site.r) = &tensor;
    }
    return parts;
}

SiteLayout lora_layout(
    const PeftConfig& config, const AdapterSite& site, const SiteTensors& parts
) {
    if (parts.a == nullptr || parts.b == nullptr) {
        const StoredTensor& have = parts.a == nullptr ? *parts.b : *parts.a;
        const char* missing = parts.a == nullptr ? ".lora_A.weight" : ".lora_B.weight";
        const std::string name = peft_tensor_name(site.module, missing);
        refuse_tensor(have, fmt::format("is there, but its partner \"{}\" is missing", name));
    }
    const auto& a = parts.a->shape;
    const auto& b = parts.b->shape;
    const bool a_fits = a.size() == 2 && a[1] == site.in && a[0] >= 1;
    check_shape(*parts.a, a_fits, fmt::format("[rank, {}]", site.in));
    const bool b_fits = b.size() == 2 && b[0] == site.out && b[1] == a[0];
    check_shape(*parts.b, b_fits, fmt::format("[{}, {}]", site.out, a[0]));
    SiteLayout layout;
    layout.kind = AdapterKind::kLora;
    layout.rank = a[0];
    layout.alpha = pattern_value(config, config.alpha_pattern, site.module, config.alpha);
    const double rank =
        pattern_value(config, config.rank_pattern, site.module, static_cast<double>(config.rank));
    if (rank != static_cast<double>(a[0])) {
        warn_line(fmt::format(
            "{}: {} has rank {} in the tensors and {} in the config; the tensors count.",
            config.path,
            site.module,
            a[0],
            rank
        ));
    }
    return layout;
}

SiteLayout oft_layout(const PeftConfig& config, const AdapterSite& site, const SiteTensors& parts) {
    const auto& shape = parts.r->shape;
    const auto fail = [&](bool fits) {
        const std::string expected = fmt::format(
            "[{} / b, b (b - 1) / 2] for a block size b that divides {}{}",
            site.in,
            site.in,
            config.block_share ? ", or one shared row" : ""
        );
        check_shape(*parts.r, fits, expected);
    };
    fail(shape.size() == 2 && shape[0] >= 1 && shape[1] >= 1 && shape[1] < (int64_t{1} << 40));
    const double root = std::sqrt(1.0 + 8.0 * static_cast<double>(shape[1]));
    SiteLayout layout;
    layout.kind = AdapterKind::kOft;
    layout.block = std::llround((1.0 + root) / 2.0);
    fail(oft_parameters(layout.block) == shape[1] && layout.block <= site.in);
    fail(site.in % layout.block == 0);
    layout.num_blocks = site.in / layout.block;
    layout.rows = shape[0];
    fail(layout.rows == layout.num_blocks || (layout.rows == 1 && config.block_share));
    return layout;
}

std::vector<SiteLayout> layouts_of(
    const PeftConfig& config,
    const std::vector<AdapterSite>& sites,
    const std::vector<SiteTensors>& parts,
    const std::string& weights
) {
    std::vector<SiteLayout> layouts;
    for (size_t i = 0; i < sites.size(); ++i) {
        SiteLayout layout;
        if (parts[i].a != nullptr || parts[i].b != nullptr) {
            layout = lora_layout(config, sites[i], parts[i]);
        } else if (parts[i].r != nullptr) {
            layout = oft_layout(config, sites[i], parts[i]);
        } else {
            // Fused experts are no linear layers to PEFT, so their names may match and stay bare.
            const bool may_be_bare = config.layers_restricted ||
                                     sites[i].module.find(".experts.") != std::string::npos ||
                                     !selects_module(config, sites[i].module);
            USER_CHECK(
                may_be_bare,
                "{} has no tensor for {}, which \"target_modules\" in {} names; the file is "
                "incomplete or belongs to another model.",
                weights,
                sites[i].module,
                config.path
            );
        }
        layout.site = sites[i];
        layouts.push_back(layout);
    }
    return layouts;
}

template <typename T>
T element(const StoredTensor& tensor, int64_t i) {
    T value;
    std::memcpy(&value, tensor.bytes.data() + static_cast<size_t>(i) * sizeof(T), sizeof(T));
    return value;
}

// The elements as float32; only finite ones.
void read_floats(const StoredTensor& tensor, float sign, float* to) {
    const int64_t count = tensor.numel();
    const std::string& type = tensor.dtype;
    if (type != "F32" && type != "F16" && type != "BF16" && type != "F64") {
        refuse_tensor(tensor, fmt::format("is {}; adapters are F32, BF16, F16 or F64", type));
    }
    for (int64_t i = 0; i < count; ++i) {
        const float value = type == "F32"    ? element<float>(tensor, i)
                            : type == "F16"  ? to_float(element<f16>(tensor, i))
                            : type == "BF16" ? to_float(element<bf16>(tensor, i))
                                             : static_cast<float>(element<double>(tensor, i));
        if (!std::isfinite(value)) {
            refuse_tensor(tensor, fmt::format("holds a value that is not finite (element {})", i));
        }
        to[i] = sign * value;
    }
}

// Short names of the adapted layers: a leaf name when all its layers are adapted, else full paths.
std::vector<std::string> target_names(const std::vector<SiteLayout>& sites) {
    std::map<std::string, bool> leaf_is_whole;
    const auto leaf = [](const SiteLayout& site) {
        return site.site.module.substr(site.site.module.rfind('.') + 1);
    };
    for (const SiteLayout& site : sites) {
        const auto at = leaf_is_whole.emplace(leaf(site), true).first;
        at->second = at->second && site.kind != AdapterKind::kNone;
    }
    std::vector<std::string> names;
    for (const SiteLayout& site : sites) {
        if (site.kind != AdapterKind::kNone) {
            names.push_back(leaf_is_whole[leaf(site)] ? leaf(site) : site.site.module);
        }
    }
    std::sort(names.begin(), names.end());
    names.erase(std::unique(names.begin(), names.end()), names.end());
    return names;
}

int64_t most_common_rank(const std::vector<SiteLayout>& sites) {
    std::map<int64_t, int64_t> counts;
    int64_t best = 0;
    for (const SiteLayout& site : sites) {
        if (site.kind == AdapterKind::kLora) {
            ++counts[site.rank];
        }
    }
    for (const auto& [rank, count] : counts) {
        best = best == 0 || count > counts[best] ? rank : best;
    }
    return best;
}

AdapterOptions options_of(const PeftConfig& config, const std::vector<SiteLayout>& sites) {
    AdapterOptions options;
    options.kind = config.kind == AdapterKind::kLora ? "lora" : "oft";
    options.targets = target_names(sites);
    if (config.kind == AdapterKind::kLora) {
        options.rank = static_cast<int32_t>(most_common_rank(sites));
        options.alpha = static_cast<float>(config.alpha);
        options.rslora = config.rslora;
    } else {
        options.block_size = static_cast<int32_t>(config.block_size);
        options.exact_cayley = config.exact_cayley;
        options.neumann_terms = config.neumann_terms;
    }
    return options;
}

AdapterExtras extras_of(const PeftConfig& config) {
    AdapterExtras extras;
    extras.transform = config.exact_cayley
                           ? OftTransform{.exact = true}
                           : neumann_transform(config.neumann_terms, config.old_neumann_rule);
    extras.old_neumann_rule = config.old_neumann_rule;
    extras.block_share = config.block_share;
    extras.coft = config.coft;
    extras.coft_eps = config.coft_eps;
    extras.fixed_num_blocks = config.num_blocks;
    return extras;
}

// Whole numbers as JSON integers, as PEFT writes lora_alpha.
nlohmann::json number_json(double value) {
    if (value == std::floor(value) && std::abs(value) < 1e15) {
        return static_cast<int64_t>(value);
    }
    return value;
}

void write_lora_fields(const AdapterStore::State& state, nlohmann::json& json) {
    const int64_t rank = most_common_rank(state.sites);
    const double alpha = static_cast<double>(state.options.alpha);
    json["peft_type"] = "LORA";
    json["r"] = rank;
    json["lora_alpha"] = number_json(alpha);
    json["lora_dropout"] = 0.0;
    json["use_rslora"] = state.options.rslora;
    json["use_dora"] = false;
    json["init_lora_weights"] = true;
    json["target_parameters"] = nullptr;
    json["rank_pattern"] = nlohmann::json::object();
    json["alpha_pattern"] = nlohmann::json::object();
    for (const SiteLayout& site : state.sites) {
        if (site.kind == AdapterKind::kLora && site.rank != rank) {
            json["rank_pattern"][site.site.module] = site.rank;
        }
        if (site.kind == AdapterKind::kLora && site.alpha != alpha) {
            json["alpha_pattern"][site.site.module] = number_json(site.alpha);
        }
    }
}

// PEFT rounds a block size that does not divide to the nearest divisor, layer by layer; write the
// one number that leads it to the sizes we have.
void write_block_size(const AdapterStore::State& state, nlohmann::json& json) {
    std::vector<SiteLayout> sites;
    for (const SiteLayout& site : state.sites) {
        if (site.kind == AdapterKind::kOft) {
            sites.push_back(site);
        }
    }
    CHECK(!sites.empty(), "(an OFT adapter without sites)");
    json["r"] = 0;
    for (const int64_t size : {int64_t{state.options.block_size}, sites.front().block}) {
        if (size > 0 && std::all_of(sites.begin(), sites.end(), [&](const SiteLayout& site) {
                return peft_block_size(site.site.in, size) == site.block;
            })) {
            json["oft_block_size"] = size;
            return;
        }
    }
    const int64_t num_blocks = sites.front().num_blocks;
    USER_CHECK(
        std::all_of(
            sites.begin(),
            sites.end(),
            [&](const SiteLayout& site) { return site.num_blocks == num_blocks; }
        ),
        "the adapter mixes block sizes in a way that PEFT's config cannot say; it cannot be saved."
    );
    json["r"] = num_blocks;
    json["oft_block_size"] = 0;
}

void write_oft_fields(const AdapterStore::State& state, nlohmann::json& json) {
    json["peft_type"] = "OFT";
    write_block_size(state, json);
    json["module_dropout"] = 0.0;
    json["init_weights"] = true;
    json["coft"] = state.extras.coft;
    json["eps"] = state.extras.coft_eps;
    json["block_share"] = state.extras.block_share;
    json["use_cayley_neumann"] = !state.options.exact_cayley;
    json["num_cayley_neumann_terms"] = state.options.neumann_terms;
    json["exclude_modules"] = nullptr;
    json["layers_pattern"] = nullptr;
    json["layers_to_transform"] = nullptr;
}

std::string config_text(const AdapterStore::State& state, const std::string& base_model) {
    nlohmann::json json;
    json["task_type"] = "CAUSAL_LM";
    json["base_model_name_or_path"] = base_model;
    json["revision"] = nullptr;
    json["inference_mode"] = true;
    json["bias"] = "none";
    json["fan_in_fan_out"] = false;
    json["modules_to_save"] = nullptr;
    json["target_modules"] = target_names(state.sites);
    // Below 0.18 PEFT computes the series with the old last coefficient; such an adapter keeps it.
    json["peft_version"] = state.extras.old_neumann_rule ? "0.17.1" : "0.18.0";
    if (state.options.kind == "lora") {
        write_lora_fields(state, json);
    } else {
        write_oft_fields(state, json);
    }
    return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

// PEFT's exact branch computes C(-Q); Orbit C(+Q) everywhere.
float file_sign(const AdapterOptions& options) {
    return options.kind == "oft" && options.exact_cayley ? -1.0f : 1.0f;
}

}  // namespace

std::unique_ptr<AdapterStore> AdapterStore::load_peft(
    const Device& device,
    const std::string& folder,
    std::vector<AdapterSite> sites,
    DType compute,
    int num_slots
) {
    USER_CHECK(
        file_exists(folder + kConfigName),
        "{} has no adapter_config.json; an adapter is the folder that PEFT's save_pretrained "
        "writes.",
        folder
    );
    USER_CHECK(
        file_exists(folder + kWeightsName),
        "{} has no adapter_model.safetensors{}.",
        folder,
        file_exists(folder + "/adapter_model.bin")
            ? "; its adapter_model.bin is a pickle, save it again with safe_serialization=True"
            : ""
    );
    const PeftConfig config =
        parse_peft_config(folder + kConfigName, read_file(folder + kConfigName));
    const SafetensorsFile file(folder + kWeightsName);
    USER_CHECK(!file.tensors().empty(), "{}{} holds no tensors.", folder, kWeightsName);
    std::string sharing;
    const AdapterTensors tensors = split_stacked(file, sites, sharing);
    const std::vector<SiteTensors> parts = assign_tensors(tensors, config, sites);
    std::vector<SiteLayout> layouts = layouts_of(config, sites, parts, folder + kWeightsName);
    AdapterOptions options = options_of(config, layouts);
    options.expert_sharing = sharing;
    std::unique_ptr<AdapterStore> store(new AdapterStore(
        State::create(device, options, extras_of(config), std::move(layouts), compute, num_slots)
    ));
    State& state = *store->state_;
    state.origin = folder;
    std::vector<float> masters(static_cast<size_t>(state.num_parameters));
    for (size_t i = 0; i < state.sites.size(); ++i) {
        const SiteLayout& site = state.sites[i];
        const float sign = file_sign(options);
        if (site.kind != AdapterKind::kNone && site.owns_first) {
            const StoredTensor* first = parts[i].a != nullptr ? parts[i].a : parts[i].r;
            read_floats(*first, sign, masters.data() + site.master);
        }
        if (site.kind == AdapterKind::kLora && site.owns_b) {
            read_floats(*parts[i].b, sign, masters.data() + site.master_b);
        }
    }
    Stream stream(device);
    copy_to_device(stream, state.masters, masters.data(), masters.size() * sizeof(float));
    synchronize(stream);
    store->publish(stream, 0);
    return store;
}

void AdapterStore::save_peft(
    Stream& stream, const std::string& folder, const std::string& base_model
) const {
    CHECK(!state_->tensors.empty(), "(saving an adapter without parameters)");
    const std::string config = config_text(*state_, base_model);
    std::vector<float> masters(static_cast<size_t>(state_->num_parameters));
    copy_to_host(stream, masters.data(), state_->masters, masters.size() * sizeof(float));
    if (file_sign(state_->options) < 0) {
        for (float& value : masters) {
            value = -value;
        }
    }
    std::vector<TensorToStore> tensors;
    std::vector<OwnedTensor> stacked;
    if (state_->options.expert_sharing == "shared") {
        stacked = stack_tensors(*state_, masters);
        for (const OwnedTensor& tensor : stacked) {
            const size_t bytes = tensor.values.size() * sizeof(float);
            tensors.push_back({tensor.name, "F32", tensor.shape, tensor.values.data(), bytes});
        }
    } else {
        for (const NamedRange& range : state_->tensors) {
            const auto bytes = static_cast<size_t>(range.shape[0] * range.shape[1]) * sizeof(float);
            tensors.push_back({range.name, "F32", range.shape, masters.data() + range.offset, bytes}
            );
        }
    }
    std::sort(tensors.begin(), tensors.end(), [](const auto& left, const auto& right) {
        return left.name < right.name;
    });
    make_directories(folder);
    write_safetensors(folder + kWeightsName, tensors, {{"format", "pt"}});
    write_file_atomic(folder + kConfigName, config);
}

}  // namespace orbit
