// The GPUs of this machine, for the planner. Implemented in csrc/cuda; builds without CUDA kernels know of none.
#pragma once

#include <ATen/Context.h>

#include <optional>

#include "plan/gpu/planner.h"

namespace lowrank_ops {

#ifdef LOWRANK_OPS_WITH_CUDA
// nullopt where there is no GPU of that index, or no driver. Creates no CUDA context.
std::optional<GpuCaps> present_gpu(int index);
#else
inline std::optional<GpuCaps> present_gpu(int) {
  return std::nullopt;
}
#endif

// Whether torch's settings let an op round fp32 to tf32. The two convolutions follow the setting of cudnn's
// convolutions, lowrank_linear that of matrix products, as the library ops do that they replace. allowTF32CuBLAS()
// would throw once the newer setting, torch.backends.cuda.matmul.fp32_precision, was used.
inline bool tf32_allowed(Op op) {
  const at::Float32Op kind = op == Op::kLinear ? at::Float32Op::MATMUL : at::Float32Op::CONV;
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, kind) == at::Float32Precision::TF32;
}

}  // namespace lowrank_ops
