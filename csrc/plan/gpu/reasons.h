// Why a kernel cannot run a problem on a GPU, but for sizes of shared memory (search.h) and Hopper's own kernels
// (sm90a.h). "": it can.
#pragma once

#include <string>

#include "plan/gpu/planner.h"

namespace lowrank_ops {

std::string dtype_reason(const Problem& problem, const GpuKernel& kernel);
// Of a kernel that keeps its factors.
std::string persistent_reason(const Problem& problem, const GpuKernel& kernel);
std::string architecture_reason(const GpuKernel& kernel, const GpuCaps& caps);
// Why this build has no code of the kernel for the GPU.
std::string code_reason(const GpuKernel& kernel, const GpuCaps& caps);

}  // namespace lowrank_ops
