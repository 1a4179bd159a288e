#include "cuda/kernels/family_simt.cuh"

namespace lowrank_ops {

cudaError_t launch_cp_simt(const BlockParams& params, DType dtype, int config, cudaStream_t stream) {
  return launch_simt<Op::kCP>(params, dtype, config, stream);
}

}  // namespace lowrank_ops
