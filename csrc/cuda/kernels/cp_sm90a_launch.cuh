// Turns the parameters of a call into those of the sm90a CP kernel, and chooses the kernel's instance.
#pragma once

#include "cuda/kernels/cp_sm90a.cuh"
#include "cuda/kernels/plane_map.h"

namespace lowrank_ops::hopper {

// Sets a residue class's tensor map of the input, and where its first tile begins there. False: the driver made none.
inline bool add_class(CpParams& to, const BlockParams& block, DType dtype, int residue) {
  const Geometry& g = block.geometry;
  const PlaneAxis rows = whole_class(g.rows, residue / g.columns.lattice);
  const PlaneAxis columns = whole_class(g.columns, residue % g.columns.lattice);
  to.shift[residue] = {rows.shift, columns.shift};
  return encode_plane(to.input[residue], block, dtype, rows, columns, g.rows.unit, g.columns.unit);
}

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
  to.tiles.count = int(g.ctas());
  to.cluster = g.cluster;
  to.t = g.t;
  to.r = g.r1;
  to.n = g.n;
  to.height = g.rows.out;
  to.width = g.columns.out;
  to.stride_h = g.rows.stride;
  to.stride_w = g.columns.stride;
  to.halo_width = g.columns.halo();
  to.box_bytes = g.rows.halo() * g.columns.halo() * L::kRowBytes;
  to.activation = block.activation;
  for (int residue = 0; residue < to.tiles.classes(); ++residue)
    if (!add_class(to, block, dtype, residue)) return false;
  const int64_t first = block.in_factor.row_stride, last = block.out_factor.row_stride;
  return encode(to.in_factor, {block.in_factor.data, 2, {g.s, g.r1}, {1, first}, {L::kSlice, L::kSlice / g.cluster}},
                dtype) &&
         // Row 32 b + 8 j + 2 q + e of shared memory is row 32 b + 8 q + 2 j + e of out_factor: axes e, q, j, b.
         encode(to.out_factor,
                {block.out_factor.data,
                 5,
                 {g.r1, 2, 4, 4, g.t / 32},
                 {1, last, 8 * last, 2 * last, 32 * last},
                 {L::kSlice, 2, 4, 4, 2 / g.cluster}},
                dtype);
}

using CpKernel = void (*)(CpParams);

// The instance for a call.
template <bool half, int channels, bool plain>
CpKernel cp_kernel(const CpSm90a& layout) {
  static_assert(CpSm90a::kMostChannels == 4 * CpSm90a::kSlice, "one case per number of slices");
  switch (layout.slices) {
    case 1:
      return cp_sm90a_kernel<half, channels, 1, plain>;
    case 2:
      return cp_sm90a_kernel<half, channels, 2, plain>;
    case 3:
      return cp_sm90a_kernel<half, channels, 3, plain>;
    default:
      return cp_sm90a_kernel<half, channels, 4, plain>;
  }
}
template <bool half, bool plain>
CpKernel cp_kernel(const CpSm90a& layout) {
  if (layout.channels == 64) return cp_kernel<half, 64, plain>(layout);
  return layout.channels == 128 ? cp_kernel<half, 128, plain>(layout) : cp_kernel<half, 256, plain>(layout);
}
inline CpKernel cp_kernel(const CpParams& p, DType dtype) {
  const bool plain = p.stride_h * p.stride_w * p.tiles.classes() == 1;
  if (dtype == DType::kHalf) return plain ? cp_kernel<true, true>(p.layout) : cp_kernel<true, false>(p.layout);
  return plain ? cp_kernel<false, true>(p.layout) : cp_kernel<false, false>(p.layout);
}

}  // namespace lowrank_ops::hopper
