// The ops on CPU tensors: check, plan, run.
#include <torch/library.h>

#include "cpu/cpu.h"
#include "cpu/isa.h"
#include "ops/chain.h"
#include "ops/checks.h"
#include "ops/dispatch.h"
#include "ops/policy.h"
#include "ops/problem_of.h"

namespace lowrank_ops {
namespace {

// Views for calls that are turned (column_as_row). An image [N, C, H, 1] as [N, C, 1, H], with the strides that a dense
// tensor of its memory format has.
at::Tensor as_row(const at::Tensor& image) {
  const int64_t length = image.size(2), step = image.stride(2);
  return image.as_strided({image.size(0), image.size(1), 1, length},
                          {image.stride(0), image.stride(1), length * step, step});
}
// The core with its axes exchanged, for the same images; a view.
at::Tensor core_as_row(const at::Tensor& core) {
  return core.size(3) == 1 ? as_row(core) : core.transpose(2, 3);
}
at::Tensor as_column(const at::Tensor& image) {
  const int64_t step = image.stride(3);
  return image.as_strided({image.size(0), image.size(1), image.size(3), 1},
                          {image.stride(0), image.stride(1), step, step});
}

// The fused kernel. Images of one column are turned into images of one row, and back (Problem::column): the two axes of
// the window are exchanged.
at::Tensor run_fused(const OpCall& call, const Problem& problem, const CpuTile& tile, const Prepared& prepared) {
  if (call.op == Op::kLinear) return linear_cpu(call, problem, tile, prepared);
  const auto kernel = call.op == Op::kTucker ? tucker_cpu : cp_cpu;
  if (!problem.column) return kernel(call, problem, tile, prepared);
  const at::Tensor row = as_row(call.input), core = call.core.defined() ? core_as_row(call.core) : call.core;
  const OpCall turned{.op = call.op,
                      .input = row,
                      .in_factor = call.in_factor,
                      .core = core,
                      .height_factor = call.width_factor,
                      .width_factor = call.height_factor,
                      .out_factor = call.out_factor,
                      .bias = call.bias,
                      .window = {},  // `problem` has it
                      .activation = call.activation};
  return as_column(kernel(turned, problem, tile, prepared));
}

// Runs the fused kernel or the chain, as the plan says. `packed`: weights packed before (prepared.h), or nullptr.
at::Tensor run(const OpCall& call, const at::Tensor* packed) {
  check(call);
  const Problem problem = as_fused(problem_of(call));
  Prepared prepared = packed ? prepared_for(*packed, call) : Prepared{};
  if (call.op == Op::kTucker && problem.column && call.core.size(3) > 1) prepared.forget_core();
  const bool is_prepared = prepared && packed_covers(problem);
  const CpuCaps caps = cpu_caps();
  const Policy chosen_policy = policy();
  const std::shared_ptr<const CpuPlan> plan = cached_cpu_plan(problem, caps, chosen_policy, is_prepared);
  const auto fused = [&] { return run_fused(call, problem, plan->tile, prepared); };
  const bool take_chain = chosen_policy == Policy::kMeasure && plan->other_possible
                              ? chain_measures_faster(
                                    problem, measured_caps(caps, is_prepared), [&] { fused(); }, [&] { chain(call); })
                              : plan->chain;
  return take_chain ? chain(call) : fused();
}

at::Tensor run_plain(const OpCall& call) {
  return run(call, nullptr);
}

}  // namespace

TORCH_LIBRARY_IMPL(lowrank_ops, CPU, m) {
  for_each_op([&m](auto op) {
    using O = decltype(op);
    m.impl(O::name, &ForwardKernel<run_plain, O>::call);
    m.impl(O::prepared_name, &PreparedKernel<run, O>::call);
  });
}

}  // namespace lowrank_ops
