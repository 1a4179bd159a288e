// The search for a kernel's cut: it compares all tiles worth trying, with every number of slots and every split.
#pragma once

#include "plan/gpu/planner.h"

namespace lowrank_ops {

struct FoundCut {
  Geometry geometry;               // the cut of lowest predicted time; stages = 0: nothing fits
  int64_t least_shared_bytes = 0;  // where nothing fits: the bytes that the smallest cut needs
  bool too_many_ctas = false;      // where nothing fits: shared memory suffices, but the grid is too large
};
FoundCut search_cut(const Problem& problem, const GpuKernel& kernel, const GpuCaps& caps);

}  // namespace lowrank_ops
