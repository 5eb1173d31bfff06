#include "run/gpu_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cmath>

#include "base/error.h"
#include "model/rope_table.h"
#include "ops/head_chunk.h"
#include "run/host_experts.h"
#include "train/options.h"

namespace orbit {
namespace {

constexpr double kMiB = 1 << 20;
constexpr double kGiB = 1 << 30;

std::string plain_name(const std::string& text) {
    std::string name;
    for (const char c : text) {
        if (std::isalnum(static_cast<unsigned char>(c)) != 0) {
            name += static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
        }
    }
    return name;
}

// The sites of experts or of everything else, named apart so that targets find them.
std::vector<AdapterSite> sites_of(const PlanModel& m, bool experts) {
    std::vector<AdapterSite> sites;
    for (const PlanMatrix& matrix : m.matrices) {
        for (int64_t i = 0; matrix.linear && matrix.expert == experts && i < matrix.count; ++i) {
            sites.push_back({fmt::format("layers.{}.{}", i, matrix.leaf), matrix.cols, matrix.rows}
            );
        }
    }
    return sites;
}

struct AdapterBytes {
    double copies = 0;
    double learning = 0;  // masters, gradients, moments
};

// Of the sites that the targets name; a target may name layers of the other kind only.
AdapterBytes adapter_bytes(const AdapterOptions& options, std::vector<AdapterSite> sites) {
    AdapterBytes bytes;
    std::erase_if(sites, [&](const AdapterSite& site) {
        return !is_targeted(options, site.module);
    });
    AdapterOptions every = options;
    every.targets.clear();
    if (sites.empty() || options.kind == "none") {
        return bytes;
    }
    for (const auto& entry : adapter_ledger(every, sites, DType::kBF16, 2)) {
        (entry.name == "adapter copies" ? bytes.copies : bytes.learning) +=
            static_cast<double>(entry.bytes);
    }
    return bytes;
}

TrainOptions train_options(const GpuPlanOptions& o) {
    TrainOptions options;
    options.recompute = o.recompute;
    options.activation_offloading = o.activation_offloading;
    return options;
}

// Channels of attention's outputs, of all layers: what the output projections read. DeepSeek-V4's
// wo_a has a group of 1,024 rows for each part of its columns.
double attention_outputs(const PlanModel& m) {
    double channels = 0;
    for (const PlanMatrix& matrix : m.matrices) {
        const auto each = static_cast<double>(matrix.cols * matrix.count);
        if (matrix.leaf == "o_proj") {
            channels += each;
        } else if (matrix.leaf == "wo_a") {
            channels += each * static_cast<double>(matrix.rows / 1024);
        }
    }
    return channels;
}

// Layer inputs stay whole on every GPU; what one layer computes is shared out. Per token, forward
// and gradient: norms and residuals, the outputs of attention (rope's and attention's beside them),
// gate, up and their product, the inputs and outputs of experts.
double activation_bytes(
    const PlanModel& m, double tokens, double gpus, const TrainOptions& options
) {
    const auto width = static_cast<double>(m.width * m.streams);
    double attention = 0;
    for (const PlanMatrix& matrix : m.matrices) {
        if (matrix.attention) {
            attention += static_cast<double>(matrix.rows * matrix.count);
        }
    }
    attention /= static_cast<double>(m.num_layers);
    double mlp = 3 * static_cast<double>(m.mlp_width);
    if (m.experts > 0) {
        const auto each = static_cast<double>(3 * m.expert_width + 2 * m.width);
        mlp = static_cast<double>(m.experts_per_token + m.shared_experts) * each;
    }
    const double inputs =
        (options.activation_offloading ? 2.0 : static_cast<double>(m.num_layers + 1)) * width;
    const double kept = options.keeps_attention() ? attention_outputs(m) : 0.0;
    const double layer = 2 * (3 * width + 1.6 * attention + mlp);
    return 2 * tokens * (inputs + (layer + kept) / gpus);
}

double head_bytes(const PlanModel& m, double tokens) {
    const auto vocabulary = static_cast<double>(m.vocabulary);
    const auto rows =
        static_cast<double>(head_chunk_rows(static_cast<int64_t>(tokens), m.vocabulary));
    return rows * vocabulary * 6 + 8 * tokens * static_cast<double>(m.width);
}

// How many sequences' keys and values a GPU holds is the same for all; their heads are shared out.
double kv_bytes(const PlanModel& m, const GpuPlanOptions& o, int64_t gpus) {
    const auto batch = static_cast<double>(o.batch);
    const double all =
        batch *
        (static_cast<double>(o.context + 2 * kPageTokens) * m.kv_token_bytes + m.kv_sequence_bytes);
    return all / static_cast<double>(std::min(gpus, m.kv_shards));
}

void add_base(const PlanModel& m, GpuPlan& plan) {
    const auto gpus = static_cast<double>(plan.set.count);
    const auto add = [&](const char* name, double bytes) {
        if (bytes > 0) {
            plan.entries.push_back({name, static_cast<size_t>(bytes)});
        }
    };
    add("base: routed experts", m.expert_bytes() / gpus);
    add(m.experts > 0 ? "base: everything else" : "base", m.other_bytes() / gpus);
}

// One GPU and a family that runs: the engine's own numbers.
void add_exact(const PlanModel& m, const GpuPlanOptions& o, GpuPlan& plan) {
    ScratchModel scratch;
    scratch.config = m.config;
    scratch.adapter = o.adapter;
    scratch.on_cpu = false;
    scratch.decodes_first = plan.set.gpu.decodes_first;
    for (const PlanMatrix& matrix : m.matrices) {
        const bool packed = matrix.format != WeightFormat::kBF16 && !matrix.expert;
        (matrix.linear ? scratch.packed.linears : scratch.packed.head) |= packed;
    }
    RolloutShape rollout;
    rollout.engine.max_batch = o.batch;
    rollout.engine.kv_tokens = o.batch * (o.context + 2 * kPageTokens);
    rollout.longest_prompt = o.context / 2;
    rollout.longest = o.context;
    TrainShape train;
    train.tokens = std::max(o.tokens, o.context);
    train.rows = train.tokens;
    train.sequences = std::max<int64_t>(1, train.tokens / o.context);
    train.longest = o.context;
    train.offload = o.activation_offloading;
    train.keep_attention = train_options(o).keeps_attention();
    const MemoryPlan memory = plan_memory(scratch, 0, rollout, train);
    size_t copies = 0;
    size_t learning = 0;
    size_t decoding = 0;
    for (const auto& entry : memory.entries) {
        if (entry.name == "adapter copies") {
            copies += entry.bytes;
        } else if (entry.name.starts_with("adapter")) {
            learning += entry.bytes;
        } else if (entry.name == "decoding") {
            decoding += entry.bytes;
        }
    }
    const auto find = [&](const std::string& name) {
        size_t bytes = 0;
        for (const auto& entry : memory.entries) {
            bytes += entry.name == name ? entry.bytes : 0;
        }
        return bytes;
    };
    plan.entries.push_back({"adapter: two versions in bf16", copies});
    plan.entries.push_back({"optimiser: masters, gradients, moments", learning});
    plan.entries.push_back({"KV pages of the rollout", find("KV pages")});
    plan.entries.push_back(
        {"activations of a training batch", memory.scratch + find("training KV pages")}
    );
    plan.pinned = memory.pinned;
    const int64_t rows = std::min(m.config.max_positions, kRopeRowsMax);
    const auto rope = static_cast<size_t>(rows * m.config.head_dim) * sizeof(float);
    plan.entries.push_back({"workspace: decoding, rope tables", decoding + rope});
}

void add_estimate(const PlanModel& m, const GpuPlanOptions& o, GpuPlan& plan) {
    const int64_t gpus = plan.set.count;
    const auto count = static_cast<double>(gpus);
    const auto tokens = static_cast<double>(std::max(o.tokens, o.context));
    const AdapterBytes experts = adapter_bytes(o.adapter, sites_of(m, true));
    const AdapterBytes others = adapter_bytes(o.adapter, sites_of(m, false));
    const auto add = [&](const char* name, double bytes) {
        plan.entries.push_back({name, static_cast<size_t>(bytes)});
    };
    add("adapter: two versions in bf16", experts.copies / count + others.copies);
    add("optimiser: masters, gradients, moments", experts.learning / count + others.learning);
    add("KV pages of the rollout", kv_bytes(m, o, gpus));
    add("activations of a training batch", activation_bytes(m, tokens, count, train_options(o)));
    if (o.activation_offloading) {
        const auto width = static_cast<double>(m.width * m.streams);
        plan.pinned =
            static_cast<size_t>(2 * tokens * static_cast<double>(m.num_layers - 1) * width);
    }
    add("workspace: logits of the head",
        head_bytes(m, tokens) + head_bytes(m, static_cast<double>(o.batch)));
}

// Which layers' experts would move, and what streaming the active ones would cost
// (performance.md 1.2: expected experts touched by a batch).
void add_host_memory(const PlanModel& m, const GpuPlanOptions& o, GpuPlan& plan) {
    if (plan.fits() || m.experts == 0) {
        return;
    }
    const auto gpus = static_cast<double>(plan.set.count);
    const double layer = m.expert_bytes() / static_cast<double>(m.expert_layers) / gpus;
    plan.staged_bytes = 2 * layer;  // of the main stream and of decoding
    const double over = plan.total() + plan.staged_bytes - plan.usable;
    plan.host_layers = static_cast<int64_t>(std::ceil(over / layer));
    if (plan.host_layers > m.expert_layers) {
        return;
    }
    const double touched =
        active_experts(m.experts, m.experts_per_token, o.batch) / static_cast<double>(m.experts);
    const auto host = static_cast<double>(plan.host_layers);
    const double others = m.other_bytes() / gpus + kv_bytes(m, o, plan.set.count);
    const double rate = plan.set.gpu.memory_rate;
    const double all = (others + touched * layer * static_cast<double>(m.expert_layers)) / rate;
    // What is streamed is read once more, from where it was staged.
    plan.decode_transfer_s = touched * layer * host / plan.set.gpu.host_rate;
    plan.decode_slowdown = (all + plan.decode_transfer_s) / all;
    // Forward, and once for recomputation and gradient together (performance.md 5.2).
    plan.train_transfer_s = 2 * layer * host / plan.set.gpu.host_rate;
}

std::string row(const std::string& name, double bytes, double of) {
    return fmt::format(
        "| {:<40} | {:>8.2f} | {:>5.1f} % |\n", name, bytes / kGiB, 100 * bytes / of
    );
}

std::string targets_text(const AdapterOptions& a) {
    std::string names;
    for (const auto& target : a.targets) {
        names += (names.empty() ? "" : ", ") + target;
    }
    return names.empty() ? "every linear layer" : names;
}

std::string adapter_text(const AdapterOptions& a) {
    if (a.kind == "none") {
        return "no adapter";
    }
    const std::string kind = a.kind == "lora" ? fmt::format("LoRA rank {}", a.rank)
                                              : fmt::format("OFT block {}", a.block_size);
    return kind + " on " + targets_text(a);
}

std::string formats_text(const PlanModel& m, bool experts) {
    std::vector<std::string> names;
    for (const PlanMatrix& matrix : m.matrices) {
        const std::string name = format_name(matrix.format);
        if (matrix.expert == experts &&
            std::find(names.begin(), names.end(), name) == names.end()) {
            names.push_back(name);
        }
    }
    std::string text;
    for (const auto& name : names) {
        text += (text.empty() ? "" : " and ") + name;
    }
    return text;
}

std::string count_text(double count) {
    return count >= 1e9 ? fmt::format("{:.1f} billion", count / 1e9)
                        : fmt::format("{:.1f} million", count / 1e6);
}

std::string header_text(const PlanModel& m, const GpuPlanOptions& o, const GpuPlan& plan) {
    const double bytes = m.expert_bytes() + m.other_bytes();
    std::string text = fmt::format(
        "{} on {} x {}: {} parameters, {:.{}f} GB ({:.{}f} GiB)\n",
        m.name,
        plan.set.count,
        plan.set.gpu.name,
        count_text(m.params()),
        bytes / 1e9,
        bytes < 1e9 ? 3 : 1,
        bytes / kGiB,
        bytes < 1e9 ? 3 : 1
    );
    if (m.experts > 0) {
        text += fmt::format(
            "routed experts {:.1f} GB in {}, the rest {:.1f} GB in {}\n",
            m.expert_bytes() / 1e9,
            formats_text(m, true),
            m.other_bytes() / 1e9,
            formats_text(m, false)
        );
    } else {
        text += fmt::format("weights in {}\n", formats_text(m, false));
    }
    text += fmt::format(
        "rollout {} x {} tokens; training batch {} tokens; {}\n",
        o.batch,
        o.context,
        std::max(o.tokens, o.context),
        adapter_text(o.adapter)
    );
    if (plan.set.count > 1) {
        text += fmt::format(
            "split: experts by expert parallelism, everything else by tensor parallelism; keys and "
            "values {}; adapters of other layers than experts on every GPU\n",
            m.kv_shards > 1 ? fmt::format("by {} KV heads", m.kv_shards) : "on every GPU"
        );
    }
    return text;
}

std::string remedy_text(const PlanModel& m, const GpuPlanOptions& o, const GpuPlan& plan) {
    std::vector<LedgerEntry> lines = plan.entries;
    std::sort(lines.begin(), lines.end(), [](const auto& a, const auto& b) {
        return a.bytes > b.bytes;
    });
    std::string text;
    const auto advise = [&](const std::string& advice) {
        text += (text.empty() ? "" : "; ") + advice;
    };
    const double over = plan.total() - plan.usable;
    for (const auto& line : lines) {
        if (static_cast<double>(line.bytes) < 0.1 * over) {
            continue;
        }
        if (line.name.starts_with("KV")) {
            advise(fmt::format("a smaller --batch ({}) or --context ({})", o.batch, o.context));
        } else if (line.name.starts_with("activations")) {
            advise(fmt::format(
                "a smaller --tokens ({}){}{}",
                o.tokens,
                train_options(o).keeps_attention() ? " or --recompute full" : "",
                o.activation_offloading ? "" : " or --activation-offloading"
            ));
        } else if (line.name.starts_with("optimiser")) {
            advise(
                o.adapter.kind == "lora" ? "a lower --rank or fewer --targets"
                                         : "a smaller --block-size or fewer --targets"
            );
        } else if (line.name.starts_with("base") && text.find("--gpus") == std::string::npos) {
            const bool packed = formats_text(m, m.experts > 0) != "BF16";
            advise(packed ? "more or larger --gpus" : "more or larger --gpus, or --format int4");
        }
    }
    return text;
}

std::string host_text(const PlanModel& m, const GpuPlan& plan) {
    if (m.experts == 0) {
        return "";
    }
    if (plan.host_layers > m.expert_layers) {
        return "it would not fit with every expert in host memory either\n";
    }
    return fmt::format(
        "or the experts of {} of {} layers in host memory ({:.1f} GiB of it{}). Prediction from "
        "{:.0f} GB/s of PCIe a GPU (published): {:.0f} ms more for every decode step, {:.1f} times "
        "its floor, and {:.1f} s more for every training batch\n",
        plan.host_layers,
        m.expert_layers,
        m.expert_bytes() / static_cast<double>(m.expert_layers) *
            static_cast<double>(plan.host_layers) / kGiB,
        plan.exact ? "; moe.host_layers = -1 does that by itself" : "; several GPUs: not built yet",
        plan.set.gpu.host_rate * 1e-9,
        1e3 * plan.decode_transfer_s,
        plan.decode_slowdown,
        plan.train_transfer_s
    );
}

}  // namespace

const std::vector<Gpu>& known_gpus() {
    // Memory of the first three: models.md 13.3 (B200 unverified); rates: the makers' data sheets.
    static const std::vector<Gpu> gpus = {
        {"H100", 81559, 3.35e12, 64e9, true},
        {"H200", 143771, 4.8e12, 64e9, true},
        {"B200", 183000, 8.0e12, 64e9},
        {"A100-40GB", 40960, 1.555e12, 32e9},
        {"A100-80GB", 81920, 2.039e12, 32e9},
        {"L40S", 46068, 0.864e12, 32e9},
        {"RTX4090", 24564, 1.008e12, 32e9},
        {"RTX5090", 32607, 1.792e12, 64e9},
    };
    return gpus;
}

GpuSet parse_gpus(const std::string& asked) {
    std::string text = asked;
    std::erase(text, ' ');
    const size_t x = text.find_first_not_of("0123456789");
    const bool counted =
        x != std::string::npos && x > 0 && x <= 4 && (text[x] == 'x' || text[x] == 'X');
    GpuSet set{known_gpus()[0], counted ? std::atoll(text.c_str()) : 1};
    std::string name = plain_name(counted ? text.substr(x + 1) : text);
    name = name == "A100" ? "A10080GB" : name;
    std::vector<std::string> names;
    for (const Gpu& gpu : known_gpus()) {
        names.emplace_back(gpu.name);
        const std::string known = plain_name(gpu.name);
        if (name == known || name + "GB" == known) {
            set.gpu = gpu;
            USER_CHECK(set.count >= 1 && set.count <= 1024, "--gpus {}: 1 to 1024 GPUs.", asked);
            return set;
        }
    }
    throw UserError(fmt::format(
        "--gpus {} is not known; write 8xH200 or one of {}.", asked, fmt::join(names, ", ")
    ));
}

double GpuPlan::total() const {
    double total = 0;
    for (const auto& entry : entries) {
        total += static_cast<double>(entry.bytes);
    }
    return total;
}

GpuPlan plan_gpus(const PlanModel& m, const GpuPlanOptions& o) {
    GpuPlan plan;
    plan.set = parse_gpus(o.gpus);
    plan.usable = plan.set.gpu.memory_mib * kMiB;
    plan.exact = m.runs && plan.set.count == 1;
    add_base(m, plan);
    if (plan.exact) {
        add_exact(m, o, plan);
    } else {
        add_estimate(m, o, plan);
    }
    if (m.experts > 0) {
        plan.entries.push_back({"room for decoded experts", static_cast<size_t>(o.dequant_bytes)});
    }
    add_host_memory(m, o, plan);
    return plan;
}

std::string gpu_plan_text(const PlanModel& m, const GpuPlanOptions& o, const GpuPlan& plan) {
    std::string text = header_text(m, o, plan) + "\n";
    text += fmt::format("| {:<40} | {:>8} | {:>7} |\n", "of each GPU", "GiB", "share");
    text += "|" + std::string(42, '-') + "|" + std::string(9, '-') + ":|" + std::string(8, '-') +
            ":|\n";
    for (const auto& entry : plan.entries) {
        text += row(entry.name, static_cast<double>(entry.bytes), plan.usable);
    }
    text += row("all", plan.total(), plan.usable);
    text += row("the GPU has", plan.usable, plan.usable);
    if (plan.pinned > 0) {
        text += fmt::format(
            "\nin pinned host memory, for each GPU: {:.2f} GiB of layer inputs\n",
            static_cast<double>(plan.pinned) / kGiB
        );
    }
    const double left = plan.usable - plan.total();
    if (plan.fits()) {
        text += fmt::format("\nfits: {:.1f} GiB of each GPU are left\n", left / kGiB);
    } else {
        text += fmt::format(
            "\ndoes not fit: {:.1f} GiB too much on each GPU. What would help: {}\n",
            -left / kGiB,
            remedy_text(m, o, plan)
        );
        text += host_text(m, plan);
    }
    text += plan.exact ? "the lines below the base are counted as the engine takes them\n"
                       : "activations and workspace are estimates\n";
    if (m.experts > 0) {
        text +=
            "room for decoded experts is moe.dequant_bytes, taken when moe.dequant_rows is set\n";
    }
    if (!m.runs) {
        text += fmt::format("the family {} does not run yet; this is a plan only\n", m.family);
    }
    if (plan.set.count > 1) {
        text += "runs on several GPUs are not built yet; this is arithmetic\n";
    }
    return text;
}

}  // namespace orbit
