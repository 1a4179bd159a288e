// A cache of plans, so that a problem is planned once. Plain C++17.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>

#include "plan/problem.h"

namespace lowrank_ops {

// Everything that a plan depends on: the problem, further numbers (the planner's figures of the machine, the policy),
// and a name.
struct PlanKey {
  static constexpr size_t kOfProblem = 26, kFurther = 10;
  std::array<int64_t, kOfProblem + kFurther> numbers;
  std::string name;

  PlanKey(const Problem& problem, const std::array<int64_t, kFurther>& further, std::string name = {});
  bool operator==(const PlanKey& other) const { return numbers == other.numbers && name == other.name; }
};
struct PlanKeyHash {
  size_t operator()(const PlanKey& key) const;
};

// Thread-safe. Forgets all plans when there are `kMostPlans`: programs whose shapes never repeat must not fill the
// memory.
template <typename Plan>
class PlanCache {
 public:
  static constexpr size_t kMostPlans = 4096;

  // The plan of this key; make() is called where there is none yet.
  template <typename Make>
  std::shared_ptr<const Plan> get(const PlanKey& key, const Make& make) {
    {
      const std::shared_lock<std::shared_mutex> lock(mutex_);
      if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
    }
    // Made under the lock, so that no problem is planned twice and no change() comes in between.
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
    if (plans_.size() >= kMostPlans) plans_.clear();
    ++made_;
    auto plan = std::make_shared<const Plan>(make());
    plans_.emplace(key, plan);
    return plan;
  }

  // Runs `change`, which changes something that plans depend on besides their keys, and forgets all plans.
  template <typename Change>
  void change(const Change& change) {
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    change();
    plans_.clear();
  }
  // Runs `read` while no `change` runs.
  template <typename Read>
  auto read(const Read& read) const {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    return read();
  }

  int64_t made() const {
    return read([&] { return made_; });
  }

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<PlanKey, std::shared_ptr<const Plan>, PlanKeyHash> plans_;
  int64_t made_ = 0;
};

}  // namespace lowrank_ops
