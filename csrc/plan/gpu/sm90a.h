// The planner's part of the sm90a kernels (cuda/kernels/tucker_sm90a.cuh, tucker_wide_sm90a.cuh, cp_sm90a.cuh,
// linear_sm90a.cuh): the problems that they take, their cuts, their costs. Plain C++17.
#pragma once

#include <string>

#include "plan/gpu/cost.h"
#include "plan/gpu/cp_sm90a.h"
#include "plan/gpu/linear_sm90a.h"
#include "plan/gpu/tucker_sm90a.h"
#include "plan/gpu/tucker_wide_sm90a.h"

namespace lowrank_ops {

bool is_sm90a(const GpuKernel& kernel);
bool is_wide_sm90a(const GpuKernel& kernel);
// Why the kernel cannot take a problem, on any GPU; "": it can.
std::string sm90a_reason(const Problem& problem, const GpuKernel& kernel);
// The cut: the kernel's fixed tile, and as many slots of the ring as fit into shared memory. Where even the fewest
// slots do not fit, sm90a_bytes of the cut exceeds the shared memory. The linear kernel's splits, and clusters, are
// left to the search.
Geometry sm90a_cut(const Problem& problem, const GpuKernel& kernel);
int sm90a_bytes(const GpuKernel& kernel, const Geometry& geometry);
int sm90a_threads(const GpuKernel& kernel);
// The most CTAs of a cluster (Geometry::cluster) that a kernel can form of so many tiles on such a GPU: 1 or 2.
int sm90a_most_cluster(const GpuKernel& kernel, int64_t tiles, const GpuCaps& caps);
int64_t sm90a_ctas(const Geometry& geometry, const GpuCaps& caps);
// How many tiles the busiest warpgroup computes one after the other (two warpgroups share each tile of CP and linear).
int64_t sm90a_turns(const GpuKernel& kernel, const Geometry& geometry, const GpuCaps& caps);
FusedFeatures sm90a_features(const GpuKernel& kernel, const Geometry& geometry, const GpuCaps& caps);
// Multiplications and additions of all tiles, padding and halos included.
double sm90a_flops(const GpuKernel& kernel, const Geometry& geometry);

}  // namespace lowrank_ops
