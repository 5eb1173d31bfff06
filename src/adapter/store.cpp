#include <algorithm>
#include <limits>
#include <map>

#include "adapter/experts.h"
#include "ops/oft_transform.h"

namespace orbit {
namespace {

constexpr int64_t kCopyAlignment = 128;  // elements: every copied tensor starts on 256 bytes

int64_t aligned(int64_t elements) {
    return (elements + kCopyAlignment - 1) / kCopyAlignment * kCopyAlignment;
}

// As PEFT's target_modules: the whole path, or its end at a dot.
bool names_module(const std::string& target, const std::string& module) {
    return module == target || (module.size() > target.size() && module.ends_with(target) &&
                                module[module.size() - target.size() - 1] == '.');
}

std::vector<std::string> leaf_names(const std::vector<AdapterSite>& sites) {
    std::vector<std::string> names;
    for (const AdapterSite& site : sites) {
        const std::string leaf = site.module.substr(site.module.rfind('.') + 1);
        if (std::find(names.begin(), names.end(), leaf) == names.end()) {
            names.push_back(leaf);
        }
    }
    return names;
}

std::string joined(const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) {
        text += (text.empty() ? "" : ", ") + name;
    }
    return text;
}

void check_targets(const AdapterOptions& options, const std::vector<AdapterSite>& sites) {
    for (const std::string& target : options.targets) {
        const bool found = std::any_of(sites.begin(), sites.end(), [&](const AdapterSite& site) {
            return names_module(target, site.module);
        });
        const std::vector<std::string> leaves = leaf_names(sites);
        const std::string nearest = nearest_name(target, leaves);
        USER_CHECK(
            found,
            "adapter.targets: \"{}\" names no linear layer of this model{}; it has {}.",
            target,
            nearest.empty() ? "" : fmt::format(" (did you mean \"{}\"?)", nearest),
            joined(leaves)
        );
    }
}

void check_options(const AdapterOptions& options) {
    USER_CHECK(
        options.kind == "oft" || options.kind == "lora" || options.kind == "none",
        "adapter.kind = \"{}\" is unknown; it is one of oft, lora, none.",
        options.kind
    );
    USER_CHECK(
        options.kind != "oft" || options.block_size >= 2,
        "adapter.block_size = {} is too small; a rotation needs at least 2 rows.",
        options.block_size
    );
    USER_CHECK(
        options.kind != "oft" || (options.neumann_terms >= 2 && options.neumann_terms <= 64),
        "adapter.neumann_terms = {} is out of range; it is 2 to 64, PEFT's default is 5.",
        options.neumann_terms
    );
    USER_CHECK(
        options.kind != "lora" || options.rank >= 1,
        "adapter.rank = {} is too small; LoRA needs a rank of at least 1.",
        options.rank
    );
    USER_CHECK(
        options.expert_sharing == "none" || options.expert_sharing == "shared",
        "adapter.expert_sharing = \"{}\" is unknown; it is none or shared.",
        options.expert_sharing
    );
}

SiteLayout fresh_layout(const AdapterOptions& options, AdapterSite site) {
    SiteLayout layout;
    layout.site = std::move(site);
    if (!is_targeted(options, layout.site.module)) {
        return layout;
    }
    if (options.kind == "lora") {
        const int64_t rank_max = std::max(layout.site.in, layout.site.out);
        USER_CHECK(
            options.rank <= rank_max,
            "adapter.rank = {} is larger than both sides of {} ({} x {}); choose a smaller rank.",
            options.rank,
            layout.site.module,
            layout.site.out,
            layout.site.in
        );
        layout.kind = AdapterKind::kLora;
        layout.rank = options.rank;
        layout.alpha = static_cast<double>(options.alpha);
        return layout;
    }
    USER_CHECK(
        layout.site.in % options.block_size == 0,
        "adapter.block_size = {} does not divide the input width {} of {}; choose a divisor, or "
        "leave the layer out of adapter.targets.",
        options.block_size,
        layout.site.in,
        layout.site.module
    );
    layout.kind = AdapterKind::kOft;
    layout.block = options.block_size;
    layout.num_blocks = layout.site.in / options.block_size;
    layout.rows = layout.num_blocks;
    return layout;
}

std::vector<SiteLayout> fresh_layouts(
    const AdapterOptions& options, const std::vector<AdapterSite>& sites
) {
    check_options(options);
    if (options.kind != "none") {
        check_targets(options, sites);
    }
    std::vector<SiteLayout> layouts;
    for (const AdapterSite& site : sites) {
        layouts.push_back(fresh_layout(options, site));
    }
    return layouts;
}

}  // namespace

