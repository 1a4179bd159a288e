// plan_gpu for every call: the plan of a problem is searched once and remembered.
#include <unordered_map>

#include "plan/gpu/planner.h"
#include "plan/plan_cache.h"

namespace lowrank_ops {
namespace {

// The state that all calls share. A remembered decision takes about 5 KB.
struct Shared {
  PlanCache<SharedDecision> plans;
  int only = -1;
  std::unordered_map<int, std::vector<std::string>> refused;  // per device: per kernel, the reason
};
Shared& shared() {
  static Shared instance;
  return instance;
}

// Called under the lock of `plans`.
GpuRestrictions restrictions_locked(const Shared& state, int device) {
  const auto found = state.refused.find(device);
  return {state.only, found == state.refused.end() ? std::vector<std::string>() : found->second};
}

}  // namespace

std::shared_ptr<const SharedDecision> cached_plan_gpu(const Problem& problem, const GpuCaps& caps, int device,
                                                      Policy policy) {
  Shared& state = shared();
  return state.plans.get(PlanKey(problem, {device, int64_t(policy)}),
                         [&] { return plan_gpu(problem, caps, policy, restrictions_locked(state, device)); });
}

int64_t gpu_plans_made() {
  return shared().plans.made();
}

bool force_gpu_kernel(const std::string& name) {
  const int index = gpu_kernel_index(name);
  if (index < 0 && !name.empty()) return false;
  Shared& state = shared();
  state.plans.change([&] { state.only = index; });
  return true;
}

std::string forced_gpu_kernel() {
  const Shared& state = shared();
  const int only = state.plans.read([&] { return state.only; });
  return only < 0 ? "" : gpu_kernels()[size_t(only)].name;
}

void refuse_gpu_kernel(int device, int kernel, const std::string& reason) {
  Shared& state = shared();
  state.plans.change([&] {
    std::vector<std::string>& refused = state.refused[device];
    refused.resize(gpu_kernels().size());
    refused[size_t(kernel)] = reason;
  });
}

GpuRestrictions gpu_restrictions(int device) {
  const Shared& state = shared();
  return state.plans.read([&] { return restrictions_locked(state, device); });
}

}  // namespace lowrank_ops
