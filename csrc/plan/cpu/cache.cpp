// The cache of CPU plans: a problem is planned once.
#include "plan/cpu/planner.h"
#include "plan/plan_cache.h"

namespace lowrank_ops {
namespace {

PlanCache<CpuPlan>& plans() {
  static PlanCache<CpuPlan> instance;
  return instance;
}

}  // namespace

std::shared_ptr<const CpuPlan> cached_cpu_plan(const Problem& problem, const CpuCaps& caps, Policy policy,
                                               bool prepared) {
  // Names every member, so that a new one does not compile before it is added to the key. The CPU's name is not part of
  // it: plans do not depend on it.
  const auto& [isa, name, l2, l3, threads, bfloat16_dot, amx, winograd_auto, winograd, teams] = caps;
  const PlanKey key(
      problem,
      {l2, l3, threads, bfloat16_dot, amx, winograd_auto, int64_t(winograd), int64_t(teams), int64_t(policy), prepared},
      isa);
  return plans().get(key, [&] { return make_cpu_plan(problem, caps, policy, prepared); });
}

int64_t cpu_plans_made() {
  return plans().made();
}

}  // namespace lowrank_ops
