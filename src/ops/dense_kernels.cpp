// Matrix products on packed panels: a register tile of a few rows by a few vectors of columns walks
// down the panel once.
#include <algorithm>
#include <cstring>

#include "ops/dense_matmul.h"
#include "ops/dense_panels.h"

#if defined(ORBIT_AVX2)
#include <immintrin.h>
#elif defined(ORBIT_AVX512)
#include "ops/dense_panels_avx512.h"
#endif

namespace orbit::ORBIT_ISA {
namespace {

#if defined(ORBIT_AVX512)
constexpr int kLanes = 16;
constexpr int kTileRows = 6;
constexpr int kTallRows = 12;  // of panels up to kTallWidth wide
constexpr int kTileVectors = 4;
#elif defined(ORBIT_AVX2)
constexpr int kLanes = 8;
constexpr int kTileRows = 6;
constexpr int kTallRows = 6;
constexpr int kTileVectors = 2;
#else
constexpr int kLanes = 4;
constexpr int kTileRows = 2;
constexpr int kTallRows = 2;
constexpr int kTileVectors = 4;
#endif

constexpr int64_t kTallWidth = 2 * kLanes;

using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));

inline void load_lanes(const float* from, Lanes& to) {
    std::memcpy(&to, from, sizeof to);
}

inline void store_lanes(float* to, const Lanes& from) {
    std::memcpy(to, &from, sizeof from);
}

// sum += x * w: fused where the instruction set has it.
inline void multiply_add(Lanes& sum, const Lanes& x, const Lanes& w) {
#if defined(ORBIT_AVX512)
    sum = _mm512_fmadd_ps(x, w, sum);
#elif defined(ORBIT_AVX2)
    sum = _mm256_fmadd_ps(x, w, sum);
#else
    sum += x * w;
#endif
}

// kRows rows by the kTileVectors vectors of columns at `column`.
template <int kRows>
void run_float_tile(const PanelTile& tile, int64_t column) {
    Lanes sum[kRows][kTileVectors] = {};
    if (!tile.first) {
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < kTileVectors; ++v) {
                load_lanes(tile.sums + r * kPanelWidth + column + v * kLanes, sum[r][v]);
            }
        }
    }
    const auto* x = static_cast<const float*>(tile.x);
    const auto* panel = reinterpret_cast<const float*>(tile.cells) + column;
    for (int64_t k = 0; k < tile.depth; ++k, panel += kPanelWidth) {
        Lanes w[kTileVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v) {
            load_lanes(panel + v * kLanes, w[v]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const Lanes value = x[r * tile.ldx + k] - Lanes{};
#pragma GCC unroll 8
            for (int v = 0; v < kTileVectors; ++v) {
                multiply_add(sum[r][v], value, w[v]);
            }
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kTileVectors; ++v) {
            store_lanes(tile.sums + r * kPanelWidth + column + v * kLanes, sum[r][v]);
        }
    }
}

template <int kRows>
void run_float_columns(const PanelTile& tile, int64_t width) {
    for (int64_t column = 0; column < width; column += kTileVectors * kLanes) {
        run_float_tile<kRows>(tile, column);
    }
}

#if defined(ORBIT_AVX512)
template <int kRows, int kVectors>
void run_pair_tile(const PanelTile& tile) {
    __m512 sum[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
            sum[r][v] = tile.first ? _mm512_setzero_ps()
                                   : _mm512_loadu_ps(tile.sums + r * kPanelWidth + v * kLanes);
        }
    }
    const auto* x = static_cast<const char*>(tile.x);
    const int64_t stride = tile.ldx * 2;
    const uint32_t* panel = tile.cells;
    const int64_t steps = tile.depth / 2;
    for (int64_t s = 0; s < steps; ++s, panel += kPanelWidth, x += 4) {
        __m512bh w[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            w[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel + v * kLanes));
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const auto pair =
                reinterpret_cast<__m512bh>(_mm512_set1_epi32(load_as<int32_t>(x + r * stride)));
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], pair, w[v]);
            }
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
            _mm512_storeu_ps(tile.sums + r * kPanelWidth + v * kLanes, sum[r][v]);
        }
    }
}

template <int kRows>
void run_pair_columns(const PanelTile& tile, int64_t width) {
    switch ((width + kLanes - 1) / kLanes) {
        case 1:
            return run_pair_tile<kRows, 1>(tile);
        case 2:
            return run_pair_tile<kRows, 2>(tile);
    }
    if constexpr (kRows <= kTileRows) {
        return width <= 3 * kLanes ? run_pair_tile<kRows, 3>(tile) : run_pair_tile<kRows, 4>(tile);
    } else {
        CHECK(false, "(tall tiles are for narrow panels)");
    }
}

