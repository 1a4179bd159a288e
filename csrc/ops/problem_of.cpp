#include "ops/problem_of.h"

namespace lowrank_ops {

DType dtype_of(at::ScalarType type) {
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

Problem problem_of(const OpCall& call) {
  const at::Tensor& input = call.input;
  Problem p;
  p.op = call.op;
  p.dtype = dtype_of(input.scalar_type());
  p.t = call.out_factor.size(0);
  p.r1 = call.in_factor.size(0);
  p.r2 = call.out_factor.size(1);
  p.activation = call.activation;
  if (call.op == Op::kLinear) {
    p.s = input.size(-1);
    p.n = p.s == 0 ? 0 : input.numel() / p.s;
    return p;
  }
  p.layout =
      input.suggest_memory_format() == at::MemoryFormat::ChannelsLast ? Layout::kChannelsLast : Layout::kContiguous;
  p.n = input.size(0);
  p.s = input.size(1);
  p.h = input.size(2);
  p.w = input.size(3);
  p.kh = call.op == Op::kTucker ? call.core.size(2) : call.height_factor.size(1);
  p.kw = call.op == Op::kTucker ? call.core.size(3) : call.width_factor.size(1);
  for (size_t axis = 0; axis < 2; ++axis) {
    p.stride[axis] = call.window.stride[axis];
    p.padding[axis] = call.window.padding[axis];
    p.dilation[axis] = call.window.dilation[axis];
  }
  p.oh = output_size(p.h, p.kh, p.stride[0], p.padding[0], p.dilation[0]);
  p.ow = output_size(p.w, p.kw, p.stride[1], p.padding[1], p.dilation[1]);
  return p;
}

}  // namespace lowrank_ops
