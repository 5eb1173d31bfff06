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

// d = add ? d + a b : a b. With kBackward b's rows run across the contraction.
template <bool kBackward>
__device__ __forceinline__ void wgmma_64_128(float (&d)[16][4], uint64_t a, uint64_t b, int add) {
#if defined(ORBIT_HAS_WGMMA)
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, %67, 0; "
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, "
        "%40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, "
        "%56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, add, 1, 1, 0, %66; }"
        : "+f"(d[0][0]),
          "+f"(d[0][1]),
          "+f"(d[0][2]),
          "+f"(d[0][3]),
          "+f"(d[1][0]),
          "+f"(d[1][1]),
          "+f"(d[1][2]),
          "+f"(d[1][3]),
          "+f"(d[2][0]),
          "+f"(d[2][1]),
          "+f"(d[2][2]),
          "+f"(d[2][3]),
          "+f"(d[3][0]),
          "+f"(d[3][1]),
          "+f"(d[3][2]),
          "+f"(d[3][3]),
          "+f"(d[4][0]),
          "+f"(d[4][1]),
          "+f"(d[4][2]),
          "+f"(d[4][3]),
          "+f"(d[5][0]),
          "+f"(d[5][1]),
          "+f"(d[5][2]),
          "+f"(d[5][3]),
          "+f"(d[6][0]),
          "+f"(d[6][1]),
          "+f"(d[6][2]),
          "+f"(d[6][3]),
          "+f"(d[7][0]),
          "+f"(d[7][1]),
          "+f"(d[7][2]),
          "+f"(d[7][3]),
          "+f"(d[8][0]),
          "+f"(d[8][1]),
          "+f"(d[8][2]),
          "+f"(d[8][3]),
          "+f"(d[9][0]),
          "+f"(d[9][1]),
          "+f"(d[9][2]),
          "+f"(d[9][3]),
          "+f"(d[10][0]),
          "+f"(d[10][1]),
          "+f"(d[10][2]),
          "+f"(d[10][3]),
          "+f"(d[11][0]),
          "+f"(d[11][1]),
          "+f"(d[11][2]),
          "+f"(d[11][3]),
          "+f"(d[12][0]),
          "+f"(d[12][1]),
          "+f"(d[12][2]),
          "+f"(d[12][3]),
          "+f"(d[13][0]),
          "+f"(d[13][1]),
          "+f"(d[13][2]),
          "+f"(d[13][3]),
          "+f"(d[14][0]),
          "+f"(d[14][1]),
          "+f"(d[14][2]),
          "+f"(d[14][3]),
          "+f"(d[15][0]),
          "+f"(d[15][1]),
          "+f"(d[15][2]),
          "+f"(d[15][3])
        : "l"(a), "l"(b), "n"(kBackward ? 1 : 0), "r"(add)
    );
#else
    __trap();
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
#define ORBIT_NEXT_32                                                \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "   \
    "%56, %57, %58, %59, %60, %61, %62, %63"

// d = add ? d + a b : a b over 16 of the contraction, 64 rows of a and kN columns of b, both in
// shared memory and along the contraction; asynchronous.
template <int kN>
__device__ __forceinline__ void wgmma_shared(
    float (&d)[kN / 8][4], uint64_t a, uint64_t b, int add
) {
    static_assert(kN == 64 || kN == 128);
#if defined(ORBIT_HAS_WGMMA)
    if constexpr (kN == 64) {
        asm volatile(
            "{ .reg .pred add; setp.ne.b32 add, %34, 0; "
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " ORBIT_FIRST_32
            "}, %32, %33, add, 1, 1, 0, 0; }"
            : ORBIT_D32(0)
            : "l"(a), "l"(b), "r"(add)
        );
    } else {
        asm volatile(
            "{ .reg .pred add; setp.ne.b32 add, %66, 0; "
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " ORBIT_FIRST_32 ORBIT_NEXT_32
            "}, %64, %65, add, 1, 1, 0, 0; }"
            : ORBIT_D32(0), ORBIT_D32(8)
            : "l"(a), "l"(b), "r"(add)
        );
    }
#else
    __trap();
#endif
}

// d += a b over 16 of the contraction: a in registers, each warp's 16 rows as mma.sync.m16n8k16
// takes them; b in shared memory, its rows across the contraction; asynchronous, and a must stay
// as it is until the group is waited for.
template <int kN>
__device__ __forceinline__ void wgmma_registers(
    float (&d)[kN / 8][4], const uint32_t (&a)[4], uint64_t b
) {
    static_assert(kN == 64 || kN == 128);
#if defined(ORBIT_HAS_WGMMA)
    if constexpr (kN == 64) {
        asm volatile(
            "{ .reg .pred add; setp.ne.b32 add, 1, 0; "
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " ORBIT_FIRST_32
            "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1; }"
            : ORBIT_D32(0)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
        );
    } else {
        asm volatile(
            "{ .reg .pred add; setp.ne.b32 add, 1, 0; "
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " ORBIT_FIRST_32 ORBIT_NEXT_32
            "}, {%64, %65, %66, %67}, %68, add, 1, 1, 1; }"
            : ORBIT_D32(0), ORBIT_D32(8)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
        );
    }
#else
    __trap();
#endif
}

#undef ORBIT_D4
#undef ORBIT_D32
#undef ORBIT_FIRST_32
#undef ORBIT_NEXT_32

}  // namespace orbit::cuda
