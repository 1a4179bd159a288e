// The policy that decides between the fused kernels and the chain, and what "measure" has learned.
#pragma once

#include <functional>
#include <string>

#include "plan/plan.h"

namespace lowrank_ops {

Policy policy();
void set_policy(Policy policy);
Policy parse_policy(const std::string& name);
const char* name_of(Policy policy);

// Whether to run the chain under "measure": each candidate is timed once a problem and thread count (both run on the
// caller's own tensors, twice, the faster time counts), the verdict is remembered for the life of the process.
bool chain_measures_faster(const Problem& problem, const CpuCaps& caps, const std::function<void()>& fused,
                           const std::function<void()>& chain);
void forget_measurements();

}  // namespace lowrank_ops
