// CUDA_CHECK: a failing call is our bug or a broken device; print the call and abort. Launch
// errors are caught right after the launch (LAUNCH_CHECK), errors inside kernels by the next
// synchronising call.
#pragma once

// fmt 9 switches its constexpr off under nvcc but keeps consteval, which then does not compile.
// This header comes first in every .cu file and switches constexpr on again.
#define FMT_USE_CONSTEXPR 1

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "base/error.h"
#include "device/device.h"

namespace orbit::cuda {

inline void check_cuda(cudaError_t status, const char* call, const char* file, int line) {
    if (status != cudaSuccess) {
        check_failed(
            file,
            line,
            std::string(call) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status)
        );
    }
}

}  // namespace orbit::cuda

#define CUDA_CHECK(call) ::orbit::cuda::check_cuda((call), #call, __FILE__, __LINE__)
#define LAUNCH_CHECK() CUDA_CHECK(cudaGetLastError())

namespace orbit::cuda {

// The stream's queue, with its GPU made current for this thread (launches need that).
inline cudaStream_t queue_of(const Stream& stream) {
    CUDA_CHECK(cudaSetDevice(stream.device.ordinal));
    return static_cast<cudaStream_t>(stream.handle());
}

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// A grid dimension; a batch that needs more blocks than the hardware has is our bug.
inline unsigned grid_dim(int64_t blocks) {
    CHECK_GT(blocks, 0);
    CHECK_LT(blocks, int64_t{1} << 31);
    return static_cast<unsigned>(blocks);
}

inline unsigned grid_dim_yz(int64_t blocks) {
    CHECK_GT(blocks, 0);
    CHECK_LT(blocks, 65536);
    return static_cast<unsigned>(blocks);
}

// What launches depend on.
struct DeviceLimits {
    int major = 0;  // of the compute capability
    int multiprocessors = 0;
    int64_t shared_bytes = 0;  // that one thread block may have
};

// Of the current device; the driver is asked once for all of them.
inline const DeviceLimits& device_limits() {
    static const std::vector<DeviceLimits> all = [] {
        int count = 0;
        CUDA_CHECK(cudaGetDeviceCount(&count));
        std::vector<DeviceLimits> limits;
        for (int device = 0; device < count; ++device) {
            const auto attribute = [&](cudaDeviceAttr name) {
                int value = 0;
                CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
                return value;
            };
            limits.push_back(DeviceLimits{
                attribute(cudaDevAttrComputeCapabilityMajor),
                attribute(cudaDevAttrMultiProcessorCount),
                attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)});
        }
        return limits;
    }();
    int device = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    return all[static_cast<size_t>(device)];
}

// Whether the current device can start a kernel before its predecessor ends: from Hopper on.
inline bool overlaps_launches() {
    return device_limits().major >= 9;
}

// Starts a kernel while its predecessor on the queue still runs; the kernel itself waits, with
// wait_for_predecessor(), before it touches anything the predecessor reads or writes. Every thread
// block of such a kernel must wait, so that the order stays that of the queue. `cluster`: of so
// many neighbouring blocks; more than one only on Hopper.
template <typename... Parameters, typename... Arguments>
void launch_clusters_early(
    unsigned cluster,
    void (*kernel)(Parameters...),
    dim3 grid,
    unsigned threads,
    size_t shared_bytes,
    cudaStream_t queue,
    Arguments&&... arguments
) {
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster;
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = queue;
    config.attrs = attributes;
    config.numAttrs = overlaps_launches() ? (cluster > 1 ? 2 : 1) : 0;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

template <typename... Parameters, typename... Arguments>
void launch_early(
    void (*kernel)(Parameters...),
    dim3 grid,
    unsigned threads,
    size_t shared_bytes,
    cudaStream_t queue,
    Arguments&&... arguments
) {
    launch_clusters_early(1, kernel, grid, threads, shared_bytes, queue, arguments...);
}

// Lets a kernel use more than 48 KiB of dynamic shared memory.
template <typename Kernel>
void allow_shared_memory(Kernel* kernel, size_t bytes) {
    if (bytes > 48u * 1024u) {
        CUDA_CHECK(cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)
        ));
    }
}

}  // namespace orbit::cuda
