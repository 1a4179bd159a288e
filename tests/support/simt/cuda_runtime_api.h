// What csrc/cuda/kernels/launch.h needs of the CUDA runtime, for compilers that have no CUDA: `-I tests/support/simt` finds this
// file in the toolkit's place.
#pragma once

#ifdef __CUDACC__
#include_next <cuda_runtime_api.h>
#else

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

using cudaStream_t = struct CUstream_st*;

#endif
