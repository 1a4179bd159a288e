// choose_cpu for every call: a problem is planned once and remembered.
#include "plan/cpu/planner.h"
#include "plan/plan_cache.h"

namespace lowrank_ops {
namespace {

PlanCache<CpuChoice>& plans() {
  static PlanCache<CpuChoice> instance;
  return instance;
}

}  // namespace

std::shared_ptr<const CpuChoice> cached_choose_cpu(const Problem& problem, const CpuCaps& caps, Policy policy,
                                                   bool prepared) {
  // Names every member, so that one more does not compile before it is in the key. The CPU's name is for the reader.
  const auto& [isa, name, l2, l3, threads, bfloat16_dot, amx, winograd_auto, winograd, teams] = caps;
  const PlanKey key(
      problem,
      {l2, l3, threads, bfloat16_dot, amx, winograd_auto, int64_t(winograd), int64_t(teams), int64_t(policy), prepared},
      isa);
  return plans().get(key, [&] { return choose_cpu(problem, caps, policy, prepared); });
}

int64_t cpu_plans_made() {
  return plans().made();
}

}  // namespace lowrank_ops
