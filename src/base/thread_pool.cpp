#include "base/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "base/error.h"

namespace orbit {
namespace {

// A worker spins this many times before it sleeps: decode steps issue many regions of a few
// microseconds each.
constexpr int kSpins = 4000;

void relax() {
    __builtin_ia32_pause();
}

thread_local bool inside_region = false;

}  // namespace

struct ThreadPool::State {
    std::vector<std::thread> workers;
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<uint64_t> generation{0};
    std::atomic<int> pending{0};
    std::atomic<bool> stopping{false};
    const std::function<void(int64_t, int64_t, int)>* body = nullptr;
    int64_t count = 0;
    int num_ranges = 1;
    std::mutex caller;  // two engines' threads may share one pool; regions are serialised

    void run_range(int index) const {
        if (index >= num_ranges) {
            return;
        }
        const int64_t begin = count * index / num_ranges;
        const int64_t end = count * (index + 1) / num_ranges;
        if (begin < end) {
            inside_region = true;
            (*body)(begin, end, index);
            inside_region = false;
        }
    }

    void work(int index) {
        uint64_t seen = 0;
        for (;;) {
            int spins = 0;
            while (generation.load(std::memory_order_acquire) == seen && !stopping.load()) {
                if (++spins < kSpins) {
                    relax();
                    continue;
                }
                std::unique_lock lock(mutex);
                wake.wait(lock, [&] { return generation.load() != seen || stopping.load(); });
            }
            if (stopping.load()) {
                return;
            }
            seen = generation.load(std::memory_order_acquire);
            run_range(index);
            pending.fetch_sub(1, std::memory_order_release);
        }
    }
};

ThreadPool::ThreadPool(int num_threads) : state_(std::make_unique<State>()) {
    CHECK_GE(num_threads, 1);
    for (int i = 1; i < num_threads; ++i) {
        state_->workers.emplace_back([this, i] { state_->work(i); });
    }
}

ThreadPool::~ThreadPool() {
    {
        std::lock_guard lock(state_->mutex);
        state_->stopping.store(true);
    }
    state_->wake.notify_all();
    for (auto& worker : state_->workers) {
        worker.join();
    }
}

int ThreadPool::num_threads() const {
    return static_cast<int>(state_->workers.size()) + 1;
}

void ThreadPool::parallel_for(
    int64_t count, int64_t grain, const std::function<void(int64_t, int64_t, int)>& body
) {
    if (count <= 0) {
        return;
    }
    const int64_t ranges =
        std::min<int64_t>(num_threads(), std::max<int64_t>(1, count / std::max<int64_t>(1, grain)));
    if (ranges == 1 || inside_region) {
        body(0, count, 0);
        return;
    }
    std::lock_guard one_caller(state_->caller);
    state_->body = &body;
    state_->count = count;
    state_->num_ranges = static_cast<int>(ranges);
    state_->pending.store(num_threads() - 1, std::memory_order_relaxed);
    {
        std::lock_guard lock(state_->mutex);
        state_->generation.fetch_add(1, std::memory_order_release);
    }
    state_->wake.notify_all();
    state_->run_range(0);
    while (state_->pending.load(std::memory_order_acquire) != 0) {
        relax();
    }
}

}  // namespace orbit
