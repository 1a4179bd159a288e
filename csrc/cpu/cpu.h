// The CPU kernels of the three ops. Arguments are checked; `Plan`s come from csrc/plan.
#pragma once

#include "ops.h"
#include "plan/plan.h"

namespace lowrank_ops {

at::Tensor tucker_cpu(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                      const at::Tensor& out_factor, const OptionalTensor& bias, const Problem& problem,
                      const CpuTile& tile);
at::Tensor cp_cpu(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                  const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                  const Problem& problem, const CpuTile& tile);
at::Tensor linear_cpu(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                      const OptionalTensor& bias, const Problem& problem, const CpuTile& tile);

}  // namespace lowrank_ops
