// Turns the parameters of a call into those of the sm90a Tucker kernels, and chooses the instance of the narrow kernel.
#pragma once

#include "cuda/kernels/plane_map.h"
#include "cuda/kernels/tucker_sm90a.cuh"

namespace lowrank_ops::hopper {

constexpr int kTuckerElement = 2;  // bytes

// Sets the plane (`y`, `x`) of a residue class and its tensor map. False: the driver made none.
template <class L>
bool add_plane(TuckerParamsOf<L>& to, const BlockParams& block, DType dtype, int residue, int y, int x) {
  const Geometry& g = block.geometry;
  const int number = residue * planes_of(g) + y * planes_of(g.columns) + x;
  Plane& plane = to.planes[number];
  plane.rows = plane_of(g.rows, residue / g.columns.lattice, y);
  plane.columns = plane_of(g.columns, residue % g.columns.lattice, x);
  plane.tap_y = y;
  plane.tap_x = x;
  plane.bytes = plane.rows.halo * plane.columns.halo * L::kRowBytes;
  return encode_plane(to.input[number], block, dtype, plane.rows, plane.columns, plane_step(g.rows),
                      plane_step(g.columns));
}

// Sets a residue class's tensor map of the output, which has at least one line and column of it, and its planes.
template <class L>
bool add_class(TuckerParamsOf<L>& to, const BlockParams& block, DType dtype, int residue) {
  const Geometry& g = block.geometry;
  const TileAxis &rows = g.rows, &columns = g.columns;
  const int64_t (&stride)[4] = block.output_stride;
  const int y = residue / columns.lattice, x = residue % columns.lattice;
  for (int plane = 0; plane < planes_of(g); ++plane)
    if (!add_plane(to, block, dtype, residue, plane / planes_of(columns), plane % planes_of(columns))) return false;
  return encode(to.output[residue],
                {static_cast<const char*>(block.output) + (y * stride[2] + x * stride[3]) * kTuckerElement,
                 4,
                 {g.t, ceil_div(columns.out - x, columns.lattice), ceil_div(rows.out - y, rows.lattice), g.n},
                 {1, stride[3] * columns.lattice, stride[2] * rows.lattice, stride[0]},
                 {L::kSlice, L::kTileSide, L::kTileSide, 1}},
                dtype);
}

// False: the driver made no tensor maps for these tensors. `in_rows`: ranks R1 per box of in_factor; `core_rows`: ranks
// R2 per box of the core.
template <class L>
bool tucker_params(TuckerParamsOf<L>& to, const BlockParams& block, DType dtype, const L& layout, int in_rows,
                   int core_rows) {
  const Geometry& g = block.geometry;
  to.layout = layout;
  to.bias = block.bias;
  to.tiles = tiles_of(g);
  to.t = g.t;
  to.taps = g.taps();
  to.stride_h = g.rows.stride;
  to.stride_w = g.columns.stride;
  to.activation = block.activation;
  to.plane_count = planes_of(g);
  for (int residue = 0; residue < g.rows.lattice * g.columns.lattice; ++residue)
    if (!add_class(to, block, dtype, residue)) return false;
  const Factor &first = block.in_factor, &core = block.core, &last = block.out_factor;
  return encode(to.in_factor, {first.data, 2, {g.s, g.r1}, {1, first.row_stride}, {L::kSlice, in_rows}}, dtype) &&
         encode(to.core,
                {core.data,
                 4,
                 {g.r1, g.columns.kernel, g.rows.kernel, g.r2},
                 {1, core.tap_stride[1], core.tap_stride[0], core.row_stride},
                 {L::kSlice, 1, 1, core_rows}},
                dtype) &&
         encode(to.out_factor, {last.data, 2, {g.r2, g.t}, {1, last.row_stride}, {L::kSlice, L::kSlice}}, dtype);
}

inline bool tucker_params(TuckerParams& to, const BlockParams& block, DType dtype) {
  const TuckerSm90a layout = sm90a_layout(block.geometry);
  return tucker_params(to, block, dtype, layout, TuckerSm90a::kSlice, layout.ranks);
}

// Whether all tiles of a call read one and the same plane.
template <class L>
bool has_one_plane(const TuckerParamsOf<L>& p) {
  return p.plane_count * p.tiles.classes() == 1;
}

using TuckerKernel = void (*)(TuckerParams);

// The instance for a call.
template <bool half, bool one_plane>
TuckerKernel tucker_kernel(const TuckerSm90a& l) {
  if (l.rows == 104)
    return l.ranks == 32 ? tucker_sm90a_kernel<half, 32, 104, one_plane>
                         : tucker_sm90a_kernel<half, 64, 104, one_plane>;
  return l.ranks == 32 ? tucker_sm90a_kernel<half, 32, 144, one_plane> : tucker_sm90a_kernel<half, 64, 144, one_plane>;
}
inline TuckerKernel tucker_kernel(const TuckerParams& p, DType dtype) {
  if (dtype == DType::kHalf)
    return has_one_plane(p) ? tucker_kernel<true, true>(p.layout) : tucker_kernel<true, false>(p.layout);
  return has_one_plane(p) ? tucker_kernel<false, true>(p.layout) : tucker_kernel<false, false>(p.layout);
}

}  // namespace lowrank_ops::hopper
