#include "ops/policy.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <initializer_list>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <vector>

namespace lowrank_ops {
namespace {

std::atomic<Policy> current{Policy::kAuto};

// A measurement and its place in time: `number` counts up, so that the lowest is the oldest.
struct Remembered {
  Measurement measurement;
  int64_t number;
};
std::shared_mutex measured_mutex;
std::map<std::string, Remembered> measured;
int64_t next_number = 0;

// The caller holds the lock.
void remember(Measurement measurement) {
  const std::string key = measurement.key;
  measured[key] = {std::move(measurement), next_number++};
}

// Forgets the oldest measurement first where there would be too many. The search for it takes far less time than the
// measurement took.
void remember_in_place_of_oldest(Measurement measurement) {
  const std::unique_lock<std::shared_mutex> lock(measured_mutex);
  if (measured.size() >= kMostMeasurements && measured.count(measurement.key) == 0) {
    const auto older = [](const auto& one, const auto& other) { return one.second.number < other.second.number; };
    measured.erase(std::min_element(measured.begin(), measured.end(), older));
  }
  remember(std::move(measurement));
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

std::string in_words(const CpuCaps& caps) {
  return caps.name + ", " + caps.isa + " kernels, " + std::to_string(caps.threads) +
         (caps.threads == 1 ? " thread" : " threads");
}

Policy policy() {
  return current.load(std::memory_order_relaxed);
}
void set_policy(Policy policy) {
  current.store(policy);
}

Policy parse_policy(const std::string& name) {
  constexpr std::array<Policy, 4> kPolicies{Policy::kAuto, Policy::kFused, Policy::kChain, Policy::kMeasure};
  std::string names;
  for (const Policy known : kPolicies) {
    if (name == name_of(known)) return known;
    names += (names.empty() ? "" : ", ") + std::string(name_of(known));
  }
  TORCH_CHECK_VALUE(false, "set_policy: policy must be one of ", names, ", got '", name, "'");
}

std::string measurement_key(const Problem& p, const std::string& device) {
  std::string key = device;
  key += "; ";
  key += name_of(p.op);
  key += ' ';
  key += name_of(p.dtype);
  key += p.tf32 ? " tf32" : "";
  key += p.layout == Layout::kChannelsLast ? " channels_last" : "";
  const auto sizes = [&](const char* what, std::initializer_list<int64_t> values) {
    key += ' ';
    key += what;
    char separator = ' ';
    for (const int64_t value : values) {
      key += separator;
      key += std::to_string(value);
      separator = 'x';
    }
  };
  sizes("input", {p.n, p.s, p.h, p.w});
  sizes("channels", {p.t});
  sizes("ranks", {p.r1, p.r2});
  sizes("kernel", {p.kh, p.kw});
  sizes("stride", {p.stride[0], p.stride[1]});
  sizes("padding", {p.padding[0], p.padding[1]});
  sizes("dilation", {p.dilation[0], p.dilation[1]});
  sizes("activation", {int64_t(p.activation)});
  if (p.input_vector + p.factor_vector + p.output_vector > 0)  // GPUs: what the tensors' strides allow
    sizes("copies", {p.input_vector, p.factor_vector, p.output_vector});
  if (p.repeats) sizes("repeats", {1});
  if (p.prepared) key += " prepared weights";
  return key;
}

std::optional<Measurement> measurement_of(const std::string& key) {
  const std::shared_lock<std::shared_mutex> lock(measured_mutex);
  const auto found = measured.find(key);
  return found == measured.end() ? std::nullopt : std::optional<Measurement>(found->second.measurement);
}

std::optional<std::string> measured_fastest(const std::string& key) {
  const std::shared_lock<std::shared_mutex> lock(measured_mutex);
  const auto found = measured.find(key);
  return found == measured.end() ? std::nullopt : std::optional<std::string>(found->second.measurement.fastest);
}

size_t measured_choice(const std::string& key, const std::vector<Candidate>& candidates) {
  TORCH_INTERNAL_ASSERT(!candidates.empty(), "measure: no candidates for ", key);
  if (candidates.size() == 1) return 0;
  if (const std::optional<std::string> fastest = measured_fastest(key))
    for (size_t i = 0; i < candidates.size(); ++i)
      if (candidates[i].name == *fastest) return i;
  Measurement measurement{key, "", {}};
  size_t best = 0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    measurement.seconds.emplace_back(candidates[i].name, candidates[i].seconds());
    if (measurement.seconds[i].second < measurement.seconds[best].second) best = i;
  }
  measurement.fastest = candidates[best].name;
  remember_in_place_of_oldest(std::move(measurement));
  return best;
}

std::optional<bool> measured_chain_faster(const Problem& problem, const CpuCaps& caps) {
  const std::optional<std::string> fastest = measured_fastest(measurement_key(problem, in_words(caps)));
  return fastest ? std::optional<bool>(*fastest == name_of(Path::kChain)) : std::nullopt;
}

bool chain_measures_faster(const Problem& problem, const CpuCaps& caps, const std::function<void()>& fused,
                           const std::function<void()>& chain) {
  const std::vector<Candidate> candidates = {{name_of(Path::kFused), [&] { return seconds(fused); }},
                                             {name_of(Path::kChain), [&] { return seconds(chain); }}};
  return candidates[measured_choice(measurement_key(problem, in_words(caps)), candidates)].name ==
         name_of(Path::kChain);
}

std::vector<Measurement> measurements() {
  const std::shared_lock<std::shared_mutex> lock(measured_mutex);
  std::vector<Measurement> result;
  for (const auto& [key, remembered] : measured) result.push_back(remembered.measurement);
  return result;
}

void remember_measurements(std::vector<Measurement> measurements) {
  const std::unique_lock<std::shared_mutex> lock(measured_mutex);
  for (Measurement& measurement : measurements) remember(std::move(measurement));
}

size_t forget_measurements() {
  const std::unique_lock<std::shared_mutex> lock(measured_mutex);
  const size_t forgotten = measured.size();
  measured.clear();
  return forgotten;
}

}  // namespace lowrank_ops