void pack(const Product& p, int64_t n0, int64_t width, int64_t k0, int64_t depth, uint32_t* cells) {
    if (p.pairs) {
        pack_pair_panel(p, n0, width, k0, depth, cells);
    } else {
        pack_panel(p, n0, width, k0, depth, cells);
    }
}
#else
void pack(const Product& p, int64_t n0, int64_t width, int64_t k0, int64_t depth, uint32_t* cells) {
    pack_panel(p, n0, width, k0, depth, cells);
}

template <int kRows>
void run_pair_columns(const PanelTile&, int64_t) {
    CHECK(false, "(the pair instructions are AVX-512's)");
}
#endif

template <int kRows>
void run_rows(const PanelTile& tile, int64_t rows, int64_t width, bool pairs) {
    if constexpr (kRows > 1) {
        if (rows < kRows) {
            // From the tall tile straight to the plain ones.
            constexpr int kNext = kRows > kTileRows ? kTileRows : kRows - 1;
            return run_rows<kNext>(tile, rows, width, pairs);
        }
    }
    if (pairs) {
        run_pair_columns<kRows>(tile, width);
    } else {
        run_float_columns<kRows>(tile, width);
    }
}

// Narrow panels have room for more rows in registers, and need them to hide the latency.
int64_t tile_rows(int64_t rows, int64_t width, bool pairs) {
    const bool tall = pairs && width <= kTallWidth && rows >= kTallRows;
    return std::min<int64_t>(rows, tall ? kTallRows : kTileRows);
}

// Rows of a matmul's tile: as many as fit the registers.
int64_t step_rows(const Matmul& m, int64_t rows, int64_t width) {
    return m.amx && m.main.pairs ? std::min(rows, isa_amx::kTileRowsMax)
                                 : tile_rows(rows, width, m.main.pairs);
}

void run_tile(
    const PanelTile& tile, int64_t rows, int64_t width, bool pairs, bool amx, char* padding
) {
    if (pairs && amx) {
        return isa_amx::multiply_tile(tile, rows, width, padding);
    }
    for (int64_t r = 0; r < rows;) {
        const int64_t count = tile_rows(rows - r, width, pairs);
        PanelTile part = tile;
        part.x = static_cast<const char*>(tile.x) + r * tile.ldx * (pairs ? 2 : 4);
        part.sums = tile.sums + r * kPanelWidth;
        run_rows<kTallRows>(part, count, width, pairs);
        r += count;
    }
}

int64_t element_bytes(const Product& p) {
    return p.pairs ? 2 : 4;
}

const char* x_at(const Product& p, int64_t row, int64_t column) {
    return static_cast<const char*>(p.x) + (row * p.ldx + column) * element_bytes(p);
}

// One finished tile: sums of the base and of the low-rank product, to y.
struct Finish {
    const Matmul* m;
    int64_t row;
    int64_t rows;
    int64_t column;  // of y
    int64_t width;
    float* sums;  // [rows][kPanelWidth], clobbered
    const float* low_rank;
};

template <typename T>
void finish_tile(const Finish& f) {
    const Matmul& m = *f.m;
    for (int64_t r = 0; r < f.rows; ++r) {
        float* v = f.sums + r * kPanelWidth;
        const int64_t at = (f.row + r) * m.ldy + f.column;
        T* y = static_cast<T*>(m.y) + at;
        if (m.scale != 1.0f) {
            for (int64_t j = 0; j < f.width; ++j) {
                v[j] *= m.scale;
            }
        }
        if (f.low_rank != nullptr) {
            const float* u = f.low_rank + r * kPanelWidth;
            for (int64_t j = 0; j < f.width; ++j) {
                v[j] += m.low_rank_scale * u[j];
            }
        }
        if (m.bias != nullptr) {
            const float* bias = m.bias + f.column;
            for (int64_t j = 0; j < f.width; ++j) {
                v[j] += bias[j];
            }
        }
        if (m.residual != nullptr) {
            const T* residual = static_cast<const T*>(m.residual) + at;
            for (int64_t j = 0; j < f.width; ++j) {
                v[j] += to_float(residual[j]);
            }
        }
        if (m.accumulate) {
            for (int64_t j = 0; j < f.width; ++j) {
                v[j] += to_float(y[j]);
            }
        }
        for (int64_t j = 0; j < f.width; ++j) {
            store(y + j, v[j]);
        }
    }
}

// One work item's place.
struct Item {
    int64_t row;
    int64_t rows;
    int64_t block;
    int64_t n0;  // within the block
    int64_t width;
};

