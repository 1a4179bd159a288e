// Which CPU kernels run here.
#pragma once

#include <string>

#include "cpu/kernels/kernels.h"
#include "plan/cpu/planner.h"

namespace lowrank_ops {

// One way to compute: the kernels, and the GEMM to use with them.
struct Engine {
  const ComputeKernels* kernels;
  GemmFunction gemm;
  const ComputeKernels* sums;  // the kernels whose elements are this engine's accumulators
};

// The engine for tensors of this dtype.
Engine engine_for(DType dtype);

// What the planner may know of this CPU; `threads` is at::get_num_threads().
CpuCaps cpu_caps();

// The same as "measure" is to remember it: with prepared weights something else may be faster.
inline CpuCaps measured_caps(CpuCaps caps, bool prepared) {
  if (prepared) caps.name += ", prepared weights";
  return caps;
}

// Caps the instruction set: "generic", "avx2", "avx512", "avx512bf16", "amx", or "" for what the environment variable
// LOWRANK_OPS_CPU_ISA asks for, as at start; without it, the best that the CPU has. For tests: not to be called while
// an op runs. Asking for more than the CPU has is an error. "brgemm" runs fp32 through oneDNN's kernels, to test on any
// machine the code that AMX needs and to compare speeds.
void set_cpu_isa(const std::string& isa);

// Where Winograd's transforms are used (Tucker's cores of stride 1): "auto" where they are predicted to pay, "never",
// or "2x2", "4x4", "line" (plan/cpu/patches.h): this one wherever it can be. The environment variable
// LOWRANK_OPS_CPU_WINOGRAD does the same at start. Not to be called while an op runs.
void set_cpu_winograd(const std::string& choice);

// Whether threads share the stages of a tile (team.h): "auto" where that is predicted to pay, "always" or "never". The
// environment variable LOWRANK_OPS_CPU_TEAMS does the same at start. No bit of a result depends on it.
void set_cpu_teams(const std::string& choice);

}  // namespace lowrank_ops
