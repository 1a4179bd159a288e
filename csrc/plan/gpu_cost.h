// The cost model for GPUs: predicted seconds of a fused kernel and of the chain of library convs. Plain C++17.
//
// A CTA's work is counted phase by phase (first stage; core or depthwise; last stage). A multiprocessor that holds k
// CTAs at a time takes, for each round of k, the longer of two bounds: the sum of their work at the rate of its busiest
// unit, and the time of one CTA alone, whose phases wait for each other and for every chunk's way from L2. All
// constants are estimates from public figures: no GPU has confirmed them yet (gpu_cost.cpp says where each comes from).
// The policy "measure" does not need them.
#pragma once

#include "plan/gpu.h"

namespace lowrank_ops {

// What one CTA does in a phase: the one of a tile's splits that has most.
struct GpuPhase {
  double multiply_flops = 0;  // of matrix products, padding included: every product of a pass is computed
  double depthwise_sums = 0;
  double shared_bytes = 0;    // to and from shared memory, bank conflicts included
  double l2_bytes = 0;        // to and from global memory, in whole sectors
  double copies = 0;          // of single lanes
  double chunks = 0;          // through the ring buffer
  double blocking_loads = 0;  // rounds of copies that a thread waits for: 2-byte elements pass through registers
};
struct GpuWork {
  GpuPhase first, middle, last;
};
// The work does not depend on the stages of the ring buffer, and only its last phase on the splits.
GpuWork gpu_work(const Problem& problem, const GpuKernel& kernel, const Geometry& geometry, const SharedLayout& layout);
GpuPhase last_phase(const Problem& problem, const GpuKernel& kernel, const Geometry& geometry,
                    const SharedLayout& layout);

int ctas_per_multiprocessor(const Problem& problem, const GpuKernel& kernel, const GpuCaps& caps, int64_t shared_bytes);

// Fills in the counts and the predicted time of a plan whose geometry stands.
void cost_fused(Plan& plan, const GpuWork& work, const Problem& problem, const GpuKernel& kernel, const GpuCaps& caps,
                const SharedLayout& layout);
Plan chain_plan(const Problem& problem, const GpuCaps& caps);

}  // namespace lowrank_ops
