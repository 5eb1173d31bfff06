// KvCache: the key and value pages of `num_layers` layers in one arena. Who owns which page is the
// caller's business. With `record_routing` a page also holds the experts that its tokens chose, in
// all layers, so that a shared or cached page keeps them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "model/model.h"
#include "ops/batch.h"
#include "ops/moe.h"

namespace orbit {

class KvCache {
  public:
    KvCache(const Model& model, int64_t num_layers, int64_t num_pages, bool record_routing = false)
        : arena_(model.arena.device()), num_pages_(num_pages) {
        const auto& c = model.config;
        // Thousands of tensors would each fill up pages of a GPU's memory.
        arena_.reserve(static_cast<size_t>(
            num_layers * 2 * num_pages * c.num_kv_heads * kPageTokens * c.head_dim *
            dtype_bytes(model.compute)
        ));
        for (int64_t layer = 0; layer < num_layers; ++layer) {
            layers_.push_back(
                {arena_.take(
                     "kv.k", model.compute, {num_pages, c.num_kv_heads, kPageTokens, c.head_dim}
                 ),
                 arena_.take(
                     "kv.v", model.compute, {num_pages, c.num_kv_heads, kPageTokens, c.head_dim}
                 )}
            );
        }
        const int64_t expert_layers = c.num_expert_layers();
        if (record_routing && expert_layers > 0) {
            routing_.layers = static_cast<int32_t>(expert_layers);
            routing_.selected = static_cast<int32_t>(c.experts_per_token);
            routing_.wide = c.num_experts > 256;
            routing_.ids =
                arena_.take("kv.routing", DType::kU8, {num_pages, page_routing_bytes()}).data;
        }
    }

    // Training needs one layer's pages only: each layer's keys and values are used up before the
    // next layer's exist.
    KvView layer(int64_t index) const {
        return layers_[static_cast<size_t>(index) % layers_.size()];
    }

    int64_t num_pages() const { return num_pages_; }

    size_t total_bytes() const { return arena_.total_bytes(); }

    // Undefined when nothing is recorded.
    const RoutingPages& routing() const { return routing_; }

    // The experts of the first `tokens` tokens of a sequence, [tokens, layers, K] ids; empty when
    // nothing is recorded.
    std::vector<uint8_t> read_routing(
        Stream& stream, std::span<const int32_t> pages, int64_t tokens
    ) const {
        std::vector<uint8_t> ids;
        if (!routing_.defined()) {
            return ids;
        }
        ids.resize(static_cast<size_t>(tokens * routing_.token_bytes()));
        const auto page_bytes = static_cast<size_t>(page_routing_bytes());
        for (size_t at = 0, i = 0; at < ids.size(); at += page_bytes, ++i) {
            const auto* page =
                static_cast<const char*>(routing_.ids) + static_cast<size_t>(pages[i]) * page_bytes;
            copy_to_host(stream, ids.data() + at, page, std::min(page_bytes, ids.size() - at));
        }
        return ids;
    }

    // Copies page `from` over page `to` in every layer.
    void copy_page(Stream& stream, int32_t from, int32_t to) const {
        for (const KvView& view : layers_) {
            for (const Tensor& pages : {view.k_pages, view.v_pages}) {
                const Tensor source = pages.slice(from, from + 1);
                copy_on_device(
                    stream,
                    pages.slice(to, to + 1).data,
                    source.data,
                    static_cast<size_t>(source.bytes())
                );
            }
        }
        if (routing_.defined()) {
            auto* ids = static_cast<char*>(routing_.ids);
            const int64_t bytes = page_routing_bytes();
            copy_on_device(
                stream, ids + to * bytes, ids + from * bytes, static_cast<size_t>(bytes)
            );
        }
    }

  private:
    int64_t page_routing_bytes() const { return kPageTokens * routing_.token_bytes(); }

    Arena arena_;
    std::vector<KvView> layers_;
    RoutingPages routing_;
    int64_t num_pages_;
};

}  // namespace orbit
