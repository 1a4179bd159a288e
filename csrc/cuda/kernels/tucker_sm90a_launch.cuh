// Turns the parameters of a call into those of the sm90a Tucker kernels, and chooses the instance of the narrow kernel.
#pragma once

#include "cuda/kernels/launch.h"
#include "cuda/kernels/tensor_map.h"
#include "cuda/kernels/tucker_sm90a.cuh"

namespace lowrank_ops::hopper {

// Sets plane number (`y`, `x`) and its tensor map. False: the driver made none.
template <class L>
bool add_plane(TuckerParamsOf<L>& to, const BlockParams& block, DType dtype, int y, int x) {
  constexpr int kElement = 2;
  const Geometry& g = block.geometry;
  const int64_t (&stride)[4] = block.input_stride;
  Plane& plane = to.planes[to.plane_count];
  plane.rows = plane_of(g.rows, y);
  plane.columns = plane_of(g.columns, x);
  plane.tap_y = y;
  plane.tap_x = x;
  plane.bytes = plane.rows.halo * plane.columns.halo * L::kRowBytes;
  const int64_t first = plane.rows.first * stride[2] + plane.columns.first * stride[3];
  return encode(to.input[to.plane_count++],
                {static_cast<const char*>(block.input) + first * kElement,
                 4,
                 {g.s, plane.columns.pixels, plane.rows.pixels, g.n},
                 {1, stride[3] * plane_step(g.columns), stride[2] * plane_step(g.rows), stride[0]},
                 {L::kSlice, plane.columns.halo, plane.rows.halo, 1}},
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
  for (int y = 0; y < planes_of(g.rows); ++y)
    for (int x = 0; x < planes_of(g.columns); ++x)
      if (!add_plane(to, block, dtype, y, x)) return false;
  const int64_t (&out)[4] = block.output_stride;
  const Factor &first = block.in_factor, &core = block.core, &last = block.out_factor;
  return encode(to.output,
                {block.output,
                 4,
                 {g.t, g.columns.out, g.rows.out, g.n},
                 {1, out[3], out[2], out[0]},
                 {L::kSlice, L::kTileSide, L::kTileSide, 1}},
                dtype) &&
         encode(to.in_factor, {first.data, 2, {g.s, g.r1}, {1, first.row_stride}, {L::kSlice, in_rows}}, dtype) &&
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
    return p.plane_count == 1 ? tucker_kernel<true, true>(p.layout) : tucker_kernel<true, false>(p.layout);
  return p.plane_count == 1 ? tucker_kernel<false, true>(p.layout) : tucker_kernel<false, false>(p.layout);
}

}  // namespace lowrank_ops::hopper
