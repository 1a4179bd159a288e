// Looks up functions of the CUDA driver at run time: nothing is linked with the driver, so that a machine without one
// can import this library too.
#pragma once

#include <cuda_runtime_api.h>

namespace lowrank_ops {

// The function in its version of CUDA 12.0. Null: there is no driver, or an older one.
inline void* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // otherwise the check after the next launch would find this error
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
}

}  // namespace lowrank_ops
