// explain() for Python: a problem described by numbers -> the planner's decision as a dict.
#pragma once

#include <torch/extension.h>

#include <array>
#include <string>

#include "plan/cpu/planner.h"

namespace lowrank_ops {

// A problem as Python describes it: `sizes` is {n, s, h, w, t, r1, r2, kh, kw}; `window` is stride, padding, dilation,
// a pair each.
Problem described_problem(const std::string& op, const std::string& dtype, bool channels_last,
                          std::array<int64_t, 9> sizes, std::array<int64_t, 6> window, const std::string& activation);
py::dict describe(const Plan& plan, Op op);

void bind_explain(py::module_& m);
void bind_cpu_planning(py::module_& m);  // explain_cpu.cpp: predictions for any class of CPUs
void bind_gpu_planning(py::module_& m);  // explain_gpu.cpp: the kernel table, single plans, tiles, for tests and tools

}  // namespace lowrank_ops
