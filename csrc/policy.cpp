#include "policy.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <vector>

namespace lowrank_ops {
namespace {

std::atomic<Policy> current{Policy::kAuto};

using Key = std::vector<int64_t>;
std::mutex measured_mutex;
std::map<Key, bool> measured;  // key -> the chain was faster

Key key_of(const Problem& p, const CpuCaps& caps) {
  return {int64_t(p.op),
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
          caps.threads};
}

double seconds(const std::function<void()>& run) {
  double best = 1e30;
  for (int i = 0; i < 3; ++i) {  // the first warms caches and generated code
    const auto start = std::chrono::steady_clock::now();
    run();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    if (i > 0) best = std::min(best, taken.count());
  }
  return best;
}

}  // namespace

Policy policy() {
  return current.load(std::memory_order_relaxed);
}
void set_policy(Policy policy) {
  current.store(policy);
}

Policy parse_policy(const std::string& name) {
  if (name == "auto") return Policy::kAuto;
  if (name == "fused") return Policy::kFused;
  if (name == "chain") return Policy::kChain;
  if (name == "measure") return Policy::kMeasure;
  TORCH_CHECK_VALUE(false, "set_policy: policy must be one of auto, fused, chain, measure, got '", name, "'");
}

const char* name_of(Policy policy) {
  switch (policy) {
    case Policy::kAuto:
      return "auto";
    case Policy::kFused:
      return "fused";
    case Policy::kChain:
      return "chain";
    case Policy::kMeasure:
      return "measure";
  }
  return "";
}

std::optional<bool> measured_chain_faster(const Problem& problem, const CpuCaps& caps) {
  const std::lock_guard<std::mutex> lock(measured_mutex);
  const auto found = measured.find(key_of(problem, caps));
  return found == measured.end() ? std::nullopt : std::optional<bool>(found->second);
}

bool chain_measures_faster(const Problem& problem, const CpuCaps& caps, const std::function<void()>& fused,
                           const std::function<void()>& chain) {
  if (const std::optional<bool> known = measured_chain_faster(problem, caps)) return *known;
  const bool verdict = seconds(chain) < seconds(fused);
  const std::lock_guard<std::mutex> lock(measured_mutex);
  return measured.emplace(key_of(problem, caps), verdict).first->second;
}

void forget_measurements() {
  const std::lock_guard<std::mutex> lock(measured_mutex);
  measured.clear();
}

}  // namespace lowrank_ops
