// Device: where memory lives and kernels run. Stream: an ordered queue of work on a device, with
// its scratch memory. Arena: named bytes on one device, taken at start and listed in the ledger. No
// globals: several engines can live in one process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/thread_pool.h"
#include "device/tensor.h"

namespace orbit {

enum class DeviceKind : uint8_t { kCpu, kCuda };

// kReference: plain scalar code, no instruction-set extensions. The fast sets are chosen at run
// time. kAvx512 needs AVX512 F, BW, DQ, VL and BF16; kAmx needs that and AMX tiles with bf16.
enum class CpuIsa : uint8_t { kReference, kAvx2, kAvx512, kAmx };

const char* isa_name(CpuIsa isa);
CpuIsa best_cpu_isa();  // what this processor can run
CpuIsa parse_cpu_isa(std::string_view name
);  // "auto", "reference", "avx2", "avx512", "amx"; UserError otherwise

struct Device {
    DeviceKind kind = DeviceKind::kCpu;
    int ordinal = 0;                  // cuda:N
    CpuIsa isa = CpuIsa::kReference;  // CPU only
    std::unique_ptr<ThreadPool>
        threads;       // CPU kernels; on CUDA devices a pool of one for host work
    std::string name;  // "cpu (avx512, 2 threads)" or the GPU's name

    bool is_cpu() const { return kind == DeviceKind::kCpu; }
};

// "auto" (a GPU when this build and machine have one, else the CPU), "cpu", "cuda:0". `num_threads`
// 0: all processors.
Device make_device(std::string_view which, std::string_view cpu_isa = "auto", int num_threads = 0);

// Raw device memory, 256-byte aligned. A CPU allocation that fails and a full GPU are UserErrors
// that say how much.
void* device_allocate(const Device& device, size_t bytes);
void device_free(const Device& device, void* pointer);

// Host memory that a device copies from and to beside other work, and that its kernels read at the
// same address: pinned on a GPU, on a CPU like any other. UserError when the machine does not give
// it.
void* host_allocate(const Device& device, size_t bytes);
void host_free(const Device& device, void* pointer);

struct MemoryInfo {
    size_t available = 0;  // what a new allocation may take
    size_t total = 0;
};

// Of the GPU, or of this machine.
MemoryInfo memory_info(const Device& device);
MemoryInfo host_memory_info();  // of this machine; the limit of a container counts

struct LedgerEntry {
    std::string name;
    size_t bytes;
};

// Where an Arena's bytes lie: on the device, or in host memory (host_allocate).
enum class MemoryPlace : uint8_t { kDevice, kHost };

class Arena {
  public:
    explicit Arena(const Device& device, MemoryPlace place = MemoryPlace::kDevice)
        : device_(&device), place_(place) {}

    ~Arena();
    Arena(Arena&& other) noexcept;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    Arena& operator=(Arena&&) = delete;

    Tensor take(std::string_view name, DType dtype, std::initializer_list<int64_t> shape);
    // Zeroed on the device, as the system gives it in host memory.
    void* take_bytes(std::string_view name, size_t bytes);

    // What is taken from now on comes out of one block of `bytes`, as long as it fits: thousands of
    // allocations would each be rounded up to the pages of a GPU.
    void reserve(size_t bytes);

    const Device& device() const { return *device_; }

    MemoryPlace place() const { return place_; }

    size_t total_bytes() const;
    // Entries of the same name (up to the first '.') are added up.
    std::vector<LedgerEntry> ledger() const;

  private:
    void* allocate(size_t bytes) const;

    const Device* device_;
    MemoryPlace place_;
    std::vector<void*> blocks_;
    std::vector<LedgerEntry> entries_;
    char* reserved_ = nullptr;
    size_t reserved_bytes_ = 0;  // left
};

// Stack-like temporary memory. Grows by blocks when it runs out (never inside a captured graph),
// and keeps them.
class Scratch {
  public:
    explicit Scratch(const Device& device) : device_(&device) {}

    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    struct Mark {
        size_t block = 0;
        size_t offset = 0;
    };

    Tensor take(DType dtype, std::initializer_list<int64_t> shape);  // uninitialised
    void* take_bytes(size_t bytes);

    Mark mark() const { return at_; }

    void release(Mark mark) { at_ = mark; }

    // One block of `bytes` in place of the present ones (0: none), and peak_bytes() from 0. Nothing
    // may be in use. What needs no more than that runs without gaps between blocks.
    void reserve(size_t bytes);

    size_t peak_bytes() const { return peak_; }

    size_t allocated_bytes() const;

  private:
    struct Block {
        char* data;
        size_t bytes;
    };

    const Device* device_;
    std::vector<Block> blocks_;
    Mark at_;
    size_t peak_ = 0;
};

// Releases the scratch taken inside a scope.
class ScratchScope {
  public:
    explicit ScratchScope(Scratch& scratch) : scratch_(&scratch), mark_(scratch.mark()) {}

    ~ScratchScope() { scratch_->release(mark_); }

    ScratchScope(const ScratchScope&) = delete;
    ScratchScope& operator=(const ScratchScope&) = delete;

  private:
    Scratch* scratch_;
    Scratch::Mark mark_;
};

struct Stream;

// Work that an op has put off, because the next op may do it on its way, and what an op leaves to
// the next one alone.
class DeferredWork {
  public:
    virtual ~DeferredWork() = default;
    virtual void launch(const Stream& stream) = 0;  // if there is any; then there is none
};

struct Stream {
    explicit Stream(const Device& on);
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    const Device& device;
    Scratch scratch;
    std::unique_ptr<DeferredWork> deferred;  // null until an op first puts something off

    // cudaStream_t on a GPU; all that was put off is launched.
    void* handle() const {
        if (deferred != nullptr) {
            deferred->launch(*this);
        }
        return handle_;
    }

    // On a GPU: two words by which kernels of this stream tell each other that something is there
    // (MatmulArgs::x_flag). Zero before, and what uses them leaves zeros. Kernels start before
    // their predecessors end, so the next kFlags - 1 calls give others.
    uint32_t* take_flag();

    // On a GPU: room for the sums that a product leaves to the next op (Epilogue::squares).
    static constexpr int64_t kSquares = 64 * 256;

    float* squares() const { return squares_; }

    bool is_cpu() const { return device.is_cpu(); }

    ThreadPool& threads() const { return *device.threads; }

  private:
    static constexpr size_t kFlags = 1024;
    void* handle_ = nullptr;
    uint32_t* flags_ = nullptr;
    float* squares_ = nullptr;
    size_t flags_taken_ = 0;
};

// Ordered after earlier work of the stream; copy_to_host returns when the bytes are there,
// copy_to_device when they have left the source, unless that is host_allocate's.
void copy_to_device(Stream& stream, void* to, const void* from, size_t bytes);
void copy_to_host(Stream& stream, void* to, const void* from, size_t bytes);
void copy_on_device(Stream& stream, void* to, const void* from, size_t bytes);
void zero_fill(Stream& stream, void* to, size_t bytes);
void synchronize(Stream& stream);

// copy_to_host that a GPU makes in its own time; `to` is host_allocate's.
void start_copy_to_host(Stream& stream, void* to, const void* from, size_t bytes);
// What is issued to `stream` from now on runs after what was issued to `other` until now. Both are
// of one device; the host does not wait.
void wait_for(Stream& stream, Stream& other);

}  // namespace orbit
