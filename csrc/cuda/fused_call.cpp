#include "cuda/fused_call.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>

#include "ops/chain.h"
#include "ops/problem_of.h"

namespace lowrank_ops {
namespace {

using at::Tensor;

// The widest copies, in bytes, of neighbouring elements along `axis` of a tensor. The elements have to lie side by
// side, and each row of them has to start at a multiple of that width and have a multiple of it. Otherwise one
// element's width.
int64_t copy_width(const Tensor& tensor, int64_t axis) {
  const int64_t element = tensor.element_size();
  if (tensor.size(axis) > 1 && tensor.stride(axis) != 1) return element;
  const uintptr_t address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  for (const int64_t width : {kVectorBytes, 8, 4}) {
    if (width <= element) break;
    bool fits = address % uintptr_t(width) == 0 && tensor.size(axis) * element % width == 0;
    for (int64_t other = 0; other < tensor.dim(); ++other)
      fits = fits && (other == axis || tensor.size(other) == 1 || tensor.stride(other) * element % width == 0);
    if (fits) return width;
  }
  return element;
}

// The kernels copy the R1 values of a tap together. Where these lie apart, as in a contiguous core, one small copy in
// front of the kernel puts them side by side: if each CTA gathered single elements, that would take longer than the
// rest.
bool needs_packing(const Tensor& core) {
  return core.size(1) > 1 && core.stride(1) != 1;
}

int64_t core_width(const Tensor& core) {
  if (!needs_packing(core)) return copy_width(core, 1);
  const int64_t bytes = core.size(1) * core.element_size();
  for (const int64_t width : {kVectorBytes, 8, 4})
    if (width > core.element_size() && bytes % width == 0) return width;
  return core.element_size();
}

// Whether an axis of a tensor has a stride of 0, or rows of channels (axis 1) that lie side by side overlap.
bool repeats_elements(const Tensor& tensor) {
  const bool side_by_side = tensor.size(1) > 1 && tensor.stride(1) == 1;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    const int64_t least = axis != 1 && side_by_side ? tensor.size(1) : 1;
    if (tensor.size(axis) > 1 && tensor.stride(axis) < least) return true;
  }
  return false;
}

Factor factor_of(const Tensor& matrix) {
  Factor factor;
  factor.data = matrix.const_data_ptr();
  factor.row_stride = matrix.stride(0);
  factor.column_stride = matrix.stride(1);
  factor.vector = int(copy_width(matrix, 1));
  return factor;
}

// [R, taps] along one axis of the window.
Factor depthwise_factor(const Tensor& matrix, int axis) {
  Factor factor;
  factor.data = matrix.const_data_ptr();
  factor.row_stride = matrix.stride(0);
  factor.tap_stride[axis] = matrix.stride(1);
  factor.vector = int(matrix.element_size());
  return factor;
}

Factor core_factor(const Tensor& core) {
  Factor factor;
  factor.data = core.const_data_ptr();
  factor.row_stride = core.stride(0);
  factor.column_stride = core.stride(1);
  factor.tap_stride[0] = core.stride(2);
  factor.tap_stride[1] = core.stride(3);
  factor.vector = int(copy_width(core, 1));
  return factor;
}

std::atomic<cudaError_t> failing{cudaSuccess};
std::atomic<int> most_ctas{0};

using Launcher = cudaError_t (*)(const BlockParams&, DType, int, cudaStream_t);

// Null: this build has no launcher of that family.
Launcher launcher_of(const GpuKernel& kernel) {
  const bool sm80 = kernel.family == Family::kSm80, sm90a = kernel.family == Family::kSm90a;
  switch (kernel.op) {
    case Op::kTucker:
      return sm90a ? launch_tucker_sm90a : sm80 ? launch_tucker_sm80 : launch_tucker_simt;
    case Op::kCP:
      return sm90a ? launch_cp_sm90a : sm80 ? launch_cp_sm80 : launch_cp_simt;
    case Op::kLinear:
      return sm90a ? launch_linear_sm90a : sm80 ? launch_linear_sm80 : launch_linear_simt;
  }
  return nullptr;
}

}  // namespace

FusedCall::FusedCall(const char* caller, const OpCall& call, const PaddedFactors* padded)
    : caller_(caller),
      given_(call),
      padded_(padded),
      call_(padded ? call_on(call.op, call.input, *padded, call.bias, call.window, call.activation) : call),
      problem_(problem_of(call)) {
  const OpCall& t = call_;
  problem_.prepared = padded != nullptr;
  problem_.tf32 = problem_.dtype == DType::kFloat && tf32_allowed(problem_.op);
  problem_.input_vector = copy_width(t.input, 1);
  problem_.factor_vector = std::min(copy_width(t.in_factor, 1), copy_width(t.out_factor, 1));
  if (t.core.defined()) problem_.factor_vector = std::min(problem_.factor_vector, core_width(t.core));
  problem_.repeats = repeats_elements(t.input) || repeats_elements(t.in_factor) || repeats_elements(t.out_factor) ||
                     (t.core.defined() && !needs_packing(t.core) && repeats_elements(t.core));
  // The output is a new tensor: dense, aligned to any vector.
  const bool by_pixel = problem_.op == Op::kLinear || problem_.layout == Layout::kChannelsLast;
  const bool side_by_side = by_pixel || problem_.oh * problem_.ow == 1;
  const int64_t bytes = problem_.t * t.input.element_size();
  problem_.output_vector = side_by_side && bytes % kVectorBytes == 0 ? kVectorBytes : t.input.element_size();
}

