// The ops on CUDA tensors: check, plan, run.
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cuda/fused_call.h"
#include "cuda/measure.h"
#include "cuda/verify.h"
#include "ops/checks.h"
#include "ops/dispatch.h"
#include "ops/policy.h"

namespace lowrank_ops {
namespace {

bool is_fused(const Plan& plan) {
  return plan.path == Path::kFused;
}

bool may_run(const FusedCall& call, const Plan& plan) {
  return !is_fused(plan) || is_verified(call.device(), plan.gpu_kernel, call.problem().dtype, call.problem().tf32);
}

// Under "measure": the plan that is fastest here, timed now unless it is known. Candidates far beyond the best
// prediction are not tried. While a graph is captured nothing can be timed: what is known, or else the prediction.
const Plan& measured_plan(const FusedCall& call, const Decision& decision, cudaStream_t stream, bool capturing) {
  constexpr double kHopeless = 5;  // times the best prediction: further off than the cost model ever should be
  double best = decision.chosen.predicted_seconds;
  for (const Plan& plan : decision.others) best = std::min(best, plan.predicted_seconds);
  std::vector<const Plan*> plans{&decision.chosen};
  for (const Plan& plan : decision.others)
    if (!is_fused(plan) || plan.predicted_seconds <= kHopeless * best) plans.push_back(&plan);
  const std::string key = measurement_key(call.problem(), gpu_caps(call.device()).name);
  if (capturing) {
    const std::optional<std::string> fastest = measured_fastest(key);
    const auto found =
        std::find_if(plans.begin(), plans.end(), [&](const Plan* plan) { return plan->kernel == fastest; });
    return found == plans.end() ? decision.chosen : **found;
  }
  std::vector<Candidate> candidates;
  for (const Plan* plan : plans)
    candidates.push_back({plan->kernel, [&call, plan, stream] {
                            return gpu_seconds(stream, [&] { is_fused(*plan) ? call.run(*plan) : call.run_chain(); });
                          }});
  return *plans[measured_choice(key, candidates)];
}

// Raises under the policy "fused" on a GPU that this build has no code for: the chain alone would ever run there, and
// the message has the remedy. Where single shapes have no kernel, "fused" runs the chain, and explain() has the reason.
void check_architecture(const FusedCall& call, const Decision& decision) {
  const GpuCaps& caps = gpu_caps(call.device());
  for (const Rejection& rejection : decision.rejections) {
    TORCH_CHECK(!rejection.no_code, call.caller(), ": policy 'fused' finds no code for ", call.device(), " (",
                caps.name, ") in this build of lowrank_ops: ", rejection.reason);
  }
}

// Whether to run the chain now, for a problem whose chain runs in CUDA graphs only. Its library calls must have run
// before a graph can record them (they search for algorithms then), so the first call outside of a graph runs it as
// well.
bool chain_for_graphs(const FusedCall& call, const SharedDecision& decision, bool captured) {
  if (captured) return decision.chain_ran.load();
  if (!decision.chain_ran.exchange(true)) call.run_chain();
  return false;
}

// Runs the plan's kernel. Where the driver refuses the launch, the kernel is left out from now on, and the chain runs;
// under the policy "fused" that is an exception.
at::Tensor run_fused(const FusedCall& call, const Plan& plan, cudaStream_t stream) {
  const at::Tensor output = call.empty_output();
  const cudaError_t error = call.launch(plan, output, stream);
  if (error == cudaSuccess) return output;
  TORCH_CHECK(is_refusal(error) && policy() != Policy::kFused && forced_gpu_kernel().empty(),
              call.failure(plan, error));
  refuse_gpu_kernel(call.device().index(), plan.gpu_kernel, "its launch failed: " + describe(error));
  TORCH_WARN("lowrank_ops: ", call.failure(plan, error),
             ". The kernel is left out in this process, and the chain of library ops runs. Please report this line.");
  return call.run_chain();
}

// Runs the fused kernel or the chain, as the plan says. A kernel is checked before its first use (verify.h); while a
// CUDA graph is captured that is impossible, and the chain runs instead: run once outside, as for any library op.
at::Tensor run(const FusedCall& call) {
  const c10::DeviceGuard guard(call.device());
  const Problem& problem = call.problem();
  if (problem.n == 0) return call.empty_output();
  const int index = call.device().index();
  const GpuCaps& caps = gpu_caps(call.device());
  const Policy chosen_policy = policy();
  const bool measure = chosen_policy == Policy::kMeasure && forced_gpu_kernel().empty();
  std::shared_ptr<const SharedDecision> decision = cached_plan_gpu(problem, caps, index, chosen_policy);
  const cudaStream_t stream = current_stream(call.device());
  const bool captured =
      (measure || decision->chain_in_graphs || !may_run(call, decision->chosen)) && is_capturing(stream);

  // Under "measure" each candidate has to be right. The next decision leaves out a kernel that is not: the loop ends.
  const auto unchecked = [&]() -> const Plan* {
    if (!may_run(call, decision->chosen)) return &decision->chosen;
    for (const Plan& plan : decision->others)
      if (measure && !may_run(call, plan)) return &plan;
    return nullptr;
  };
  while (!captured) {
    const Plan* plan = unchecked();
    if (!plan) break;
    verify(call.device(), plan->gpu_kernel, problem.dtype, problem.tf32);
    decision = cached_plan_gpu(problem, caps, index, chosen_policy);
  }

  const Plan& plan = measure ? measured_plan(call, *decision, stream, captured) : decision->chosen;
  if (is_fused(plan) && may_run(call, plan)) {
    if (!measure && decision->chain_in_graphs && chain_for_graphs(call, *decision, captured)) return call.run_chain();
    return run_fused(call, plan, stream);
  }
  if (chosen_policy == Policy::kFused && !is_fused(plan)) check_architecture(call, *decision);
  return call.run_chain();
}

// `packed`: factors prepared before (padded_factors.h), or nullptr.
at::Tensor run_call(const OpCall& call, const at::Tensor* packed) {
  check(call);
  const PaddedFactors* padded = packed ? padded_factors_for(*packed, call) : nullptr;
  if (call.op != Op::kLinear) return run({name_of(call.op), call, padded});
  std::vector<int64_t> sizes = call.input.sizes().vec();
  sizes.back() = call.out_factor.size(0);
  // A view, unless the leading axes do not merge.
  const at::Tensor rows = call.input.reshape({-1, call.in_factor.size(1)});
  return run({name_of(call.op), with_input(call, rows), padded}).view(sizes);
}

at::Tensor run_plain(const OpCall& call) {
  return run_call(call, nullptr);
}

}  // namespace

TORCH_LIBRARY_IMPL(lowrank_ops, CUDA, m) {
  for_each_op([&m](auto op) {
    using O = decltype(op);
    m.impl(O::name, &ForwardKernel<run_plain, O>::call);
    m.impl(O::prepared_name, &PreparedKernel<run_call, O>::call);
  });
}

}  // namespace lowrank_ops
