// The policy that decides between the fused kernels and the chain, and what "measure" has learned.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "plan/plan.h"

namespace lowrank_ops {

Policy policy();
void set_policy(Policy policy);
Policy parse_policy(const std::string& name);
const char* name_of(Policy policy);

// Whether to run the chain under "measure": each candidate is timed once a problem and thread count (both run on the
// caller's own tensors, three times, the first untimed, the faster of the others counts), the verdict is remembered for
// the life of the process.
bool chain_measures_faster(const Problem& problem, const CpuCaps& caps, const std::function<void()>& fused,
                           const std::function<void()>& chain);
// What "measure" has found so far for a problem: whether the chain was faster.
std::optional<bool> measured_chain_faster(const Problem& problem, const CpuCaps& caps);
void forget_measurements();

}  // namespace lowrank_ops