Tensor FusedCall::run_chain() const {
  if (!merges_depthwise(problem_)) return chain(given_);
  return padded_ ? merged_cp_chain(given_, padded_->taps) : merged_cp_chain(given_);
}

Tensor FusedCall::empty_output() const {
  const Tensor& input = call_.input;
  if (problem_.op == Op::kLinear) return at::empty({problem_.n, problem_.t}, input.options());
  return at::empty({problem_.n, problem_.t, problem_.oh, problem_.ow},
                   input.options().memory_format(input.suggest_memory_format()));
}

Launch FusedCall::prepare(const Geometry& geometry, const Tensor& output) const {
  const OpCall& t = call_;
  Launch result;
  result.output = output;
  result.core = t.core.defined() && needs_packing(t.core) ? t.core.contiguous(at::MemoryFormat::ChannelsLast) : t.core;
  result.bias = t.bias;
  if (result.bias) result.bias = result.bias->contiguous();
  // The planner counts on the lean kernel, which reads the bias in vectors (kernels/common_case.h).
  if (result.bias && reinterpret_cast<uintptr_t>(result.bias->const_data_ptr()) % kVectorBytes != 0)
    result.bias = result.bias->clone();

  BlockParams& params = result.params;
  params.geometry = geometry;
  if (most_ctas > 0) params.geometry.most_ctas = most_ctas;
  params.input = t.input.const_data_ptr();
  params.output = output.data_ptr();
  // A linear layer is one image of one line, its rows side by side.
  const bool linear = problem_.op == Op::kLinear;
  for (int axis = linear ? 1 : 0; axis < (linear ? 2 : 4); ++axis) {
    params.input_stride[axis] = t.input.stride(axis);
    params.output_stride[axis] = output.stride(axis);
  }
  if (linear) {
    params.input_stride[3] = t.input.stride(0);
    params.output_stride[3] = output.stride(0);
  }
  params.input_vector = int(problem_.input_vector);
  params.output_vector = int(problem_.output_vector);
  params.in_factor = factor_of(t.in_factor);
  params.out_factor = factor_of(t.out_factor);
  if (result.core.defined()) params.core = core_factor(result.core);
  if (t.height_factor.defined()) {
    params.height_factor = depthwise_factor(t.height_factor, 0);
    params.width_factor = depthwise_factor(t.width_factor, 1);
  }
  params.bias = result.bias ? result.bias->const_data_ptr() : nullptr;
  params.activation = problem_.activation;
  return result;
}

cudaError_t FusedCall::launch(const Plan& plan, const Tensor& output, cudaStream_t stream) const {
  const GpuKernel& kernel = gpu_kernels()[size_t(plan.gpu_kernel)];
  const Launcher launcher = launcher_of(kernel);
  if (!launcher) return cudaErrorInvalidDeviceFunction;
  if (failing != cudaSuccess) return failing;
  const Launch prepared = prepare(plan.geometry, output);
  // Torch's guard has chosen the device for torch's CUDA runtime; this is the call for ours.
  const cudaError_t error = cudaSetDevice(device().index());
  return error == cudaSuccess ? launcher(prepared.params, problem_.dtype, kernel.config, stream) : error;
}

Tensor FusedCall::run(const Plan& plan) const {
  const Tensor output = empty_output();
  run(plan, output);
  return output;
}

void FusedCall::run(const Plan& plan, const Tensor& output) const {
  const cudaError_t error = launch(plan, output, current_stream(device()));
  TORCH_CHECK(error == cudaSuccess, failure(plan, error));
}

std::string FusedCall::failure(const Plan& plan, cudaError_t error) const {
  const Geometry& g = plan.geometry;
  return c10::str(
      caller_, ": the CUDA kernel ", plan.kernel, " could not be launched on ", device(), " (", gpu_caps(device()).name,
      "): ", describe(error), ". input ", call_.input.sizes(), " of ", call_.input.scalar_type(), ", strides ",
      call_.input.strides(), padded_ ? "; prepared in_factor " : "; in_factor ", call_.in_factor.sizes(),
      ", out_factor ", call_.out_factor.sizes(), ", kernel ", problem_.kh, "x", problem_.kw, ". Plan: ", g.tile_n,
      " images x ", g.rows.tile, "x", g.columns.tile, " pixels a tile, ", g.stages, " stages, ", g.splits, " splits, ",
      plan.ctas, " CTAs in clusters of ", g.cluster, ", of ", plan.threads, " threads, ", plan.shared_bytes,
      " bytes of shared memory. ",
      is_refusal(error) ? ""
                        : "An error of earlier work on this GPU can show here: CUDA_LAUNCH_BLOCKING=1 finds "
                          "where. ",
      "set_policy('chain') runs without this kernel");
}

bool is_refusal(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:  // also: a tensor map that the driver does not make
    case cudaErrorInvalidConfiguration:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorMemoryAllocation:  // the kernel's code is loaded at its first launch
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidKernelImage:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorNotSupported:
    case cudaErrorInvalidClusterSize:
      return true;
    default:
      return false;
  }
}

void fail_launches(cudaError_t error) {
  failing = error;
}

void limit_ctas(int ctas) {
  most_ctas = ctas;
}

}  // namespace lowrank_ops
