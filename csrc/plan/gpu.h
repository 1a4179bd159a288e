// What the planner knows of GPUs and of the fused CUDA kernels. Plain C++17: no torch, no CUDA headers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/geometry.h"
#include "plan/plan.h"

namespace lowrank_ops {

// A GPU as the planner sees it: read from the driver for the present device, or from the list of named GPUs (gpus.cpp).
struct GpuCaps {
  std::string name;
  int architecture = 0;              // 80, 86, 90, ...: compute capability x 10
  int multiprocessors = 0;
  int64_t shared_bytes_cta = 0;      // dynamic shared memory that a CTA may ask for
  int64_t shared_bytes_multiprocessor = 0;
  int64_t l2_bytes = 0;
  double memory_bytes_per_second = 0;
  double fp32_flops = 0, fp64_flops = 0, tf32_flops = 0, fp16_flops = 0;  // a second; the last two of mma.sync
  // Architectures that this build has code for ({80, 86, ...}), and that of its PTX (0: none); empty: not known, taken
  // as everything (plans for GPUs that are not there).
  std::vector<int> built_for;
  int built_ptx = 0;
};

const std::vector<GpuCaps>& named_gpus();         // A100, RTX 3090, RTX 4090, H100, H200, B200
const GpuCaps* find_gpu(const std::string& name);  // by name, case and spaces ignored; nullptr: unknown

// One kernel that can be launched: a family's configuration for one op.
struct GpuKernel {
  const char* name;  // tucker_conv2d_sm80_128x64: op, family, pixels x columns
  Op op;
  const char* family;  // simt, sm80
  int config;          // index into the family's configurations (geometry.h)
  Config shape;
  int first_architecture;   // runs from here on
  const char* verified_on;  // GPUs that have run it right, or "" (then it is checked before its first use)
};
const std::vector<GpuKernel>& gpu_kernels();  // the table, kernel_table.inc

// Cuts `problem` for `kernel`: the tile, stages and splits of lowest predicted time, or a reason why it cannot run.
struct GpuCandidate {
  Plan plan;
  std::string reason;  // empty: it can run
};
GpuCandidate plan_kernel(const Problem& problem, const GpuKernel& kernel, const GpuCaps& caps);
// The same with a given cut, for tests that walk over tiles: tile_n, tile_h, tile_w, stages, splits.
Geometry geometry_of(const Problem& problem, int tile_n, int tile_h, int tile_w, int stages, int splits);

Decision plan_gpu(const Problem& problem, const GpuCaps& caps, Policy policy);

}  // namespace lowrank_ops
