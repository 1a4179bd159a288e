#include "cuda/verify.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <c10/core/DeviceGuard.h>

#include <array>
#include <atomic>
#include <limits>
#include <mutex>
#include <sstream>
#include <vector>

#include "cuda/fused_call.h"
#include "ops/chain.h"
#include "plan/gpu/sm90a.h"

namespace lowrank_ops {
namespace {

using at::Tensor;

enum class Check : int { kNone, kPassed, kFailed };
std::mutex mutex;  // held during a check: a second thread waits for its result

// The state of a kernel's check on a GPU in a dtype (float32 and tf32 count as two): read at every call, without a
// lock.
std::atomic<Check>& check_of(c10::Device device, int kernel, DType dtype, bool tf32) {
  constexpr size_t kDtypes = 5, kTf32 = 4;
  static std::vector<std::atomic<Check>> known(kMostDevices * gpu_kernels().size() * kDtypes);
  const size_t kind = dtype == DType::kFloat && tf32 ? kTf32 : size_t(dtype);
  return known[(size_t(device.index()) * gpu_kernels().size() + size_t(kernel)) * kDtypes + kind];
}
static_assert(size_t(DType::kHalf) == 3, "kTf32 follows the last dtype");

at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kDouble:
      return at::kDouble;
    case DType::kBFloat16:
      return at::kBFloat16;
    case DType::kHalf:
      return at::kHalf;
    case DType::kFloat:
      break;
  }
  return at::kFloat;
}

// How far the kernel's result may be from the fp64 one, in the Frobenius norm: `magnitude` is the same computed from
// absolute values. No simulated kernel (tests/support/simulator) needs more than a fifth of it on the problems below;
// one channel of 144 that is missing is five times too much in bf16, the coarsest.
double allowed_error(DType dtype, bool tf32, double norm, double magnitude) {
  switch (dtype) {
    case DType::kDouble:
      return std::numeric_limits<double>::epsilon() * magnitude;
    case DType::kBFloat16:
      return 2 * 0x1p-7 * norm;
    case DType::kHalf:
      return 2 * 0x1p-10 * norm;
    case DType::kFloat:
      break;
  }
  return tf32 ? 4 * 0x1p-10 * norm : double(std::numeric_limits<float>::epsilon()) * magnitude;
}

struct TrialTensors {
  Tensor input;
  Factors factors;
  OptionalTensor bias;

  // The same with `change` made to each tensor.
  template <typename Change>
  TrialTensors with(const Change& change) const {
    const auto changed = [&](const Tensor& tensor) { return tensor.defined() ? change(tensor) : tensor; };
    const Factors& f = factors;
    return {.input = changed(input),
            .factors = {changed(f.in_factor), changed(f.core), changed(f.height_factor), changed(f.width_factor),
                        changed(f.out_factor)},
            .bias = changed(*bias)};
  }
};

// The stride and the dilation of a trial's window: none; a stride of 2 along one axis and a dilation of 2 along the
// other; a stride of 2 along both.
enum class Steps { kNone, kStrideOfHeight, kStrideOfWidth, kStrides };

// A small call with more than one tile, pass and chunk of everything, sizes that are no multiples of a tile, and
// borders.
struct Trial {
  TrialTensors tensors;  // on the CPU, fp64, rounded to the dtype
  Op op;
  DType dtype;
  Activation activation;
  Steps steps;

  Window window() const {
    static constexpr int64_t kNone[2] = {1, 1}, kHeight[2] = {2, 1}, kWidth[2] = {1, 2}, kBoth[2] = {2, 2};
    static constexpr int64_t kRows[2] = {1, 0}, kColumns[2] = {0, 1};  // of padding
    switch (steps) {
      case Steps::kNone:
        return {kNone, kRows, kNone};
      case Steps::kStrideOfHeight:
        return {kHeight, kColumns, kWidth};
      case Steps::kStrideOfWidth:
        return {kWidth, kRows, kHeight};
      case Steps::kStrides:
        return {kBoth, kRows, kNone};
    }
    return {};
  }

  // The ranks to try: R2 of Tucker, the only rank of CP and linear. The sm90a linear kernel has three instances.
  static std::vector<int64_t> ranks(const GpuKernel& kernel) {
    if (!is_sm90a(kernel)) return {kernel.shape.persistent ? 16 : 40};
    if (kernel.op == Op::kLinear) return {40, 104, 200};
    return {kernel.op == Op::kCP ? 136 : is_wide_sm90a(kernel) ? 104 : 40};
  }

