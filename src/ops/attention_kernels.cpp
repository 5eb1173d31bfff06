// Sixteen query rows (tokens x the query heads of one KV head) stand in the lanes; keys, values and
// channels are walked one by one, in ascending order, by broadcasts. So a row's score with key j is
// one chain of fused multiply-adds over the channels, its weight sum one chain over j, each output
// channel one chain over j: the same operations whatever shares the lanes with it. Keys beyond a
// row's own position are masked, never multiplied by zero.
#include "ops/attention_kernels.h"

#include "base/exact_math.h"
#include "ops/batch.h"
#include "ops/lanes.h"

namespace orbit::ORBIT_ISA {
namespace {

static_assert(kAttentionLanes == kLanes);

// Accumulators that fit the registers of the set.
constexpr int kBlock = kNativeLanes == 16 ? 16 : (kNativeLanes == 8 ? 4 : 2);

// The rows of one group of lanes. Lanes beyond `count` repeat the last row and are not stored.
struct Group {
    int32_t limit[kLanes];  // keys that the row sees
    int64_t at[kLanes];     // (token * heads + head) of the row
    int64_t ahead;          // rows from here to the same lane of the next group
    int32_t count;
    int32_t least;  // smallest and largest limit
    int32_t most;
};

template <typename T>
Group make_group(const AttentionItem<T>& item, int64_t row, int64_t end_row) {
    const int64_t share = item.heads / item.kv_heads;
    Group g{};
    g.count = static_cast<int32_t>(end_row - row < kLanes ? end_row - row : kLanes);
    int64_t token = row / share;
    int64_t head = row % share;
    for (int32_t lane = 0; lane < kLanes; ++lane) {
        g.limit[lane] = static_cast<int32_t>(item.position + token + 1);
        g.at[lane] = token * item.heads + item.kv_head * share + head;
        if (lane + 1 < g.count && ++head == share) {
            head = 0;
            ++token;
        }
    }
    g.ahead = kLanes / share * item.heads;
    g.least = g.limit[0];
    g.most = g.limit[kLanes - 1];
    return g;
}

// Channels [0, 2 kNativeLanes) of bf16 rows, transposed as pairs and then taken apart.
ORBIT_LANES void load_pairs(const int64_t* at, const bf16* from, int32_t d, float* to) {
    NativeFloat square[kNativeLanes];
    for (int32_t r = 0; r < kNativeLanes; ++r) {
        __builtin_memcpy(&square[r], from + at[r] * d, sizeof(NativeFloat));
    }
    transpose(square);
    for (int32_t r = 0; r < kNativeLanes; ++r) {
        const NativeWord pair = __builtin_bit_cast(NativeWord, square[r]);
        store_native(to + 2 * r * kLanes, __builtin_bit_cast(NativeFloat, pair << 16));
        store_native(
            to + (2 * r + 1) * kLanes, __builtin_bit_cast(NativeFloat, pair & 0xffff0000u)
        );
    }
}

ORBIT_LANES void load_pairs(const int64_t*, const float*, int32_t, float*) {}

// to[i][lane] = from[row of lane][i]
template <typename T>
void load_rows(const Group& g, const T* from, int32_t d, float* to) {
    constexpr int32_t kPerCacheLine = 64 / sizeof(T);
    for (int32_t lane = 0; lane < kLanes; ++lane) {
        for (int32_t i = 0; i < d; i += kPerCacheLine) {
            __builtin_prefetch(from + (g.at[lane] + g.ahead) * d + i);
        }
    }
    if (sizeof(T) == 2 && d % (2 * kNativeLanes) == 0) {
        for (int32_t part = 0; part < kLanes; part += kNativeLanes) {
            for (int32_t i = 0; i < d; i += 2 * kNativeLanes) {
                load_pairs(g.at + part, from + i, d, to + i * kLanes + part);
            }
        }
        return;
    }
    const int32_t whole = d / kNativeLanes * kNativeLanes;
    for (int32_t part = 0; part < kLanes; part += kNativeLanes) {
        for (int32_t i = 0; i < whole; i += kNativeLanes) {
            NativeFloat square[kNativeLanes];
            for (int32_t r = 0; r < kNativeLanes; ++r) {
                square[r] = load_native(from + g.at[part + r] * d + i);
            }
            transpose(square);
            for (int32_t r = 0; r < kNativeLanes; ++r) {
                store_native(to + (i + r) * kLanes + part, square[r]);
            }
        }
    }
    for (int32_t lane = 0; lane < kLanes; ++lane) {
        for (int32_t i = whole; i < d; ++i) {
            to[i * kLanes + lane] = to_float(from[g.at[lane] * d + i]);
        }
    }
}

template <typename T>
void store_rows(const Group& g, const float* from, int32_t d, T* to) {
    const int32_t whole = d / kNativeLanes * kNativeLanes;
    for (int32_t part = 0; part < g.count; part += kNativeLanes) {
        for (int32_t i = 0; i < whole; i += kNativeLanes) {
            NativeFloat square[kNativeLanes];
            for (int32_t r = 0; r < kNativeLanes; ++r) {
                square[r] = load_native(from + (i + r) * kLanes + part);
            }
            transpose(square);
            for (int32_t r = 0; r < kNativeLanes && part + r < g.count; ++r) {
                store_native(to + g.at[part + r] * d + i, square[r]);
            }
        }
    }
    for (int32_t lane = 0; lane < g.count; ++lane) {
        for (int32_t i = whole; i < d; ++i) {
            orbit::store(to + g.at[lane] * d + i, from[i * kLanes + lane]);
        }
    }
}

// out[j] = sum over i of rows[i] * keys[j][i] for kCount keys.
template <int kCount>
ORBIT_LANES void dot_block(const float* rows, const float* keys, int32_t d, float* out) {
    Lanes sum[kCount];
    for (int j = 0; j < kCount; ++j) {
        sum[j] = splat(0.0f);
    }
    for (int32_t i = 0; i < d; ++i) {
        const Lanes value = load(rows + i * kLanes);
        for (int j = 0; j < kCount; ++j) {
            sum[j] = fused(value, splat(keys[j * d + i]), sum[j]);
        }
    }
    for (int j = 0; j < kCount; ++j) {
        store(out + j * kLanes, sum[j]);
    }
}

// May read and write up to kBlock rows more than asked for: the workspace has them, nobody looks.
ORBIT_LANES void dots_of(
    const float* rows, const float* keys, int32_t d, int64_t count, float* out
) {
    constexpr int kSmall = kBlock >= 4 ? kBlock / 4 : 1;
    for (int64_t j = 0; j < count;) {
        if (count - j <= kSmall) {
            dot_block<kSmall>(rows, keys + j * d, d, out + j * kLanes);
            j += kSmall;
        } else {
            dot_block<kBlock>(rows, keys + j * d, d, out + j * kLanes);
            j += kBlock;
        }
    }
}

// out[j] = dot(rows, keys[j]), j < count. The usual widths are compiled apart.
void dots(const float* rows, const float* keys, int32_t d, int64_t count, float* out) {
    if (d == 64) {
        dots_of(rows, keys, 64, count, out);
    } else if (d == 128) {
        dots_of(rows, keys, 128, count, out);
    } else {
        dots_of(rows, keys, d, count, out);
    }
}

// sums[c] = sum over j of weights[j] * values[j][c] for kCount channels, j ascending; from `least`
// on, lane by lane while j is below the row's limit.
template <int kCount>
ORBIT_LANES void weigh_block(
    const Group& g, const float* weights, const float* values, int32_t d, float* sums
) {
    Lanes sum[kCount];
    for (int c = 0; c < kCount; ++c) {
        sum[c] = splat(0.0f);
    }
    int32_t j = 0;
    for (; j < g.least; ++j) {
        const Lanes weight = load(weights + int64_t{j} * kLanes);
        for (int c = 0; c < kCount; ++c) {
            sum[c] = fused(weight, splat(values[int64_t{j} * d + c]), sum[c]);
        }
    }
    for (; j < g.most; ++j) {
        const Lanes weight = load(weights + int64_t{j} * kLanes);
        const LaneMask mask = lanes_below(j, g.limit);
        for (int c = 0; c < kCount; ++c) {
            sum[c] = choose(mask, fused(weight, splat(values[int64_t{j} * d + c]), sum[c]), sum[c]);
        }
    }
    for (int c = 0; c < kCount; ++c) {
        store(sums + c * kLanes, sum[c]);
    }
}

ORBIT_LANES void weigh_of(
    const Group& g, const float* weights, const float* values, int32_t d, float* sums
) {
    const int32_t whole = d / kBlock * kBlock;
    for (int32_t c = 0; c < whole; c += kBlock) {
        weigh_block<kBlock>(g, weights, values + c, d, sums + c * kLanes);
    }
    for (int32_t c = whole; c < d; ++c) {
        weigh_block<1>(g, weights, values + c, d, sums + c * kLanes);
    }
}

// The same sums for one row, with channels in the lanes: cheaper when few rows share them.
ORBIT_LANES void weigh_row(
    int32_t limit, const float* weights, const float* values, int32_t d, float* sums
) {
    for (int32_t c = 0; c < d; c += kLanes) {
        Lanes sum = splat(0.0f);
        for (int32_t j = 0; j < limit; ++j) {
            sum =
                fused(splat(weights[int64_t{j} * kLanes]), load(values + int64_t{j} * d + c), sum);
        }
        float channel[kLanes];
        store(channel, sum);
        for (int32_t i = 0; i < kLanes; ++i) {
            sums[(c + i) * kLanes] = channel[i];
        }
    }
}

constexpr int32_t kFewRows = 4;

void weigh(const Group& g, const float* weights, const float* values, int32_t d, float* sums) {
    if (g.count <= kFewRows && d % kLanes == 0) {
        for (int32_t lane = 0; lane < g.count; ++lane) {
            weigh_row(g.limit[lane], weights + lane, values, d, sums + lane);
        }
        return;
    }
    if (d == 64) {
        weigh_of(g, weights, values, 64, sums);
    } else if (d == 128) {
        weigh_of(g, weights, values, 128, sums);
    } else {
        weigh_of(g, weights, values, d, sums);
    }
}

// scores -> scaled scores, with what a row does not see replaced by `masked`.
void scale_scores(const Group& g, float scale, float masked, float* scores) {
    const Lanes factor = splat(scale);
    const Lanes hidden = splat(masked);
    for (int32_t j = 0; j < g.most; ++j) {
        float* at = scores + int64_t{j} * kLanes;
        const Lanes score = factor * load(at);
        store(at, j < g.least ? score : choose(lanes_below(j, g.limit), score, hidden));
    }
}

// x[i][lane] = exp(x[i][lane] - offset[lane])
void exp_rows(const float* offset, int64_t count, float* x) {
    for (int64_t i = 0; i < count; ++i) {
        float* at = x + i * kLanes;
        for (int lane = 0; lane < kLanes; ++lane) {
            at[lane] = exact_exp(at[lane] - offset[lane]);
        }
    }
}

template <typename T>
ORBIT_LANES Lanes to_compute_type(const Lanes& value) {
    if constexpr (sizeof(T) == 2) {
        return round_lanes_to_bf16(value);
    }
    return value;
}

// Scores to weights P of the compute type; the largest score and the sum of the weights per lane.
template <typename T>
void softmax(const Group& g, float* scores, float* largest, float* total) {
    Lanes best = load(scores);
    for (int32_t j = 1; j < g.most; ++j) {
        best = larger(best, load(scores + int64_t{j} * kLanes));
    }
    store(largest, best);
    exp_rows(largest, g.most, scores);
    Lanes sum = splat(0.0f);
    for (int32_t j = 0; j < g.most; ++j) {
        float* at = scores + int64_t{j} * kLanes;
        const Lanes weight = load(at);
        sum = sum + weight;  // a masked weight is exactly 0
        store(at, to_compute_type<T>(weight));
    }
    store(total, sum);
}

template <typename T>
void attend_group(
    const AttentionItem<T>& item,
    const Group& g,
    const float* keys,
    const float* values,
    float* scores,
    float* work
) {
    const auto d = static_cast<int32_t>(item.d);
    float* rows = work;
    float* sums = work + d * kLanes;
    load_rows(g, item.q, d, rows);
    dots(rows, keys, d, g.most, scores);
    scale_scores(g, item.scale, -__builtin_inff(), scores);
    float largest[kLanes];
    float total[kLanes];
    softmax<T>(g, scores, largest, total);
    weigh(g, scores, values, d, sums);
    const Lanes divisor = load(total);
    for (int64_t i = 0; i < d; ++i) {
        store(sums + i * kLanes, load(sums + i * kLanes) / divisor);
    }
    store_rows(g, sums, d, item.o);
    if (item.lse != nullptr) {
        for (int32_t lane = 0; lane < g.count; ++lane) {
            item.lse[g.at[lane]] = largest[lane] + exact_log(total[lane]);
        }
    }
}

template <typename T>
void convert(const T* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) {
        to[i] = to_float(from[i]);
    }
}

template <typename T>
void load_pages(const AttentionItem<T>& item, int64_t keys, float* workspace) {
    const int64_t d = item.d;
    float* values = workspace + (keys + kAttentionPadding) * d;
    for (int64_t j = 0; j < keys; j += kPageTokens) {
        const int64_t page = item.pages[j / kPageTokens];
        const int64_t count = keys - j < kPageTokens ? keys - j : int64_t{kPageTokens};
        const int64_t from = (page * item.kv_heads + item.kv_head) * kPageTokens * d;
        convert(item.k_pages + from, count * d, workspace + j * d);
        convert(item.v_pages + from, count * d, values + j * d);
    }
}

template <typename T>
void attend(
    const AttentionItem<T>& item, int64_t begin, int64_t end, int64_t keys, float* workspace
) {
    const int64_t padded = keys + kAttentionPadding;
    const float* values = workspace + padded * item.d;
    float* scores = workspace + 2 * padded * item.d;
    float* work = scores + padded * kLanes;
    const int64_t share = item.heads / item.kv_heads;
    for (int64_t row = begin * share; row < end * share; row += kLanes) {
        const Group g = make_group(item, row, end * share);
        attend_group(item, g, workspace, values, scores, work);
    }
}

// Working memory of the backward of one item.
struct Backward {
    float* keys;      // [keys, d]
    float* values;    // [keys, d]
    float* d_keys;    // [keys, d]
    float* d_values;  // [keys, d]
    float* weights;   // [keys, lanes]
    float* d_scores;  // [keys, lanes]
    float* q_lanes;   // [d, lanes]
    float* do_lanes;  // [d, lanes]
    float* dq_lanes;  // [d, lanes]
    float* q_rows;    // [lanes, d]
    float* do_rows;   // [lanes, d]
    float* o_lanes;   // [d, lanes]
};

Backward lay_out(float* workspace, int64_t capacity, int64_t d) {
    const int64_t keys = capacity + kAttentionPadding;
    float* at = workspace;
    const auto take = [&at](int64_t count) {
        float* taken = at;
        at += count;
        return taken;
    };
    Backward b{};
    b.keys = take(keys * d);
    b.values = take(keys * d);
    b.d_keys = take(keys * d);
    b.d_values = take(keys * d);
    b.weights = take(keys * kLanes);
    b.d_scores = take(keys * kLanes);
    for (float** buffer :
         {&b.q_lanes, &b.do_lanes, &b.dq_lanes, &b.q_rows, &b.do_rows, &b.o_lanes}) {
        *buffer = take(kLanes * d);
    }
    return b;
}

// sums[j][c..] += sum over rows r of weights[j][r] * rows[r][c..], r ascending.
template <int kKeys, int kVectors>
ORBIT_LANES void outer_block(
    const float* weights, const float* rows, int32_t count, int64_t d, float* sums
) {
    Lanes sum[kKeys][kVectors];
    for (int j = 0; j < kKeys; ++j) {
        for (int c = 0; c < kVectors; ++c) {
            sum[j][c] = load(sums + j * d + c * kLanes);
        }
    }
    for (int32_t r = 0; r < count; ++r) {
        Lanes row[kVectors];
        for (int c = 0; c < kVectors; ++c) {
            row[c] = load(rows + r * d + c * kLanes);
        }
        for (int j = 0; j < kKeys; ++j) {
            const Lanes weight = splat(weights[j * kLanes + r]);
            for (int c = 0; c < kVectors; ++c) {
                sum[j][c] = fused(weight, row[c], sum[j][c]);
            }
        }
    }
    for (int j = 0; j < kKeys; ++j) {
        for (int c = 0; c < kVectors; ++c) {
            store(sums + j * d + c * kLanes, sum[j][c]);
        }
    }
}

template <int kKeys>
ORBIT_LANES void outer_keys(
    const float* weights, const float* rows, int32_t count, int64_t d, float* sums
) {
    constexpr int kVectors = kNativeLanes == 16 ? 4 : 1;
    int64_t c = 0;
    for (; c + kVectors * kLanes <= d; c += kVectors * kLanes) {
        outer_block<kKeys, kVectors>(weights, rows + c, count, d, sums + c);
    }
    for (; c + kLanes <= d; c += kLanes) {
        outer_block<kKeys, 1>(weights, rows + c, count, d, sums + c);
    }
    for (; c < d; ++c) {
        for (int j = 0; j < kKeys; ++j) {
            for (int32_t r = 0; r < count; ++r) {
                sums[j * d + c] += weights[j * kLanes + r] * rows[r * d + c];
            }
        }
    }
}

void outer(
    const float* weights, const float* rows, int32_t count, int64_t d, int64_t keys, float* sums
) {
    constexpr int kKeys = 4;
    int64_t j = 0;
    for (; j + kKeys <= keys; j += kKeys) {
        outer_keys<kKeys>(weights + j * kLanes, rows, count, d, sums + j * d);
    }
    for (; j < keys; ++j) {
        outer_keys<1>(weights + j * kLanes, rows, count, d, sums + j * d);
    }
}

template <typename T>
void row_major(const Group& g, const T* from, int64_t d, float* to) {
    for (int32_t lane = 0; lane < g.count; ++lane) {
        convert(from + g.at[lane] * d, d, to + lane * d);
    }
}

// weights = P = exp(s - lse), d_scores = P (dP - D) with D = dO . O; exactly 0 where masked.
template <typename T>
void score_gradients(const AttentionItem<T>& item, const Group& g, const Backward& b) {
    const auto d = static_cast<int32_t>(item.d);
    load_rows(g, item.q, d, b.q_lanes);
    load_rows(g, item.d_o, d, b.do_lanes);
    load_rows(g, item.o, d, b.o_lanes);
    Lanes delta = splat(0.0f);
    for (int64_t i = 0; i < d; ++i) {
        delta = fused(load(b.do_lanes + i * kLanes), load(b.o_lanes + i * kLanes), delta);
    }
    float lse[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        lse[lane] = item.lse_in[g.at[lane]];
    }
    dots(b.q_lanes, b.keys, d, g.most, b.weights);
    scale_scores(g, item.scale, -__builtin_inff(), b.weights);
    exp_rows(lse, g.most, b.weights);
    dots(b.do_lanes, b.values, d, g.most, b.d_scores);
    for (int32_t j = 0; j < g.most; ++j) {
        float* at = b.d_scores + int64_t{j} * kLanes;
        const Lanes slope = load(b.weights + int64_t{j} * kLanes) * (load(at) - delta);
        store(at, j < g.least ? slope : choose(lanes_below(j, g.limit), slope, splat(0.0f)));
    }
}

template <typename T>
void store_scaled(const AttentionItem<T>& item, const float* from, float scale, T* to) {
    const int64_t d = item.d;
    for (int64_t t = 0; t < item.tokens; ++t) {
        T* row = to + (t * item.kv_heads + item.kv_head) * d;
        for (int64_t i = 0; i < d; ++i) {
            orbit::store(row + i, scale * from[t * d + i]);
        }
    }
}

template <typename T>
void backward_item(const AttentionItem<T>& item, int64_t capacity, float* workspace) {
    const auto d = static_cast<int32_t>(item.d);
    const int64_t share = item.heads / item.kv_heads;
    const Backward b = lay_out(workspace, capacity, d);
    for (int64_t t = 0; t < item.tokens; ++t) {
        const int64_t from = (t * item.kv_heads + item.kv_head) * d;
        convert(item.k + from, d, b.keys + t * d);
        convert(item.v + from, d, b.values + t * d);
    }
    for (int64_t i = 0; i < item.tokens * d; ++i) {
        b.d_keys[i] = 0.0f;
        b.d_values[i] = 0.0f;
    }
    for (int64_t row = 0; row < item.tokens * share; row += kLanes) {
        const Group g = make_group(item, row, item.tokens * share);
        score_gradients(item, g, b);
        row_major(g, item.q, d, b.q_rows);
        row_major(g, item.d_o, d, b.do_rows);
        outer(b.d_scores, b.q_rows, g.count, d, g.most, b.d_keys);
        outer(b.weights, b.do_rows, g.count, d, g.most, b.d_values);
        weigh(g, b.d_scores, b.keys, d, b.dq_lanes);
        for (int64_t i = 0; i < d * kLanes; ++i) {
            b.dq_lanes[i] *= item.scale;
        }
        store_rows(g, b.dq_lanes, d, item.dq);
    }
    store_scaled(item, b.d_keys, item.scale, item.dk);
    store_scaled(item, b.d_values, 1.0f, item.dv);
}

}  // namespace

void attention_load(const AttentionItem<float>& item, int64_t keys, float* workspace) {
    load_pages(item, keys, workspace);
}

void attention_load(const AttentionItem<bf16>& item, int64_t keys, float* workspace) {
    load_pages(item, keys, workspace);
}

void attention_tokens(
    const AttentionItem<float>& item, int64_t begin, int64_t end, int64_t keys, float* workspace
) {
    attend(item, begin, end, keys, workspace);
}

void attention_tokens(
    const AttentionItem<bf16>& item, int64_t begin, int64_t end, int64_t keys, float* workspace
) {
    attend(item, begin, end, keys, workspace);
}

void attention_item_backward(const AttentionItem<float>& item, int64_t capacity, float* workspace) {
    backward_item(item, capacity, workspace);
}

void attention_item_backward(const AttentionItem<bf16>& item, int64_t capacity, float* workspace) {
    backward_item(item, capacity, workspace);
}

}  // namespace orbit::ORBIT_ISA
