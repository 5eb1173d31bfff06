// Graph: work of one stream, captured once and replayed. On the CPU it keeps the function and calls
// it.
#pragma once

#include <functional>

#include "device/device.h"

namespace orbit {

class Graph {
  public:
    // `body` issues the work; everything it needs is at fixed addresses, its scratch memory too:
    // the scratch that is in use now must be the same at every launch. On a GPU `body` runs once
    // for real first, so that scratch has grown.
    Graph(Stream& stream, std::function<void()> body);
    ~Graph();
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    void launch();

  private:
    Stream* stream_;
    std::function<void()> body_;
    void* graph_ = nullptr;
};

}  // namespace orbit
