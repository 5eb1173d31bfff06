// Linked instead of arrange_cuda.cu when the build has no CUDA.
#include "base/error.h"
#include "quant/arrange.h"

namespace orbit::cuda {

void arrange_codes(Stream&, void*, size_t) {
    throw UserError("this build has no CUDA; use device = \"cpu\".");
}

}  // namespace orbit::cuda
