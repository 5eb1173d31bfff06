// The CUDA side of device.cpp: plain allocations, one non-blocking stream per Stream, copies.
#include "device/cuda/check.cuh"
#include "device/cuda_api.h"

namespace orbit::cuda {
namespace {

cudaStream_t as_stream(void* stream) {
    return static_cast<cudaStream_t>(stream);
}

}  // namespace

int num_devices() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        (void)cudaGetLastError();  // No driver or no device: an ordinary machine.
        return 0;
    }
    return count;
}

std::string device_name(int ordinal) {
    cudaDeviceProp properties{};
    CUDA_CHECK(cudaGetDeviceProperties(&properties, ordinal));
    return properties.name;
}

void memory_info(int ordinal, size_t* free_bytes, size_t* total_bytes) {
    CUDA_CHECK(cudaSetDevice(ordinal));
    CUDA_CHECK(cudaMemGetInfo(free_bytes, total_bytes));
}

void* allocate(int ordinal, size_t bytes) {
    CUDA_CHECK(cudaSetDevice(ordinal));
    void* pointer = nullptr;
    const cudaError_t status = cudaMalloc(&pointer, bytes);
    if (status == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        size_t free_bytes = 0;
        size_t total_bytes = 0;
        CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
        constexpr double kMiB = 1024.0 * 1024.0;
        throw UserError(fmt::format(
            "GPU {} is out of memory: {:.1f} MiB more were asked for, {:.1f} of {:.1f} MiB are "
            "free; use a smaller model, batch or max_tokens.",
            ordinal,
            static_cast<double>(bytes) / kMiB,
            static_cast<double>(free_bytes) / kMiB,
            static_cast<double>(total_bytes) / kMiB
        ));
    }
    CUDA_CHECK(status);
    return pointer;
}

void free(int ordinal, void* pointer) {
    CUDA_CHECK(cudaSetDevice(ordinal));
    CUDA_CHECK(cudaFree(pointer));
}

// With unified addressing, which every GPU of ours has, kernels read it at the host's address.
void* allocate_host(int ordinal, size_t bytes) {
    CUDA_CHECK(cudaSetDevice(ordinal));
    void* pointer = nullptr;
    const cudaError_t status = cudaHostAlloc(&pointer, bytes, cudaHostAllocDefault);
    if (status == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        throw UserError(fmt::format(
            "this machine did not give {:.1f} MiB of pinned host memory; end other programs, or "
            "keep less there (moe.host_layers, train.activation_offloading).",
            static_cast<double>(bytes) / (1024.0 * 1024.0)
        ));
    }
    CUDA_CHECK(status);
    return pointer;
}

void free_host(int ordinal, void* pointer) {
    CUDA_CHECK(cudaSetDevice(ordinal));
    CUDA_CHECK(cudaFreeHost(pointer));
}

void* create_stream(int ordinal) {
    CUDA_CHECK(cudaSetDevice(ordinal));
    cudaStream_t stream = nullptr;
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
}

void destroy_stream(int ordinal, void* stream) {
    CUDA_CHECK(cudaSetDevice(ordinal));
    CUDA_CHECK(cudaStreamSynchronize(as_stream(stream)));
    CUDA_CHECK(cudaStreamDestroy(as_stream(stream)));
}

// From pageable memory cudaMemcpyAsync returns when the bytes have left the source, so the caller
// may reuse it at once, as on the CPU.
void copy_to_device(void* stream, void* to, const void* from, size_t bytes) {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, as_stream(stream)));
}

void copy_to_host(void* stream, void* to, const void* from, size_t bytes) {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, as_stream(stream)));
}

void copy_on_device(void* stream, void* to, const void* from, size_t bytes) {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, as_stream(stream)));
}

void zero_fill(void* stream, void* to, size_t bytes) {
    CUDA_CHECK(cudaMemsetAsync(to, 0, bytes, as_stream(stream)));
}

void synchronize(void* stream) {
    CUDA_CHECK(cudaStreamSynchronize(as_stream(stream)));
}

// The event's memory is released once it is no longer waited for.
void wait_for(int ordinal, void* stream, void* other) {
    CUDA_CHECK(cudaSetDevice(ordinal));
    cudaEvent_t event = nullptr;
    CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventRecord(event, as_stream(other)));
    CUDA_CHECK(cudaStreamWaitEvent(as_stream(stream), event, 0));
    CUDA_CHECK(cudaEventDestroy(event));
}

}  // namespace orbit::cuda
