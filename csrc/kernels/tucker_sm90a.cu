#include "kernels/tucker_sm90a_launch.cuh"
#include "kernels/launch_hopper.cuh"

namespace lowrank_ops {

cudaError_t launch_tucker_sm90a(const BlockParams& params, DType dtype, int config, cudaStream_t stream) {
  hopper::TuckerParams to{};
  if (config != 0 || !is_half_precision(dtype) || !hopper::tucker_params(to, params, dtype)) return cudaErrorInvalidValue;
  return launch_persistent(hopper::tucker_kernel(to.layout, dtype), to.tiles.count, TuckerSm90a::kThreads, to.layout.bytes,
                           stream, to);
}

}  // namespace lowrank_ops
