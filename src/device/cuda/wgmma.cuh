// Hopper's warp-group matrix instruction: 64 rows of A and N rows of B, both in shared memory, 16
// of the contraction. Four consecutive warps act together; warp w of them holds rows 16w..16w+15 of
// the result in the layout of mma.sync.m16n8k16.
//
// Tiles have rows of 128 bytes whose 16-byte granules are permuted by the row's number in its group
// of eight (the 128-byte swizzle); they start at multiples of 1024 bytes.
#pragma once

#include <cstdint>
#include <type_traits>

// sm_90a only; elsewhere the host never launches these kernels.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ORBIT_HAS_WGMMA 1
#endif

namespace orbit::cuda {

// Descriptor of a tile whose rows run along the contraction (64 values a row), at a shared address.
__device__ __forceinline__ uint64_t descriptor_along_k(uint32_t address) {
    constexpr uint64_t kEightRows = 1024 >> 4;
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    return ((address & 0x3ffffu) >> 4) | (uint64_t{1} << 16) | (kEightRows << 32) | kSwizzle128;
}

// The descriptor of what lies so many bytes further on, a multiple of 16.
__device__ __forceinline__ uint64_t further_along(uint64_t descriptor, uint32_t bytes) {
    const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
    return (descriptor & 0xffffffff00000000u) | low;
}

// Descriptor of a tile whose rows run across it: 64 columns a row, one row for each k; the next 64
// columns lie `column_block` bytes further on.
__device__ __forceinline__ uint64_t descriptor_across_k(uint32_t address, uint32_t column_block) {
    constexpr uint64_t kEightRows = 1024 >> 4;
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    return ((address & 0x3ffffu) >> 4) | (static_cast<uint64_t>(column_block >> 4) << 16) |
           (kEightRows << 32) | kSwizzle128;
}

// Orders ordinary writes to shared memory before reads by the matrix unit; each writing thread,
// before the barrier.
__device__ __forceinline__ void fence_for_wgmma() {
#if defined(ORBIT_HAS_WGMMA)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Before the first wgmma that uses registers the thread has written.
__device__ __forceinline__ void wgmma_begin() {
#if defined(ORBIT_HAS_WGMMA)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#if defined(ORBIT_HAS_WGMMA)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
#if defined(ORBIT_HAS_WGMMA)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// A warp group gives registers back, or takes more, so that each of its threads has kCount; all its
// warps, and in a kernel with __launch_bounds__(threads, 1).
template <int kCount>
__device__ __forceinline__ void lower_registers() {
#if defined(ORBIT_HAS_WGMMA)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

template <int kCount>
__device__ __forceinline__ void raise_registers() {
#if defined(ORBIT_HAS_WGMMA)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// Keeps the compiler from moving reads and writes of these registers across this point: after
// wgmma_wait() for results, before wgmma_begin() for what the next wgmma takes.
template <int kFragments, typename T>
__device__ __forceinline__ void pin_registers(T (&d)[kFragments][4]) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            if constexpr (std::is_same_v<T, float>) {
                asm volatile("" : "+f"(d[j][c])::"memory");
            } else {
                asm volatile("" : "+r"(d[j][c])::"memory");
            }
        }
    }
}

#define ORBIT_D4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define ORBIT_D32(j)                                                                 \
    ORBIT_D4(j), ORBIT_D4(j + 1), ORBIT_D4(j + 2), ORBIT_D4(j + 3), ORBIT_D4(j + 4), \
        ORBIT_D4(j + 5), ORBIT_D4(j + 6), ORBIT_D4(j + 7)
#define ORBIT_FIRST_32                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, " \
    "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "  \
    "%26, %27, %28, %29, %30, %31"
#define ORBIT_SECOND_32                                              \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "   \
    "%56, %57, %58, %59, %60, %61, %62, %63"
#define ORBIT_THIRD_32                                               \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, " \
    "%76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, "   \
    "%88, %89, %90, %91, %92, %93, %94, %95"
#define ORBIT_FOURTH_32                                                     \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107," \
    "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, "    \
    "%119, %120, %121, %122, %123, %124, %125, %126, %127"
#define ORBIT_WGMMA(shape, flag)                                                          \
    "{ .reg .pred add; setp.ne.b32 add, " flag ", 0; wgmma.mma_async.sync.aligned." shape \
    ".f32.bf16.bf16 "

// d = add ? d + a b : a b over 16 of the contraction, 64 rows of a and kN columns of b, both in
// shared memory; a along the contraction, and b too, or with kAcross its rows across it;
// asynchronous.
template <int kN, bool kAcross = false>
__device__ __forceinline__ void wgmma_shared(
    float (&d)[kN / 8][4], uint64_t a, uint64_t b, int add
) {
    static_assert(kN == 64 || kN == 80 || kN == 128 || kN == 144 || kN == 192 || kN == 256);
#if defined(ORBIT_HAS_WGMMA)
    constexpr int kTransposed = kAcross ? 1 : 0;
    if constexpr (kN == 64) {
        asm volatile(ORBIT_WGMMA("m64n64k16", "%34") ORBIT_FIRST_32
                     "}, %32, %33, add, 1, 1, 0, %35; }"
                     : ORBIT_D32(0)
                     : "l"(a), "l"(b), "r"(add), "n"(kTransposed));
    } else if constexpr (kN == 80) {
        asm volatile(ORBIT_WGMMA("m64n80k16", "%42") ORBIT_FIRST_32
                     ", %32, %33, %34, %35, %36, %37, %38, %39}, %40, %41, add, 1, 1, 0, %43; }"
                     : ORBIT_D32(0), ORBIT_D4(8), ORBIT_D4(9)
                     : "l"(a), "l"(b), "r"(add), "n"(kTransposed));
    } else if constexpr (kN == 128) {
        asm volatile(ORBIT_WGMMA("m64n128k16", "%66") ORBIT_FIRST_32 ORBIT_SECOND_32
                     "}, %64, %65, add, 1, 1, 0, %67; }"
                     : ORBIT_D32(0), ORBIT_D32(8)
                     : "l"(a), "l"(b), "r"(add), "n"(kTransposed));
    } else if constexpr (kN == 144) {
        asm volatile(ORBIT_WGMMA("m64n144k16", "%74") ORBIT_FIRST_32 ORBIT_SECOND_32
                     ", %64, %65, %66, %67, %68, %69, %70, %71}, %72, %73, add, 1, 1, 0, %75; }"
                     : ORBIT_D32(0), ORBIT_D32(8), ORBIT_D4(16), ORBIT_D4(17)
                     : "l"(a), "l"(b), "r"(add), "n"(kTransposed));
    } else if constexpr (kN == 192) {
        asm volatile(ORBIT_WGMMA("m64n192k16", "%98") ORBIT_FIRST_32 ORBIT_SECOND_32 ORBIT_THIRD_32
                     "}, %96, %97, add, 1, 1, 0, %99; }"
                     : ORBIT_D32(0), ORBIT_D32(8), ORBIT_D32(16)
                     : "l"(a), "l"(b), "r"(add), "n"(kTransposed));
    } else {
        asm volatile(ORBIT_WGMMA("m64n256k16", "%130")
                         ORBIT_FIRST_32 ORBIT_SECOND_32 ORBIT_THIRD_32 ORBIT_FOURTH_32
                     "}, %128, %129, add, 1, 1, 0, %131; }"
                     : ORBIT_D32(0), ORBIT_D32(8), ORBIT_D32(16), ORBIT_D32(24)
                     : "l"(a), "l"(b), "r"(add), "n"(kTransposed));
    }
#else
    __trap();
#endif
}

// d += a b over 16 of the contraction: a in registers, each warp's 16 rows as mma.sync.m16n8k16
// takes them; b in shared memory, its rows across the contraction or (not kAcross) along it;
// asynchronous, and a must stay as it is until the group is waited for.
template <int kN, bool kAcross = true>
__device__ __forceinline__ void wgmma_registers(
    float (&d)[kN / 8][4], const uint32_t (&a)[4], uint64_t b
) {
    static_assert(kN == 32 || kN == 64 || kN == 128);
    [[maybe_unused]] constexpr int kTransposed = kAcross ? 1 : 0;
#if defined(ORBIT_HAS_WGMMA)
    if constexpr (kN == 32) {
        asm volatile(
            "{ .reg .pred add; setp.ne.b32 add, 1, 0; "
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
            "{%16, %17, %18, %19}, %20, add, 1, 1, %21; }"
            : ORBIT_D4(0), ORBIT_D4(1), ORBIT_D4(2), ORBIT_D4(3)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposed)
        );
    } else if constexpr (kN == 64) {
        asm volatile(
            "{ .reg .pred add; setp.ne.b32 add, 1, 0; "
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " ORBIT_FIRST_32
            "}, {%32, %33, %34, %35}, %36, add, 1, 1, %37; }"
            : ORBIT_D32(0)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposed)
        );
    } else {
        asm volatile(
            "{ .reg .pred add; setp.ne.b32 add, 1, 0; "
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " ORBIT_FIRST_32 ORBIT_SECOND_32
            "}, {%64, %65, %66, %67}, %68, add, 1, 1, %69; }"
            : ORBIT_D32(0), ORBIT_D32(8)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposed)
        );
    }
#else
    __trap();
#endif
}

#undef ORBIT_D4
#undef ORBIT_D32
#undef ORBIT_FIRST_32
#undef ORBIT_SECOND_32
#undef ORBIT_THIRD_32
#undef ORBIT_FOURTH_32
#undef ORBIT_WGMMA

}  // namespace orbit::cuda
