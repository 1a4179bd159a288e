// The gradient of a block's input as a block of its own, which the kernels of the forward pass compute.
//
//   output = out_factor core in_factor input          (1x1, window, 1x1)
//   grad_input = in_factor' core' out_factor' grad    (' transposes the channels; a window is flipped besides)
//
// So with a stride of 1 it is the same op with its factors transposed and in exchanged places, on the gradient in front
// of the activation. It saves what a chain of gradients writes and reads again: the gradients of the hidden images.
// Where the gradient of a factor needs those anyway, the chain of gradients is the shorter way.
#pragma once

#include "ops/call.h"

namespace lowrank_ops {

// Whether the input's gradient of a call is such a block: every stride is 1, and no padding exceeds what its window
// reaches over (a padding of dilation * (KH - 1) is the most).
bool is_block_gradient(const OpCall& call);

// The exchanged block of a call. Holds its factors, so that a batch can be computed in parts.
class InputGradient {
 public:
  // is_block_gradient(call) must be true.
  explicit InputGradient(const OpCall& call);

  // The gradient of the input. `grad`: the gradient of what the activation is applied to.
  at::Tensor of(const at::Tensor& grad) const;

 private:
  Op op_;
  Factors factors_;
  std::array<int64_t, 2> padding_{}, dilation_{1, 1};
};

// What the activation of a call is applied to, by the call's op.
at::Tensor before_activation(const OpCall& call);

}  // namespace lowrank_ops
