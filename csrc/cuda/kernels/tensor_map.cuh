// Implements tensor_map.h with the driver's cuTensorMapEncodeTiled.
#pragma once

#include <cudaTypedefs.h>

#include "cuda/kernels/driver.h"
#include "cuda/kernels/tensor_map.h"

namespace lowrank_ops::hopper {

inline PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto found =
      reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(driver_function("cuTensorMapEncodeTiled"));
  return found;
}

inline bool encode(CUtensorMap& map, const Boxes& boxes, DType dtype) {
  constexpr cuuint64_t kElement = 2, kStrideUnit = 16;
  const PFN_cuTensorMapEncodeTiled_v12000 encode_tiled = encoder();
  if (!encode_tiled) return false;
  cuuint64_t sizes[5], strides[4];  // bytes, of all axes but the innermost
  cuuint32_t box[5];
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  for (int axis = 0; axis < boxes.axes; ++axis) {
    sizes[axis] = cuuint64_t(boxes.size[axis]);
    box[axis] = cuuint32_t(boxes.box[axis]);
    // An axis of one element is never walked along: its stride may be anything that the driver accepts.
    if (axis > 0) strides[axis - 1] = boxes.size[axis] == 1 ? kStrideUnit : cuuint64_t(boxes.stride[axis]) * kElement;
  }
  return encode_tiled(&map, dtype == DType::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                      cuuint32_t(boxes.axes), const_cast<void*>(boxes.data), sizes, strides, box, steps,
                      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace lowrank_ops::hopper
