// Kernels that no real GPU has run yet (GpuKernel::verified_on is ""): checked once a process, GPU and dtype before
// their first use.
#pragma once

#include "cuda/device.h"

namespace lowrank_ops {

// Whether a kernel may run on this GPU in this dtype as far as is known: it needs no check, or has passed it.
bool is_verified(c10::Device device, int kernel, DType dtype, bool tf32);

// Runs the kernel on small problems of random numbers against an fp64 chain on the CPU. Where they differ, the planner
// is told to leave the kernel out on this GPU (refuse_gpu_kernel) and the user is warned. Waits for the GPU: never to
// be called while a graph is captured.
void verify(c10::Device device, int kernel, DType dtype, bool tf32);

}  // namespace lowrank_ops
