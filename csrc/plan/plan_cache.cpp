#include "plan/plan_cache.h"

#include <algorithm>
#include <functional>
#include <utility>

namespace lowrank_ops {
namespace {

// Names every member, so that a new one does not compile before it is added here. `oh` and `ow` follow from the others.
std::array<int64_t, PlanKey::kOfProblem> numbers_of(const Problem& problem) {
  const auto& [op, dtype, layout, n, s, h, w, t, oh, ow, r1, r2, kh, kw, stride, padding, dilation, activation, tf32,
               input_vector, factor_vector, output_vector, repeats, prepared, column] = problem;
  return {int64_t(op),
          int64_t(dtype),
          int64_t(layout),
          n,
          s,
          h,
          w,
          t,
          r1,
          r2,
          kh,
          kw,
          stride[0],
          stride[1],
          padding[0],
          padding[1],
          dilation[0],
          dilation[1],
          int64_t(activation),
          tf32,
          input_vector,
          factor_vector,
          output_vector,
          repeats,
          prepared,
          column};
}

}  // namespace

PlanKey::PlanKey(const Problem& problem, const std::array<int64_t, kFurther>& further, std::string name)
    : name(std::move(name)) {
  const std::array<int64_t, kOfProblem> of_problem = numbers_of(problem);
  std::copy(further.begin(), further.end(), std::copy(of_problem.begin(), of_problem.end(), numbers.begin()));
}

size_t PlanKeyHash::operator()(const PlanKey& key) const {
  uint64_t hash = std::hash<std::string>()(key.name);
  for (const int64_t value : key.numbers) {  // FNV-1a on words, with a mix of the high bits
    hash = (hash ^ uint64_t(value)) * 0x100000001b3ull;
    hash ^= hash >> 29;
  }
  return size_t(hash);
}

}  // namespace lowrank_ops
