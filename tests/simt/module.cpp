// What Python calls (harness.py): one kernel launch on the simulator. Every number is an int64, pointers too, so that
// the struct can be written down twice without surprises.
#include <algorithm>
#include <string>

#include "counters.h"
#include "kernels/launch.h"
#include "plan/gpu.h"
#include "simulator.h"

using namespace lowrank_ops;

struct FactorCall {
  int64_t data, row_stride, column_stride, tap_stride[2], vector, bytes;  // bytes: from the first to the last element
};

struct BlockCall {
  int64_t op, family, config, dtype, activation;  // the numbers of the enums
  int64_t n, s, h, w, t, oh, ow, r1, r2, kh, kw;  // as plan/problem.h
  int64_t stride[2], padding[2], dilation[2];
  int64_t tile_n, tile_h, tile_w, stages, splits;
  int64_t input, input_bytes, input_stride[4], input_vector;
  int64_t output, output_bytes, output_stride[4], output_vector;
  FactorCall in_factor, core, height_factor, width_factor, out_factor;
  int64_t bias;
};

namespace {

std::string report_text;

Factor factor_of(const char* name, const FactorCall& call, int element) {
  if (call.data == 0) return {};
  const void* data = reinterpret_cast<const void*>(call.data);
  simulator::add_buffer(name, data, call.bytes, element);
  return {data, call.row_stride, call.column_stride, {call.tap_stride[0], call.tap_stride[1]}, int(call.vector)};
}

BlockParams params_of(const BlockCall& c) {
  const int element = int(element_bytes(DType(c.dtype)));
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
  BlockParams p;
  p.geometry = geometry_of(problem, int(c.tile_n), int(c.tile_h), int(c.tile_w), int(c.stages), int(c.splits));
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
  if (p.bias != nullptr) simulator::add_buffer("bias", p.bias, c.t * element, element);
  p.activation = Activation(c.activation);
  return p;
}

}  // namespace

#define LOWRANK_OPS_EXPORT extern "C" __attribute__((visibility("default")))

// So that both sides agree about the structs.
LOWRANK_OPS_EXPORT int64_t simt_sizes(int64_t which) {
  return which == 0 ? sizeof(BlockCall) : sizeof(simulator::Settings);
}

// Returns the launcher's error; simt_report says what happened.
LOWRANK_OPS_EXPORT int simt_run(const BlockCall* call, const simulator::Settings* settings) {
  using Launcher = cudaError_t (*)(const BlockParams&, DType, int, cudaStream_t);
  static constexpr Launcher launchers[3][2] = {{launch_tucker_simt, launch_tucker_sm80},
                                               {launch_cp_simt, launch_cp_sm80},
                                               {launch_linear_simt, launch_linear_sm80}};
  simulator::forget_everything();
  simulator::machine.settings = *settings;
  const BlockParams params = params_of(*call);
  return launchers[call->op][call->family](params, DType(call->dtype), int(call->config), nullptr);
}

LOWRANK_OPS_EXPORT const char* simt_report() {
  report_text = simulator::report();
  return report_text.c_str();
}
