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

// A region's ranges are claimed one by one from a ticket, so a worker that the system has not
// scheduled yet delays nobody: the caller takes its range. The ticket holds the region's number,
// how many ranges it has and the next one.
struct ThreadPool::State {
    std::vector<std::thread> workers;
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<uint64_t> ticket{0};
    std::atomic<int> done{0};
    std::atomic<bool> stopping{false};
    std::atomic<const std::function<void(int64_t, int64_t, int)>*> body{nullptr};
    std::atomic<int64_t> count{0};
    std::mutex caller;  // two engines' threads may share one pool; regions are serialised

    static bool has_range(uint64_t value) { return (value & 0xffff) < ((value >> 16) & 0xffff); }

    // Claims and runs ranges until none is left. The fields are read after the claim: a claimed
    // range keeps its region from ending.
    void run_ranges() {
        while (has_range(ticket.load(std::memory_order_acquire))) {
            const uint64_t claimed = ticket.fetch_add(1, std::memory_order_acq_rel);
            if (!has_range(claimed)) {
                return;
            }
            const auto index = static_cast<int64_t>(claimed & 0xffff);
            const auto ranges = static_cast<int64_t>((claimed >> 16) & 0xffff);
            const int64_t all = count.load(std::memory_order_relaxed);
            inside_region = true;
            (*body.load(std::memory_order_relaxed))(
                all* index / ranges, all * (index + 1) / ranges, static_cast<int>(index)
            );
            inside_region = false;
            done.fetch_add(1, std::memory_order_release);
        }
    }

    void work() {
        while (!stopping.load()) {
            int spins = 0;
            while (!has_range(ticket.load(std::memory_order_acquire)) && !stopping.load()) {
                if (++spins < kSpins) {
                    relax();
                    continue;
                }
                std::unique_lock lock(mutex);
                wake.wait(lock, [&] { return has_range(ticket.load()) || stopping.load(); });
            }
            run_ranges();
        }
    }
};

ThreadPool::ThreadPool(int num_threads) : state_(std::make_unique<State>()) {
    CHECK_GE(num_threads, 1);
    for (int i = 1; i < num_threads; ++i) {
        state_->workers.emplace_back([this] { state_->work(); });
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
    CHECK_LT(ranges, 0xffff);
    std::lock_guard one_caller(state_->caller);
    State& state = *state_;
    state.body.store(&body, std::memory_order_relaxed);
    state.count.store(count, std::memory_order_relaxed);
    state.done.store(0, std::memory_order_relaxed);
    {
        std::lock_guard lock(state.mutex);
        const uint64_t region = (state.ticket.load(std::memory_order_relaxed) >> 32) + 1;
        state.ticket.store(
            region << 32 | static_cast<uint64_t>(ranges) << 16, std::memory_order_release
        );
    }
    state.wake.notify_all();
    state.run_ranges();
    while (state.done.load(std::memory_order_acquire) != ranges) {
        relax();
    }
}

}  // namespace orbit
