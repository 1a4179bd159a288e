#pragma once

#include "ops/call.h"
#include "plan/cpu/planner.h"

namespace lowrank_ops {

// Fills `output` by CP, for at most kMostDotRows pixels of input and of output in all images together.
void cp_few_pixels(const OpCall& call, const Problem& problem, at::Tensor& output);

}  // namespace lowrank_ops
