// The ops on CPU tensors: check, plan, run.
#include <torch/library.h>

#include "cpu/cpu.h"
#include "cpu/isa.h"
#include "ops/checks.h"
#include "ops/policy.h"
#include "ops/problem_of.h"

namespace lowrank_ops {
namespace {

using c10::IntArrayRef;
using c10::string_view;

// Runs the fused kernel or the chain, as the plan says. `is_prepared`: all that the fused kernel needs is packed.
template <typename Fused, typename Chain>
at::Tensor run(const Problem& problem, bool is_prepared, const Fused& fused, const Chain& chain) {
  const CpuCaps caps = cpu_caps();
  const Policy chosen_policy = policy();
  const std::shared_ptr<const CpuPlan> choice = cached_cpu_plan(problem, caps, chosen_policy, is_prepared);
  const auto run_fused = [&] { return fused(choice->tile); };
  const bool take_chain = chosen_policy == Policy::kMeasure && choice->other_possible
                              ? chain_measures_faster(
                                    problem, measured_caps(caps, is_prepared), [&] { run_fused(); }, [&] { chain(); })
                              : choice->chain;
  return take_chain ? chain() : run_fused();
}

// An image (core) of one column seen as one of one row (column_as_row), and an image of one row as one of one column,
// with the strides of a dense tensor of its format.
at::Tensor as_row(const at::Tensor& image) {
  const int64_t length = image.size(2), step = image.stride(2);
  return image.as_strided({image.size(0), image.size(1), 1, length},
                          {image.stride(0), image.stride(1), length * step, step});
}
// Its window has one column, or both axes are exchanged: a view either way.
at::Tensor core_as_row(const at::Tensor& core) {
  return core.size(3) == 1 ? as_row(core) : core.transpose(2, 3);
}
at::Tensor as_column(const at::Tensor& image) {
  const int64_t step = image.stride(3);
  return image.as_strided({image.size(0), image.size(1), image.size(3), 1},
                          {image.stride(0), image.stride(1), step, step});
}

at::Tensor tucker(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                  const at::Tensor& out_factor, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
                  IntArrayRef dilation, string_view activation_name, const at::Tensor* packed) {
  const Window window{stride, padding, dilation};
  check_tucker(input, in_factor, core, out_factor, bias, window);
  const Activation activation = parse_activation("tucker_conv2d", activation_name);
  const Problem problem = as_fused(tucker_problem(input, core, out_factor, window, activation));
  Prepared prepared = packed ? prepared_for(*packed, in_factor, &core, out_factor) : Prepared{};
  if (problem.column && core.size(3) > 1) prepared.forget_core();
  return run(
      problem, prepared && packed_covers(problem),
      [&](const CpuTile& tile) {
        return problem.column ? as_column(tucker_cpu(as_row(input), in_factor, core_as_row(core), out_factor, bias,
                                                     problem, tile, prepared))
                              : tucker_cpu(input, in_factor, core, out_factor, bias, problem, tile, prepared);
      },
      [&] { return tucker_chain(input, in_factor, core, out_factor, bias, window, activation); });
}

at::Tensor cp(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
              const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
              IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, string_view activation_name,
              const at::Tensor* packed) {
  const Window window{stride, padding, dilation};
  check_cp(input, in_factor, height_factor, width_factor, out_factor, bias, window);
  const Activation activation = parse_activation("cp_conv2d", activation_name);
  const Problem problem = as_fused(cp_problem(input, height_factor, width_factor, out_factor, window, activation));
  const Prepared prepared = packed ? prepared_for(*packed, in_factor, nullptr, out_factor) : Prepared{};
  return run(
      problem, bool(prepared),
      [&](const CpuTile& tile) {
        return problem.column
                   ? as_column(cp_cpu(as_row(input), in_factor, width_factor, height_factor, out_factor, bias, problem,
                                      tile, prepared))
                   : cp_cpu(input, in_factor, height_factor, width_factor, out_factor, bias, problem, tile, prepared);
      },
      [&] { return cp_chain(input, in_factor, height_factor, width_factor, out_factor, bias, window, activation); });
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                  const OptionalTensor& bias, string_view activation_name, const at::Tensor* packed) {
  check_linear(input, in_factor, out_factor, bias);
  const Activation activation = parse_activation("lowrank_linear", activation_name);
  const Problem problem = linear_problem(input, out_factor, activation);
  const Prepared prepared = packed ? prepared_for(*packed, in_factor, nullptr, out_factor) : Prepared{};
  return run(
      problem, bool(prepared),
      [&](const CpuTile& tile) { return linear_cpu(input, in_factor, out_factor, bias, problem, tile, prepared); },
      [&] { return linear_chain(input, in_factor, out_factor, bias, activation); });
}

at::Tensor tucker_conv2d(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                         const at::Tensor& out_factor, const OptionalTensor& bias, IntArrayRef stride,
                         IntArrayRef padding, IntArrayRef dilation, string_view activation) {
  return tucker(input, in_factor, core, out_factor, bias, stride, padding, dilation, activation, nullptr);
}

at::Tensor tucker_conv2d_prepared(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                                  const at::Tensor& out_factor, const OptionalTensor& bias, IntArrayRef stride,
                                  IntArrayRef padding, IntArrayRef dilation, string_view activation,
                                  const at::Tensor& packed) {
  return tucker(input, in_factor, core, out_factor, bias, stride, padding, dilation, activation, &packed);
}

at::Tensor cp_conv2d(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                     const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                     IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, string_view activation) {
  return cp(input, in_factor, height_factor, width_factor, out_factor, bias, stride, padding, dilation, activation,
            nullptr);
}

at::Tensor cp_conv2d_prepared(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                              const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                              IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, string_view activation,
                              const at::Tensor& packed) {
  return cp(input, in_factor, height_factor, width_factor, out_factor, bias, stride, padding, dilation, activation,
            &packed);
}

at::Tensor lowrank_linear(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                          const OptionalTensor& bias, string_view activation) {
  return linear(input, in_factor, out_factor, bias, activation, nullptr);
}

at::Tensor lowrank_linear_prepared(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                                   const OptionalTensor& bias, string_view activation, const at::Tensor& packed) {
  return linear(input, in_factor, out_factor, bias, activation, &packed);
}

}  // namespace

TORCH_LIBRARY_IMPL(lowrank_ops, CPU, m) {
  m.impl("tucker_conv2d", &tucker_conv2d);
  m.impl("cp_conv2d", &cp_conv2d);
  m.impl("lowrank_linear", &lowrank_linear);
  m.impl("tucker_conv2d_prepared", &tucker_conv2d_prepared);
  m.impl("cp_conv2d_prepared", &cp_conv2d_prepared);
  m.impl("lowrank_linear_prepared", &lowrank_linear_prepared);
}

}  // namespace lowrank_ops
