#include "ops/matmul_format_cuda.cuh"

namespace orbit::cuda {

template void matmul_format<WeightFormat::kNvFp4>(cudaStream_t, Direction, MatmulGroup&);

}  // namespace orbit::cuda
