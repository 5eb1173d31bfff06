#include "ops/grouped_format_cuda.cuh"

namespace orbit::cuda {

template bool
grouped_matmul_format<WeightFormat::kBF16>(cudaStream_t, Direction, const GroupedArgs&);

}  // namespace orbit::cuda
