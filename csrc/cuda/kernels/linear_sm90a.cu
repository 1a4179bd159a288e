#include "cuda/kernels/launch_hopper.cuh"
#include "cuda/kernels/linear_sm90a_launch.cuh"

namespace lowrank_ops {

cudaError_t launch_linear_sm90a(const BlockParams& params, DType dtype, int config, cudaStream_t stream) {
  hopper::LinearParams to{};
  if (config != kSm90aLinearConfig || !is_half_precision(dtype) || !hopper::linear_params(to, params, dtype))
    return cudaErrorInvalidValue;
  return launch_persistent(hopper::linear_kernel(to.layout, dtype), to.items, LinearSm90a::kThreads, to.layout.bytes,
                           stream, to, to.cluster.divisor);
}

}  // namespace lowrank_ops
