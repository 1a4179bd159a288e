// The CPU kernels that run here: those of one instruction set.
#pragma once

#include <string>

#include "cpu/kernels/kernels.h"
#include "plan/cpu/planner.h"

namespace lowrank_ops {

// The kernels for tensors of one dtype, and the GEMM to use with them (oneDNN's on AMX, otherwise their own).
struct KernelSet {
  const ComputeKernels* kernels;
  GemmFunction gemm;
  const ComputeKernels* sums;  // the kernels whose elements have the type of `kernels`' accumulators
};

KernelSet kernel_set_for(DType dtype);

// All that the planner knows about this CPU; `threads` is at::get_num_threads().
CpuCaps cpu_caps();

// The same with a name under which the policy "measure" remembers timings: prepared weights may make another path
// faster.
inline CpuCaps measured_caps(CpuCaps caps, bool prepared) {
  if (prepared) caps.name += ", prepared weights";
  return caps;
}

// Caps the instruction set: "generic", "avx2", "avx512", "avx512bf16" or "amx". "" takes the one that the environment
// variable LOWRANK_OPS_CPU_ISA names, as at start; without it, the best that the CPU has. One that the CPU does not
// have is an error. "brgemm" runs fp32 through oneDNN's kernels, so that the code for AMX can be tested on any machine
// and the speeds compared. For tests; not to be called while an op runs.
void set_cpu_isa(const std::string& isa);

// Sets where Winograd's transforms are used (Tucker's cores of stride 1): "auto" where they are predicted to be faster,
// "never", or one of "2x2", "4x4" and "line" (plan/patches.h) wherever it is possible. The environment variable
// LOWRANK_OPS_CPU_WINOGRAD does the same at start. Not to be called while an op runs.
void set_cpu_winograd(const std::string& setting);

// Sets whether threads share the stages of a tile (team.h): "auto" where that is predicted to be faster, "always" or
// "never". The environment variable LOWRANK_OPS_CPU_TEAMS does the same at start. No bit of a result depends on it.
void set_cpu_teams(const std::string& setting);

}  // namespace lowrank_ops
