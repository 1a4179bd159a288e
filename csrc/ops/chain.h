// The chain of library convolutions: what runs where no kernel of ours does. Any device, differentiable, in
// library_dtype(), the output in the memory format that the input suggests.
#pragma once

#include "ops/call.h"

namespace lowrank_ops {

// The arguments are checked.
at::Tensor chain(const OpCall& call);
// CP's chain with the two depthwise stages multiplied out into one KHxKW convolution, which a GPU's library runs faster
// (merges_depthwise of plan/gpu/planner.h). `taps`: depthwise_taps of the call's factors, in library_dtype.
at::Tensor merged_cp_chain(const OpCall& call, const at::Tensor& taps);
at::Tensor merged_cp_chain(const OpCall& call);
// The window of that convolution, [R, 1, KH, KW]: the product of the factors [R, KH] and [R, KW], rounded once.
at::Tensor depthwise_taps(const at::Tensor& height_factor, const at::Tensor& width_factor);

at::Tensor checked_chain(const OpCall& call);

}  // namespace lowrank_ops
