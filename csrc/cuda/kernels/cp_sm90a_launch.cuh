// Turns the parameters of a call into those of the sm90a CP kernel, and chooses the kernel's instance.
#pragma once

#include "cuda/kernels/cp_sm90a.cuh"
#include "cuda/kernels/launch.h"
#include "cuda/kernels/tensor_map.h"

namespace lowrank_ops::hopper {

// False: the driver made no tensor maps for these tensors.
inline bool cp_params(CpParams& to, const BlockParams& block, DType dtype) {
  using L = CpSm90a;
  const Geometry& g = block.geometry;
  to.layout = cp_sm90a_layout(g);
  to.down = static_cast<const uint16_t*>(block.height_factor.data);
  to.down_rank = block.height_factor.row_stride;
  to.down_tap = block.height_factor.tap_stride[0];
  to.across = static_cast<const uint16_t*>(block.width_factor.data);
  to.across_rank = block.width_factor.row_stride;
  to.across_tap = block.width_factor.tap_stride[1];
  to.bias = static_cast<const uint16_t*>(block.bias);
  to.output = static_cast<uint16_t*>(block.output);
  to.tiles = tiles_of(g);
  to.t = g.t;
  to.r = g.r1;
  to.height = g.rows.out;
  to.width = g.columns.out;
  to.padding_h = g.rows.padding;
  to.padding_w = g.columns.padding;
  to.activation = block.activation;
  const int64_t (&in)[4] = block.input_stride;
  const int64_t first = block.in_factor.row_stride, last = block.out_factor.row_stride;
  return encode(to.input,
                {block.input,
                 4,
                 {g.s, g.columns.in, g.rows.in, g.n},
                 {1, in[3], in[2], in[0]},
                 {L::kSlice, L::kHaloWidth, L::kHaloHeight, 1}},
                dtype) &&
         encode(to.in_factor, {block.in_factor.data, 2, {g.s, g.r1}, {1, first}, {L::kSlice, L::kSlice}}, dtype) &&
         // Row 32 b + 8 j + 2 q + e of shared memory is row 32 b + 8 q + 2 j + e of out_factor: axes e, q, j, b.
         encode(to.out_factor,
                {block.out_factor.data,
                 5,
                 {g.r1, 2, 4, 4, g.t / 32},
                 {1, last, 8 * last, 2 * last, 32 * last},
                 {L::kSlice, 2, 4, 4, 2}},
                dtype);
}

using CpKernel = void (*)(CpParams);

// The instance for a layout.
template <bool half, int channels>
CpKernel cp_kernel(const CpSm90a& layout) {
  static_assert(CpSm90a::kMostChannels == 4 * CpSm90a::kSlice, "one case per number of slices");
  switch (layout.slices) {
    case 1:
      return cp_sm90a_kernel<half, channels, 1>;
    case 2:
      return cp_sm90a_kernel<half, channels, 2>;
    case 3:
      return cp_sm90a_kernel<half, channels, 3>;
    default:
      return cp_sm90a_kernel<half, channels, 4>;
  }
}
template <bool half>
CpKernel cp_kernel(const CpSm90a& layout) {
  if (layout.channels == 64) return cp_kernel<half, 64>(layout);
  return layout.channels == 128 ? cp_kernel<half, 128>(layout) : cp_kernel<half, 256>(layout);
}
inline CpKernel cp_kernel(const CpSm90a& layout, DType dtype) {
  return dtype == DType::kHalf ? cp_kernel<true>(layout) : cp_kernel<false>(layout);
}

}  // namespace lowrank_ops::hopper
