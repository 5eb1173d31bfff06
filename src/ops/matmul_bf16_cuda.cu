#include "ops/matmul_format_cuda.cuh"

namespace orbit::cuda {

template void matmul_format<WeightFormat::kBF16>(cudaStream_t, Direction, MatmulGroup&);

}  // namespace orbit::cuda
