#include "run/memory_plan.h"

#include <algorithm>

namespace orbit {
namespace {

double mib(size_t bytes) {
    return static_cast<double>(bytes) / (1 << 20);
}

// A page of `layers` layers, and what its tokens chose, as KvCache keeps them.
int64_t page_bytes(const ScratchModel& m, int64_t layers, bool routing) {
    const ModelConfig& c = m.config;
    const int64_t kv = 2 * kPageTokens * c.num_kv_heads * c.head_dim * dtype_bytes(m.compute);
    return layers * kv + (routing ? routing_page_bytes(m) : 0);
}

int64_t rollout_kv_bytes(const ScratchModel& m, const EngineOptions& options) {
    const int64_t pages = pages_for(std::max<int64_t>(options.kv_tokens, kPageTokens)) + 1;
    // As floating point: a config may ask for more than an integer can say.
    const int64_t page = page_bytes(m, m.config.num_layers, options.record_routing);
    const double bytes = static_cast<double>(page) * static_cast<double>(pages);
    return static_cast<int64_t>(std::min(bytes, 1e18));
}

// The state of a DecodeLoop.
int64_t decode_state_bytes(const ScratchModel& m, const RolloutShape& shape) {
    const int64_t batch = shape.engine.max_batch;
    const int64_t steps =
        shape.engine.decode_steps > 0 ? shape.engine.decode_steps : (m.on_cpu ? 1 : 8);
    const int64_t blocks = std::max<int64_t>(2 * pages_for(shape.longest), 32);
    const int64_t per_row = 4 * (7 + blocks + (steps + 1) + 2 * steps) + int64_t{sizeof(SampleRow)};
    return batch * per_row;
}

int64_t bytes_named(const MemoryPlan& plan, const std::string& start) {
    int64_t total = 0;
    for (const auto& entry : plan.entries) {
        total += entry.name.starts_with(start) ? static_cast<int64_t>(entry.bytes) : 0;
    }
    return total;
}

// What makes one line of the plan smaller.
std::string remedy(const MemoryPlan& plan, const std::string& name, const Config& c) {
    if (name == "base" && c.moe.host_layers > 0) {
        return fmt::format("raise moe.host_layers ({})", c.moe.host_layers);
    }
    if (name == "base") {
        return c.quantize.empty() ? "set quantize = \"int4\" for a BF16 base, or take a smaller one"
                                  : "take a smaller model";
    }
    if (name.starts_with("adapter")) {
        return c.adapter.kind == "lora"
                   ? fmt::format("lower adapter.rank ({})", c.adapter.rank)
                   : fmt::format("lower adapter.block_size ({})", c.adapter.block_size);
    }
    if (name.find("experts") != std::string::npos) {
        return fmt::format("set moe.host_layers = 0 (it is {})", c.moe.host_layers);
    }
    if (name.starts_with("training")) {
        std::string ways =
            fmt::format("lower train.tokens_per_batch ({})", c.train.tokens_per_batch);
        if (plan.recomputable > 0) {
            ways += fmt::format(
                ", or set train.recompute = \"full\" (saves {:.1f} MiB)", mib(plan.recomputable)
            );
        }
        if (plan.offloadable > 0) {
            ways += fmt::format(
                ", or set train.activation_offloading = true (moves {:.1f} MiB to host memory)",
                mib(plan.offloadable)
            );
        }
        return ways;
    }
    if (name == "prefill") {
        return fmt::format("lower rollout.prefill_chunk ({})", c.rollout.prefill_chunk);
    }
    return fmt::format(
        "lower rollout.max_batch ({}) or rollout.max_tokens ({})",
        c.rollout.max_batch,
        c.rollout.max_tokens
    );
}

}  // namespace

void MemoryPlan::add(const std::string& name, int64_t bytes) {
    entries.push_back({name, static_cast<size_t>(bytes)});
}

size_t MemoryPlan::total() const {
    size_t total = 0;
    for (const auto& entry : entries) {
        total += entry.bytes;
    }
    return total;
}

MemoryPlan plan_memory(
    const ScratchModel& m, int64_t base, const RolloutShape& rollout, const TrainShape& train
) {
    MemoryPlan plan;
    plan.add("base", base);
    if (m.adapter.kind != "none") {
        const auto sites = adapter_sites(m.config);
        for (const auto& entry : adapter_ledger(m.adapter, sites, m.compute, 2)) {
            plan.add(entry.name, static_cast<int64_t>(entry.bytes));
        }
    }
    if (m.staged > 0) {
        plan.add("staged experts", m.staged);
    }
    int64_t training = 0;
    if (train.tokens > 0) {
        training = training_scratch(m, train);
        TrainShape full = train;
        full.keep_attention = false;
        plan.recomputable = static_cast<size_t>(training - training_scratch(m, full));
        plan.add(
            "training KV pages",
            page_bytes(m, 1, rollout.engine.record_routing) * training_pages(train)
        );
        const int64_t inputs = offload_bytes(m.config, m.compute, train.tokens);
        if (m.on_cpu && train.offload) {
            plan.add("training layer inputs", inputs);
        } else if (!m.on_cpu) {
            (train.offload ? plan.pinned : plan.offloadable) = static_cast<size_t>(inputs);
        }
    }
    int64_t prefill = 0;
    if (rollout.engine.max_batch > 0 && rollout.longest > 0) {
        PrefillShape shape;
        shape.tokens = std::min(
            rollout.engine.prefill_chunk, rollout.engine.max_batch * rollout.longest_prompt
        );
        shape.draws = rollout.engine.max_batch;
        shape.sequences = std::min(rollout.engine.max_batch, shape.tokens);
        shape.longest = rollout.longest_prompt;
        shape.filter = rollout.filter;
        prefill = prefill_scratch(m, shape);
        plan.add("KV pages", rollout_kv_bytes(m, rollout.engine));
        plan.add(
            "decoding",
            decode_state_bytes(m, rollout) - m.staged +
                decode_scratch(m, rollout.engine.max_batch, rollout.longest, rollout.filter)
        );
        if (m.staged > 0) {
            plan.add("staged experts of decoding", m.staged);
        }
    }
    plan.scratch = static_cast<size_t>(std::max(training, prefill));
    if (plan.scratch > 0) {
        const int64_t rest = std::max(training, prefill) - m.staged;
        plan.add(training >= prefill ? "training batch" : "prefill", rest);
    }
    return plan;
}

EngineOptions engine_options(const Config& c, int64_t longest_prompt) {
    EngineOptions options;
    options.max_batch = std::max(c.rollout.max_batch, c.rollout.samples_per_prompt);
    options.prefill_chunk = c.rollout.prefill_chunk;
    options.prefix_cache = c.rollout.prefix_cache;
    options.record_routing = true;
    options.kv_tokens =
        options.max_batch * (longest_prompt + c.rollout.max_tokens + 2 * kPageTokens);
    return options;
}

TrainShape largest_batch(const Config& c, const ModelConfig& model, int64_t longest_prompt) {
    TrainShape shape;
    const int64_t answers = c.rollout.prompts_per_step * c.rollout.samples_per_prompt;
    shape.longest = std::min(longest_prompt + c.rollout.max_tokens, model.max_positions);
    shape.tokens =
        std::min(std::max(c.train.tokens_per_batch, shape.longest), answers * shape.longest);
    shape.rows = std::min(shape.tokens, answers * c.rollout.max_tokens);
    shape.sequences = std::min(answers, shape.tokens);
    shape.filter = {c.rollout.temperature, c.rollout.top_p, c.rollout.top_k, c.rollout.min_p};
    shape.replay_routing = c.moe.replay_routing;
    shape.offload = c.train.activation_offloading;
    shape.keep_attention = c.train.keeps_attention();
    return shape;
}

namespace {

MemoryPlan plan_with_host_layers(
    const Config& c,
    const Device& device,
    const Checkpoint& checkpoint,
    int64_t longest_prompt,
    int64_t host_layers
) {
    LoadOptions load;
    load.quantize = c.quantize;
    const HostExperts host =
        host_experts(checkpoint.config, placed_formats(checkpoint, load), host_layers);
    ScratchModel m = scratch_model(device, checkpoint.config, c.adapter);
    m.dequant = {c.moe.dequant_bytes, c.moe.dequant_rows};
    m.staged = host.staged;
    m.packed = packed_parts(checkpoint.config, placed_formats(checkpoint, load));
    const TrainShape train = largest_batch(c, checkpoint.config, longest_prompt);
    RolloutShape rollout;
    rollout.engine = engine_options(c, longest_prompt);
    rollout.longest_prompt = longest_prompt;
    rollout.longest = train.longest;
    rollout.filter = train.filter;
    MemoryPlan plan = plan_memory(m, base_bytes(checkpoint, load) - host.bytes, rollout, train);
    plan.host_layers = host_layers;
    if (!device.is_cpu()) {
        plan.host_experts = static_cast<size_t>(host.bytes);
    } else if (host.bytes > 0) {  // the same memory
        plan.add("experts in host memory", host.bytes);
    }
    return plan;
}

}  // namespace

MemoryPlan plan_run(
    const Config& c,
    const Device& device,
    const Checkpoint& checkpoint,
    int64_t longest_prompt,
    size_t available
) {
    const auto plan_with = [&](int64_t host_layers) {
        return plan_with_host_layers(c, device, checkpoint, longest_prompt, host_layers);
    };
    if (c.moe.host_layers != kHostLayersAuto) {
        return plan_with(c.moe.host_layers);
    }
    MemoryPlan whole = plan_with(0);
    // The fewest layers that make it fit, by halving.
    int64_t too_few = 0;
    int64_t enough = checkpoint.config.num_expert_layers();
    if (device.is_cpu() || available == 0 || whole.total() <= available || enough == 0) {
        return whole;
    }
    MemoryPlan fits = plan_with(enough);
    while (enough - too_few > 1) {
        const int64_t middle = (too_few + enough) / 2;
        MemoryPlan plan = plan_with(middle);
        if (plan.total() <= available) {
            enough = middle;
            fits = std::move(plan);
        } else {
            too_few = middle;
        }
    }
    return fits.total() <= available ? fits : whole;
}

namespace {

void check_host_fits(const MemoryPlan& plan, const Config& config, size_t available) {
    const size_t host = plan.pinned + plan.host_experts;
    std::string ways;
    if (plan.pinned > 0) {
        ways = fmt::format(
            "lower train.tokens_per_batch ({}), or set train.activation_offloading = false",
            config.train.tokens_per_batch
        );
    }
    if (plan.host_experts > 0) {
        ways += fmt::format(
            "{}keep the experts of fewer layers there than {} (moe.host_layers)",
            ways.empty() ? "" : ", or ",
            plan.host_layers
        );
    }
    USER_CHECK(
        host <= available || available == 0,
        "this run needs {:.1f} MiB of host memory beside the GPU's, {:.1f} MiB are available; {}.",
        mib(host),
        mib(available),
        ways
    );
}

}  // namespace

void check_fits(
    const MemoryPlan& plan, const Config& config, size_t available, size_t host_available
) {
    check_host_fits(plan, config, host_available);
    if (plan.total() <= available) {
        return;
    }
    std::vector<LedgerEntry> largest = plan.entries;
    std::sort(largest.begin(), largest.end(), [](const auto& a, const auto& b) {
        return a.bytes > b.bytes;
    });
    std::string lines;
    std::vector<std::string> remedies;
    for (size_t i = 0; i < std::min<size_t>(3, largest.size()); ++i) {
        lines += fmt::format(
            "{}{} {:.1f} MiB", i == 0 ? "" : ", ", largest[i].name, mib(largest[i].bytes)
        );
        const std::string way = remedy(plan, largest[i].name, config);
        if (std::find(remedies.begin(), remedies.end(), way) == remedies.end()) {
            remedies.push_back(way);
        }
    }
    std::string ways;
    for (const auto& way : remedies) {
        ways += (ways.empty() ? "" : ", or ") + way;
    }
    throw UserError(fmt::format(
        "this run needs {:.1f} MiB of memory, {:.1f} MiB are available; the largest parts are {}: "
        "{}.",
        mib(plan.total()),
        mib(available),
        lines,
        ways
    ));
}

std::string plan_text(const MemoryPlan& plan) {
    const int64_t adapter = bytes_named(plan, "adapter");
    std::string text;
    const auto part = [&](const std::string& name, size_t bytes) {
        text += fmt::format("{}{} {:.1f} MiB", text.empty() ? "" : ", ", name, mib(bytes));
    };
    for (const auto& entry : plan.entries) {
        if (!entry.name.starts_with("adapter")) {
            part(entry.name, entry.bytes);
        } else if (entry.name == "adapter masters") {
            part("adapter", static_cast<size_t>(adapter));
        }
    }
    if (plan.pinned > 0) {
        part("and in pinned host memory layer inputs", plan.pinned);
    }
    if (plan.host_experts > 0) {
        part("and in pinned host memory experts", plan.host_experts);
    }
    return text;
}

}  // namespace orbit
