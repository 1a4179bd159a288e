// The GPUs of this machine, for the planner. Implemented in csrc/cuda; builds without CUDA kernels know of none.
#pragma once

#include <ATen/Context.h>

#include <optional>

#include "plan/gpu.h"

namespace lowrank_ops {

#ifdef LOWRANK_OPS_WITH_CUDA
// nullopt where there is no GPU of that index, or no driver. Creates no CUDA context.
std::optional<GpuCaps> present_gpu(int index);
#else
inline std::optional<GpuCaps> present_gpu(int) {
  return std::nullopt;
}
#endif

// Whether torch's settings let an op round fp32 to tf32: the flag of cudnn's convolutions for the convs, that of matrix
// products for the linear, as for the library ops that they stand for.
inline bool tf32_allowed(Op op) {
  return op == Op::kLinear ? at::globalContext().allowTF32CuBLAS()
                           : at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
}

}  // namespace lowrank_ops
