#pragma once

#include "ops/call.h"
#include "plan/cpu/planner.h"

namespace lowrank_ops {

// CP for up to kMostDotRows pixels of input and of output in all: fills `output`.
void cp_few_pixels(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                   const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                   const Problem& problem, at::Tensor& output);

}  // namespace lowrank_ops
