// Adapters: fp32 masters, gradients, and immutable compute copies in a few numbered slots. The only
// thing that learns.
//
// AdapterStore owns everything about one adapter: flat float32 masters (LoRA: A then B per site;
// OFT: packed v per site, algorithms.md 1.3), a flat float32 gradient of the same layout, and
// `num_slots` sets of compute copies. publish() derives a slot from the masters and gives it a
// version; a published version never changes, and a slot is reused only when nothing pins its
// version. Not thread safe except pin/unpin/current.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "device/device.h"
#include "ops/dense.h"

namespace orbit {

struct AdapterOptions {
    std::string kind = "oft";   // "oft", "lora", "none"
    int32_t block_size = 32;    // OFT
    bool exact_cayley = false;  // OFT: exact Cayley instead of the Cayley-Neumann series
    int32_t neumann_terms = 5;  // PEFT's num_cayley_neumann_terms
    int32_t rank = 16;          // LoRA
    float alpha = 32.0f;
    bool rslora = false;                  // alpha / sqrt(r)
    std::string expert_sharing = "none";  // "none", "shared"
    std::vector<std::string>
        targets;  // leaf names such as "q_proj"; empty: every linear layer of the model

    void visit(auto&& field) {
        field("kind", kind, "oft or lora");
        field(
            "block_size",
            block_size,
            "OFT: rows of a rotation block; must divide every targeted input width"
        );
        field(
            "exact_cayley", exact_cayley, "OFT: exact Cayley transform instead of the 5-term series"
        );
        field(
            "neumann_terms",
            neumann_terms,
            "OFT: terms of the Cayley-Neumann series, as PEFT counts them"
        );
        field("rank", rank, "LoRA rank r");
        field("alpha", alpha, "LoRA scale: alpha / r");
        field("rslora", rslora, "LoRA: scale alpha / sqrt(r) instead");
        field(
            "expert_sharing",
            expert_sharing,
            "experts of a layer: none, or shared (LoRA: A of gate and up, B of down; OFT: one "
            "rotation before gate and up)"
        );
        field(
            "targets",
            targets,
            "layers to adapt, by leaf name (q_proj, ...); empty: all linear layers"
        );
    }
};

// A linear layer that can carry an adapter. `module` is the Hugging Face path:
// "model.layers.0.self_attn.q_proj".
struct AdapterSite {
    std::string module;
    int64_t in = 0;
    int64_t out = 0;
};

// Whether options.targets name the module.
bool is_targeted(const AdapterOptions& options, const std::string& module);

// What a fresh AdapterStore takes, as its ledger() will say, without taking it. The same
// UserErrors.
std::vector<LedgerEntry> adapter_ledger(
    const AdapterOptions& options,
    const std::vector<AdapterSite>& sites,
    DType compute,
    int num_slots
);

struct OftHealth {              // over all blocks of the masters
    double block_norm_max = 0;  // ||Q||_F = sqrt(2) ||v||
    double theta_max = 0;       // bound (||Q^2||_F / sqrt 2)^(1/2)
};

class AdapterStore {
  public:
    // Fresh adapter at identity (LoRA: B = 0, A ~ U(-1/sqrt(in), 1/sqrt(in)) from `seed`; OFT: v =
    // 0), published as version 0. `sites` are all linear layers of the model; those that
    // options.targets does not name stay bare. UserError when a target names no layer or the block
    // size does not divide an input width.
    AdapterStore(
        const Device& device,
        const AdapterOptions& options,
        std::vector<AdapterSite> sites,
        DType compute,
        int num_slots,
        uint64_t seed
    );
    // Reads a PEFT folder (adapter_config.json, adapter_model.safetensors). UserError when it does
    // not fit the sites.
    static std::unique_ptr<AdapterStore> load_peft(
        const Device& device,
        const std::string& folder,
        std::vector<AdapterSite> sites,
        DType compute,
        int num_slots
    );
    ~AdapterStore();

    // Writes a PEFT folder (float32 tensors), names and layout exact.
    void save_peft(Stream& stream, const std::string& folder, const std::string& base_model) const;

    const AdapterOptions& options() const;
    int64_t num_parameters() const;
    float* masters();    // device memory, float32 [num_parameters]
    float* gradients();  // same
    float* moments_m();  // AdamW state, allocated with the store
    float* moments_v();

    // The accumulators that linear_backward adds to for site index `site` (all null when the site
    // is bare).
    AdapterGrad gradient(int32_t site);
    void zero_gradients(Stream& stream);
    // OFT: turns the accumulated dL/dD into dL/dv once per optimiser step (algorithms.md 1.4).
    // LoRA: nothing to do.
    void finish_gradients(Stream& stream);

    // Derives compute copies from the masters into a free slot, then makes it current. Returns the
    // slot. OFT with the series: UserError when a block's theta bound reaches 1 (says the block and
    // what to do).
    int publish(Stream& stream, int64_t version);
    int64_t current_version() const;
    int pin_current();  // slot of the current version, pinned
    void unpin(int slot);
    int64_t version_of(int slot) const;
    AdapterView view(int slot, int32_t site) const;

    OftHealth oft_health(Stream& stream) const;

    // Named float32 views of the masters, in flat order, with PEFT tensor names; for checkpoints
    // and verify.
    struct NamedRange {
        std::string name;
        int64_t offset;
        std::vector<int64_t> shape;
    };

    const std::vector<NamedRange>& tensors() const;
    std::vector<LedgerEntry> ledger() const;

    struct State;  // adapter/state.h, for the files of this folder

  private:
    explicit AdapterStore(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

}  // namespace orbit
