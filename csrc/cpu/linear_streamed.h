// Low-rank linear layers of some hundred rows: all rows meet a block of packed weights while it is in L2, so that the
// packed weights are never written to memory.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/isa.h"
#include "cpu/prepared.h"
#include "cpu/weights.h"
#include "plan/cpu/planner.h"

namespace lowrank_ops {

// rows [N, S] -> output [N, T].
void linear_streamed(const at::Tensor& rows, const at::Tensor& in_factor, const at::Tensor& out_factor,
                     const SumRows& bias, const Problem& problem, const CpuTile& tile, const KernelSet& kernel_set,
                     const Prepared& prepared, at::Tensor& output);

}  // namespace lowrank_ops
