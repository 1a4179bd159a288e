// Tensor maps of the input's planes (plan/gpu/planes.h). Host code.
#pragma once

#include "cuda/kernels/launch.h"
#include "cuda/kernels/tensor_map.h"
#include "plan/gpu/planes.h"

namespace lowrank_ops::hopper {

// Makes the tensor map of a plane, whose pixels lie `step_y` and `step_x` pixels of the input apart: boxes of a halo x
// 64 channels. False: the driver made none.
inline bool encode_plane(CUtensorMap& map, const BlockParams& block, DType dtype, const PlaneAxis& rows,
                         const PlaneAxis& columns, int step_y, int step_x) {
  constexpr int kElement = 2, kChannels = 64;  // kElement: bytes
  const int64_t (&stride)[4] = block.input_stride;
  const int64_t first = rows.first * stride[2] + columns.first * stride[3];
  return encode(map,
                {static_cast<const char*>(block.input) + first * kElement,
                 4,
                 {block.geometry.s, columns.pixels, rows.pixels, block.geometry.n},
                 {1, stride[3] * step_x, stride[2] * step_y, stride[0]},
                 {kChannels, columns.halo, rows.halo, 1}},
                dtype);
}

}  // namespace lowrank_ops::hopper
