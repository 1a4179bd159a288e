// Kernels whose tests no GPU of this architecture has all run (ran_right_on of plan/gpu/planner.h): checked once per
// process, GPU and dtype before their first use.
#pragma once

#include <string>

#include "cuda/device.h"

namespace lowrank_ops {

// Runs a kernel on small problems of random numbers and compares with an fp64 chain on the CPU. Returns the error in
// words, "" when there is none. `damaged`, for tests: the result is made wrong first. Waits for the GPU.
std::string find_error(c10::Device device, int kernel, DType dtype, bool tf32, bool damaged = false);

// Whether a kernel may run on this GPU in this dtype now: it needs no check, or has passed it.
bool is_verified(c10::Device device, int kernel, DType dtype, bool tf32);

// find_error() once. A kernel that is wrong is left out of later plans for this GPU (refuse_gpu_kernel) and the user is
// warned. Never to be called while a graph is captured.
void verify(c10::Device device, int kernel, DType dtype, bool tf32);

}  // namespace lowrank_ops