Item item_at(const Matmul& m, int64_t index) {
    const int64_t panel = index % m.panels;
    const int64_t block = index / m.panels % m.blocks;
    const int64_t row = index / m.panels / m.blocks * m.row_block;
    const int64_t n0 = panel * kPanelWidth;
    return {
        row, std::min(m.row_block, m.rows - row), block, n0, std::min(kPanelWidth, m.width - n0)};
}

Product block_of(const Product& p, int64_t block) {
    Product one = p;
    if (block > 0) {
        one.x = x_at(p, 0, block * p.depth);
        one.w.data = static_cast<const char*>(p.w.data) +
                     block * p.w.rows * p.w.cols * (p.w.format == WeightFormat::kBF16 ? 2 : 4);
    }
    return one;
}

// One thread's memory.
struct Workspace {
    float* sums;               // [row_block + 32][kPanelWidth]
    uint32_t* cells;           // of one chunk
    uint32_t* low_rank_cells;  // of the whole low-rank product
    char* padding;             // [16, chunk or the low rank] bf16
};

// The rows of one item over one packed chunk; finishes them when the chunk is the last.
void run_chunk(
    const Matmul& m, const Item& item, const Product& main, int64_t k0, const Workspace& workspace
) {
    const int64_t depth = std::min(m.chunk, main.depth - k0);
    const bool last = k0 + depth == main.depth;
    for (int64_t r = 0; r < item.rows;) {
        const int64_t rows = step_rows(m, item.rows - r, item.width);
        float* tile_sums = workspace.sums + r * kPanelWidth;
        const PanelTile tile = {
            x_at(main, item.row + r, k0), main.ldx, workspace.cells, depth, tile_sums, k0 == 0};
        run_tile(tile, rows, item.width, main.pairs, m.amx, workspace.padding);
        r += rows;
        if (!last) {
            continue;
        }
        float low_rank[isa_amx::kTileRowsMax * kPanelWidth];
        const Product& p = m.low_rank;
        const int64_t row = item.row + r - rows;
        if (p.defined()) {
            const PanelTile second = {
                x_at(p, row, 0), p.ldx, workspace.low_rank_cells, p.depth, low_rank, true};
            run_tile(second, rows, item.width, p.pairs, m.amx, workspace.padding);
        }
        const Finish finish = {
            &m,
            row,
            rows,
            item.block * m.width + item.n0,
            item.width,
            tile_sums,
            p.defined() ? low_rank : nullptr};
        if (m.y_bf16) {
            finish_tile<bf16>(finish);
        } else {
            finish_tile<float>(finish);
        }
    }
}

}  // namespace

void matmul_items(const Matmul& m, int64_t begin, int64_t end, void* memory) {
    Workspace workspace;
    workspace.sums = static_cast<float*>(memory);
    workspace.cells =
        reinterpret_cast<uint32_t*>(workspace.sums + (m.row_block + kSumsPadding) * kPanelWidth);
    workspace.low_rank_cells = workspace.cells + m.chunk * kPanelWidth;
    workspace.padding =
        reinterpret_cast<char*>(workspace.low_rank_cells + m.low_rank.depth * kPanelWidth);
    if (m.amx) {
        isa_amx::begin_tiles();
    }
    for (int64_t index = begin; index < end; ++index) {
        const Item item = item_at(m, index);
        const Product main = block_of(m.main, item.block);
        if (m.low_rank.defined()) {
            pack(m.low_rank, item.n0, item.width, 0, m.low_rank.depth, workspace.low_rank_cells);
        }
        for (int64_t k0 = 0; k0 < main.depth; k0 += m.chunk) {
            pack(
                main, item.n0, item.width, k0, std::min(m.chunk, main.depth - k0), workspace.cells
            );
            run_chunk(m, item, main, k0, workspace);
        }
    }
    if (m.amx) {
        isa_amx::end_tiles();
    }
}

void decode_rows(const DecodePart& part, int64_t begin, int64_t end) {
#if defined(ORBIT_AVX512)
    if (part.pairs) {
        return decode_pair_rows(part, begin, end);
    }
#endif
    float values[kDecodeRun];
    for (int64_t r = begin; r < end; ++r) {
        bf16* out = part.out + r * part.cols;
        for (int64_t c = 0; c < part.cols; c += kDecodeRun) {
            const int64_t count = std::min(kDecodeRun, part.cols - c);
            decode_row(part.w, part.row + r, part.column + c, count, false, values);
            for (int64_t i = 0; i < count; ++i) {
                out[c + i] = to_bf16(values[i]);
            }
        }
    }
}