bool is_targeted(const AdapterOptions& options, const std::string& module) {
    const auto& targets = options.targets;
    return options.kind != "none" &&
           (targets.empty() || std::any_of(targets.begin(), targets.end(), [&](const auto& t) {
                return names_module(t, module);
            }));
}

std::vector<LedgerEntry> adapter_ledger(
    const AdapterOptions& options,
    const std::vector<AdapterSite>& sites,
    DType compute,
    int num_slots
) {
    const Device nowhere;
    AdapterStore::State state(nowhere);
    state.options = options;
    state.lay_out(fresh_layouts(options, sites));
    const auto count = static_cast<size_t>(state.num_parameters);
    const auto copied = static_cast<size_t>(state.num_copied);
    const size_t copy_bytes = copied * static_cast<size_t>(dtype_bytes(compute));
    std::vector<LedgerEntry> entries = {
        {"adapter masters", count * sizeof(float)},
        {"adapter gradients", count * sizeof(float)},
        {"adapter moments", 2 * count * sizeof(float)},
        {"adapter copies", static_cast<size_t>(num_slots) * copy_bytes}};
    if (state.num_oft_rows > 0) {
        entries.push_back({"adapter rotation gradients", copied * sizeof(float)});
    }
    return entries;
}

std::string peft_tensor_name(const std::string& module, const char* suffix) {
    return "base_model.model." + module + suffix;
}

namespace {

// Where a part lies. `rows` and `cols` are those of its tensor.
struct Place {
    int64_t master;
    int64_t copy;
    int64_t rows;
    int64_t cols;
    int64_t first_row;
};

}  // namespace

// Shared parts come first: the parts of a layer's experts then lie at one distance from each other,
// as the kernels of a GPU want them.
void AdapterStore::State::lay_out(std::vector<SiteLayout> all) {
    check_expert_groups(options, all);
    std::map<std::string, Place> shared_places;  // by tensor name
    bool shared_pass = false;
    // A place of its own, or that of the expert that brought the shared part.
    const auto place = [&](SiteLayout& site,
                           const char* suffix,
                           bool is_b,
                           int64_t rows,
                           int64_t cols,
                           int64_t copied) {
        const std::string shared = shared_module(options, site.site.module, is_b);
        if (shared.empty() == shared_pass) {
            return;
        }
        const std::string name =
            peft_tensor_name(shared.empty() ? site.site.module : shared, suffix);
        Place here{num_parameters, num_copied, rows, cols, num_oft_rows};
        const auto found = shared_places.find(name);
        const bool owned = found == shared_places.end();
        if (owned) {
            tensors.push_back({name, num_parameters, {rows, cols}});
            num_parameters += rows * cols;
            num_copied += aligned(copied);
            num_oft_rows += site.kind == AdapterKind::kOft ? rows : 0;
        } else {
            here = found->second;
            CHECK(here.rows == rows && here.cols == cols, "(shared alike)");
        }
        if (shared_pass && owned) {
            shared_places.emplace(name, here);
        }
        (is_b ? site.owns_b : site.owns_first) = owned;
        (is_b ? site.master_b : site.master) = here.master;
        (is_b ? site.copy_b : site.copy) = here.copy;
        site.first_row = is_b ? site.first_row : here.first_row;
    };
    for (const bool now : {true, false}) {
        shared_pass = now;
        for (SiteLayout& site : all) {
            const int64_t in = site.site.in;
            const int64_t out = site.site.out;
            if (site.kind == AdapterKind::kLora) {
                place(site, ".lora_A.weight", false, site.rank, in, site.rank * in);
                place(site, ".lora_B.weight", true, out, site.rank, site.rank * out);
            } else if (site.kind == AdapterKind::kOft) {
                const int64_t copied = site.num_blocks * site.block * site.block;
                place(site, ".oft_R.weight", false, site.rows, oft_parameters(site.block), copied);
                block_max = std::max(block_max, site.block);
            }
        }
    }
    sites = std::move(all);
}

