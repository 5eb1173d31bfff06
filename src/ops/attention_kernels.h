#pragma once

#include "ops/isa.h"

namespace orbit {

// Rows that share the lanes of a kernel: (token, query head of one KV head), token by token.
constexpr int32_t kAttentionLanes = 16;

// Rows of keys, values and scores that kernels may touch beyond the last one.
constexpr int64_t kAttentionPadding = 16;

// One sequence and one KV head; T is the compute type.
template <typename T>
struct AttentionItem {
    const T* q;            // the sequence's first token: [tokens, heads, d]
    const T* k;            // [tokens, kv_heads, d]
    const T* v;            // [tokens, kv_heads, d]
    T* o;                  // [tokens, heads, d]
    float* lse;            // [tokens, heads], or null
    const T* k_pages;      // [num_pages, kv_heads, kPageTokens, d]
    const T* v_pages;      // the same
    const int32_t* pages;  // the sequence's row of the block table
    int64_t tokens;
    int64_t position;  // of the first token
    int64_t heads;
    int64_t kv_heads;
    int64_t kv_head;
    int64_t d;
    float scale;
    // Backward only.
    const T* d_o;
    const float* lse_in;
    T* dq;
    T* dk;
    T* dv;
};

// Float32 working memory of one thread, in floats. `keys`: the longest sequence.
inline int64_t attention_workspace(int64_t keys, int64_t d) {
    return (keys + kAttentionPadding) * (2 * d + kAttentionLanes) + 2 * kAttentionLanes * d;
}

inline int64_t attention_backward_workspace(int64_t keys, int64_t d) {
    return (keys + kAttentionPadding) * (4 * d + 2 * kAttentionLanes) + 6 * kAttentionLanes * d;
}

// Converts the keys and values at positions [0, keys) of an item into `workspace`, from the pages.
ORBIT_KERNEL(
    void, attention_load, (const AttentionItem<float>& item, int64_t keys, float* workspace)
)
ORBIT_KERNEL(
    void, attention_load, (const AttentionItem<bf16>& item, int64_t keys, float* workspace)
)
// Tokens [begin, end) of the item. `keys`: as loaded.
ORBIT_KERNEL(
    void,
    attention_tokens,
    (const AttentionItem<float>& item, int64_t begin, int64_t end, int64_t keys, float* workspace)
)
ORBIT_KERNEL(
    void,
    attention_tokens,
    (const AttentionItem<bf16>& item, int64_t begin, int64_t end, int64_t keys, float* workspace)
)
ORBIT_KERNEL(
    void,
    attention_item_backward,
    (const AttentionItem<float>& item, int64_t capacity, float* workspace)
)
ORBIT_KERNEL(
    void,
    attention_item_backward,
    (const AttentionItem<bf16>& item, int64_t capacity, float* workspace)
)

}  // namespace orbit
