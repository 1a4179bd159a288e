// The CPU kernels of the three ops. Arguments are checked; `Plan`s come from csrc/plan. What is `prepared` is not
// packed again; results do not depend on it.
#pragma once

#include "cpu/prepared.h"
#include "ops/ops.h"
#include "plan/cpu/planner.h"

namespace lowrank_ops {

at::Tensor tucker_cpu(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                      const at::Tensor& out_factor, const OptionalTensor& bias, const Problem& problem,
                      const CpuTile& tile, const Prepared& prepared);
at::Tensor cp_cpu(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                  const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                  const Problem& problem, const CpuTile& tile, const Prepared& prepared);
at::Tensor linear_cpu(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                      const OptionalTensor& bias, const Problem& problem, const CpuTile& tile,
                      const Prepared& prepared);

}  // namespace lowrank_ops
