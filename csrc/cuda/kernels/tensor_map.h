// Tensor maps: how the copy engine of Hopper walks a tensor. Host code.
#pragma once

#include <cstdint>

#include "cuda/kernels/hopper.cuh"
#include "plan/problem.h"

namespace lowrank_ops::hopper {

// A tensor of up to 5 axes, the innermost first; strides in elements, that of the innermost axis is 1. Boxes of `box`
// elements lie in shared memory as rows of 128 bytes in the 128-byte swizzle: box[0] is 64 elements of 2 bytes.
struct Boxes {
  const void* data;
  int axes;
  int64_t size[5], stride[5];
  int box[5];
};

// False: there is no driver that can, or it refuses (an address or a stride that is no multiple of 16 bytes, say). In
// tensor_map.cuh, for tests in tests/support/simt/hopper.cpp.
inline bool encode(CUtensorMap& map, const Boxes& boxes, DType dtype);

}  // namespace lowrank_ops::hopper
