// Turns the parameters of a call into those of the sm90a kernel for linear layers, and chooses the kernel's instance.
#pragma once

#include "cuda/kernels/launch.h"
#include "cuda/kernels/linear_sm90a.cuh"
#include "cuda/kernels/tensor_map.h"

namespace lowrank_ops::hopper {

// False: the driver made no tensor maps for these tensors. The layer's rows lie along the width of one image.
inline bool linear_params(LinearParams& to, const BlockParams& block, DType dtype) {
  using L = LinearSm90a;
  const Geometry& g = block.geometry;
  to.layout = linear_sm90a_layout(g);
  to.bias = static_cast<const uint32_t*>(block.bias);
  to.splits = Divider(g.splits);
  to.cluster = Divider(g.cluster);
  to.items = int(g.ctas());
  to.t = g.t;
  to.share = int(ceil_div(to.layout.chunks, g.splits));
  to.activation = block.activation;
  const int rows = g.columns.out, padded = to.layout.parts * L::kSlice;
  const int64_t in = block.input_stride[3], out = block.output_stride[3];
  const Factor &first = block.in_factor, &last = block.out_factor;
  return encode(to.input, {block.input, 2, {g.s, rows}, {1, in}, {L::kSlice, L::kRows}}, dtype) &&
         encode(to.output, {block.output, 4, {g.t, rows, 1, 1}, {1, out, out, out}, {L::kSlice, L::kGroupRows, 1, 1}},
                dtype) &&
         encode(to.in_factor, {first.data, 2, {g.s, g.r1}, {1, first.row_stride}, {L::kSlice, padded / g.cluster}},
                dtype) &&
         encode(to.out_factor, {last.data, 2, {g.r1, g.t}, {1, last.row_stride}, {L::kSlice, L::kSlice / g.cluster}},
                dtype);
}

using LinearKernel = void (*)(LinearParams);

// The instance for a layout.
template <bool half>
LinearKernel linear_kernel(const LinearSm90a& layout) {
  if (layout.parts == 1) return linear_sm90a_kernel<half, 1>;
  return layout.parts == 2 ? linear_sm90a_kernel<half, 2> : linear_sm90a_kernel<half, 4>;
}
inline LinearKernel linear_kernel(const LinearSm90a& layout, DType dtype) {
  return dtype == DType::kHalf ? linear_kernel<true>(layout) : linear_kernel<false>(layout);
}

}  // namespace lowrank_ops::hopper
