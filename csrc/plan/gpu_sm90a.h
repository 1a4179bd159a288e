// The planner's part of the sm90a kernels (kernels/tucker_sm90a.cuh): what they take, their one cut, what they cost.
// Plain C++17.
#pragma once

#include <string>

#include "kernels/tucker_sm90a.h"
#include "plan/gpu_cost.h"

namespace lowrank_ops {

bool is_sm90a(const GpuKernel& kernel);
// Why the kernel cannot take a problem, on any GPU; "": it can.
std::string sm90a_reason(const Problem& problem);
// The cut: tiles of 8x8 pixels, and as many slots as shared memory holds. `bytes` is what the smallest needs; above
// TuckerSm90a::kMostBytes there is no cut.
Geometry sm90a_cut(const Problem& problem, int64_t& bytes);
int64_t sm90a_ctas(const Geometry& geometry, const GpuCaps& caps);
FusedFeatures sm90a_features(const Geometry& geometry, const GpuCaps& caps);
// Multiplications and additions, padding and halos included.
double sm90a_flops(const Geometry& geometry);

}  // namespace lowrank_ops
