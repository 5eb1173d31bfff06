// The AMX tile of the matrix products: TDPBF16PS on the same panels as AVX-512's pair instructions,
// 32 k an instruction. Its order of addition is its own, so isa = amx uses it for every number of
// rows; only an odd depth goes another way (dense_matmul.h).
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "ops/dense_matmul.h"

namespace orbit::isa_amx {
namespace {

constexpr int64_t kRows = 16;       // of one register tile
constexpr int64_t kStepDepth = 32;  // k of one instruction
constexpr int64_t kColumns = 16;

struct TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static_assert(sizeof(TileConfig) == 64);

// Sixteen rows of x, and how far apart they lie.
struct RowGroup {
    const char* data;
    int64_t stride;
};

// GCC's tile intrinsics do not say how much memory behind a pointer they read and write.
inline void memory_barrier(const void* pointer) {
    __asm__ volatile("" ::"r"(pointer) : "memory");
}

// Registers 0 to 3: sums [row group][column group]; 4, 5: x; 6, 7: panel.
template <int kGroups, int kVectors>
inline void step(const RowGroup* x, int64_t at, const uint32_t* cells, int64_t cell_stride) {
    _tile_loadd(4, x[0].data + at, x[0].stride);
    _tile_loadd(6, cells, cell_stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kVectors == 2) {
        _tile_loadd(7, cells + kColumns, cell_stride);
        _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kGroups == 2) {
        _tile_loadd(5, x[1].data + at, x[1].stride);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kVectors == 2) {
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

template <int kGroups, int kVectors>
inline void load_sums(const float* sums, bool first) {
    constexpr int64_t kStride = kPanelWidth * 4;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        return;
    }
    _tile_loadd(0, sums, kStride);
    if constexpr (kVectors == 2) {
        _tile_loadd(1, sums + kColumns, kStride);
    }
    if constexpr (kGroups == 2) {
        _tile_loadd(2, sums + kRows * kPanelWidth, kStride);
        if constexpr (kVectors == 2) {
            _tile_loadd(3, sums + kRows * kPanelWidth + kColumns, kStride);
        }
    }
}

template <int kGroups, int kVectors>
inline void store_sums(float* sums) {
    constexpr int64_t kStride = kPanelWidth * 4;
    _tile_stored(0, sums, kStride);
    if constexpr (kVectors == 2) {
        _tile_stored(1, sums + kColumns, kStride);
    }
    if constexpr (kGroups == 2) {
        _tile_stored(2, sums + kRows * kPanelWidth, kStride);
        if constexpr (kVectors == 2) {
            _tile_stored(3, sums + kRows * kPanelWidth + kColumns, kStride);
        }
    }
}

// The last, partial step of a depth that is no multiple of 32, zero-padded.
struct Tail {
    alignas(64) char x[2][kRows * 64];
    alignas(64) uint32_t cells[kStepDepth / 2 * 2 * kColumns];
};

template <int kGroups, int kVectors>
void multiply_columns(const PanelTile& tile, const RowGroup* x, int64_t column) {
    const uint32_t* cells = tile.cells + column;
    const int64_t whole = tile.depth / kStepDepth * kStepDepth;
    load_sums<kGroups, kVectors>(tile.sums + column, tile.first);
    for (int64_t k = 0; k < whole; k += kStepDepth) {
        step<kGroups, kVectors>(x, k * 2, cells + k / 2 * kPanelWidth, kPanelWidth * 4);
    }
    if (whole < tile.depth) {
        Tail tail;
        std::memset(&tail, 0, sizeof tail);
        const int64_t left = tile.depth - whole;
        RowGroup padded[2];
        for (int64_t g = 0; g < kGroups; ++g) {
            for (int64_t r = 0; r < kRows; ++r) {
                std::memcpy(
                    tail.x[g] + r * 64,
                    x[g].data + r * x[g].stride + whole * 2,
                    static_cast<size_t>(left * 2)
                );
            }
            padded[g] = {tail.x[g], 64};
        }
        for (int64_t s = 0; s < left / 2; ++s) {
            std::memcpy(
                tail.cells + s * 2 * kColumns,
                cells + (whole / 2 + s) * kPanelWidth,
                static_cast<size_t>(kVectors * kColumns * 4)
            );
        }
        memory_barrier(&tail);
        step<kGroups, kVectors>(padded, 0, tail.cells, 2 * kColumns * 4);
    }
    store_sums<kGroups, kVectors>(tile.sums + column);
    memory_barrier(tile.sums);
}

template <int kGroups>
void multiply_groups(const PanelTile& tile, const RowGroup* x, int64_t width) {
    for (int64_t column = 0; column < width; column += 2 * kColumns) {
        if (width - column > kColumns) {
            multiply_columns<kGroups, 2>(tile, x, column);
        } else {
            multiply_columns<kGroups, 1>(tile, x, column);
        }
    }
}

}  // namespace

void begin_tiles() {
    const TileConfig config;
    memory_barrier(&config);
    _tile_loadconfig(&config);
}

void end_tiles() {
    _tile_release();
}

void multiply_tile(const PanelTile& tile, int64_t rows, int64_t width, char* padding) {
    const auto* x = static_cast<const char*>(tile.x);
    const int64_t stride = tile.ldx * 2;
    RowGroup groups[2] = {{x, stride}, {x + kRows * stride, stride}};
    const int64_t last_rows = rows % kRows;
    if (last_rows != 0) {
        // A register tile always reads sixteen rows: the last ones are a zero-padded copy.
        RowGroup& last = groups[rows / kRows];
        const int64_t bytes = tile.depth * 2;
        for (int64_t r = 0; r < kRows; ++r) {
            if (r < last_rows) {
                std::memcpy(
                    padding + r * bytes, last.data + r * stride, static_cast<size_t>(bytes)
                );
            } else {
                std::memset(padding + r * bytes, 0, static_cast<size_t>(bytes));
            }
        }
        last = {padding, bytes};
    }
    memory_barrier(padding);
    if (rows > kRows) {
        multiply_groups<2>(tile, groups, width);
    } else {
        multiply_groups<1>(tile, groups, width);
    }
}

}  // namespace orbit::isa_amx
