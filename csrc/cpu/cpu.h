// The CPU kernels of the three ops. Arguments are checked; `problem` is the call's as_fused() and has its window; tiles
// come from csrc/plan. Weights that are `prepared` are not packed again; results do not depend on it.
#pragma once

#include "cpu/prepared.h"
#include "ops/call.h"
#include "plan/cpu/planner.h"

namespace lowrank_ops {

at::Tensor tucker_cpu(const OpCall& call, const Problem& problem, const CpuTile& tile, const Prepared& prepared);
at::Tensor cp_cpu(const OpCall& call, const Problem& problem, const CpuTile& tile, const Prepared& prepared);
at::Tensor linear_cpu(const OpCall& call, const Problem& problem, const CpuTile& tile, const Prepared& prepared);

}  // namespace lowrank_ops
