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

CUtensorMap encode(
    const void* data,
    int64_t rows,
    int64_t cols,
    int64_t row_bytes,
    int32_t box_rows,
    uint32_t box_cols,
    CUtensorMapSwizzle swizzle
) {
    CHECK_EQ(reinterpret_cast<uintptr_t>(data) % 16, uintptr_t{0});
    CHECK_EQ(row_bytes % 16, 0);
    CUtensorMap map{};
    const cuuint64_t extents[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_bytes)};
    const cuuint32_t box[2] = {box_cols, static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t element_strides[2] = {1, 1};
    const CUresult status = encode_function()(
        &map,
        CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        2,
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

}  // namespace

CUtensorMap tensor_map(
    const void* data, int64_t rows, int64_t cols, int64_t row_bytes, int32_t box_rows
) {
    return encode(data, rows, cols, row_bytes, box_rows, 64, CU_TENSOR_MAP_SWIZZLE_128B);
}

CUtensorMap tensor_map_unswizzled(
    const void* data, int64_t rows, int64_t cols, int64_t row_bytes, int32_t box_rows
) {
    return encode(data, rows, cols, row_bytes, box_rows, 8, CU_TENSOR_MAP_SWIZZLE_NONE);
}

}  // namespace orbit::cuda
