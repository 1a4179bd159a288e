// The gradients of the ops: they recompute the intermediates, so that only the input and the factors need to be kept
// from the forward pass. A mask says, in the order of the gradients (input, factors, bias), which of them are wanted;
// the others come back undefined. The bias is read only where there is an activation; its gradient does not need it.
#pragma once

#include <vector>

#include "ops/block.h"

namespace lowrank_ops {

// The gradients of input, the stages' weights and the bias, in this order and in the block's dtype (the bias's in fp32
// at least). Differentiable under grad mode, and reads no sizes then. All intermediates exist at once: for a large
// batch the caller passes a part at a time.
std::vector<at::Tensor> block_gradients(const at::Tensor& grad_output, const at::Tensor& input, const Block& block,
                                        c10::ArrayRef<bool> mask);

// cp_conv2d_backward with both depthwise stages as one convolution, as GPUs run it where that is faster: on any device.
std::vector<at::Tensor> merged_cp_backward(const at::Tensor& grad_output, const OpCall& call, c10::ArrayRef<bool> mask);

}  // namespace lowrank_ops
