// A call with tensors -> the planner's Problem.
#pragma once

#include "ops/call.h"

namespace lowrank_ops {

DType dtype_of(at::ScalarType type);
Problem problem_of(const OpCall& call);

}  // namespace lowrank_ops
