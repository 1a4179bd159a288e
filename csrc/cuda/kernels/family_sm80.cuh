// The sm80 family for one op, on tensor cores: every configuration in every dtype that mma.sync takes.
#pragma once

#include "cuda/kernels/engine_sm80.cuh"
#include "cuda/kernels/launch_block.cuh"

namespace lowrank_ops {

template <Op op, typename Element>
cudaError_t launch_sm80(const BlockParams& params, int config, cudaStream_t stream) {
  static_assert(kNumSm80Configs == 6, "one case per configuration");
  switch (config) {
    case 0:
      return launch_block<op, TensorCores<Element>, Family::kSm80, 0>(params, stream);
    case 1:
      return launch_block<op, TensorCores<Element>, Family::kSm80, 1>(params, stream);
    case 2:
      return launch_block<op, TensorCores<Element>, Family::kSm80, 2>(params, stream);
    case 3:
      return launch_block<op, TensorCores<Element>, Family::kSm80, 3>(params, stream);
    case 4:
      return launch_block<op, TensorCores<Element>, Family::kSm80, 4>(params, stream);
    case 5:
      if constexpr (op == Op::kTucker) return launch_block<op, TensorCores<Element>, Family::kSm80, 5>(params, stream);
      [[fallthrough]];
    default:
      return cudaErrorInvalidValue;
  }
}

template <Op op>
cudaError_t launch_sm80(const BlockParams& params, DType dtype, int config, cudaStream_t stream) {
  switch (dtype) {
    case DType::kBFloat16:
      return launch_sm80<op, BFloat16>(params, config, stream);
    case DType::kHalf:
      return launch_sm80<op, Half>(params, config, stream);
    case DType::kFloat:
      return launch_sm80<op, Tf32>(params, config, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace lowrank_ops
