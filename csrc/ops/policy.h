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

// One way to run a problem. `seconds` runs it and returns the time that it took on its device.
struct Candidate {
  std::string name;  // a kernel's, "fused" or "chain"
  std::function<double()> seconds;
};

// Calls under "measure" remember so many problems and forget the oldest first: programs whose shapes never repeat must
// not fill the memory. Those of a file are all remembered: its user has chosen them.
constexpr size_t kMostMeasurements = 4096;

// The result of "measure" for a problem on a device.
struct Measurement {
  std::string key, fastest;
  std::vector<std::pair<std::string, double>> seconds;  // of each candidate
};

// A CPU with the instruction set and the threads in use, on which timings depend.
std::string in_words(const CpuCaps& caps);
// The key of a measurement: a problem and where it runs, as text. `device` names all that may change the winner.
std::string measurement_key(const Problem& problem, const std::string& device);
// The index of the candidate to run: the fastest of an earlier measurement, if it is among the candidates. Otherwise
// each candidate is timed once, and the result is remembered.
size_t measured_choice(const std::string& key, const std::vector<Candidate>& candidates);
std::optional<std::string> measured_fastest(const std::string& key);
std::optional<Measurement> measurement_of(const std::string& key);

// Whether to run the chain under "measure" on a CPU: both run on the caller's own tensors, three times, the first
// untimed, the faster of the others counts.
bool chain_measures_faster(const Problem& problem, const CpuCaps& caps, const std::function<void()>& fused,
                           const std::function<void()>& chain);
// Whether the chain was faster in an earlier measurement of a problem on a CPU; nullopt: there was none.
std::optional<bool> measured_chain_faster(const Problem& problem, const CpuCaps& caps);

// All measurements, to be written to a file, and those read from one.
std::vector<Measurement> measurements();
void remember_measurements(std::vector<Measurement> measurements);
size_t forget_measurements();  // how many there were

}  // namespace lowrank_ops
