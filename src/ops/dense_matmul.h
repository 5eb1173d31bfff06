// The CPU's matrix products, described as plain structs: dense_cpu.cpp fills them, the kernels of
// each instruction set run them.
//
// Order of one output element: a single fp32 chain over ascending k. On AVX-512 (and AMX) bf16
// operands go through the pair instructions, two k a step (32 a step), zero-padded; elsewhere one
// fma (AVX2) or multiply and add (reference) a step. An odd depth takes the fma path everywhere.
// So the order is a function of the depth and the instruction set; rows, threads, tiles and chunks
// do not enter, because partial sums only ever leave a register as the float they are.
#pragma once

#include "ops/isa.h"
#include "quant/quantized_matrix.h"

namespace orbit {

constexpr int64_t kSumsPadding = 32;  // rows past a row block that a tile may write
constexpr int64_t kPanelWidth = 64;   // output columns of one packed panel of the weight

// x W^T (contracting w's columns), or x W (contracting its rows) when transposed.
struct Product {
    const void* x = nullptr;  // [rows, depth], rows ldx apart; bf16 when pairs, else float
    int64_t ldx = 0;
    int64_t depth = 0;
    QuantizedMatrix w;
    bool transposed = false;
    bool pairs = false;         // the bf16 pair instructions
    bool exact_values = false;  // check mode: decode_f32, not decode_bf16

    bool defined() const { return x != nullptr; }
};

// y = round(scale * main + low_rank_scale * low_rank + bias + residual [+ y]).
// blocks > 1: a block-diagonal weight; block n reads x columns [n depth, ...), the n-th
// [w.rows, w.cols] matrix of w.data, and writes y columns [n width, ...).
struct Matmul {
    int64_t rows = 0;
    int64_t width = 0;
    int64_t blocks = 1;
    Product main;
    Product low_rank;
    float scale = 1;
    float low_rank_scale = 0;
    const float* bias = nullptr;
    const void* residual = nullptr;  // same type and stride as y
    void* y = nullptr;
    int64_t ldy = 0;
    bool y_bf16 = false;
    bool accumulate = false;
    bool amx = false;  // products with `pairs` run on AMX tiles

    // The plan: work items are (row block, block, panel), panels innermost. See plan_matmul.
    int64_t panels = 0;     // per block
    int64_t row_block = 0;  // rows of one item
    int64_t chunk = 0;      // k of one packed panel
    int64_t num_items = 0;
    int64_t workspace_bytes = 0;  // per thread
};

// out[i][j] += sum over t ascending of (scale * a[t][i]) * b[t][j], block n of a, b and out for n
// in [0, blocks). The chain starts at out's value, so cutting a batch in two changes no bit.
struct OuterSum {
    const void* a = nullptr;  // [rows, blocks * a_width]
    const void* b = nullptr;  // [rows, blocks * b_width]
    bool is_bf16 = false;     // both
    int64_t rows = 0;
    int64_t blocks = 1;
    int64_t a_width = 0;
    int64_t b_width = 0;
    float scale = 1;
    float* out = nullptr;  // [blocks, a_width, b_width]
};

constexpr int64_t kOuterTile = 8;  // rows of `out` in one work item

inline int64_t outer_tiles(const OuterSum& o) {
    return (o.a_width + kOuterTile - 1) / kOuterTile;
}

// One register tile's work: rows of x down one packed panel.
struct PanelTile {
    const void* x;
    int64_t ldx;
    const uint32_t* cells;
    int64_t depth;
    float* sums;  // [rows][kPanelWidth]
    bool first;   // start at zero, not at `sums`
};

namespace isa_amx {
constexpr int64_t kTileRowsMax = 32;
void begin_tiles();  // once per thread before multiply_tile; end_tiles after
void end_tiles();
// rows <= 32. Writes whole register tiles: `sums` has room for 16 or 32 rows, whatever `rows` is.
// padding: room for [16, depth] bf16.
void multiply_tile(const PanelTile& tile, int64_t rows, int64_t width, char* padding);
}  // namespace isa_amx

// Rows [row, row + rows) and columns [column, column + cols) of w as the bf16 values that a product
// with `pairs` (or without) multiplies. out: [rows, cols]. column: a multiple of 32.
struct DecodePart {
    QuantizedMatrix w;
    int64_t row = 0;
    int64_t column = 0;
    int64_t cols = 0;
    bool pairs = false;
    bf16* out = nullptr;
};

// The rotation's share of linear_backward, g being the gradient of the rotated input:
// grad += x^T g per block, dx (+)= g + g D^T. dx undefined, grad null: skipped.
void rotation_backward(
    Stream& stream, Tensor x, Tensor oft_d, Tensor g, Tensor dx, bool accumulate_dx, float* grad
);

ORBIT_KERNEL(void, decode_rows, (const DecodePart& part, int64_t begin, int64_t end))
ORBIT_KERNEL(void, matmul_items, (const Matmul& m, int64_t begin, int64_t end, void* workspace))
ORBIT_KERNEL(void, outer_sum_items, (const OuterSum& o, int64_t begin, int64_t end))

}  // namespace orbit
