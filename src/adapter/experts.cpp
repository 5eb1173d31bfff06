#include "adapter/experts.h"

#include <algorithm>
#include <charconv>

namespace orbit {
namespace {

constexpr std::string_view kPrefix = "base_model.model.";
constexpr std::string_view kSuffixes[] = {".lora_A.weight", ".lora_B.weight", ".oft_R.weight"};

// The names of stacked tensors, as Tinker, vLLM and SGLang have them.
constexpr std::pair<const char*, const char*> kStackedNames[] = {
    {"gate_proj", "w1"}, {"down_proj", "w2"}, {"up_proj", "w3"}};

std::string stacked_name(const std::string& leaf) {
    for (const auto& [own, stacked] : kStackedNames) {
        if (leaf == own) {
            return stacked;
        }
    }
    return leaf;
}

bool reads_the_layers_input(const std::string& leaf) {
    return leaf == "gate_proj" || leaf == "up_proj";
}

// "base_model.model.X.experts.w1.lora_A.weight" taken apart.
struct StackedName {
    std::string group;
    std::string leaf;
    std::string suffix;
};

std::optional<StackedName> parse_stacked(const StoredTensor& tensor) {
    const std::string& name = tensor.name;
    for (const std::string_view suffix : kSuffixes) {
        for (const auto& [own, stacked] : kStackedNames) {
            const std::string end = std::string(".experts.") + stacked + std::string(suffix);
            if (name.starts_with(kPrefix) && name.ends_with(end) &&
                name.size() > kPrefix.size() + end.size()) {
                const size_t length = name.size() - kPrefix.size() - end.size();
                std::string group = name.substr(kPrefix.size(), length) + ".experts";
                return StackedName{std::move(group), own, std::string(suffix)};
            }
        }
    }
    return std::nullopt;
}

[[noreturn]] void refuse(const StoredTensor& tensor, const std::string& why) {
    throw UserError(fmt::format("{}: tensor \"{}\" {}.", tensor.file, tensor.name, why));
}

void insert_once(AdapterTensors& tensors, StoredTensor tensor, const StoredTensor& from) {
    const std::string name = tensor.name;
    if (!tensors.emplace(name, std::move(tensor)).second) {
        refuse(from, fmt::format("brings \"{}\" a second time", name));
    }
}

// One expert's matrix of a stacked tensor.
StoredTensor expert_part(
    const StoredTensor& stacked, const StackedName& name, int64_t expert, int64_t count
) {
    StoredTensor part = stacked;
    part.name =
        peft_tensor_name(fmt::format("{}.{}.{}", name.group, expert, name.leaf), "") + name.suffix;
    part.shape.erase(part.shape.begin());
    const size_t bytes = stacked.bytes.size() / static_cast<size_t>(stacked.shape[0]);
    const int64_t at = stacked.shape[0] == count ? expert : 0;
    part.bytes = stacked.bytes.subspan(static_cast<size_t>(at) * bytes, bytes);
    return part;
}

// Whether this part is one that Orbit shares.
bool is_shared_part(const StackedName& name) {
    return (name.suffix == ".lora_B.weight") != reads_the_layers_input(name.leaf);
}

// Appends rows of one part of a group's experts, in the order of experts.
void append(OwnedTensor& tensor, const std::vector<float>& masters, int64_t at) {
    const auto count = static_cast<int64_t>(tensor.shape[1] * tensor.shape[2]);
    tensor.values.insert(tensor.values.end(), masters.begin() + at, masters.begin() + at + count);
    ++tensor.shape[0];
}

}  // namespace

std::optional<ExpertModule> expert_module(const std::string& module) {
    constexpr std::string_view kExperts = ".experts.";
    const size_t at = module.find(kExperts);
    if (at == std::string::npos) {
        return std::nullopt;
    }
    ExpertModule expert;
    expert.group = module.substr(0, at + kExperts.size() - 1);
    const char* begin = module.data() + at + kExperts.size();
    const char* end = module.data() + module.size();
    const auto number = std::from_chars(begin, end, expert.expert);
    if (number.ec != std::errc() || number.ptr == end || *number.ptr != '.') {
        return std::nullopt;
    }
    expert.leaf = std::string(number.ptr + 1, end);
    return expert;
}

std::string shared_module(const AdapterOptions& options, const std::string& module, bool is_b) {
    const auto expert = expert_module(module);
    if (options.expert_sharing != "shared" || !expert) {
        return "";
    }
    const bool first = reads_the_layers_input(expert->leaf);
    if (options.kind == "oft") {
        return first ? expert->group + ".gate_up_proj" : "";
    }
    return first != is_b ? expert->group + "." + expert->leaf : "";
}

void check_expert_groups(const AdapterOptions& options, const std::vector<SiteLayout>& sites) {
    if (options.expert_sharing != "shared") {
        return;
    }
    std::map<std::string, AdapterKind> kinds;
    for (const SiteLayout& site : sites) {
        if (const auto expert = expert_module(site.site.module)) {
            const std::string name = expert->group + "." + expert->leaf;
            USER_CHECK(
                kinds.emplace(name, site.kind).first->second == site.kind,
                "adapter.targets names some experts of {} and leaves others out, which "
                "adapter.expert_sharing = \"shared\" cannot do; name {} alone, or set it to "
                "\"none\".",
                expert->group,
                expert->leaf
            );
        }
    }
}

AdapterTensors split_stacked(
    const SafetensorsFile& file, const std::vector<AdapterSite>& sites, std::string& sharing
) {
    std::map<std::string, int64_t> counts;
    for (const AdapterSite& site : sites) {
        if (const auto expert = expert_module(site.module)) {
            int64_t& count = counts[expert->group];
            count = std::max(count, expert->expert + 1);
        }
    }
    AdapterTensors tensors;
    sharing = "none";
    std::map<std::string, const StoredTensor*> rotations;  // before gate and up, by group
    const StoredTensor* own = nullptr;                     // a part that could be shared and is not
    for (const auto& [key, tensor] : file.tensors()) {
        const auto name = parse_stacked(tensor);
        if (!name || tensor.shape.size() != 3) {
            insert_once(tensors, tensor, tensor);
            continue;
        }
        const auto found = counts.find(name->group);
        if (found == counts.end()) {
            refuse(tensor, "adapts experts that this model does not have");
        }
        const int64_t count = found->second;
        const bool one = tensor.shape[0] == 1 && count > 1;
        if (!one && tensor.shape[0] != count) {
            refuse(
                tensor, fmt::format("stacks {} experts, the model has {}", tensor.shape[0], count)
            );
        }
        if (one && !is_shared_part(*name)) {
            refuse(tensor, "is shared by all experts, and Orbit has one for each there");
        }
        if (one) {
            sharing = "shared";
        } else if (is_shared_part(*name)) {
            own = &tensor;
        }
        if (one && name->suffix == ".oft_R.weight") {
            const StoredTensor*& other = rotations.emplace(name->group, &tensor).first->second;
            const bool equal = other->dtype == tensor.dtype && std::equal(
                                                                   other->bytes.begin(),
                                                                   other->bytes.end(),
                                                                   tensor.bytes.begin(),
                                                                   tensor.bytes.end()
                                                               );
            if (!equal) {
                refuse(tensor, "differs from w1's rotation, and Orbit has one before gate and up");
            }
        }
        for (int64_t e = 0; e < count; ++e) {
            insert_once(tensors, expert_part(tensor, *name, e, count), tensor);
        }
    }
    if (sharing == "shared" && own != nullptr) {
        refuse(*own, "has a part for each expert where another tensor of the file shares one");
    }
    return tensors;
}

std::vector<OwnedTensor> stack_tensors(
    const AdapterStore::State& state, const std::vector<float>& masters
) {
    std::map<std::string, OwnedTensor> tensors;
    const auto put = [&](const SiteLayout& site,
                         const char* suffix,
                         int64_t at,
                         int64_t rows,
                         int64_t cols,
                         bool is_b) {
        const auto expert = expert_module(site.site.module);
        if (!expert) {
            OwnedTensor& tensor = tensors[peft_tensor_name(site.site.module, suffix)];
            tensor.shape = {rows, cols};
            tensor.values.assign(masters.begin() + at, masters.begin() + at + rows * cols);
            return;
        }
        const std::string module = expert->group + "." + stacked_name(expert->leaf);
        OwnedTensor& tensor = tensors[peft_tensor_name(module, suffix)];
        if (tensor.shape.empty()) {
            tensor.shape = {0, rows, cols};
        }
        const bool shared = !shared_module(state.options, site.site.module, is_b).empty();
        if (!shared || tensor.shape[0] == 0) {
            append(tensor, masters, at);
        }
    };
    for (const SiteLayout& site : state.sites) {
        if (site.kind == AdapterKind::kLora) {
            put(site, ".lora_A.weight", site.master, site.rank, site.site.in, false);
            put(site, ".lora_B.weight", site.master_b, site.site.out, site.rank, true);
        } else if (site.kind == AdapterKind::kOft) {
            const int64_t cols = oft_parameters(site.block);
            put(site, ".oft_R.weight", site.master, site.rows, cols, false);
        }
    }
    std::vector<OwnedTensor> list;
    for (auto& [name, tensor] : tensors) {
        tensor.name = name;
        list.push_back(std::move(tensor));
    }
    return list;
}

}  // namespace orbit
