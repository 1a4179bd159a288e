// Tensors -> the planner's Problem.
#pragma once

#include "ops/ops.h"

namespace lowrank_ops {

inline DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return DType::kDouble;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kHalf;
    default:
      return DType::kFloat;
  }
}

inline Problem conv_problem(Op op, const at::Tensor& input, int64_t kh, int64_t kw, const at::Tensor& out_factor,
                            const Window& window, Activation activation) {
  Problem p;
  p.op = op;
  p.dtype = dtype_of(input.scalar_type());
  p.layout =
      input.suggest_memory_format() == at::MemoryFormat::ChannelsLast ? Layout::kChannelsLast : Layout::kContiguous;
  p.n = input.size(0);
  p.s = input.size(1);
  p.h = input.size(2);
  p.w = input.size(3);
  p.t = out_factor.size(0);
  p.r1 = p.r2 = out_factor.size(1);
  p.kh = kh;
  p.kw = kw;
  for (int axis = 0; axis < 2; ++axis) {
    p.stride[axis] = window.stride[axis];
    p.padding[axis] = window.padding[axis];
    p.dilation[axis] = window.dilation[axis];
  }
  p.oh = output_size(p.h, kh, p.stride[0], p.padding[0], p.dilation[0]);
  p.ow = output_size(p.w, kw, p.stride[1], p.padding[1], p.dilation[1]);
  p.activation = activation;
  return p;
}

inline Problem tucker_problem(const at::Tensor& input, const at::Tensor& core, const at::Tensor& out_factor,
                              const Window& window, Activation activation) {
  Problem p = conv_problem(Op::kTucker, input, core.size(2), core.size(3), out_factor, window, activation);
  p.r1 = core.size(1);
  return p;
}

inline Problem cp_problem(const at::Tensor& input, const at::Tensor& height_factor, const at::Tensor& width_factor,
                          const at::Tensor& out_factor, const Window& window, Activation activation) {
  return conv_problem(Op::kCP, input, height_factor.size(1), width_factor.size(1), out_factor, window, activation);
}

inline Problem linear_problem(const at::Tensor& input, const at::Tensor& out_factor, Activation activation) {
  Problem p;
  p.op = Op::kLinear;
  p.dtype = dtype_of(input.scalar_type());
  p.s = input.size(-1);
  p.n = p.s == 0 ? 0 : input.numel() / p.s;
  p.t = out_factor.size(0);
  p.r1 = p.r2 = out_factor.size(1);
  p.activation = activation;
  return p;
}

}  // namespace lowrank_ops
