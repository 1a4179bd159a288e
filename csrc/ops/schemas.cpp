// The op schemas, and the kernel of every device that has none of its own.
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/ops.h"

namespace lowrank_ops {
using c10::IntArrayRef;
using c10::string_view;

at::Tensor tucker_by_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                           const at::Tensor& out_factor, const OptionalTensor& bias, IntArrayRef stride,
                           IntArrayRef padding, IntArrayRef dilation, string_view activation) {
  const Window window{stride, padding, dilation};
  check_tucker(input, in_factor, core, out_factor, bias, window);
  return tucker_chain(input, in_factor, core, out_factor, bias, window, parse_activation("tucker_conv2d", activation));
}

at::Tensor cp_by_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                       const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                       IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, string_view activation) {
  const Window window{stride, padding, dilation};
  check_cp(input, in_factor, height_factor, width_factor, out_factor, bias, window);
  return cp_chain(input, in_factor, height_factor, width_factor, out_factor, bias, window,
                  parse_activation("cp_conv2d", activation));
}

at::Tensor linear_by_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                           const OptionalTensor& bias, string_view activation) {
  check_linear(input, in_factor, out_factor, bias);
  return linear_chain(input, in_factor, out_factor, bias, parse_activation("lowrank_linear", activation));
}

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
  // The same with weights packed before (cpu/prepared.h). Where `packed` does not fit the factors, the device, autocast
  // or gradients, these are the ops above.
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
  m.impl("tucker_conv2d", &tucker_by_chain);
  m.impl("cp_conv2d", &cp_by_chain);
  m.impl("lowrank_linear", &linear_by_chain);
}

}  // namespace lowrank_ops
