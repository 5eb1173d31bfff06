// Mixture of experts (models.md 1.6, 4): route, sort rows by expert, grouped linear, combine.
//
// Nothing here depends on how many tokens the batch holds: a token's experts come from its own row,
// ties go to the lower expert, and its outputs are combined in ascending expert order. Routing
// stays on the device. T tokens, K experts per token, E experts, R = T K routed rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "device/device.h"
#include "ops/batch.h"
#include "ops/dense.h"

namespace orbit {

// The chosen experts of tokens, kept beside their keys and values (algorithms.md 3.5): ids
// [pages, kPageTokens, layers, K], ascending in each token, one byte each up to 256 experts, else
// two. `layers` counts the layers with experts.
struct RoutingPages {
    void* ids = nullptr;  // device
    int32_t layers = 0;
    int32_t selected = 0;  // K
    bool wide = false;     // two bytes an id

    bool defined() const { return ids != nullptr; }

    int64_t layer_bytes() const { return int64_t{selected} * (wide ? 2 : 1); }  // of one token

    int64_t token_bytes() const { return layers * layer_bytes(); }
};

struct RouterParams {
    Tensor x;                  // [T, D]
    QuantizedMatrix weight;    // [E, D]; logits accumulate in fp32 and are not rounded
    int32_t num_selected = 0;  // K
    bool normalize = true;     // weights of the chosen experts sum to 1

    // Record and replay; undefined: neither. The own choice goes to `record`; the experts of
    // `replay` are then taken instead of it, with weights from the own scores.
    BatchView batch;    // the pages of each token
    int32_t layer = 0;  // of the record
    RoutingPages record;
    RoutingPages replay;
};

// All device memory, filled by route().
struct Routing {
    int32_t num_tokens = 0;
    int32_t num_experts = 0;
    int32_t num_selected = 0;
    float* scores = nullptr;      // [T, E] softmax over all experts
    int32_t* expert = nullptr;    // [T, K] ascending in each token
    float* weight = nullptr;      // [T, K]
    int32_t* offsets = nullptr;   // [E + 1] rows of expert e are [offsets[e], offsets[e + 1])
    int32_t* token_of = nullptr;  // [R] token of a sorted row; ascending inside an expert
    int32_t* row_of = nullptr;    // [T, K] the sorted row of a token's k-th expert
};

Routing make_routing(
    Stream& stream, int64_t tokens, int64_t experts, int64_t selected
);  // from stream.scratch
void route(Stream& stream, const RouterParams& p, const Routing& routing);
// dx += the gradient that reaches x through the weights. d_weight: float32 [T, K].
void route_backward(
    Stream& stream, const RouterParams& p, const Routing& routing, const float* d_weight, Tensor dx
);

// y[r] = x[token_of[r]]; and its adjoint dx[t] (+)= sum over k, ascending, of dy[row_of[t, k]].
void dispatch_rows(Stream& stream, const Routing& routing, Tensor x, Tensor y);
void dispatch_rows_backward(
    Stream& stream, const Routing& routing, Tensor dy, Tensor dx, bool accumulate
);

// y[t] = round(residual[t] + sum over k, ascending, of weight[t, k] * x[row_of[t, k]]), fp32
// inside.
void combine_rows(Stream& stream, const Routing& routing, Tensor x, Tensor residual, Tensor y);
// dx[r] = weight * dy[t], d_weight[t, k] = dy[t] . x[row].
void combine_rows_backward(
    Stream& stream, const Routing& routing, Tensor x, Tensor dy, Tensor dx, float* d_weight
);

// Active-expert-chunked dequantisation (performance.md 5): experts that received rows are decoded
// to bf16 first, `bytes` at a time, and multiplied from there.
struct DequantOptions {
    int64_t bytes = int64_t{256} << 20;  // temporary memory, exactly
    int64_t rows = 0;  // from this many rows per expert on average; 0: decode inside the product
};

// The decoded matrices, in scratch memory of the stream that lives as long as the caller's scope.
// A matrix that is still there is not decoded again: backward walks the experts in the opposite
// order, so it begins with what the recomputed forward left. On a GPU every product decodes anew.
class DequantBuffer {
  public:
    DequantBuffer(Stream& stream, int64_t bytes)
        : memory_(static_cast<bf16*>(stream.scratch.take_bytes(static_cast<size_t>(bytes)))),
          bytes_(bytes) {}

    bf16* memory() const { return memory_; }

    int64_t bytes() const { return bytes_; }

    // Room for `w` as bf16, `decoded` when its values are there already; null when it is too large.
    bf16* place(const QuantizedMatrix& w, bool& decoded);

    void clear() { slots_.clear(); }  // the memory was used for something else

    int64_t num_decoded() const { return num_decoded_; }  // matrices, or panels of one

    void count_decoded() { ++num_decoded_; }

  private:
    struct Slot {
        const void* weight;
        uint64_t used;
    };

    bf16* memory_;
    int64_t bytes_;
    int64_t slot_bytes_ = 0;
    std::vector<Slot> slots_;
    uint64_t clock_ = 0;
    int64_t num_decoded_ = 0;
};

// Experts whose weights lie in host memory: one array of every expert, codes or scales, at one
// distance from each other on both sides. Each expert's bytes start on 256 and may be read and
// written up to the next multiple of 16.
struct ExpertArray {
    const std::byte* from = nullptr;  // of expert 0, in host memory
    std::byte* to = nullptr;          // on the device
    int64_t bytes = 0;                // of one expert
    int64_t from_distance = 0;        // bytes from an expert to the next
    int64_t to_distance = 0;
};

constexpr size_t kExpertArraysMax = 6;  // codes and scales of gate, up and down

// Copies what the experts with rows have in `arrays`; what the others have on the device stays as
// it was. The device finds them in the offsets ([E + 1], device), so nothing waits for the host and
// the copy can be part of a captured graph.
void stage_experts(
    Stream& stream, const int32_t* offsets, int32_t num_experts, std::span<const ExpertArray> arrays
);

// y[r] = linear of row r with its expert's weight and adapter. experts, adapters: one per expert,
// host arrays; adapters empty: none. The same arithmetic as linear() on the expert's rows alone,
// and the same bits with a buffer as without one.
struct GroupedLinearParams {
    Tensor x;                                  // [R, in]
    std::span<const QuantizedMatrix> experts;  // [E] of [out, in]
    std::span<const AdapterView> adapters;
    const int32_t* offsets = nullptr;  // [E + 1], device
    DequantBuffer* dequant = nullptr;  // null: weights are decoded inside the product
};

void grouped_linear(Stream& stream, const GroupedLinearParams& p, Tensor y);
// The same of several weights for rows sorted alike, in fewer launches where they suit each other.
void grouped_linear_group(
    Stream& stream, std::span<const GroupedLinearParams> params, std::span<const Tensor> y
);
// grads: one per expert, or empty. Overwrites or adds to dx.
void grouped_linear_backward(
    Stream& stream,
    const GroupedLinearParams& p,
    Tensor dy,
    Tensor dx,
    bool accumulate_dx,
    std::span<const AdapterGrad> grads
);

}  // namespace orbit
