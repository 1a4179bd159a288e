// The counts and predictions of the CPU's cost model for a problem on any class of CPUs, for tests and
// benchmarks/studies/fit_cost.py.
#include "plan/cpu/cost.h"
#include "python/explain.h"

namespace lowrank_ops {
namespace {

// `sizes` and `window` as explain() has them; `isa` may be one that this machine does not have.
py::dict cpu_prediction(const std::string& op, const std::string& dtype, bool channels_last,
                        std::array<int64_t, 9> sizes, std::array<int64_t, 6> window, const std::string& isa,
                        int64_t l2_bytes, int64_t l3_bytes) {
  const Problem given =
      described_problem({.op = op, .dtype = dtype, .channels_last = channels_last, .sizes = sizes, .window = window});
  const Problem p = as_fused(given);
  CpuCaps caps;
  caps.isa = isa;
  caps.l2_bytes = l2_bytes;
  caps.l3_bytes = l3_bytes;
  caps.bfloat16_dot = isa == "avx512bf16";
  const CpuPlan choice = make_cpu_plan(p, caps, Policy::kAuto);
  py::dict result;
  result["chain"] = choice.chain;
  result["other_possible"] = choice.other_possible;
  result["fused_features"] = fused_features(p, caps, choice.one_thread_tile);
  result["chain_features"] = chain_features(p, caps);
  result["fused_seconds"] = choice.fused_seconds;
  result["chain_seconds"] = choice.chain_seconds;
  return result;
}

}  // namespace

void bind_cpu_planning(py::module_& m) {
  m.def("cpu_prediction", &cpu_prediction);
  m.attr("fused_feature_names") =
      std::vector<std::string>(std::begin(kFusedFeatureNames), std::end(kFusedFeatureNames));
  m.attr("chain_feature_names") =
      std::vector<std::string>(std::begin(kChainFeatureNames), std::end(kChainFeatureNames));
}

}  // namespace lowrank_ops
