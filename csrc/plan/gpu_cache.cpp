// plan_gpu for every call: a plan is searched for once a problem and remembered.
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "plan/gpu.h"

namespace lowrank_ops {
namespace {

// Everything of a Problem that a plan depends on, as numbers.
struct Key {
  int64_t values[26];
  bool operator==(const Key& other) const { return std::memcmp(values, other.values, sizeof values) == 0; }
};

Key key_of(const Problem& p, int device, Policy policy) {
  return {{int64_t(p.op),
           int64_t(p.dtype),
           int64_t(p.layout),
           p.n,
           p.s,
           p.h,
           p.w,
           p.t,
           p.r1,
           p.r2,
           p.kh,
           p.kw,
           p.stride[0],
           p.stride[1],
           p.padding[0],
           p.padding[1],
           p.dilation[0],
           p.dilation[1],
           int64_t(p.activation),
           p.tf32,
           p.input_vector,
           p.factor_vector,
           p.output_vector,
           p.repeats,
           device,
           int64_t(policy)}};
}

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (const int64_t value : key.values) {  // FNV-1a on words, with a mix of the high bits
      hash = (hash ^ uint64_t(value)) * 0x100000001b3ull;
      hash ^= hash >> 29;
    }
    return size_t(hash);
  }
};

// Above this many the cache starts anew: programs whose shapes never repeat must not fill the memory. A decision takes
// about 5 KB.
constexpr size_t kMostPlans = 4096;

struct Shared {
  std::shared_mutex mutex;
  std::unordered_map<Key, std::shared_ptr<const Decision>, Hash> plans;
  int64_t made = 0;
  int only = -1;
  std::unordered_map<int, std::vector<std::string>> refused;  // by device
};
Shared& shared() {
  static Shared instance;
  return instance;
}

GpuRestrictions restrictions_locked(const Shared& state, int device) {
  const auto found = state.refused.find(device);
  return {state.only, found == state.refused.end() ? std::vector<std::string>() : found->second};
}

}  // namespace

std::shared_ptr<const Decision> cached_plan_gpu(const Problem& problem, const GpuCaps& caps, int device,
                                                Policy policy) {
  Shared& state = shared();
  const Key key = key_of(problem, device, policy);
  {
    const std::shared_lock<std::shared_mutex> lock(state.mutex);
    const auto found = state.plans.find(key);
    if (found != state.plans.end()) return found->second;
  }
  // Planned under the lock: restrictions cannot change in between, and no shape is planned twice.
  const std::unique_lock<std::shared_mutex> lock(state.mutex);
  const auto found = state.plans.find(key);
  if (found != state.plans.end()) return found->second;
  if (state.plans.size() >= kMostPlans) state.plans.clear();
  ++state.made;
  auto made = std::make_shared<const Decision>(plan_gpu(problem, caps, policy, restrictions_locked(state, device)));
  state.plans.emplace(key, made);
  return made;
}

int64_t gpu_plans_made() {
  Shared& state = shared();
  const std::shared_lock<std::shared_mutex> lock(state.mutex);
  return state.made;
}

bool force_gpu_kernel(const std::string& name) {
  const int index = gpu_kernel_index(name);
  if (index < 0 && !name.empty()) return false;
  Shared& state = shared();
  const std::unique_lock<std::shared_mutex> lock(state.mutex);
  state.only = index;
  state.plans.clear();
  return true;
}

std::string forced_gpu_kernel() {
  Shared& state = shared();
  const std::shared_lock<std::shared_mutex> lock(state.mutex);
  return state.only < 0 ? "" : gpu_kernels()[size_t(state.only)].name;
}

void refuse_gpu_kernel(int device, int kernel, const std::string& reason) {
  Shared& state = shared();
  const std::unique_lock<std::shared_mutex> lock(state.mutex);
  std::vector<std::string>& refused = state.refused[device];
  refused.resize(gpu_kernels().size());
  refused[size_t(kernel)] = reason;
  state.plans.clear();
}

GpuRestrictions gpu_restrictions(int device) {
  Shared& state = shared();
  const std::shared_lock<std::shared_mutex> lock(state.mutex);
  return restrictions_locked(state, device);
}

}  // namespace lowrank_ops
