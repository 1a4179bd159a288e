// The simulator as a library, for Python (module.h).
#include "module.h"

#include <algorithm>
#include <string>

#include "counters.h"
#include "cuda/kernels/common_case.h"
#include "cuda/kernels/launch.h"
#include "plan/counts.h"
#include "plan/gpu/planner.h"

using namespace lowrank_ops;

namespace {

std::string report_text;

Factor factor_of(const char* name, const FactorCall& call, int element) {
  if (call.data == 0) return {};
  const void* data = reinterpret_cast<const void*>(call.data);
  simulator::add_buffer(name, data, call.bytes, element);
  return {data, call.row_stride, call.column_stride, {call.tap_stride[0], call.tap_stride[1]}, int(call.vector)};
}

Problem problem_of(const BlockCall& c) {
  Problem problem;
  problem.op = Op(c.op);
  problem.dtype = DType(c.dtype);
  problem.n = c.n, problem.s = c.s, problem.h = c.h, problem.w = c.w;
  problem.t = c.t, problem.oh = c.oh, problem.ow = c.ow;
  problem.r1 = c.r1, problem.r2 = c.r2, problem.kh = c.kh, problem.kw = c.kw;
  for (int i = 0; i < 2; i++) {
    problem.stride[i] = c.stride[i];
    problem.padding[i] = c.padding[i];
    problem.dilation[i] = c.dilation[i];
  }
  problem.activation = Activation(c.activation);
  if (c.input_stride[1] == 1) problem.layout = Layout::kChannelsLast;
  problem.tf32 = problem.dtype == DType::kFloat && Family(c.family) == Family::kSm80;
  return problem;
}

BlockParams params_of(const BlockCall& c) {
  const int element = int(element_bytes(DType(c.dtype)));
  BlockParams p;
  p.geometry = geometry_of(problem_of(c), int(c.tile_n), int(c.tile_h), int(c.tile_w), int(c.stages), int(c.splits),
                           int(c.cluster));
  p.input = reinterpret_cast<const void*>(c.input);
  p.output = reinterpret_cast<void*>(c.output);
  std::copy_n(c.input_stride, 4, p.input_stride);
  std::copy_n(c.output_stride, 4, p.output_stride);
  p.input_vector = int(c.input_vector);
  p.output_vector = int(c.output_vector);
  simulator::add_buffer("input", p.input, c.input_bytes, element);
  simulator::add_buffer("output", p.output, c.output_bytes, element);
  p.in_factor = factor_of("in_factor", c.in_factor, element);
  p.core = factor_of("core", c.core, element);
  p.height_factor = factor_of("height_factor", c.height_factor, element);
  p.width_factor = factor_of("width_factor", c.width_factor, element);
  p.out_factor = factor_of("out_factor", c.out_factor, element);
  p.bias = reinterpret_cast<const void*>(c.bias);
  if (p.bias != nullptr) simulator::add_buffer("bias", p.bias, c.bias_bytes, element);
  p.activation = Activation(c.activation);
  return p;
}

}  // namespace

// The sizes of the structs, by which harness.py checks its declarations.
LOWRANK_OPS_EXPORT int64_t simulator_sizes(int64_t which) {
  return which == 0 ? sizeof(BlockCall) : sizeof(simulator::Settings);
}

// Writes a configuration's threads, halo positions per pass, pixels and columns, and whether it is persistent, to
// `sizes`; zeros: there is none of that index.
LOWRANK_OPS_EXPORT void simulator_config(int64_t family, int64_t index, int64_t has_halo, int64_t* sizes) {
  std::fill_n(sizes, 5, 0);
  static constexpr int numbers[] = {kNumSimtConfigs, kNumSm80Configs, kNumSm90aConfigs};
  if (index >= numbers[family]) return;
  const Config config = config_of(Family(family), int(index), has_halo != 0);
  sizes[0] = config.threads();
  sizes[1] = config.halo_rows();
  sizes[2] = config.pixels();
  sizes[3] = config.columns();
  sizes[4] = config.persistent;
}

LOWRANK_OPS_EXPORT int simulator_run(const BlockCall* call, const simulator::Settings* settings) {
  using Launcher = cudaError_t (*)(const BlockParams&, DType, int, cudaStream_t);
  static constexpr Launcher launchers[3][3] = {{launch_tucker_simt, launch_tucker_sm80, launch_tucker_sm90a},
                                               {launch_cp_simt, launch_cp_sm80, launch_cp_sm90a},
                                               {launch_linear_simt, launch_linear_sm80, launch_linear_sm90a}};
  simulator::forget_everything();
  simulator::machine.settings = *settings;
  const BlockParams params = params_of(*call);
  return launchers[call->op][call->family](params, DType(call->dtype), int(call->config), nullptr);
}

// Whether the launcher of an sm80 kernel takes its lean variant for this call.
LOWRANK_OPS_EXPORT int simulator_is_common_case(const BlockCall* call) {
  const BlockParams params = params_of(*call);
  simulator::forget_everything();
  return is_common_case(params, Op(call->op) == Op::kTucker, int(element_bytes(DType(call->dtype))));
}

LOWRANK_OPS_EXPORT const char* simulator_plan(const BlockCall* call, const char* gpu, int64_t* cut) {
  static std::string reason;
  const GpuCaps* const caps = find_gpu(gpu);
  reason = caps == nullptr ? "no GPU of that name" : "no kernel of that number";
  if (caps == nullptr) return reason.c_str();
  for (const GpuKernel& kernel : gpu_kernels()) {
    if (kernel.op != Op(call->op) || kernel.family != Family(call->family) || kernel.config != call->config) continue;
    const GpuCandidate candidate = plan_kernel(problem_of(*call), kernel, *caps);
    const Geometry& g = candidate.plan.geometry;
    const int64_t numbers[] = {g.tile_n, g.rows.tile, g.columns.tile,        g.stages,
                               g.splits, g.cluster,   caps->shared_bytes_cta};
    std::copy_n(numbers, 7, cut);
    reason = candidate.reason;
    break;
  }
  return reason.c_str();
}

LOWRANK_OPS_EXPORT const char* simulator_report() {
  report_text = simulator::report();
  return report_text.c_str();
}
