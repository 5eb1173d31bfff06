// The CPU kernels of an op live in X_kernels.cpp, which CMake compiles once per instruction set
// with ORBIT_ISA set to isa_reference, isa_avx2, isa_avx512 (and isa_amx for files named
// *_amx.cpp); X_cpu.cpp picks one at run time. A kernel's result for one row depends on the
// instruction set but never on the batch (docs/NUMERICS.md).
#pragma once

#include "device/device.h"

// Declares a kernel in each namespace: ORBIT_KERNEL(void, norm_rows, (const float* x, float* y,
// int64_t n));
#define ORBIT_KERNEL(result, name, arguments) \
    namespace isa_reference {                 \
    result name arguments;                    \
    }                                         \
    namespace isa_avx2 {                      \
    result name arguments;                    \
    }                                         \
    namespace isa_avx512 {                    \
    result name arguments;                    \
    }

// Calls it: ORBIT_CALL_KERNEL(stream.device.isa, norm_rows, (x, y, n));
#define ORBIT_CALL_KERNEL(isa, name, arguments)                     \
    ((isa) >= ::orbit::CpuIsa::kAvx512 ? isa_avx512::name arguments \
     : (isa) == ::orbit::CpuIsa::kAvx2 ? isa_avx2::name arguments   \
                                       : isa_reference::name arguments)
