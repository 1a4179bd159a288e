// The names of the CUDA runtime that csrc/cuda/kernels/launch.h uses, for compilers that have no CUDA: with `-I
// tests/support/simulator` they find this file instead of the toolkit's.
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
