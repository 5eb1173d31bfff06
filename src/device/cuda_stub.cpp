// Linked instead of device/cuda/ when the build has no CUDA.
#include "base/error.h"
#include "device/cuda_api.h"

namespace orbit::cuda {
namespace {

[[noreturn]] void no_cuda() {
    throw UserError("this build has no CUDA; use device = \"cpu\".");
}

}  // namespace

int num_devices() {
    return 0;
}

std::string device_name(int) {
    no_cuda();
}

void memory_info(int, size_t*, size_t*) {
    no_cuda();
}

void* allocate(int, size_t) {
    no_cuda();
}

void free(int, void*) {
    no_cuda();
}

void* allocate_host(int, size_t) {
    no_cuda();
}

void free_host(int, void*) {
    no_cuda();
}

void* create_stream(int) {
    no_cuda();
}

void destroy_stream(int, void*) {
    no_cuda();
}

void copy_to_device(void*, void*, const void*, size_t) {
    no_cuda();
}

void copy_to_host(void*, void*, const void*, size_t) {
    no_cuda();
}

void copy_on_device(void*, void*, const void*, size_t) {
    no_cuda();
}

void zero_fill(void*, void*, size_t) {
    no_cuda();
}

void synchronize(void*) {
    no_cuda();
}

void wait_for(int, void*, void*) {
    no_cuda();
}

void begin_capture(void*) {
    no_cuda();
}

void* end_capture(void*) {
    no_cuda();
}

void launch_graph(void*, void*) {
    no_cuda();
}

void destroy_graph(void*) {}

}  // namespace orbit::cuda
