#include "ops/input_gradient.h"

#include <ATen/ops/flip.h>

#include "ops/dispatch.h"

namespace lowrank_ops {
namespace {

using at::Tensor;

constexpr const char* kNoActivation = "none";

Tensor transposed(const Tensor& factor) {
  return factor.t().contiguous();
}

// The taps that a call's window has along each axis.
std::array<int64_t, 2> taps_of(const OpCall& call) {
  if (call.op == Op::kTucker) return {call.core.size(2), call.core.size(3)};
  return {call.height_factor.size(1), call.width_factor.size(1)};
}

// The op of `call` without its activation, on the device of its input.
Tensor run(const OpCall& call) {
  const auto& [stride, padding, dilation] = call.window;
  switch (call.op) {
    case Op::kTucker:
      return forward_op<TuckerOp>().call(call.input, call.in_factor, call.core, call.out_factor, call.bias, stride,
                                         padding, dilation, kNoActivation);
    case Op::kCP:
      return forward_op<CPOp>().call(call.input, call.in_factor, call.height_factor, call.width_factor, call.out_factor,
                                     call.bias, stride, padding, dilation, kNoActivation);
    case Op::kLinear:
      return forward_op<LinearOp>().call(call.input, call.in_factor, call.out_factor, call.bias, kNoActivation);
  }
  TORCH_INTERNAL_ASSERT(false, "unknown op");
}

}  // namespace

bool is_block_gradient(const OpCall& call) {
  if (call.op == Op::kLinear) return true;
  const std::array<int64_t, 2> taps = taps_of(call);
  for (size_t axis = 0; axis < 2; ++axis)
    if (call.window.stride[axis] != 1 || call.window.padding[axis] > call.window.dilation[axis] * (taps[axis] - 1))
      return false;
  return true;
}

InputGradient::InputGradient(const OpCall& call)
    : op_(call.op), factors_{.in_factor = transposed(call.out_factor), .out_factor = transposed(call.in_factor)} {
  if (op_ == Op::kLinear) return;
  if (op_ == Op::kTucker) {
    factors_.core = call.core.transpose(0, 1).flip({2, 3}).contiguous(at::MemoryFormat::ChannelsLast);
  } else {
    factors_.height_factor = call.height_factor.flip(1);
    factors_.width_factor = call.width_factor.flip(1);
  }
  const std::array<int64_t, 2> taps = taps_of(call);
  for (size_t axis = 0; axis < 2; ++axis) {
    dilation_[axis] = call.window.dilation[axis];
    padding_[axis] = dilation_[axis] * (taps[axis] - 1) - call.window.padding[axis];
  }
}

Tensor InputGradient::of(const Tensor& grad) const {
  constexpr std::array<int64_t, 2> kStride{1, 1};
  const OptionalTensor no_bias;
  return run(call_on(op_, grad, factors_, no_bias, {kStride, padding_, dilation_}, Activation::kNone));
}

Tensor before_activation(const OpCall& call) {
  return run(call);
}

}  // namespace lowrank_ops
