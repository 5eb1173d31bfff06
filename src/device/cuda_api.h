// The few calls that device.cpp makes into the CUDA runtime. device/cuda/cuda_device.cu implements
// them; a build without CUDA links device/cuda_stub.cpp, where num_devices() is 0 and everything
// else throws "this build has no CUDA".
#pragma once

#include <cstddef>
#include <string>

namespace orbit::cuda {

int num_devices();
std::string device_name(int ordinal);
void memory_info(int ordinal, size_t* free_bytes, size_t* total_bytes);
void* allocate(int ordinal, size_t bytes);
void free(int ordinal, void* pointer);
void* allocate_host(int ordinal, size_t bytes);  // pinned; kernels read it at its address
void free_host(int ordinal, void* pointer);
void* create_stream(int ordinal);
void destroy_stream(int ordinal, void* stream);
// Copies between a device and pinned host memory return at once.
void copy_to_device(void* stream, void* to, const void* from, size_t bytes);
void copy_to_host(void* stream, void* to, const void* from, size_t bytes);
void copy_on_device(void* stream, void* to, const void* from, size_t bytes);
void zero_fill(void* stream, void* to, size_t bytes);
void synchronize(void* stream);
void wait_for(int ordinal, void* stream, void* other);  // by an event
// Stream capture: between the two calls, work on the stream is recorded and not run. end_capture
// returns the executable graph. No allocation may happen in between.
void begin_capture(void* stream);
void* end_capture(void* stream);
void launch_graph(void* graph, void* stream);
void destroy_graph(void* graph);

}  // namespace orbit::cuda
