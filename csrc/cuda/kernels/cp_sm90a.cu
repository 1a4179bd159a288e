#include "cuda/kernels/cp_sm90a_launch.cuh"
#include "cuda/kernels/launch_hopper.cuh"

namespace lowrank_ops {

cudaError_t launch_cp_sm90a(const BlockParams& params, DType dtype, int config, cudaStream_t stream) {
  hopper::CpParams to{};
  if (config != kSm90aCpConfig || !is_half_precision(dtype) || !hopper::cp_params(to, params, dtype))
    return cudaErrorInvalidValue;
  return launch_persistent(hopper::cp_kernel(to, dtype), to.tiles.count, CpSm90a::kThreads, to.layout.bytes, stream, to,
                           to.cluster);
}

}  // namespace lowrank_ops