  Trial(const GpuKernel& kernel, DType dtype, at::MemoryFormat format, Activation activation, int64_t r2, Steps steps)
      : op(kernel.op), dtype(dtype), activation(activation), steps(steps) {
    // The kernels of sm90a stay on their multiprocessor: enough images for a third tile on some, a second slice of S, a
    // third part of CP's ranks; enough rows for a second tile on some. CP takes windows of 3x3 and T in multiples of
    // 32, the wide kernel ranks above 64.
    // The persistent kernel of sm80 keeps all factors in 100 KB of shared memory: one pass over its ranks.
    const bool hopper = is_sm90a(kernel), square = op == Op::kCP && hopper, wide = is_wide_sm90a(kernel);
    const bool small = kernel.shape.persistent;
    constexpr int64_t kh = 3;
    // Input sizes, in the order of Steps, of an output of 9x18 for windows of 3x2.
    constexpr int64_t kHeights[] = {9, 19, 11, 17}, kWidths[] = {19, 18, 37, 37};
    const int64_t h = kHeights[int(steps)], w = kWidths[int(steps)];
    const int64_t rows = hopper ? 17970 : 150;
    const int64_t n = square ? 89 : hopper ? 47 : 3, s = hopper ? 136 : small ? 72 : 40;
    const int64_t t = square ? 160 : small ? 72 : 144, kw = square ? 3 : 2;
    const int64_t r1 = wide ? 72 : small ? 8 : 24;
    const at::Generator generator = at::detail::createCPUGenerator(1234);
    const auto draw = [&](at::IntArrayRef sizes, int64_t summed) {
      const Tensor values = at::randn(sizes, generator, at::dtype(at::kDouble)) / std::sqrt(double(summed));
      return values.to(scalar_type(dtype)).to(at::kDouble);
    };
    const int64_t in_rank = op == Op::kTucker ? r1 : r2;
    tensors.input = op == Op::kLinear ? draw({rows, s}, 1) : draw({n, s, h, w}, 1).contiguous(format);
    Factors& factors = tensors.factors;
    factors.in_factor = draw({in_rank, s}, s);
    factors.out_factor = draw({t, r2}, r2);
    tensors.bias = draw({t}, 4);
    if (op == Op::kTucker) factors.core = draw({r2, r1, kh, kw}, r1 * kh * kw);
    if (op == Op::kCP) {
      factors.height_factor = draw({r2, kh}, kh);
      factors.width_factor = draw({r2, kw}, kw);
    }
  }

  // The call with `given`, which are this trial's tensors or made from them.
  OpCall call(const TrialTensors& given, Activation function) const {
    return call_on(op, given.input, given.factors, given.bias, window(), function);
  }

  Tensor reference() const { return chain(call(tensors, activation)); }
  // The same from absolute values, without the activation.
  Tensor magnitude() const {
    const TrialTensors absolute = tensors.with([](const Tensor& tensor) { return tensor.abs(); });
    return chain(call(absolute, Activation::kNone));
  }

  TrialTensors on(c10::Device device) const {
    return tensors.with(
        [&](const Tensor& tensor) { return tensor.to(tensor.options().device(device).dtype(scalar_type(dtype))); });
  }
};

// What a trial's results are compared with: the fp64 result, and the error that they may have.
struct Expected {
  Tensor exact;
  double norm, allowed;
};

std::string error_of(const FusedCall& call, const Plan& plan, const Expected& expected, bool damaged) {
  const c10::Device device = call.device();
  const Tensor output = call.empty_output().fill_(std::numeric_limits<double>::quiet_NaN());
  const cudaError_t error = call.launch(plan, output, current_stream(device));
  if (error != cudaSuccess) return "its launch failed: " + describe(error);
  if (damaged) output.select(1, 0).zero_();
  const double difference = (output.cpu().to(at::kDouble) - expected.exact).norm().item<double>();
  if (difference <= expected.allowed) return "";  // false for NaN
  std::ostringstream message;
  message << "its result";
  if (plan.geometry.cluster > 1) message << " in clusters of " << plan.geometry.cluster << " CTAs";
  message << " is off by " << difference / expected.norm << " of the norm, allowed is "
          << expected.allowed / expected.norm;
  return message.str();
}

