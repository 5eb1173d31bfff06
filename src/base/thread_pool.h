// A fixed set of worker threads with static partition. One pool per CPU Device; no globals.
// parallel_for splits [0, count) into contiguous ranges of at least `grain`, one per thread at
// most, and blocks until all are done. A range's result must not depend on the split: never reduce
// over the split axis. The calling thread works too. Not re-entrant from inside a body (a nested
// call runs inline).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace orbit {

class ThreadPool {
  public:
    explicit ThreadPool(int num_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int num_threads() const;

    // body(begin, end, thread_index)
    void parallel_for(
        int64_t count, int64_t grain, const std::function<void(int64_t, int64_t, int)>& body
    );

  private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace orbit
