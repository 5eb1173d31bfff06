#include "ops/matmul_format_cuda.cuh"

namespace orbit::cuda {

template void matmul_format<WeightFormat::kFp8>(cudaStream_t, Direction, MatmulGroup&);

}  // namespace orbit::cuda
