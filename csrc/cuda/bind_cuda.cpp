#include "cuda/bind_cuda.h"

#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <array>
#include <limits>
#include <utility>
#include <vector>

#include "cuda/fused_call.h"
#include "cuda/verify.h"
#include "ops/checks.h"
#include "plan/gpu/sm90a.h"

namespace lowrank_ops {
namespace {

using Windows = std::array<std::vector<int64_t>, 3>;  // stride, padding, dilation
using Cut = std::array<int, 6>;                       // tile_n, tile_h, tile_w, stages, splits, cluster

// A call and one kernel with a given cut, whatever the planner would take.
struct PlannedCall {
  FusedCall call;
  Plan plan;
};

const GpuKernel& kernel_named(const char* caller, const std::string& name) {
  const int index = gpu_kernel_index(name);
  TORCH_CHECK_VALUE(index >= 0, caller, ": no kernel is called '", name, "'");
  return gpu_kernels()[size_t(index)];
}

// The kernels of sm90a take the planner's cut, with fewer stages, other splits of linear layers and other clusters.
void check_sm90a(const char* caller, const GpuKernel& kernel, const Cut& cut, const Problem& problem) {
  const std::string reason = sm90a_reason(problem, kernel);
  TORCH_CHECK_VALUE(reason.empty(), caller, ": ", kernel.name, " ", reason);
  const Geometry planned = sm90a_cut(problem, kernel);
  const int splits = problem.op == Op::kLinear ? linear_sm90a_layout(planned).chunks : 1;
  const int cluster = problem.op == Op::kTucker ? 1 : 2;
  TORCH_CHECK_VALUE(cut[0] == planned.tile_n && cut[1] == planned.rows.tile && cut[2] == planned.columns.tile &&
                        cut[3] >= 2 && cut[3] <= planned.stages && cut[4] <= splits && cut[5] <= cluster,
                    caller, ": ", kernel.name, " takes tiles of 1x", planned.rows.tile, "x", planned.columns.tile,
                    ", 2 to ", planned.stages, " stages, splits up to ", splits, " and clusters up to ", cluster,
                    " here, got ", cut[0], "x", cut[1], "x", cut[2], ", ", cut[3], ", ", cut[4], ", ", cut[5]);
}

// `packed`: factors prepared for the call (padded_factors.h), or none.
PlannedCall plan_call(const char* caller, const GpuKernel& kernel, const Cut& cut, const OpCall& arguments,
                      const OptionalTensor& packed) {
  TORCH_CHECK_VALUE(*std::min_element(cut.begin(), cut.end()) >= 1, caller,
                    ": each number of the cut must be at least 1, got ", c10::ArrayRef<int>(cut));
  check(arguments);
  FusedCall call(caller, arguments, packed ? padded_factors_for(*packed, arguments) : nullptr);
  const Problem problem = kernel_problem(call.problem());
  if (is_sm90a(kernel))
    check_sm90a(caller, kernel, cut, problem);
  else
    TORCH_CHECK_VALUE(cut[5] == 1, caller, ": ", kernel.name, " forms no clusters: cluster must be 1, got ", cut[5]);
  Plan plan;
  plan.path = Path::kFused;
  plan.kernel = kernel.name;
  plan.gpu_kernel = gpu_kernel_index(kernel.name);
  plan.geometry = geometry_of(problem, cut[0], cut[1], cut[2], cut[3], cut[4], cut[5]);
  plan.threads = threads_of(kernel);
  plan.ctas = plan.geometry.ctas();
  plan.shared_bytes = layout_of(problem, kernel, plan.geometry).bytes;
  return {std::move(call), std::move(plan)};
}

// `run`, a function of a PlannedCall, as a function of Python: a kernel's name, its cut, a call whose factors are None
// where its op has none of that name, and the packed factors or None.
template <typename Run>
void bind_with_call(py::module_& m, const char* caller, const Run& run) {
  m.def(caller,
        [caller, run](const std::string& name, const Cut& cut, const at::Tensor& input, const at::Tensor& in_factor,
                      const OptionalTensor& core, const OptionalTensor& height_factor,
                      const OptionalTensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                      const Windows& windows, const std::string& activation, const OptionalTensor& packed) {
          const GpuKernel& kernel = kernel_named(caller, name);
          const bool needs_core = kernel.op == Op::kTucker, needs_axes = kernel.op == Op::kCP;
          TORCH_CHECK_VALUE((core || !needs_core) && ((height_factor && width_factor) || !needs_axes), caller, ": ",
                            name, " needs the factors of its op");
          const at::Tensor no, rows = kernel.op == Op::kLinear ? input.flatten(0, -2) : input;
          const Factors factors{in_factor, core.value_or(no), height_factor.value_or(no), width_factor.value_or(no),
                                out_factor};
          const OpCall call = call_on(kernel.op, rows, factors, bias, {windows[0], windows[1], windows[2]},
                                      parse_activation(caller, activation));
          return run(kernel, cut, call, packed);
        });
}

// Launches the kernel on the input's GPU, into an output that is full of NaN before (for tests) or not (for timing).
at::Tensor launch(const char* caller, const GpuKernel& kernel, const Cut& cut, const OpCall& call,
                  const OptionalTensor& packed, bool poison) {
  TORCH_CHECK_VALUE(call.input.is_cuda(), caller, ": input must be on a GPU, got ", call.input.device());
  const c10::DeviceGuard guard(call.input.device());
  const PlannedCall planned = plan_call(caller, kernel, cut, call, packed);
  const at::Tensor output = planned.call.empty_output();
  if (poison) output.fill_(std::numeric_limits<double>::quiet_NaN());
  planned.call.run(planned.plan, output);
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

// The parameters that the kernel would get, on any device: for the simulator.
py::dict describe_launch(const GpuKernel& kernel, const Cut& cut, const OpCall& call, const OptionalTensor& packed) {
  const PlannedCall planned = plan_call("describe_launch", kernel, cut, call, packed);
  const Launch launch = planned.call.prepare(planned.plan.geometry, planned.call.empty_output());
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
  const Problem& problem = planned.call.problem();
  result["planned_vectors"] = std::vector<int64_t>{problem.input_vector, problem.factor_vector, problem.output_vector};
  result["output_tensor"] = launch.output;
  // The tensors that the pointers point into.
  result["kept"] = py::make_tuple(call.input, launch.core.defined() ? py::cast(launch.core) : py::none(), launch.bias);
  return result;
}

// The error that the check before first use finds, on a result that is wrong in one channel when `damaged`.
std::string check_gpu_kernel(const std::string& name, const std::string& dtype, bool tf32, int device, bool damaged) {
  kernel_named("check_gpu_kernel", name);
  TORCH_CHECK_VALUE(present_gpu(device), "check_gpu_kernel: device must be the index of a GPU, got ", device);
  for (const DType known : {DType::kFloat, DType::kDouble, DType::kBFloat16, DType::kHalf})
    if (dtype == name_of(known))
      return find_error({c10::DeviceType::CUDA, c10::DeviceIndex(device)}, gpu_kernel_index(name), known, tf32,
                        damaged);
  TORCH_CHECK_VALUE(false, "check_gpu_kernel: unknown dtype '", dtype, "'");
}

}  // namespace

void bind_cuda(py::module_& m) {
  bind_with_call(m, "launch_gpu_kernel",
                 [](const GpuKernel& kernel, const Cut& cut, const OpCall& call, const OptionalTensor& packed) {
                   return launch("launch_gpu_kernel", kernel, cut, call, packed, /*poison=*/true);
                 });
  bind_with_call(m, "run_gpu_kernel",
                 [](const GpuKernel& kernel, const Cut& cut, const OpCall& call, const OptionalTensor& packed) {
                   return launch("run_gpu_kernel", kernel, cut, call, packed, /*poison=*/false);
                 });
  bind_with_call(m, "describe_launch", &describe_launch);
  m.def("check_gpu_kernel", &check_gpu_kernel);
  m.def("fail_gpu_launches", [](int error) { fail_launches(cudaError_t(error)); });
  m.def("limit_gpu_ctas", &limit_ctas);
  m.def("is_launch_refusal", [](int error) { return is_refusal(cudaError_t(error)); });
}

}  // namespace lowrank_ops
