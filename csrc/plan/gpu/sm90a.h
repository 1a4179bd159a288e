// The planner's part of the sm90a kernels (kernels/tucker_sm90a.cuh, tucker_wide_sm90a.cuh, cp_sm90a.cuh): what they
// take, their cuts, what they cost. Plain C++17.
#pragma once

#include <string>

#include "plan/gpu/cost.h"
#include "plan/gpu/cp_sm90a.h"
#include "plan/gpu/tucker_sm90a.h"
#include "plan/gpu/tucker_wide_sm90a.h"

namespace lowrank_ops {

bool is_sm90a(const GpuKernel& kernel);
bool is_wide_sm90a(const GpuKernel& kernel);
// Why the kernel cannot take a problem, on any GPU; "": it can.
std::string sm90a_reason(const Problem& problem, const GpuKernel& kernel);
// The cut: the kernel's tile, and as many slots of the ring as shared memory holds, which may be too few.
Geometry sm90a_cut(const Problem& problem, const GpuKernel& kernel);
int sm90a_bytes(const GpuKernel& kernel, const Geometry& geometry);
int sm90a_threads(const GpuKernel& kernel);
int64_t sm90a_ctas(const Geometry& geometry, const GpuCaps& caps);
// How many tiles the busiest warpgroup computes one after the other.
int64_t sm90a_turns(const GpuKernel& kernel, const Geometry& geometry, const GpuCaps& caps);
FusedFeatures sm90a_features(const GpuKernel& kernel, const Geometry& geometry, const GpuCaps& caps);
// Multiplications and additions, padding and halos included.
double sm90a_flops(const GpuKernel& kernel, const Geometry& geometry);

}  // namespace lowrank_ops
