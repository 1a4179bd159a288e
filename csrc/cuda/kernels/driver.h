// A function of the CUDA driver, looked up at run time: nothing is linked with the driver, and a machine without one
// can still import this library.
#pragma once

#include <cuda_runtime_api.h>

namespace lowrank_ops {

// As of CUDA 12.0; null where there is no driver, or an older one.
inline void* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // or it would be found after the next launch
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
}

}  // namespace lowrank_ops
