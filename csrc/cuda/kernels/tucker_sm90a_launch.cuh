// Turns the parameters of a call into those of the sm90a Tucker kernels, and chooses the instance of the narrow kernel.
#pragma once

#include "cuda/kernels/launch.h"
#include "cuda/kernels/tensor_map.h"
#include "cuda/kernels/tucker_sm90a.cuh"

namespace lowrank_ops::hopper {

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
  to.halo_w = g.columns.halo();
  to.taps_h = g.rows.kernel;
  to.taps_w = g.columns.kernel;
  to.padding_h = g.rows.padding;
  to.padding_w = g.columns.padding;
  to.slice_box = g.rows.halo() * g.columns.halo() * L::kRowBytes;
  to.activation = block.activation;
  const int64_t (&in)[4] = block.input_stride, (&out)[4] = block.output_stride;
  const Factor &first = block.in_factor, &core = block.core, &last = block.out_factor;
  return encode(to.input,
                {block.input,
                 4,
                 {g.s, g.columns.in, g.rows.in, g.n},
                 {1, in[3], in[2], in[0]},
                 {L::kSlice, g.columns.halo(), g.rows.halo(), 1}},
                dtype) &&
         encode(to.output,
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

// The instance for a layout.
template <bool half>
TuckerKernel tucker_kernel(const TuckerSm90a& layout) {
  const bool narrow = layout.ranks == 32;
  if (layout.rows == 104) return narrow ? tucker_sm90a_kernel<half, 32, 104> : tucker_sm90a_kernel<half, 64, 104>;
  return narrow ? tucker_sm90a_kernel<half, 32, 144> : tucker_sm90a_kernel<half, 64, 144>;
}
inline TuckerKernel tucker_kernel(const TuckerSm90a& layout, DType dtype) {
  return dtype == DType::kHalf ? tucker_kernel<true>(layout) : tucker_kernel<false>(layout);
}

}  // namespace lowrank_ops::hopper
