// Stream capture and graph replay of device/cuda_api.h.
#include "device/cuda/check.cuh"
#include "device/cuda_api.h"

namespace orbit::cuda {

void begin_capture(void* stream) {
    CUDA_CHECK(
        cudaStreamBeginCapture(static_cast<cudaStream_t>(stream), cudaStreamCaptureModeThreadLocal)
    );
}

void* end_capture(void* stream) {
    cudaGraph_t graph = nullptr;
    CUDA_CHECK(cudaStreamEndCapture(static_cast<cudaStream_t>(stream), &graph));
    cudaGraphExec_t executable = nullptr;
    CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
    CUDA_CHECK(cudaGraphDestroy(graph));
    return executable;
}

void launch_graph(void* graph, void* stream) {
    CUDA_CHECK(
        cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), static_cast<cudaStream_t>(stream))
    );
}

void destroy_graph(void* graph) {
    CUDA_CHECK(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)));
}

}  // namespace orbit::cuda
