#include "kernels/primitives.cuh"
#include "kernels/tensor_map.cuh"
#include "kernels/tucker_sm90a_launch.cuh"

namespace lowrank_ops {

cudaError_t launch_tucker_sm90a(const BlockParams& params, DType dtype, int config, cudaStream_t stream) {
  if (config != 0 || (dtype != DType::kBFloat16 && dtype != DType::kHalf)) return cudaErrorInvalidValue;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  hopper::TuckerParams to{};
  if (!hopper::tucker_params(to, params, dtype)) return cudaErrorInvalidValue;
  return launch(hopper::tucker_kernel(to.layout, dtype), least(to.tiles, multiprocessors), TuckerSm90a::kThreads,
                to.layout.bytes, stream, to);
}

}  // namespace lowrank_ops