std::unique_ptr<AdapterStore::State> AdapterStore::State::create(
    const Device& device,
    const AdapterOptions& options,
    const AdapterExtras& extras,
    std::vector<SiteLayout> sites,
    DType compute,
    int num_slots
) {
    CHECK(compute == DType::kBF16 || compute == DType::kF32, "(adapter compute type)");
    CHECK_GE(num_slots, 1);
    auto state = std::make_unique<State>(device);
    state->options = options;
    state->extras = extras;
    state->compute = compute;
    state->lay_out(std::move(sites));
    const auto floats = [&](const char* name, int64_t count) {
        return static_cast<float*>(
            state->arena.take_bytes(name, static_cast<size_t>(count) * sizeof(float))
        );
    };
    state->masters = floats("adapter masters", state->num_parameters);
    state->gradients = floats("adapter gradients", state->num_parameters);
    state->moments_m = floats("adapter moments.m", state->num_parameters);
    state->moments_v = floats("adapter moments.v", state->num_parameters);
    if (state->num_oft_rows > 0) {
        state->delta_gradients = floats("adapter rotation gradients", state->num_copied);
    }
    state->slots.resize(static_cast<size_t>(num_slots));
    for (Slot& slot : state->slots) {
        slot.copies = static_cast<char*>(state->arena.take_bytes(
            "adapter copies.slot", static_cast<size_t>(state->num_copied * dtype_bytes(compute))
        ));
    }
    return state;
}

namespace {

// Host memory with the masters: themselves on a CPU, a copy from a GPU.
const float* masters_on_host(
    Stream& stream, const AdapterStore::State& state, std::vector<float>& staging
) {
    if (stream.is_cpu()) {
        return state.masters;
    }
    staging.resize(static_cast<size_t>(state.num_parameters));
    copy_to_host(stream, staging.data(), state.masters, staging.size() * sizeof(float));
    return staging.data();
}

OftJob oft_job(const AdapterStore::State& state) {
    return {state.origin, state.sites, state.extras.transform, state.num_oft_rows, state.block_max};
}

HostWork host_work(const Stream& stream) {
    return {stream.threads(), stream.is_cpu() ? stream.device.isa : best_cpu_isa()};
}

void project_masters(Stream& stream, AdapterStore::State& state) {
    std::vector<float> staging;
    masters_on_host(stream, state, staging);
    float* host = stream.is_cpu() ? state.masters : staging.data();
    if (oft_project(oft_job(state), state.extras.coft_eps, host) && !stream.is_cpu()) {
        copy_to_device(stream, state.masters, host, staging.size() * sizeof(float));
        synchronize(stream);
    }
}

// Every row of skew values, in the order of the bounds.
std::vector<OftRow> oft_rows(const std::vector<SiteLayout>& sites) {
    std::vector<OftRow> rows;
    for (const SiteLayout& site : sites) {
        if (site.kind != AdapterKind::kOft || !site.owns_first) {
            continue;
        }
        const int64_t copies = site.rows < site.num_blocks ? site.num_blocks : 1;
        for (int64_t row = 0; row < site.rows; ++row) {
            rows.push_back(
                {site.master + row * oft_parameters(site.block),
                 site.copy + row * site.block * site.block,
                 static_cast<int32_t>(copies),
                 static_cast<int32_t>(site.block)}
            );
        }
    }
    return rows;
}

// Whether the GPU has its own transforms for this adapter; else the host does them.
bool on_device(const Stream& stream, const AdapterStore::State& state) {
    const OftTransform& t = state.extras.transform;
    const bool series = !t.exact && t.degree == 4 && t.last == 1.0f;
    return !stream.is_cpu() &&
           (state.num_oft_rows == 0 || (series && state.block_max <= kOftDeviceBlockMax));
}

void derive_on_device(Stream& stream, const AdapterStore::State& state, char* copies) {
    CHECK(state.compute == DType::kBF16);
    auto* to = reinterpret_cast<bf16*>(copies);
    cuda::round_ranges(stream, lora_ranges(state.sites), state.masters, to);
    if (state.num_oft_rows == 0) {
        return;
    }
    const std::vector<OftRow> rows = oft_rows(state.sites);
    std::vector<OftRowBound> squares(rows.size());
    cuda::oft_derive_rows(stream, rows, state.masters, to, squares);
    std::vector<OftBound> bounds;
    for (const OftRowBound& row : squares) {
        bounds.push_back(oft_bound_of(row.squares, row.squares_of_square));
    }
    oft_check_bounds(oft_job(state), bounds);
}

void derive_copies(Stream& stream, const AdapterStore::State& state, char* copies) {
    if (on_device(stream, state)) {
        return derive_on_device(stream, state, copies);
    }
    std::vector<float> staging;
    const float* masters = masters_on_host(stream, state, staging);
    std::vector<char> host_copies;
    char* to = copies;
    const size_t bytes = static_cast<size_t>(state.num_copied * dtype_bytes(state.compute));
    if (!stream.is_cpu()) {
        host_copies.resize(bytes);
        to = host_copies.data();
    }
    const HostWork work = host_work(stream);
    lora_derive(work, state.sites, state.compute, masters, to);
    if (state.num_oft_rows > 0) {
        const OftJob job = oft_job(state);
        oft_check_bounds(job, oft_derive(work, job, state.compute, masters, to));
    }
    if (!stream.is_cpu()) {
        copy_to_device(stream, copies, to, bytes);
        synchronize(stream);
    }
}

// Called with the mutex held: a slot that is neither current nor pinned, oldest version first.
int free_slot(const AdapterStore::State& state) {
    int found = -1;
    int64_t oldest = std::numeric_limits<int64_t>::max();
    for (size_t i = 0; i < state.slots.size(); ++i) {
        const auto& slot = state.slots[i];
        if (static_cast<int>(i) != state.current && slot.pins == 0 && slot.version < oldest) {
            oldest = slot.version;
            found = static_cast<int>(i);
        }
    }
    return found;
}

}  // namespace

