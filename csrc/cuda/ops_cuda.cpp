// The ops on CUDA tensors: check, plan, run.
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cuda/fused_call.h"
#include "cuda/measure.h"
#include "cuda/verify.h"
#include "ops/checks.h"
#include "ops/policy.h"
#include "ops/problem_of.h"

namespace lowrank_ops {
namespace {

using c10::IntArrayRef;
using c10::string_view;
using Chain = std::function<at::Tensor()>;

bool is_fused(const Plan& plan) {
  return plan.path == "fused";
}

bool may_run(const FusedCall& call, const Plan& plan) {
  return !is_fused(plan) || is_verified(call.device(), plan.gpu_kernel, call.problem().dtype, call.problem().tf32);
}

// Under "measure": the plan that is fastest here, timed now unless it is known. Candidates far beyond the best
// prediction are not tried. While a graph is captured nothing can be timed: what is known, or else the prediction.
const Plan& measured_plan(const FusedCall& call, const Decision& decision, const Chain& chain, cudaStream_t stream,
                          bool capturing) {
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
    candidates.push_back({plan->kernel, [&call, &chain, plan, stream] {
                            return gpu_seconds(stream, [&] { is_fused(*plan) ? call.run(*plan) : chain(); });
                          }});
  return *plans[measured_choice(key, candidates)];
}

// Policy "fused" on a GPU that this build has no code for: nothing else would ever run there, so say how to get it.
// Where single shapes have no kernel, "fused" runs the chain, and explain() says why.
void check_architecture(const FusedCall& call, const Decision& decision) {
  const GpuCaps& caps = gpu_caps(call.device());
  for (const Rejection& rejection : decision.rejections) {
    TORCH_CHECK(!rejection.no_code, call.op(), ": policy 'fused' finds no code for ", call.device(), " (", caps.name,
                ") in this build of lowrank_ops: ", rejection.reason);
  }
}

// Of a problem whose chain runs in CUDA graphs only: whether it is to run now. Its library calls must have run before a
// graph can record them (they search for algorithms then), so the first call outside of a graph runs it as well.
bool chain_for_graphs(const SharedDecision& decision, bool captured, const Chain& chain) {
  if (captured) return decision.chain_ran.load();
  if (!decision.chain_ran.exchange(true)) chain();
  return false;
}

// Runs the fused kernel or the chain, as the plan says. A kernel is checked before its first use (verify.h); while a
// CUDA graph is captured that is impossible, and the chain runs instead: run once outside, as for any library op.
at::Tensor run(const FusedCall& call, const Chain& chain) {
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

  // Under "measure" every candidate has to be right. A kernel that is not leaves the next decision: this ends.
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

  const Plan& plan = measure ? measured_plan(call, *decision, chain, stream, captured) : decision->chosen;
  if (is_fused(plan) && may_run(call, plan)) {
    if (!measure && decision->chain_in_graphs && chain_for_graphs(*decision, captured, chain)) return chain();
    return call.run(plan);
  }
  if (chosen_policy == Policy::kFused && !is_fused(plan)) check_architecture(call, *decision);
  return chain();
}

at::Tensor tucker_conv2d(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                         const at::Tensor& out_factor, const OptionalTensor& bias, IntArrayRef stride,
                         IntArrayRef padding, IntArrayRef dilation, string_view activation_name) {
  constexpr const char* op = "tucker_conv2d";
  const Window window{stride, padding, dilation};
  check_tucker(input, in_factor, core, out_factor, bias, window);
  const Activation activation = parse_activation(op, activation_name);
  return run({op,
              {input, in_factor, core, {}, {}, out_factor, bias},
              tucker_problem(input, core, out_factor, window, activation)},
             [&] { return tucker_chain(input, in_factor, core, out_factor, bias, window, activation); });
}

at::Tensor cp_conv2d(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                     const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                     IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, string_view activation_name) {
  constexpr const char* op = "cp_conv2d";
  const Window window{stride, padding, dilation};
  check_cp(input, in_factor, height_factor, width_factor, out_factor, bias, window);
  const Activation activation = parse_activation(op, activation_name);
  const Problem problem = cp_problem(input, height_factor, width_factor, out_factor, window, activation);
  const auto chain = merges_depthwise(problem) ? merged_cp_chain : cp_chain;
  return run({op, {input, in_factor, {}, height_factor, width_factor, out_factor, bias}, problem}, [&] {
    return chain(input, in_factor, height_factor, width_factor, out_factor, bias, window, activation);
  });
}

at::Tensor lowrank_linear(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                          const OptionalTensor& bias, string_view activation_name) {
  constexpr const char* op = "lowrank_linear";
  check_linear(input, in_factor, out_factor, bias);
  const Activation activation = parse_activation(op, activation_name);
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes.back() = out_factor.size(0);
  const at::Tensor rows = input.reshape({-1, in_factor.size(1)});  // a view, unless the leading axes do not merge
  return run({op, {rows, in_factor, {}, {}, {}, out_factor, bias}, linear_problem(rows, out_factor, activation)},
             [&] { return linear_chain(rows, in_factor, out_factor, bias, activation); })
      .view(sizes);
}

}  // namespace

TORCH_LIBRARY_IMPL(lowrank_ops, CUDA, m) {
  m.impl("tucker_conv2d", &tucker_conv2d);
  m.impl("cp_conv2d", &cp_conv2d);
  m.impl("lowrank_linear", &lowrank_linear);
}

}  // namespace lowrank_ops
