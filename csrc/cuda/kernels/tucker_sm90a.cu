#include "cuda/kernels/launch_hopper.cuh"
#include "cuda/kernels/tucker_sm90a_launch.cuh"
#include "cuda/kernels/tucker_wide_sm90a_launch.cuh"

namespace lowrank_ops {
namespace {

cudaError_t launch_narrow(const BlockParams& params, DType dtype, cudaStream_t stream) {
  hopper::TuckerParams to{};
  if (!hopper::tucker_params(to, params, dtype)) return cudaErrorInvalidValue;
  return launch_persistent(hopper::tucker_kernel(to, dtype), to.tiles.count, TuckerSm90a::kThreads, to.layout.bytes,
                           stream, to);
}

cudaError_t launch_wide(const BlockParams& params, DType dtype, cudaStream_t stream) {
  hopper::WideParams to{};
  if (!hopper::wide_params(to, params, dtype)) return cudaErrorInvalidValue;
  return launch_persistent(hopper::wide_kernel(to, dtype), to.tiles.count, TuckerWideSm90a::kThreads, to.layout.bytes,
                           stream, to);
}

}  // namespace

cudaError_t launch_tucker_sm90a(const BlockParams& params, DType dtype, int config, cudaStream_t stream) {
  if (!is_half_precision(dtype)) return cudaErrorInvalidValue;
  if (config == kSm90aTuckerConfig) return launch_narrow(params, dtype, stream);
  return config == kSm90aWideConfig ? launch_wide(params, dtype, stream) : cudaErrorInvalidValue;
}

}  // namespace lowrank_ops
