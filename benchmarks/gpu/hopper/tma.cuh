// TMA, the unit that copies boxes of tensors: tensor maps on the host, copies on the device.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.cuh"
#include "test.cuh"

namespace hopper {

// A box of an image batch [n][height][width][channels]: 64 or 8 channels of a rectangle of pixels of one image. It lies
// in shared memory as [pixel][channel]; k8x8, by a map of five dimensions, as [channel / 8][pixel][channel % 8].
enum class Box { k64, k64Swizzled, k8, k8x8 };
inline const char* const kBoxNames[4] = {"box64", "box64_swizzled", "box8", "box8x8"};

// cuTensorMapEncodeTiled, looked up at run time: nothing is linked with the driver.
inline PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
  if (!encode) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess || !function) throw std::runtime_error("no cuTensorMapEncodeTiled");
    encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }
  return encode;
}

// The tensor map for boxes of box_height x box_width pixels. Pixels outside of the image read as zero.
inline CUtensorMap tensor_map(Box box, void* image, int n, int height, int width, int channels, int box_height,
                              int box_width) {
  const PFN_cuTensorMapEncodeTiled_v12000 encode = encoder();
  const cuuint64_t c = cuuint64_t(channels), w = cuuint64_t(width), h = cuuint64_t(height), images = cuuint64_t(n);
  const bool planes = box == Box::k8x8;
  const cuuint32_t inner = box == Box::k64 || box == Box::k64Swizzled ? 64 : 8;
  const cuuint64_t sizes4[4] = {c, w, h, images}, sizes5[5] = {8, w, h, c / 8, images};
  const cuuint64_t strides4[3] = {c * 2, w * c * 2, h * w * c * 2};  // bytes, of all dimensions but the first
  const cuuint64_t strides5[4] = {c * 2, w * c * 2, 16, h * w * c * 2};
  const cuuint32_t box4[4] = {inner, cuuint32_t(box_width), cuuint32_t(box_height), 1};
  const cuuint32_t box5[5] = {8, cuuint32_t(box_width), cuuint32_t(box_height), 8, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, planes ? 5 : 4, image, planes ? sizes5 : sizes4,
             planes ? strides5 : strides4, planes ? box5 : box4, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             box == Box::k64Swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string("cuTensorMapEncodeTiled ") + kBoxNames[int(box)] + ": CUresult " +
                             std::to_string(int(result)));
  return map;
}

// Copies of a box to shared memory; they complete the bytes that the barrier expects.
DEVICE void tma_load_4d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c, int x, int y, int n) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c), "r"(x), "r"(y), "r"(n)
      : "memory");
}
DEVICE void tma_load_5d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c, int x, int y, int c8, int n) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c), "r"(x), "r"(y), "r"(c8), "r"(n)
      : "memory");
}
// A copy of consecutive bytes, without a tensor map.
DEVICE void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}
// The same copy to all CTAs of the cluster whose bit is set in `ctas`, each with its own memory and barrier at these
// addresses.
DEVICE void bulk_load_to(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "h"(ctas)
      : "memory");
}

}  // namespace hopper
