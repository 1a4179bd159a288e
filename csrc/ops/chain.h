// The chain of library convolutions: what runs where no kernel of ours does. Any device, differentiable, in
// library_dtype(), the output in the memory format that the input suggests.
#pragma once

#include "ops/call.h"

namespace lowrank_ops {

// The arguments are checked.
at::Tensor chain(const OpCall& call);
// CP's chain with the two depthwise stages multiplied out into one KHxKW convolution, which a GPU's library runs faster
// (merges_depthwise of plan/gpu/planner.h).
at::Tensor merged_cp_chain(const OpCall& call);

at::Tensor checked_chain(const OpCall& call);

}  // namespace lowrank_ops
