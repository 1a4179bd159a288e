// Launches an sm90a kernel: persistent CTAs, at most one per multiprocessor, in clusters of `cluster`.
#pragma once

#include "cuda/kernels/primitives.cuh"
#include "cuda/kernels/tensor_map.cuh"

namespace lowrank_ops {

template <typename Params>
cudaError_t launch_persistent(void (*kernel)(Params), int tiles, int threads, int shared_bytes, cudaStream_t stream,
                              const Params& params, int cluster = 1) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int ctas = least(tiles, multiprocessors / cluster * cluster);
  return launch(kernel, ctas, threads, shared_bytes, stream, params, cluster);
}

inline bool is_half_precision(DType dtype) {
  return dtype == DType::kBFloat16 || dtype == DType::kHalf;
}

}  // namespace lowrank_ops
