#include "cuda/kernels/family_simt.cuh"

namespace lowrank_ops {

cudaError_t launch_tucker_simt(const BlockParams& params, DType dtype, int config, cudaStream_t stream) {
  return launch_simt<Op::kTucker>(params, dtype, config, stream);
}

}  // namespace lowrank_ops