std::string error_of(c10::Device device, const GpuKernel& kernel, const Trial& trial, bool tf32, bool damaged) {
  const TrialTensors tensors = trial.on(device);
  const FusedCall call("verify", trial.call(tensors, trial.activation));
  Problem problem = call.problem();
  problem.tf32 = tf32;
  const GpuCaps& caps = gpu_caps(device);
  GpuCandidate candidate = plan_kernel(problem, kernel, caps);
  if (!candidate.reason.empty()) return candidate.reason;
  const Tensor exact = trial.reference();
  const double norm = exact.norm().item<double>(), magnitude = trial.magnitude().norm().item<double>();
  const Expected expected{exact, norm, allowed_error(problem.dtype, tf32, norm, magnitude)};
  // Another call's plan may form clusters of CTAs where this one forms none, and the other way round.
  Geometry& cut = candidate.plan.geometry;
  cut.most_ctas = 2;  // of the persistent kernel: several tiles each
  const int most = sm90a_most_cluster(kernel, cut.tiles(), caps);
  std::string error;
  for (cut.cluster = 1; cut.cluster <= most && error.empty(); ++cut.cluster)
    error = error_of(call, candidate.plan, expected, damaged);
  return error;
}

}  // namespace

std::string find_error(c10::Device device, int index, DType dtype, bool tf32, bool damaged) {
  // The caller may be anywhere: under autocast, in grad mode.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::AutoDispatchBelowADInplaceOrView no_grad;
  const c10::DeviceGuard guard(device);
  const GpuKernel& kernel = gpu_kernels()[size_t(index)];
  std::string error;
  const auto try_on = [&](at::MemoryFormat format, Activation activation, Steps steps) {
    for (const int64_t rank : Trial::ranks(kernel))
      if (error.empty())
        error = error_of(device, kernel, Trial(kernel, dtype, format, activation, rank, steps), tf32, damaged);
  };
  // Linear layers have no memory format; the other sm90a kernels, and the persistent one of sm80, take one.
  if ((!is_sm90a(kernel) && !kernel.shape.persistent) || kernel.op == Op::kLinear)
    try_on(at::MemoryFormat::Contiguous, Activation::kNone, Steps::kNone);
  if (kernel.op != Op::kLinear) try_on(at::MemoryFormat::ChannelsLast, Activation::kSilu, Steps::kNone);
  // Strides and dilations are code of their own in these kernels (plan/gpu/planes.h).
  if (is_sm90a(kernel) && kernel.op != Op::kLinear)
    for (const Steps steps : {Steps::kStrideOfHeight, Steps::kStrideOfWidth, Steps::kStrides})
      try_on(at::MemoryFormat::ChannelsLast, Activation::kSilu, steps);
  return error;
}

bool is_verified(c10::Device device, int kernel, DType dtype, bool tf32) {
  std::atomic<Check>& known = check_of(device, kernel, dtype, tf32);
  if (known.load(std::memory_order_acquire) == Check::kPassed) return true;
  if (!ran_right_on(gpu_kernels()[size_t(kernel)], gpu_caps(device))) return false;
  known.store(Check::kPassed, std::memory_order_release);  // its names are not to be looked up at every call
  return true;
}

void verify(c10::Device device, int index, DType dtype, bool tf32) {
  const GpuKernel& kernel = gpu_kernels()[size_t(index)];
  std::string reason;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    std::atomic<Check>& known = check_of(device, index, dtype, tf32);
    if (known.load(std::memory_order_acquire) != Check::kNone) return;
    reason = find_error(device, index, dtype, tf32);
    known.store(reason.empty() ? Check::kPassed : Check::kFailed, std::memory_order_release);
  }
  if (reason.empty()) return;
  const std::string name = dtype == DType::kFloat && tf32 ? "tf32" : name_of(dtype);
  refuse_gpu_kernel(device.index(), index, "wrong on this GPU in " + name + ": " + reason);
  TORCH_WARN("lowrank_ops: the kernel ", kernel.name, " failed its check before first use on ", device, " (",
             gpu_caps(device).name, ", sm_", gpu_caps(device).architecture, ") in ", name, ": ", reason,
             ". It is left out in this process. Please report this line.");
}

}  // namespace lowrank_ops
