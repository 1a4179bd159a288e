// The policy that decides between the fused kernels and the chain, and what "measure" has learned.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "plan/cpu/planner.h"

namespace lowrank_ops {

Policy policy();
void set_policy(Policy policy);
Policy parse_policy(const std::string& name);

// One way to run a problem; `seconds` runs it and says how long it took, however the device is timed.
struct Candidate {
  std::string name;  // a kernel's, "fused" or "chain"
  std::function<double()> seconds;
};

// How many problems calls under "measure" remember: the oldest make place for others, as programs whose shapes never
// repeat must not fill the memory. Those of a file are all remembered: who loads it has chosen them.
constexpr size_t kMostMeasurements = 4096;

// What "measure" remembers of a problem on a device.
struct Measurement {
  std::string key, fastest;
  std::vector<std::pair<std::string, double>> seconds;  // of each candidate
};

// A CPU with the instruction set and the threads in use, on which timings depend.
std::string in_words(const CpuCaps& caps);
// A problem and where it runs, as text: the key of a measurement. `device` names everything that may change the winner.
std::string measurement_key(const Problem& problem, const std::string& device);
// The index of the candidate to run: the fastest of an earlier measurement, if it is among the candidates, or else of
// this one, which times each candidate once and is then remembered.
size_t measured_choice(const std::string& key, const std::vector<Candidate>& candidates);
std::optional<std::string> measured_fastest(const std::string& key);

// Whether to run the chain under "measure" on a CPU: both run on the caller's own tensors, three times, the first
// untimed, the faster of the others counts.
bool chain_measures_faster(const Problem& problem, const CpuCaps& caps, const std::function<void()>& fused,
                           const std::function<void()>& chain);
// What "measure" has found so far for a problem on a CPU: whether the chain was faster.
std::optional<bool> measured_chain_faster(const Problem& problem, const CpuCaps& caps);

// All of them, to be written to a file, and what was read from one.
std::vector<Measurement> measurements();
void remember_measurements(std::vector<Measurement> measurements);
size_t forget_measurements();  // how many there were

}  // namespace lowrank_ops
