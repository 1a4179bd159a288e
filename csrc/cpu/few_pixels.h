#pragma once

#include "ops/ops.h"
#include "plan/cpu/planner.h"

namespace lowrank_ops {

// Fills `output` by CP, for at most kMostDotRows pixels of input and of output in all images together.
void cp_few_pixels(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                   const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                   const Problem& problem, at::Tensor& output);

}  // namespace lowrank_ops
