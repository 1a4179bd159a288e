#include "plan/plan.h"

#include "plan/counts.h"

namespace lowrank_ops {

const char* name_of(Op op) {
  return op == Op::kTucker ? "tucker_conv2d" : op == Op::kCP ? "cp_conv2d" : "lowrank_linear";
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat:
      return "float32";
    case DType::kDouble:
      return "float64";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kHalf:
      return "float16";
  }
  return "";
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

const char* name_of(Path path) {
  return path == Path::kFused ? "fused" : "chain";
}

std::string by_policy(Policy policy) {
  return std::string("the policy is \"") + name_of(policy) + "\"";
}

Decision plan_other(const Problem& p, const std::string& why, Policy policy) {
  Decision decision;
  decision.chosen.path = Path::kChain;
  decision.chosen.kernel = "chain of torch ops";
  decision.chosen.flops = block_flops(p);
  decision.chosen.bytes = block_bytes(p) + hidden_bytes(p);
  std::string reason = why;
  if (policy == Policy::kChain) reason = by_policy(policy) + ", and " + why;
  if (policy == Policy::kFused) reason += ": the chain runs although " + by_policy(policy);
  if (policy == Policy::kMeasure) reason += ": there is nothing to measure";
  decision.rejections.push_back({"fused", reason});
  return decision;
}

}  // namespace lowrank_ops