AdapterStore::AdapterStore(std::unique_ptr<State> state) : state_(std::move(state)) {}

AdapterStore::~AdapterStore() = default;

AdapterStore::AdapterStore(
    const Device& device,
    const AdapterOptions& options,
    std::vector<AdapterSite> sites,
    DType compute,
    int num_slots,
    uint64_t seed
) {
    std::vector<SiteLayout> layouts = fresh_layouts(options, sites);
    AdapterExtras extras;
    extras.transform = options.exact_cayley ? OftTransform{.exact = true}
                                            : neumann_transform(options.neumann_terms, false);
    state_ = State::create(device, options, extras, std::move(layouts), compute, num_slots);
    Stream stream(device);
    std::vector<float> a;
    for (const SiteLayout& site : state_->sites) {
        if (site.kind == AdapterKind::kLora && site.owns_first) {
            a.resize(static_cast<size_t>(site.rank * site.site.in));
            const std::string shared = shared_module(options, site.site.module, false);
            const std::string name =
                peft_tensor_name(shared.empty() ? site.site.module : shared, ".lora_A.weight");
            lora_init_a(a.data(), site.rank, site.site.in, name, seed);
            const size_t bytes = a.size() * sizeof(float);
            copy_to_device(stream, state_->masters + site.master, a.data(), bytes);
            synchronize(stream);
        }
    }
    publish(stream, 0);
}

const AdapterOptions& AdapterStore::options() const {
    return state_->options;
}

int64_t AdapterStore::num_parameters() const {
    return state_->num_parameters;
}

float* AdapterStore::masters() {
    return state_->masters;
}

float* AdapterStore::gradients() {
    return state_->gradients;
}

float* AdapterStore::moments_m() {
    return state_->moments_m;
}

float* AdapterStore::moments_v() {
    return state_->moments_v;
}

AdapterGrad AdapterStore::gradient(int32_t site_index) {
    const SiteLayout& site = state_->sites.at(static_cast<size_t>(site_index));
    AdapterGrad grad;
    if (site.kind == AdapterKind::kLora) {
        grad.lora_a = state_->gradients + site.master;
        grad.lora_b = state_->gradients + site.master_b;
    } else if (site.kind == AdapterKind::kOft) {
        grad.oft_d = state_->delta_gradients + site.copy;
    }
    return grad;
}

void AdapterStore::zero_gradients(Stream& stream) {
    const auto bytes = [](int64_t count) { return static_cast<size_t>(count) * sizeof(float); };
    zero_fill(stream, state_->gradients, bytes(state_->num_parameters));
    if (state_->delta_gradients != nullptr) {
        zero_fill(stream, state_->delta_gradients, bytes(state_->num_copied));
    }
}

