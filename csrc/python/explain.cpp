#include "python/explain.h"

#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>

#include "cpu/isa.h"
#include "ops/call.h"
#include "ops/gpu_device.h"
#include "ops/policy.h"
#include "plan/cpu/cost.h"
#include "plan/gpu/planner.h"

namespace lowrank_ops {
namespace {

constexpr int64_t kMostOfAnAxis = int64_t(1) << 40;  // no tensor is larger; sums of such sizes do not overflow

// The one of `known` that has this name.
template <typename Value, size_t count>
Value named(const char* what, const std::string& name, const Value (&known)[count]) {
  for (const Value value : known)
    if (name == name_of(value)) return value;
  TORCH_CHECK_VALUE(false, "explain: unknown ", what, " '", name, "'");
}

void describe_gpu(py::dict& result, const Plan& plan) {
  const Geometry& g = plan.geometry;
  result["tile"] = std::vector<int>{g.tile_n, g.rows.tile, g.columns.tile};
  result["stages"] = g.stages;
  result["splits"] = g.splits;
  result["cluster"] = g.cluster;
  result["threads"] = plan.threads;
  result["ctas"] = plan.ctas;
  result["waves"] = plan.waves;
  result["shared_bytes"] = plan.shared_bytes;
  result["gpu_kernel"] = plan.gpu_kernel;
}

}  // namespace

py::dict describe(const Plan& plan, Op op) {
  py::dict result;
  result["path"] = name_of(plan.path);
  result["kernel"] = plan.kernel;
  if (plan.gpu_kernel >= 0) {
    describe_gpu(result, plan);
  } else if (plan.path == Path::kFused) {
    result["tile_rows"] = plan.tile.rows;
    if (op != Op::kLinear) {
      result["tile_columns"] = plan.tile.columns;
      result["strips"] = plan.tile.strips;
      result["team"] = plan.tile.team;
    }
    result["scratch_bytes"] = plan.tile.scratch_bytes;
  }
  result["flops"] = plan.flops;
  result["bytes"] = plan.bytes;
  result["predicted_seconds"] = plan.predicted_seconds;
  result["features"] = plan.features;
  result["notes"] = plan.notes;
  return result;
}

Problem described_problem(const Description& description) {
  const auto& sizes = description.sizes;
  const auto& window = description.window;
  Problem p;
  p.op = named("op", description.op, {Op::kTucker, Op::kCP, Op::kLinear});
  p.dtype = named("dtype", description.dtype, {DType::kFloat, DType::kDouble, DType::kBFloat16, DType::kHalf});
  p.layout = description.channels_last ? Layout::kChannelsLast : Layout::kContiguous;
  std::tie(p.n, p.s, p.h, p.w, p.t, p.r1, p.r2, p.kh, p.kw) = std::tuple_cat(sizes);
  for (int axis = 0; axis < 2; ++axis) {
    p.stride[axis] = window[axis];
    p.padding[axis] = window[2 + axis];
    p.dilation[axis] = window[4 + axis];
  }
  p.activation = parse_activation("explain", description.activation);
  // The rules of check_window (checks.cpp), and no axis of size 0 but the batch: before anything is divided or
  // multiplied.
  const auto valid = [&](bool condition) {
    TORCH_CHECK_VALUE(condition, "explain: the sizes and the window must be those of a valid call of ", description.op,
                      ", got sizes ", at::IntArrayRef(sizes), " (N, S, H, W, T, R1, R2, KH, KW) and window ",
                      at::IntArrayRef(window), " (stride, padding, dilation)");
  };
  valid(p.n >= 0 && *std::min_element(sizes.begin() + 1, sizes.end()) >= 1 &&
        *std::max_element(sizes.begin(), sizes.end()) <= kMostOfAnAxis);
  valid(std::min({p.stride[0], p.stride[1], p.dilation[0], p.dilation[1]}) >= 1 &&
        std::min(p.padding[0], p.padding[1]) >= 0 && *std::max_element(window.begin(), window.end()) <= INT32_MAX);
  p.oh = output_size(p.h, p.kh, p.stride[0], p.padding[0], p.dilation[0]);
  p.ow = output_size(p.w, p.kw, p.stride[1], p.padding[1], p.dilation[1]);
  valid(p.oh > 0 && p.ow > 0);
  return p;
}

namespace {

// A decision, the device that it was made for in words for the reader, and the key of its measurements.
struct DeviceDecision {
  Decision decision;
  std::string device, key;
};

DeviceDecision plan_for_cpu(const Problem& given, bool packed) {
  const CpuCaps caps = cpu_caps();
  const Problem p = as_fused(given);
  const bool prepared = packed && packed_covers(p);
  DeviceDecision planned{plan_cpu(p, caps, policy(), prepared), in_words(caps),
                         measurement_key(p, in_words(measured_caps(caps, prepared)))};
  Decision& decision = planned.decision;
  if (policy() == Policy::kMeasure && decision.others.size() == 1) {
    const std::optional<bool> chain_faster = measured_chain_faster(p, measured_caps(caps, prepared));
    if (chain_faster && *chain_faster != (decision.chosen.path == Path::kChain))
      std::swap(decision.chosen, decision.others.front());
    decision.rejections = {{decision.others.front().kernel,
                            chain_faster ? "measured to be slower" : "predicted to be slower; not measured yet"}};
  }
  return planned;
}

// Replaces the predicted choice by the one that "measure" has found on this GPU.
void apply_measurement(Decision& decision, const std::string& key) {
  const std::optional<std::string> fastest = measured_fastest(key);
  const auto is_fastest = [&](const Plan& plan) { return fastest && plan.kernel == *fastest; };
  const auto found = std::find_if(decision.others.begin(), decision.others.end(), is_fastest);
  const bool measured = found != decision.others.end() || is_fastest(decision.chosen);
  if (found != decision.others.end()) {
    const auto reason = std::find_if(decision.rejections.begin(), decision.rejections.end(),
                                     [&](const Rejection& rejection) { return rejection.kernel == found->kernel; });
    std::swap(decision.chosen, *found);
    if (reason != decision.rejections.end()) reason->kernel = found->kernel;
  }
  for (Rejection& rejection : decision.rejections)
    for (const Plan& plan : decision.others)
      if (plan.kernel == rejection.kernel)
        rejection.reason = measured ? "measured to be slower" : "predicted to be slower; not measured yet";
}

#ifdef LOWRANK_OPS_WITH_CUDA
constexpr bool kHasCudaKernels = true;
#else
constexpr bool kHasCudaKernels = false;
#endif
constexpr int kNoDevice = -1;  // for plans for a named GPU, which need not be in this machine

std::string in_words(const GpuCaps& caps) {
  return caps.name + " (sm_" + std::to_string(caps.architecture) + ", " + std::to_string(caps.multiprocessors) +
         " multiprocessors)";
}

std::string source_of_predictions(const GpuCaps& caps) {
  return is_measured(caps) ? "predictions fitted to measurements on an NVIDIA H200"
                           : "predictions scaled from measurements on an NVIDIA H200, not checked on this kind of GPU";
}

std::string known_gpus() {
  std::string names;
  for (const GpuCaps& caps : named_gpus()) names += (names.empty() ? "" : ", ") + caps.name;
  return names;
}

c10::Device parse_device(const std::string& device) {
  try {
    return c10::Device(device);
  } catch (const c10::Error&) {
    TORCH_CHECK_VALUE(false, "explain: device must be \"cpu\", \"cuda\", another device of torch or one of the GPUs ",
                      known_gpus(), ", got '", device, "'");
  }
}

// `device`: the name of a GPU, or one of torch's devices; without an index the first (the caller of "cuda" gives the
// index of the current one).
DeviceDecision plan_for_device(Problem& p, const std::string& device, bool prepared) {
  const GpuCaps* named = find_gpu(device);
  const std::optional<c10::Device> known = named ? std::nullopt : std::optional(parse_device(device));
  if (known && known->is_cpu()) return plan_for_cpu(p, prepared);
  const bool on_gpu = named || known->is_cuda();
  p.tf32 = on_gpu && p.dtype == DType::kFloat && tf32_allowed(p.op);
  p.prepared = on_gpu && prepared;
  if (named)
    return {plan_gpu(p, *named, policy(), gpu_restrictions(kNoDevice)),
            in_words(*named) + "; " + source_of_predictions(*named), ""};
  const int index = known->has_index() ? known->index() : 0;
  const std::optional<GpuCaps> present = known->is_cuda() ? present_gpu(index) : std::nullopt;
  if (!present) {
    const bool could_be_here = known->is_cuda() && kHasCudaKernels;
    return {plan_other(p,
                       could_be_here ? "there is no GPU " + device + " here; plans for one that is not: device=\"A100\""
                                     : "lowrank_ops has no kernels for " + device + " in this build",
                       policy()),
            device, ""};
  }
  // The widths of a call with dense tensors: they are part of a measurement's key.
  const CopyWidths widths = copy_widths(kernel_problem(p));
  p.input_vector = widths.input;
  p.factor_vector = widths.factor;
  p.output_vector = widths.output;
  DeviceDecision planned{plan_gpu(p, *present, policy(), gpu_restrictions(index)),
                         device + ": " + in_words(*present) + "; " + source_of_predictions(*present),
                         measurement_key(p, present->name)};
  if (policy() == Policy::kMeasure) apply_measurement(planned.decision, planned.key);
  return planned;
}

// A plan with the time that the policy "measure" has measured, where there is one.
py::dict described_with_time(const Plan& plan, Op op, const std::optional<Measurement>& measurement) {
  py::dict result = describe(plan, op);
  if (measurement)
    for (const auto& [name, seconds] : measurement->seconds)
      if (name == plan.kernel || (plan.gpu_kernel < 0 && name == name_of(plan.path)))
        result["measured_seconds"] = seconds;
  return result;
}

py::dict explain(const std::string& op, const std::string& dtype, bool channels_last, std::array<int64_t, 9> sizes,
                 std::array<int64_t, 6> window, const std::string& activation, const std::string& device,
                 bool prepared) {
  Problem p = described_problem({op, dtype, channels_last, sizes, window, activation});
  const DeviceDecision planned = plan_for_device(p, device, prepared);
  py::dict result;
  result["policy"] = std::string(name_of(policy()));
  result["device"] = planned.device;
  result["tf32"] = p.tf32;
  const std::optional<Measurement> measurement = measurement_of(planned.key);
  result["chosen"] = described_with_time(planned.decision.chosen, p.op, measurement);
  py::list others, rejections;
  for (const Plan& plan : planned.decision.others) others.append(described_with_time(plan, p.op, measurement));
  for (const Rejection& rejection : planned.decision.rejections)
    rejections.append(py::make_tuple(rejection.kernel, rejection.reason));
  result["others"] = others;
  result["rejections"] = rejections;
  return result;
}

}  // namespace

void bind_explain(py::module_& m) {
  m.def("explain", &explain, py::arg("op"), py::arg("dtype"), py::arg("channels_last"), py::arg("sizes"),
        py::arg("window"), py::arg("activation"), py::arg("device"), py::arg("prepared") = false);
  m.def("measurements", [] {
    py::list result;
    for (const Measurement& measurement : measurements())
      result.append(py::make_tuple(measurement.key, measurement.fastest, measurement.seconds));
    return result;
  });
  using Entry = std::tuple<std::string, std::string, std::vector<std::pair<std::string, double>>>;
  m.def("remember_measurements", [](const std::vector<Entry>& entries) {
    std::vector<Measurement> result;
    for (const auto& [key, fastest, seconds] : entries) result.push_back({key, fastest, seconds});
    remember_measurements(std::move(result));
  });
  bind_cpu_planning(m);
  bind_gpu_planning(m);
}

}  // namespace lowrank_ops
