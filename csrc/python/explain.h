// explain() for Python: a problem described by numbers -> the planner's decision as a dict.
#pragma once

#include <torch/extension.h>

#include <array>
#include <string>

#include "ops/call.h"
#include "plan/cpu/planner.h"

namespace lowrank_ops {

// A problem as Python describes it. `sizes` is {n, s, h, w, t, r1, r2, kh, kw}; `window` is stride, padding, dilation,
// a pair each.
struct Description {
  std::string op, dtype;
  bool channels_last = false;
  std::array<int64_t, 9> sizes{};
  std::array<int64_t, 6> window{};
  std::string activation = name_of(Activation::kNone);
};
Problem described_problem(const Description& description);
py::dict describe(const Plan& plan, Op op);

void bind_explain(py::module_& m);
void bind_cpu_planning(py::module_& m);  // explain_cpu.cpp: predictions for any class of CPUs
void bind_gpu_planning(py::module_& m);  // explain_gpu.cpp: the kernel table, single plans, tiles, for tests and tools

}  // namespace lowrank_ops
