#include "ops/grouped_format_cuda.cuh"

namespace orbit::cuda {

template bool
grouped_matmul_format<WeightFormat::kInt4>(cudaStream_t, Direction, const GroupedArgs&);
template void
decode_experts<WeightFormat::kInt4>(cudaStream_t, const GroupedArgs&, int32_t, int32_t, bf16*);

}  // namespace orbit::cuda
