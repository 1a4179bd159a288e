#include "cuda/kernels/family_sm80.cuh"

namespace lowrank_ops {

cudaError_t launch_linear_sm80(const BlockParams& params, DType dtype, int config, cudaStream_t stream) {
  return launch_sm80<Op::kLinear>(params, dtype, config, stream);
}

}  // namespace lowrank_ops
