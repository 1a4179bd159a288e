// How a kernel should cut a problem: all tiles worth trying, with every depth of the ring buffer and every split.
#pragma once

#include "plan/gpu/planner.h"

namespace lowrank_ops {

struct FoundCut {
  Geometry geometry;               // of the lowest predicted time; no stages: nothing fits
  int64_t least_shared_bytes = 0;  // where nothing fits: what the smallest cut needs
  bool too_many_ctas = false;      // where nothing fits: memory would do, the grid is too large
};
FoundCut search_cut(const Problem& problem, const GpuKernel& kernel, const GpuCaps& caps);

}  // namespace lowrank_ops
