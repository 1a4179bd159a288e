#include "explain.h"

#include <algorithm>
#include <array>
#include <tuple>

#include "cpu/isa.h"
#include "ops.h"
#include "plan/cost.h"
#include "plan/plan.h"
#include "policy.h"

namespace lowrank_ops {
namespace {

py::dict describe(const Plan& plan, Op op) {
  py::dict result;
  result["path"] = plan.path;
  result["kernel"] = plan.kernel;
  if (plan.path == "fused") {
    result["tile_rows"] = plan.tile.rows;
    if (op != Op::kLinear) {
      result["tile_columns"] = plan.tile.columns;
      result["strips"] = plan.tile.strips;
    }
    result["scratch_bytes"] = plan.tile.scratch_bytes;
  }
  result["flops"] = plan.flops;
  result["bytes"] = plan.bytes;
  result["predicted_seconds"] = plan.predicted_seconds;
  result["features"] = plan.features;
  return result;
}

template <typename Value, size_t count>
Value choose(const char* what, const std::string& name, const std::pair<const char*, Value> (&known)[count]) {
  for (const auto& [known_name, value] : known)
    if (name == known_name) return value;
  TORCH_CHECK_VALUE(false, "explain: unknown ", what, " '", name, "'");
}

// `sizes` is {n, s, h, w, t, r1, r2, kh, kw}; `window` is stride, padding, dilation, a pair each.
py::dict explain(const std::string& op, const std::string& dtype, bool channels_last, std::array<int64_t, 9> sizes,
                 std::array<int64_t, 6> window, const std::string& activation, const std::string& device) {
  Problem p;
  p.op =
      choose<Op>("op", op, {{"tucker_conv2d", Op::kTucker}, {"cp_conv2d", Op::kCP}, {"lowrank_linear", Op::kLinear}});
  p.dtype = choose<DType>("dtype", dtype,
                          {{"float32", DType::kFloat},
                           {"float64", DType::kDouble},
                           {"bfloat16", DType::kBFloat16},
                           {"float16", DType::kHalf}});
  p.layout = channels_last ? Layout::kChannelsLast : Layout::kContiguous;
  std::tie(p.n, p.s, p.h, p.w, p.t, p.r1, p.r2, p.kh, p.kw) = std::tuple_cat(sizes);
  for (int axis = 0; axis < 2; ++axis) {
    p.stride[axis] = window[axis];
    p.padding[axis] = window[2 + axis];
    p.dilation[axis] = window[4 + axis];
  }
  p.activation = parse_activation("explain", activation);
  p.oh = output_size(p.h, p.kh, p.stride[0], p.padding[0], p.dilation[0]);
  p.ow = output_size(p.w, p.kw, p.stride[1], p.padding[1], p.dilation[1]);

  TORCH_CHECK_VALUE(*std::min_element(p.stride, p.stride + 2) >= 1 &&
                        *std::min_element(p.dilation, p.dilation + 2) >= 1 && p.oh > 0 && p.ow > 0 && p.r1 > 0 &&
                        p.r2 > 0,
                    "explain: the sizes and the window must be those of a valid call of ", op);
  const CpuCaps caps = cpu_caps();
  Decision decision = device == "cpu" ? plan_cpu(p, caps, policy()) : plan_other(p, device, policy());
  if (policy() == Policy::kMeasure && decision.others.size() == 1) {
    const std::optional<bool> chain_faster = measured_chain_faster(p, caps);
    if (chain_faster && *chain_faster != (decision.chosen.path == "chain"))
      std::swap(decision.chosen, decision.others.front());
    decision.rejections = {{decision.others.front().kernel,
                            chain_faster ? "measured to be slower" : "predicted to be slower; not measured yet"}};
  }
  py::dict result;
  result["policy"] = std::string(name_of(policy()));
  result["device"] = device == "cpu" ? caps.name + ", " + caps.isa + " kernels, " + std::to_string(caps.threads) +
                                           (caps.threads == 1 ? " thread" : " threads")
                                     : device;
  result["chosen"] = describe(decision.chosen, p.op);
  py::list others, rejections;
  for (const Plan& plan : decision.others) others.append(describe(plan, p.op));
  for (const Rejection& rejection : decision.rejections)
    rejections.append(py::make_tuple(rejection.kernel, rejection.reason));
  result["others"] = others;
  result["rejections"] = rejections;
  return result;
}

}  // namespace

void bind_explain(py::module_& m) {
  m.def("explain", &explain);
  m.attr("feature_names") = std::vector<std::string>(std::begin(kFeatureNames), std::end(kFeatureNames));
}

}  // namespace lowrank_ops