namespace {

constexpr int64_t kOuterRows = 128;  // tokens converted at a time
constexpr int kOuterVectors = kLanes >= 8 ? 2 : 4;
constexpr int64_t kOuterColumns = kOuterVectors * kLanes;

// Columns [column, column + width) of rows [row, row + rows) as floats times scale, `to_width`
// apart and zero-filled.
template <typename T>
void widen(
    const void* from,
    int64_t ld,
    int64_t row,
    int64_t rows,
    int64_t column,
    int64_t width,
    float scale,
    float* to,
    int64_t to_width
) {
    const T* source = static_cast<const T*>(from) + row * ld + column;
    for (int64_t r = 0; r < rows; ++r, source += ld, to += to_width) {
        for (int64_t j = 0; j < width; ++j) {
            to[j] = scale * to_float(source[j]);
        }
        for (int64_t j = width; j < to_width; ++j) {
            to[j] = 0.0f;
        }
    }
}

// sums [kOuterTile][kOuterColumns] += a^T b over `rows` tokens.
void outer_tile(const float* a, const float* b, int64_t rows, float* sums) {
    constexpr int kRows = kLanes == 16 ? 8 : 4;
    for (int64_t i = 0; i < kOuterTile; i += kRows) {
        Lanes sum[kRows][kOuterVectors];
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < kOuterVectors; ++v) {
                load_lanes(sums + (i + r) * kOuterColumns + v * kLanes, sum[r][v]);
            }
        }
        for (int64_t t = 0; t < rows; ++t) {
            Lanes w[kOuterVectors];
            for (int v = 0; v < kOuterVectors; ++v) {
                load_lanes(b + t * kOuterColumns + v * kLanes, w[v]);
            }
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const Lanes value = a[t * kOuterTile + i + r] - Lanes{};
#pragma GCC unroll 8
                for (int v = 0; v < kOuterVectors; ++v) {
                    multiply_add(sum[r][v], value, w[v]);
                }
            }
        }
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < kOuterVectors; ++v) {
                store_lanes(sums + (i + r) * kOuterColumns + v * kLanes, sum[r][v]);
            }
        }
    }
}

// Moves a tile of `out` into registers' reach and back; the padding stays out of it.
void add_outer_tile(
    const OuterSum& o,
    int64_t block,
    int64_t i0,
    int64_t j0,
    const float* a,
    const float* b,
    int64_t rows
) {
    const int64_t height = std::min(kOuterTile, o.a_width - i0);
    const int64_t width = std::min(kOuterColumns, o.b_width - j0);
    float sums[kOuterTile * kOuterColumns] = {};
    float* out = o.out + (block * o.a_width + i0) * o.b_width + j0;
    for (int64_t i = 0; i < height; ++i) {
        std::copy_n(out + i * o.b_width, width, sums + i * kOuterColumns);
    }
    outer_tile(a, b, rows, sums);
    for (int64_t i = 0; i < height; ++i) {
        std::copy_n(sums + i * kOuterColumns, width, out + i * o.b_width);
    }
}

template <typename T>
void outer_sum_range(const OuterSum& o, int64_t begin, int64_t end) {
    float a[kOuterRows * kOuterTile];
    float b[kOuterRows * kOuterColumns];
    const int64_t tiles = outer_tiles(o);
    for (int64_t row = 0; row < o.rows; row += kOuterRows) {
        const int64_t rows = std::min(kOuterRows, o.rows - row);
        for (int64_t j0 = 0; j0 < o.b_width; j0 += kOuterColumns) {
            const int64_t width = std::min(kOuterColumns, o.b_width - j0);
            int64_t widened = -1;
            for (int64_t index = begin; index < end; ++index) {
                const int64_t block = index / tiles;
                const int64_t i0 = index % tiles * kOuterTile;
                if (block != widened) {
                    widen<T>(
                        o.b,
                        o.blocks * o.b_width,
                        row,
                        rows,
                        block * o.b_width + j0,
                        width,
                        1.0f,
                        b,
                        kOuterColumns
                    );
                    widened = block;
                }
                widen<T>(
                    o.a,
                    o.blocks * o.a_width,
                    row,
                    rows,
                    block * o.a_width + i0,
                    std::min(kOuterTile, o.a_width - i0),
                    o.scale,
                    a,
                    kOuterTile
                );
                add_outer_tile(o, block, i0, j0, a, b, rows);
            }
        }
    }
}

}  // namespace

void outer_sum_items(const OuterSum& o, int64_t begin, int64_t end) {
    if (o.is_bf16) {
        outer_sum_range<bf16>(o, begin, end);
    } else {
        outer_sum_range<float>(o, begin, end);
    }
}

}  // namespace orbit::ORBIT_ISA
