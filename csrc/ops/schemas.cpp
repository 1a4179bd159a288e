// The op schemas, and the kernel of every device that has none of its own.
#include <torch/library.h>

#include "ops/chain.h"
#include "ops/dispatch.h"

namespace lowrank_ops {

TORCH_LIBRARY(lowrank_ops, m) {
  m.def(
      "tucker_conv2d(Tensor input, Tensor in_factor, Tensor core, Tensor out_factor, Tensor? bias=None, "
      "int[2] stride=1, int[2] padding=0, int[2] dilation=1, str activation=\"none\") -> Tensor");
  m.def(
      "cp_conv2d(Tensor input, Tensor in_factor, Tensor height_factor, Tensor width_factor, Tensor out_factor, "
      "Tensor? bias=None, int[2] stride=1, int[2] padding=0, int[2] dilation=1, str activation=\"none\") -> Tensor");
  m.def(
      "lowrank_linear(Tensor input, Tensor in_factor, Tensor out_factor, Tensor? bias=None, "
      "str activation=\"none\") -> Tensor");
  // The same with weights packed before (cpu/prepared.h, padded_factors.h). Where `packed` does not fit the factors,
  // the device, autocast or gradients, these are the ops above.
  m.def(
      "tucker_conv2d_prepared(Tensor input, Tensor in_factor, Tensor core, Tensor out_factor, Tensor? bias, "
      "int[2] stride, int[2] padding, int[2] dilation, str activation, Tensor packed) -> Tensor");
  m.def(
      "cp_conv2d_prepared(Tensor input, Tensor in_factor, Tensor height_factor, Tensor width_factor, "
      "Tensor out_factor, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, str activation, "
      "Tensor packed) -> Tensor");
  m.def(
      "lowrank_linear_prepared(Tensor input, Tensor in_factor, Tensor out_factor, Tensor? bias, str activation, "
      "Tensor packed) -> Tensor");
  // Gradients in the order of the arguments, undefined (None) where output_mask is false; see backward.h.
  m.def(
      "tucker_conv2d_backward(Tensor grad_output, Tensor input, Tensor in_factor, Tensor core, Tensor out_factor, "
      "Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, str activation, bool[5] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cp_conv2d_backward(Tensor grad_output, Tensor input, Tensor in_factor, Tensor height_factor, "
      "Tensor width_factor, Tensor out_factor, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
      "str activation, bool[6] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lowrank_linear_backward(Tensor grad_output, Tensor input, Tensor in_factor, Tensor out_factor, Tensor? bias, "
      "str activation, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lowrank_ops, CompositeExplicitAutograd, m) {
  for_each_op([&m](auto op) { m.impl(op.name, &ForwardKernel<checked_chain, decltype(op)>::call); });
}

}  // namespace lowrank_ops
