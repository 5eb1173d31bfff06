#include "device/graph.h"

#include "device/cuda_api.h"

namespace orbit {

Graph::Graph(Stream& stream, std::function<void()> body)
    : stream_(&stream), body_(std::move(body)) {
    if (stream.is_cpu()) {
        return;
    }
    const Scratch::Mark mark = stream.scratch.mark();
    body_();
    synchronize(stream);
    stream.scratch.release(mark);
    cuda::begin_capture(stream.handle());
    body_();
    graph_ = cuda::end_capture(stream.handle());
    stream.scratch.release(mark);
}

Graph::~Graph() {
    if (graph_ != nullptr) {
        cuda::destroy_graph(graph_);
    }
}

void Graph::launch() {
    if (stream_->is_cpu()) {
        const ScratchScope scope(stream_->scratch);
        body_();
    } else {
        cuda::launch_graph(graph_, stream_->handle());
    }
}

}  // namespace orbit
