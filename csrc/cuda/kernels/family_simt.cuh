// The simt family for one op, multiplying without tensor cores: fp32, bf16 and fp16 in both configurations, fp64 in the
// smaller one.
#pragma once

#include "cuda/kernels/engine_simt.cuh"
#include "cuda/kernels/launch_block.cuh"

namespace lowrank_ops {

template <Op op, typename Element>
cudaError_t launch_simt(const BlockParams& params, int config, cudaStream_t stream) {
  static_assert(kNumSimtConfigs == 2, "one case per configuration");
  using Engine = MultiplyAdds<Element, float>;
  switch (config) {
    case 0:
      return launch_block<op, Engine, Family::kSimt, 0>(params, stream);
    case 1:
      return launch_block<op, Engine, Family::kSimt, 1>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <Op op>
cudaError_t launch_simt(const BlockParams& params, DType dtype, int config, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat:
      return launch_simt<op, float>(params, config, stream);
    case DType::kBFloat16:
      return launch_simt<op, BFloat16>(params, config, stream);
    case DType::kHalf:
      return launch_simt<op, Half>(params, config, stream);
    case DType::kDouble:
      if (config != 1) return cudaErrorInvalidValue;
      return launch_block<op, MultiplyAdds<double, double>, Family::kSimt, 1>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace lowrank_ops
