// KvCache: the key and value pages of `num_layers` layers in one arena. Who owns which page is the
// caller's business.
#pragma once

#include <vector>

#include "model/model.h"
#include "ops/batch.h"

namespace orbit {

class KvCache {
  public:
    KvCache(const Model& model, int64_t num_layers, int64_t num_pages)
        : arena_(model.arena.device()), num_pages_(num_pages) {
        const auto& c = model.config;
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
    }

    // Training needs one layer's pages only: each layer's keys and values are used up before the
    // next layer's exist.
    KvView layer(int64_t index) const {
        return layers_[static_cast<size_t>(index) % layers_.size()];
    }

    int64_t num_pages() const { return num_pages_; }

    size_t total_bytes() const { return arena_.total_bytes(); }

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
    }

  private:
    Arena arena_;
    std::vector<KvView> layers_;
    int64_t num_pages_;
};

}  // namespace orbit
