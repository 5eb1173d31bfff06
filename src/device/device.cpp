#include "device/device.h"

#include <fmt/core.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <thread>

#include "device/cuda_api.h"

namespace orbit {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kScratchBlockBytes = size_t{32} << 20;

size_t aligned(size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
}

// The kernel gives a process the AMX state only when it asks; once is enough, and asking again is
// harmless.
bool has_amx() {
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// cgroup v2. The file cache counts as used there, but gives way.
void limit_to_container(MemoryInfo& info) {
    size_t limit = 0;  // "max" where there is none, which reads as 0
    size_t used = 0;
    size_t cached = 0;
    std::ifstream("/sys/fs/cgroup/memory.max") >> limit;
    std::ifstream("/sys/fs/cgroup/memory.current") >> used;
    std::ifstream stat("/sys/fs/cgroup/memory.stat");
    std::string name;
    for (size_t value = 0; stat >> name >> value;) {
        cached = name == "file" ? value : cached;
    }
    if (limit > 0 && limit < info.total) {
        used -= std::min(used, cached);
        info.total = limit;
        info.available = std::min(info.available, limit - std::min(limit, used));
    }
}

}  // namespace

const char* isa_name(CpuIsa isa) {
    switch (isa) {
        case CpuIsa::kReference:
            return "reference";
        case CpuIsa::kAvx2:
            return "avx2";
        case CpuIsa::kAvx512:
            return "avx512";
        case CpuIsa::kAmx:
            return "amx";
    }
    return "?";
}

CpuIsa best_cpu_isa() {
    __builtin_cpu_init();
    if (has_avx512()) {
        return has_amx() ? CpuIsa::kAmx : CpuIsa::kAvx512;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? CpuIsa::kAvx2
                                                                           : CpuIsa::kReference;
}

CpuIsa parse_cpu_isa(std::string_view name) {
    const CpuIsa best = best_cpu_isa();
    if (name == "auto") {
        return best;
    }
    for (const CpuIsa isa : {CpuIsa::kReference, CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAmx}) {
        if (name == isa_name(isa)) {
            USER_CHECK(
                isa <= best,
                "cpu.isa = \"{}\" asks for instructions that this processor does not have; use "
                "\"auto\" (here {}).",
                name,
                isa_name(best)
            );
            return isa;
        }
    }
    throw UserError(fmt::format(
        "cpu.isa = \"{}\" is unknown; it is one of auto, reference, avx2, avx512, amx.", name
    ));
}

Device make_device(std::string_view which, std::string_view cpu_isa, int num_threads) {
    Device device;
    const bool is_auto = which == "auto";
    if (which.starts_with("cuda") || (is_auto && cuda::num_devices() > 0)) {
        const std::string_view digits = which.starts_with("cuda:") ? which.substr(5) : "0";
        USER_CHECK(
            !digits.empty() && digits.size() < 4 &&
                std::all_of(
                    digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; }
                ),
            "device = \"{}\" is not understood; write \"cuda:0\", \"cpu\" or \"auto\".",
            which
        );
        device.kind = DeviceKind::kCuda;
        device.ordinal = std::atoi(std::string(digits).c_str());
        USER_CHECK(
            device.ordinal < cuda::num_devices(),
            "device = \"{}\" was asked for, but this build and machine have {} CUDA devices; use "
            "device = \"cpu\".",
            which,
            cuda::num_devices()
        );
        device.threads = std::make_unique<ThreadPool>(1);
        device.name = cuda::device_name(device.ordinal);
        return device;
    }
    USER_CHECK(
        is_auto || which == "cpu",
        "device = \"{}\" is unknown; it is one of auto, cpu, cuda:0.",
        which
    );
    const int available = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    device.isa = parse_cpu_isa(cpu_isa);
    device.threads = std::make_unique<ThreadPool>(num_threads > 0 ? num_threads : available);
    device.name =
        fmt::format("cpu ({}, {} threads)", isa_name(device.isa), device.threads->num_threads());
    return device;
}

MemoryInfo memory_info(const Device& device) {
    if (device.is_cpu()) {
        return host_memory_info();
    }
    MemoryInfo info;
    cuda::memory_info(device.ordinal, &info.available, &info.total);
    return info;
}

MemoryInfo host_memory_info() {
    MemoryInfo info;
    std::ifstream meminfo("/proc/meminfo");
    for (std::string line; std::getline(meminfo, line);) {
        const size_t kib = std::strtoull(line.c_str() + line.find(':') + 1, nullptr, 10);
        if (line.starts_with("MemAvailable:")) {
            info.available = kib << 10;
        } else if (line.starts_with("MemTotal:")) {
            info.total = kib << 10;
        }
    }
    limit_to_container(info);
    return info;
}

void* device_allocate(const Device& device, size_t bytes) {
    const size_t size = std::max(kAlignment, aligned(bytes));
    if (!device.is_cpu()) {
        return cuda::allocate(device.ordinal, size);
    }
    void* pointer = std::aligned_alloc(kAlignment, size);
    USER_CHECK(
        pointer != nullptr,
        "out of memory: {:.1f} MiB more were asked for; use a smaller model, batch or max_tokens.",
        static_cast<double>(size) / (1 << 20)
    );
    return pointer;
}

void device_free(const Device& device, void* pointer) {
    if (device.is_cpu()) {
        std::free(pointer);
    } else {
        cuda::free(device.ordinal, pointer);
    }
}

void* host_allocate(const Device& device, size_t bytes) {
    if (device.is_cpu()) {
        return device_allocate(device, bytes);
    }
    // Asked before: a machine that runs out of pinned memory ends programs without a word.
    const size_t available = host_memory_info().available;
    USER_CHECK(
        available == 0 || bytes <= available,
        "{:.1f} MiB of pinned host memory were asked for, {:.1f} MiB are available; end other "
        "programs, or keep less there (moe.host_layers, train.activation_offloading).",
        static_cast<double>(bytes) / (1 << 20),
        static_cast<double>(available) / (1 << 20)
    );
    return cuda::allocate_host(device.ordinal, std::max(kAlignment, aligned(bytes)));
}

void host_free(const Device& device, void* pointer) {
    if (device.is_cpu()) {
        device_free(device, pointer);
    } else {
        cuda::free_host(device.ordinal, pointer);
    }
}

Arena::~Arena() {
    for (void* block : blocks_) {
        if (place_ == MemoryPlace::kHost) {
            host_free(*device_, block);
        } else {
            device_free(*device_, block);
        }
    }
}

Arena::Arena(Arena&& other) noexcept
    : device_(other.device_),
      place_(other.place_),
      blocks_(std::move(other.blocks_)),
      entries_(std::move(other.entries_)),
      reserved_(other.reserved_),
      reserved_bytes_(other.reserved_bytes_) {
    other.blocks_.clear();
    other.reserved_bytes_ = 0;
}

void* Arena::allocate(size_t bytes) const {
    return place_ == MemoryPlace::kHost ? host_allocate(*device_, bytes)
                                        : device_allocate(*device_, bytes);
}

void Arena::reserve(size_t bytes) {
    reserved_ = static_cast<char*>(allocate(bytes));
    reserved_bytes_ = bytes;
    blocks_.push_back(reserved_);
}

void* Arena::take_bytes(std::string_view name, size_t bytes) {
    const size_t size = std::max(kAlignment, aligned(bytes));
    void* pointer = reserved_;
    if (size <= reserved_bytes_) {
        reserved_ += size;
        reserved_bytes_ -= size;
    } else {
        pointer = allocate(bytes);
        blocks_.push_back(pointer);
    }
    entries_.push_back({std::string(name), bytes});
    if (place_ == MemoryPlace::kHost) {
        return pointer;
    }
    if (device_->is_cpu()) {
        std::memset(pointer, 0, bytes);
    } else {
        cuda::zero_fill(nullptr, pointer, bytes);
        cuda::synchronize(nullptr);
    }
    return pointer;
}

Tensor Arena::take(std::string_view name, DType dtype, std::initializer_list<int64_t> shape) {
    Tensor t = make_tensor(nullptr, dtype, shape);
    t.data = take_bytes(name, static_cast<size_t>(t.bytes()));
    return t;
}

size_t Arena::total_bytes() const {
    size_t total = 0;
    for (const auto& entry : entries_) {
        total += entry.bytes;
    }
    return total;
}

std::vector<LedgerEntry> Arena::ledger() const {
    std::vector<LedgerEntry> sums;
    for (const auto& entry : entries_) {
        const std::string group = entry.name.substr(0, entry.name.find('.'));
        const auto found = std::find_if(sums.begin(), sums.end(), [&](const LedgerEntry& sum) {
            return sum.name == group;
        });
        if (found == sums.end()) {
            sums.push_back({group, entry.bytes});
        } else {
            found->bytes += entry.bytes;
        }
    }
    return sums;
}

Scratch::~Scratch() {
    for (const auto& block : blocks_) {
        device_free(*device_, block.data);
    }
}

void Scratch::reserve(size_t bytes) {
    CHECK(at_.block == 0 && at_.offset == 0, "(scratch in use)");
    for (const auto& block : blocks_) {
        device_free(*device_, block.data);
    }
    blocks_.clear();
    peak_ = 0;
    if (bytes > 0) {
        const size_t size = aligned(bytes);
        blocks_.push_back({static_cast<char*>(device_allocate(*device_, size)), size});
    }
}

size_t Scratch::allocated_bytes() const {
    size_t total = 0;
    for (const auto& block : blocks_) {
        total += block.bytes;
    }
    return total;
}

void* Scratch::take_bytes(size_t bytes) {
    const size_t size = std::max(kAlignment, aligned(bytes));
    while (at_.block < blocks_.size() && at_.offset + size > blocks_[at_.block].bytes) {
        at_ = {at_.block + 1, 0};
    }
    if (at_.block == blocks_.size()) {
        const size_t block_bytes = std::max(kScratchBlockBytes, size);
        blocks_.push_back({static_cast<char*>(device_allocate(*device_, block_bytes)), block_bytes}
        );
    }
    void* pointer = blocks_[at_.block].data + at_.offset;
    at_.offset += size;
    size_t in_use = at_.offset;
    for (size_t i = 0; i < at_.block; ++i) {
        in_use += blocks_[i].bytes;
    }
    peak_ = std::max(peak_, in_use);
    return pointer;
}

Tensor Scratch::take(DType dtype, std::initializer_list<int64_t> shape) {
    Tensor t = make_tensor(nullptr, dtype, shape);
    t.data = take_bytes(static_cast<size_t>(t.bytes()));
    return t;
}

Stream::Stream(const Device& on) : device(on), scratch(on) {
    if (!on.is_cpu()) {
        handle_ = cuda::create_stream(on.ordinal);
        constexpr size_t kBytes = kFlags * 2 * sizeof(uint32_t);
        flags_ = static_cast<uint32_t*>(device_allocate(on, kBytes));
        zero_fill(*this, flags_, kBytes);
        squares_ = static_cast<float*>(device_allocate(on, kSquares * sizeof(float)));
    }
}

uint32_t* Stream::take_flag() {
    CHECK(flags_ != nullptr);
    return flags_ + 2 * (flags_taken_++ % kFlags);
}

Stream::~Stream() {
    if (!is_cpu()) {
        deferred.reset();
        cuda::destroy_stream(device.ordinal, handle_);
        device_free(device, flags_);
        device_free(device, squares_);
    }
}

void copy_to_device(Stream& stream, void* to, const void* from, size_t bytes) {
    if (stream.is_cpu()) {
        std::memcpy(to, from, bytes);
    } else {
        cuda::copy_to_device(stream.handle(), to, from, bytes);
    }
}

void start_copy_to_host(Stream& stream, void* to, const void* from, size_t bytes) {
    if (stream.is_cpu()) {
        std::memcpy(to, from, bytes);
    } else {
        cuda::copy_to_host(stream.handle(), to, from, bytes);
    }
}

void copy_to_host(Stream& stream, void* to, const void* from, size_t bytes) {
    start_copy_to_host(stream, to, from, bytes);
    synchronize(stream);
}

void copy_on_device(Stream& stream, void* to, const void* from, size_t bytes) {
    if (stream.is_cpu()) {
        std::memmove(to, from, bytes);
    } else {
        cuda::copy_on_device(stream.handle(), to, from, bytes);
    }
}

void zero_fill(Stream& stream, void* to, size_t bytes) {
    if (stream.is_cpu()) {
        std::memset(to, 0, bytes);
    } else {
        cuda::zero_fill(stream.handle(), to, bytes);
    }
}

void synchronize(Stream& stream) {
    if (!stream.is_cpu()) {
        cuda::synchronize(stream.handle());
    }
}

void wait_for(Stream& stream, Stream& other) {
    CHECK(&stream.device == &other.device, "(streams of two devices)");
    if (!stream.is_cpu()) {
        cuda::wait_for(stream.device.ordinal, stream.handle(), other.handle());
    }
}

}  // namespace orbit