void AdapterStore::finish_gradients(Stream& stream) {
    if (state_->num_oft_rows == 0) {
        return;
    }
    if (on_device(stream, *state_)) {
        cuda::oft_gradient_rows(
            stream,
            oft_rows(state_->sites),
            state_->masters,
            state_->delta_gradients,
            state_->gradients
        );
        const auto count = static_cast<size_t>(state_->num_copied);
        return zero_fill(stream, state_->delta_gradients, count * sizeof(float));
    }
    const size_t bytes = static_cast<size_t>(state_->num_parameters) * sizeof(float);
    const size_t delta_bytes = static_cast<size_t>(state_->num_copied) * sizeof(float);
    std::vector<float> staging;
    std::vector<float> host_gradients;
    std::vector<float> host_deltas;
    const float* masters = masters_on_host(stream, *state_, staging);
    float* gradients = state_->gradients;
    const float* deltas = state_->delta_gradients;
    if (!stream.is_cpu()) {
        host_gradients.resize(static_cast<size_t>(state_->num_parameters));
        host_deltas.resize(static_cast<size_t>(state_->num_copied));
        copy_to_host(stream, host_gradients.data(), gradients, bytes);
        copy_to_host(stream, host_deltas.data(), deltas, delta_bytes);
        gradients = host_gradients.data();
        deltas = host_deltas.data();
    }
    oft_finish_gradients(host_work(stream), oft_job(*state_), masters, deltas, gradients);
    if (!stream.is_cpu()) {
        copy_to_device(stream, state_->gradients, gradients, bytes);
        synchronize(stream);
    }
    // dL/dv is linear in dL/dD: what has been turned in is not turned in again.
    zero_fill(stream, state_->delta_gradients, delta_bytes);
}

int AdapterStore::publish(Stream& stream, int64_t version) {
    int slot = -1;
    {
        const std::lock_guard lock(state_->mutex);
        slot = free_slot(*state_);
        CHECK(slot >= 0, "(every adapter slot is current or pinned: num_slots is too small)");
        state_->slots[static_cast<size_t>(slot)].version = -1;
    }
    if (state_->extras.coft) {
        project_masters(stream, *state_);
    }
    derive_copies(stream, *state_, state_->slots[static_cast<size_t>(slot)].copies);
    const std::lock_guard lock(state_->mutex);
    state_->slots[static_cast<size_t>(slot)].version = version;
    state_->current = slot;
    return slot;
}

int64_t AdapterStore::current_version() const {
    const std::lock_guard lock(state_->mutex);
    return state_->slots[static_cast<size_t>(state_->current)].version;
}

int AdapterStore::pin_current() {
    const std::lock_guard lock(state_->mutex);
    ++state_->slots[static_cast<size_t>(state_->current)].pins;
    return state_->current;
}

void AdapterStore::unpin(int slot) {
    const std::lock_guard lock(state_->mutex);
    int32_t& pins = state_->slots.at(static_cast<size_t>(slot)).pins;
    CHECK_GT(pins, 0);
    --pins;
}

int64_t AdapterStore::version_of(int slot) const {
    const std::lock_guard lock(state_->mutex);
    return state_->slots.at(static_cast<size_t>(slot)).version;
}

AdapterView AdapterStore::view(int slot, int32_t site_index) const {
    const SiteLayout& site = state_->sites.at(static_cast<size_t>(site_index));
    char* copies = state_->slots.at(static_cast<size_t>(slot)).copies;
    const auto at = [&](int64_t offset) { return copies + offset * dtype_bytes(state_->compute); };
    AdapterView view;
    view.kind = site.kind;
    if (site.kind == AdapterKind::kLora) {
        const DType type = state_->compute;
        view.lora_a = make_tensor(at(site.copy), type, {site.rank, site.site.in});
        view.lora_b = make_tensor(at(site.copy_b), type, {site.site.out, site.rank});
        view.lora_scale = lora_scale(site, state_->options.rslora);
    } else if (site.kind == AdapterKind::kOft) {
        view.oft_d =
            make_tensor(at(site.copy), state_->compute, {site.num_blocks, site.block, site.block});
    }
    return view;
}

OftHealth AdapterStore::oft_health(Stream& stream) const {
    OftHealth health;
    if (state_->num_oft_rows == 0) {
        return health;
    }
    std::vector<float> staging;
    const float* masters = masters_on_host(stream, *state_, staging);
    for (const OftBound& bound : oft_bounds(host_work(stream), oft_job(*state_), masters)) {
        health.block_norm_max = std::max(health.block_norm_max, bound.norm);
        health.theta_max = std::max(health.theta_max, bound.theta);
    }
    return health;
}

const std::vector<AdapterStore::NamedRange>& AdapterStore::tensors() const {
    return state_->tensors;
}

std::vector<LedgerEntry> AdapterStore::ledger() const {
    return state_->arena.ledger();
}

}  // namespace orbit
