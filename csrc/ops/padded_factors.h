// Factors that `prepare_for_inference_` has copied once for the kernels of GPUs, instead of at every call.
//
// The copies lie one behind the other in one uint8 tensor, the argument `packed` of the ops. The kernels read them as
// ordinary factors of higher ranks: ranks are padded with zeros to whole vectors of 16 bytes (padded_rank of
// plan/problem.h), rows are contiguous, each factor begins at a multiple of 128 bytes, and the R1 values of a tap of
// Tucker's core lie side by side. So the kernels that need whole vectors take every rank, and no call copies a factor.
//
// A record of the factors' memory, version counters, sizes and strides (factor_record.h) is kept on the host, beside
// the address of the tensor's memory, so that a call compares it without waiting for the GPU. A copy of the tensor has
// no record.
#pragma once

#include "ops/call.h"

namespace lowrank_ops {

struct PaddedFactors : Factors {
  at::Tensor taps;  // CP: the product of the two depthwise factors as they were given, for merged_cp_chain
};

// Copies the factors of a call, on their device. Raises what the op itself would raise for this call, and
// ValueError for inference tensors.
at::Tensor pad_factors(const OpCall& call);

// The copies in `packed`, which live as long as it does, if they were made from the factors of this
// checked call as they are now; otherwise nullptr.
const PaddedFactors* padded_factors_for(const at::Tensor& packed, const OpCall& call);

}  // namespace lowrank_ops
