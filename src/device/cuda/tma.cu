#include <algorithm>

#include "device/cuda/check.cuh"
#include "device/cuda/tma.cuh"

namespace orbit::cuda {
namespace {

// Found at run time, so that a program without a driver still starts.
decltype(&cuTensorMapEncodeTiled) encode_function() {
    static const auto encode = [] {
        constexpr unsigned kSince = 12000;
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found{};
        CUDA_CHECK(cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &entry, kSince, cudaEnableDefault, &found
        ));
        CHECK(found == cudaDriverEntryPointSuccess);
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
    }();
    return encode;
}

// kRank dimensions, the innermost first; strides in bytes, of all but the innermost.
template <int kRank>
CUtensorMap encode(
    const void* data,
    const cuuint64_t (&extents)[kRank],
    const cuuint64_t (&strides)[kRank - 1],
    const cuuint32_t (&box)[kRank],
    CUtensorMapSwizzle swizzle
) {
    CHECK_EQ(reinterpret_cast<uintptr_t>(data) % 16, uintptr_t{0});
    for (const cuuint64_t stride : strides) {
        CHECK_EQ(stride % 16, cuuint64_t{0});
    }
    CUtensorMap map{};
    cuuint32_t element_strides[kRank];
    std::fill_n(element_strides, kRank, 1);
    const CUresult status = encode_function()(
        &map,
        CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        kRank,
        const_cast<void*>(data),
        extents,
        strides,
        box,
        element_strides,
        CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
    );
    CHECK_EQ(static_cast<int>(status), static_cast<int>(CUDA_SUCCESS));
    return map;
}

CUtensorMap encode_matrix(
    const void* data,
    int64_t rows,
    int64_t cols,
    int64_t row_bytes,
    int32_t box_rows,
    uint32_t box_cols,
    CUtensorMapSwizzle swizzle
) {
    return encode<2>(
        data,
        {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)},
        {static_cast<cuuint64_t>(row_bytes)},
        {box_cols, static_cast<cuuint32_t>(box_rows)},
        swizzle
    );
}

}  // namespace

CUtensorMap tensor_map(
    const void* data, int64_t rows, int64_t cols, int64_t row_bytes, int32_t box_rows
) {
    return encode_matrix(data, rows, cols, row_bytes, box_rows, 64, CU_TENSOR_MAP_SWIZZLE_128B);
}

CUtensorMap tensor_map_unswizzled(
    const void* data, int64_t rows, int64_t cols, int64_t row_bytes, int32_t box_rows
) {
    return encode_matrix(data, rows, cols, row_bytes, box_rows, 8, CU_TENSOR_MAP_SWIZZLE_NONE);
}

CUtensorMap tensor_map_pages(
    const void* data,
    int64_t pages,
    int64_t heads,
    int64_t tokens,
    int64_t channels,
    int32_t box_pages
) {
    const auto row = static_cast<cuuint64_t>(2 * channels);
    const auto head = row * static_cast<cuuint64_t>(tokens);
    return encode<4>(
        data,
        {static_cast<cuuint64_t>(channels),
         static_cast<cuuint64_t>(tokens),
         static_cast<cuuint64_t>(heads),
         static_cast<cuuint64_t>(pages)},
        {row, head, head * static_cast<cuuint64_t>(heads)},
        {64, static_cast<cuuint32_t>(tokens), 1, static_cast<cuuint32_t>(box_pages)},
        CU_TENSOR_MAP_SWIZZLE_128B
    );
}

}  // namespace orbit::cuda
