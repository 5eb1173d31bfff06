// What an AdapterStore holds, and the per-kind functions that work on it (oft.cpp, lora.cpp).
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "adapter/adapter.h"
#include "adapter/oft_math.h"
#include "ops/optimizer.h"

namespace orbit {

// Where one site's adapter lies in the flat buffers; offsets count elements.
struct SiteLayout {
    AdapterSite site;
    AdapterKind kind = AdapterKind::kNone;
    int64_t rank = 0;        // LoRA
    double alpha = 0;        // LoRA
    int64_t block = 0;       // OFT: b
    int64_t num_blocks = 0;  // OFT: in / b
    int64_t rows = 0;        // OFT: rows of v; 1 when all blocks share one, else num_blocks
    int64_t master = 0;      // LoRA: A; OFT: v
    int64_t master_b = 0;    // LoRA: B
    int64_t copy = 0;        // LoRA: A; OFT: D. The gradient of D has the same offset.
    int64_t copy_b = 0;      // LoRA: B
    bool owns_first = true;  // A or v; false: it is that of an earlier expert, shared
    bool owns_b = true;      // LoRA: B
    int64_t first_row = 0;   // OFT: rows of v in earlier sites
};

// Facts of a PEFT file that AdapterOptions does not hold.
struct AdapterExtras {
    OftTransform transform;
    bool old_neumann_rule = false;  // written by PEFT before 0.18
    bool block_share = false;
    bool coft = false;
    double coft_eps = 6e-5;
    int64_t fixed_num_blocks = 0;  // PEFT's OFT r, when the file fixes it instead of the size
};

struct AdapterStore::State {
    struct Slot {
        char* copies = nullptr;
        int64_t version = -1;
        int32_t pins = 0;
    };

    explicit State(const Device& on) : device(&on), arena(on) {}

    // Lays the sites out, takes memory. Nothing is published yet.
    static std::unique_ptr<State> create(
        const Device& device,
        const AdapterOptions& options,
        const AdapterExtras& extras,
        std::vector<SiteLayout> sites,
        DType compute,
        int num_slots
    );

    // Assigns offsets to the sites and names to their tensors.
    void lay_out(std::vector<SiteLayout> all);

    const Device* device;
    std::string origin = "adapter";  // for messages: the folder it was read from
    AdapterOptions options;
    AdapterExtras extras;
    DType compute = DType::kBF16;
    std::vector<SiteLayout> sites;
    std::vector<NamedRange> tensors;
    int64_t num_parameters = 0;
    int64_t num_copied = 0;    // elements of one slot
    int64_t num_oft_rows = 0;  // rotations over all sites
    int64_t block_max = 0;
    Arena arena;
    float* masters = nullptr;
    float* gradients = nullptr;
    float* moments_m = nullptr;
    float* moments_v = nullptr;
    float* delta_gradients = nullptr;  // OFT: dL/dD, [num_copied]
    std::vector<Slot> slots;
    int current = -1;
    mutable std::mutex mutex;  // guards slots and current
};

inline float lora_scale(const SiteLayout& site, bool rslora) {
    const double rank = static_cast<double>(site.rank);
    return static_cast<float>(site.alpha / (rslora ? __builtin_sqrt(rank) : rank));
}

// "base_model.model." + module + suffix.
std::string peft_tensor_name(const std::string& module, const char* suffix);

// All of these work on host memory; `threads` and `isa` choose how fast, never the result.
struct HostWork {
    ThreadPool& threads;
    CpuIsa isa;
};

// A ~ U(-1/sqrt(in), 1/sqrt(in)) by Philox keyed by (seed, name, element).
void lora_init_a(float* a, int64_t rank, int64_t in, const std::string& name, uint64_t seed);
// Where each LoRA tensor stands among the masters and in a slot.
std::vector<RoundRange> lora_ranges(const std::vector<SiteLayout>& sites);
// Rounds A and B of every LoRA site into `copies`.
void lora_derive(
    const HostWork& work,
    const std::vector<SiteLayout>& sites,
    DType compute,
    const float* masters,
    char* copies
);

struct OftJob {
    const std::string& origin;
    const std::vector<SiteLayout>& sites;
    OftTransform transform;
    int64_t num_rows = 0;
    int64_t block_max = 0;
};

// D of every OFT site into `copies`; returns the bounds, one per row of v in site order.
std::vector<OftBound> oft_derive(
    const HostWork& work, const OftJob& job, DType compute, const float* masters, char* copies
);
// Adds dL/dv to `gradients`. A row that several blocks share gets their sum in ascending order.
void oft_finish_gradients(
    const HostWork& work,
    const OftJob& job,
    const float* masters,
    const float* delta_gradients,
    float* gradients
);
std::vector<OftBound> oft_bounds(const HostWork& work, const OftJob& job, const float* masters);
// UserError when a block's series no longer converges to a rotation, or is not finite.
void oft_check_bounds(const OftJob& job, const std::vector<OftBound>& bounds);
// COFT: scales every row back to ||Q||_F <= eps / sqrt(rows of its tensor). True when a row moved.
bool oft_project(const OftJob& job, double eps, float* masters);

}  // namespace orbit
