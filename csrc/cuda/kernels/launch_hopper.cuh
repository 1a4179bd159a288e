// Launches an sm90a kernel: persistent CTAs, at most one per multiprocessor.
#pragma once

#include "cuda/kernels/primitives.cuh"
#include "cuda/kernels/tensor_map.cuh"

namespace lowrank_ops {

template <typename Params>
cudaError_t launch_persistent(void (*kernel)(Params), int tiles, int threads, int shared_bytes, cudaStream_t stream,
                              const Params& params) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  return launch(kernel, least(tiles, multiprocessors), threads, shared_bytes, stream, params);
}

inline bool is_half_precision(DType dtype) {
  return dtype == DType::kBFloat16 || dtype == DType::kHalf;
}

}  // namespace lowrank_ops
