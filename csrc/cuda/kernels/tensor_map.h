// Tensor maps: they tell TMA, Hopper's unit for copies of boxes, how a tensor lies in memory. Host code.
#pragma once

#include <cstdint>

#include "cuda/kernels/hopper.cuh"
#include "plan/problem.h"

namespace lowrank_ops::hopper {

// A tensor of at most 5 axes, the innermost first, and the boxes that are copied of it. Strides are in elements; that
// of the innermost axis is 1. A box lies in shared memory as rows of 128 bytes in the 128-byte swizzle: box[0] is 64
// elements of 2 bytes.
struct Boxes {
  const void* data;
  int axes;
  int64_t size[5], stride[5];
  int box[5];
};

// Makes a tensor map. False: no driver here can, or it refuses (for example an address or a stride that is no multiple
// of 16 bytes). Defined in tensor_map.cuh, for tests in tests/support/simulator/hopper.cpp.
inline bool encode(CUtensorMap& map, const Boxes& boxes, DType dtype);

}  // namespace lowrank_ops::hopper
