#include "cuda/bind_cuda.h"

#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "cuda/fused_call.h"
#include "cuda/verify.h"
#include "ops/checks.h"
#include "ops/problem_of.h"
#include "plan/gpu/sm90a.h"

namespace lowrank_ops {
namespace {

using Windows = std::array<std::vector<int64_t>, 3>;  // stride, padding, dilation

// A call and one kernel with a given cut (tile_n, tile_h, tile_w, stages, splits), whatever the planner would take.
struct Chosen {
  FusedCall call;
  Plan plan;
};

Chosen choose(const char* op, const std::string& name, std::array<int, 5> cut, const at::Tensor& input,
              const at::Tensor& in_factor, const OptionalTensor& core, const OptionalTensor& height_factor,
              const OptionalTensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
              const Windows& windows, const std::string& activation_name) {
  Plan plan;
  plan.path = "fused";
  plan.kernel = name;
  plan.gpu_kernel = gpu_kernel_index(name);
  TORCH_CHECK_VALUE(plan.gpu_kernel >= 0, op, ": no kernel is called '", name, "'");
  TORCH_CHECK_VALUE(*std::min_element(cut.begin(), cut.end()) >= 1, op,
                    ": each number of the cut must be at least 1, got ", c10::ArrayRef<int>(cut));
  const GpuKernel& kernel = gpu_kernels()[size_t(plan.gpu_kernel)];
  const Window window{windows[0], windows[1], windows[2]};
  const Activation activation = parse_activation(op, activation_name);
  const at::Tensor rows = kernel.op == Op::kLinear ? input.flatten(0, -2) : input;
  TORCH_CHECK_VALUE(
      kernel.op == Op::kTucker ? core.has_value() : kernel.op != Op::kCP || (height_factor && width_factor), op, ": ",
      name, " needs the factors of its op");
  Problem problem;
  if (kernel.op == Op::kTucker) {
    check_tucker(input, in_factor, *core, out_factor, bias, window);
    problem = tucker_problem(input, *core, out_factor, window, activation);
  } else if (kernel.op == Op::kCP) {
    check_cp(input, in_factor, *height_factor, *width_factor, out_factor, bias, window);
    problem = cp_problem(input, *height_factor, *width_factor, out_factor, window, activation);
  } else {
    check_linear(input, in_factor, out_factor, bias);
    problem = linear_problem(rows, out_factor, activation);
  }
  const auto given = [](const OptionalTensor& tensor) { return tensor ? *tensor : at::Tensor(); };
  FusedCall call(op, {rows, in_factor, given(core), given(height_factor), given(width_factor), out_factor, bias},
                 problem);
  plan.geometry = geometry_of(call.problem(), cut[0], cut[1], cut[2], cut[3], cut[4]);
  if (is_sm90a(kernel)) {  // these rely on the planner
    const std::string reason = sm90a_reason(call.problem(), kernel);
    TORCH_CHECK_VALUE(reason.empty(), op, ": ", name, " ", reason);
    const Geometry planned = sm90a_cut(call.problem(), kernel);
    TORCH_CHECK_VALUE(cut[0] == planned.tile_n && cut[1] == planned.rows.tile && cut[2] == planned.columns.tile &&
                          cut[3] >= 2 && cut[3] <= planned.stages && cut[4] == 1,
                      op, ": ", name, " takes tiles of 1x", planned.rows.tile, "x", planned.columns.tile, ", 2 to ",
                      planned.stages, " stages and 1 split here, got ", cut[0], "x", cut[1], "x", cut[2], ", ", cut[3],
                      ", ", cut[4]);
  }
  plan.threads = threads_of(kernel);
  plan.ctas = plan.geometry.ctas();
  plan.shared_bytes = layout_of(call.problem(), kernel, plan.geometry).bytes;
  return {std::move(call), std::move(plan)};
}

// Launches it on the input's GPU, into an output that is full of NaN before (for tests) or not (for timing).
template <bool poison, typename... Arguments>
at::Tensor launch_gpu_kernel(const std::string& name, std::array<int, 5> cut, const at::Tensor& input,
                             const Arguments&... arguments) {
  constexpr const char* op = "launch_gpu_kernel";
  TORCH_CHECK_VALUE(input.is_cuda(), op, ": input must be on a GPU, got ", input.device());
  const c10::DeviceGuard guard(input.device());
  const Chosen chosen = choose(op, name, cut, input, arguments...);
  const at::Tensor output = chosen.call.empty_output();
  if (poison) output.fill_(std::numeric_limits<double>::quiet_NaN());
  chosen.call.run(chosen.plan, output);
  return output;
}

py::dict describe(const Factor& factor) {
  py::dict result;
  result["data"] = reinterpret_cast<uintptr_t>(factor.data);
  result["row_stride"] = factor.row_stride;
  result["column_stride"] = factor.column_stride;
  result["tap_stride"] = std::vector<int64_t>(factor.tap_stride, factor.tap_stride + 2);
  result["vector"] = factor.vector;
  return result;
}

// What the kernel would be told, on any device: for the simulator.
template <typename... Arguments>
py::dict describe_launch(const std::string& name, std::array<int, 5> cut, const at::Tensor& input,
                         const Arguments&... arguments) {
  const Chosen chosen = choose("describe_launch", name, cut, input, arguments...);
  const Launch launch = chosen.call.prepare(chosen.plan.geometry, chosen.call.empty_output());
  const BlockParams& p = launch.params;
  const auto strides = [](const int64_t (&values)[4]) { return std::vector<int64_t>(values, values + 4); };
  py::dict result;
  result["input"] = reinterpret_cast<uintptr_t>(p.input);
  result["input_stride"] = strides(p.input_stride);
  result["input_vector"] = p.input_vector;
  result["output_stride"] = strides(p.output_stride);
  result["output_vector"] = p.output_vector;
  result["in_factor"] = describe(p.in_factor);
  result["core"] = describe(p.core);
  result["height_factor"] = describe(p.height_factor);
  result["width_factor"] = describe(p.width_factor);
  result["out_factor"] = describe(p.out_factor);
  result["bias"] = reinterpret_cast<uintptr_t>(p.bias);
  const Problem& problem = chosen.call.problem();
  result["planned_vectors"] = std::vector<int64_t>{problem.input_vector, problem.factor_vector, problem.output_vector};
  result["output_tensor"] = launch.output;
  // What the pointers point into has to live on.
  result["kept"] =
      py::make_tuple(chosen.call.input(), launch.core.defined() ? py::cast(launch.core) : py::none(), launch.bias);
  return result;
}

// The check before first use, on a result that is wrong in one channel when `damaged`: what it finds.
std::string check_gpu_kernel(const std::string& name, const std::string& dtype, bool tf32, int device, bool damaged) {
  const int kernel = gpu_kernel_index(name);
  TORCH_CHECK_VALUE(kernel >= 0, "check_gpu_kernel: no kernel is called '", name, "'");
  TORCH_CHECK_VALUE(present_gpu(device), "check_gpu_kernel: device must be the index of a GPU, got ", device);
  for (const DType known : {DType::kFloat, DType::kDouble, DType::kBFloat16, DType::kHalf})
    if (dtype == name_of(known))
      return find_error({c10::DeviceType::CUDA, c10::DeviceIndex(device)}, kernel, known, tf32, damaged);
  TORCH_CHECK_VALUE(false, "check_gpu_kernel: unknown dtype '", dtype, "'");
}

}  // namespace

void bind_cuda(py::module_& m) {
  using Optional = OptionalTensor;
  m.def("launch_gpu_kernel",
        &launch_gpu_kernel<true, at::Tensor, Optional, Optional, Optional, at::Tensor, Optional, Windows, std::string>);
  m.def(
      "run_gpu_kernel",
      &launch_gpu_kernel<false, at::Tensor, Optional, Optional, Optional, at::Tensor, Optional, Windows, std::string>);
  m.def("describe_launch",
        &describe_launch<at::Tensor, Optional, Optional, Optional, at::Tensor, Optional, Windows, std::string>);
  m.def("check_gpu_kernel", &check_gpu_kernel);
}

}  // namespace lowrank_ops
