// explain() for Python: a problem described by numbers -> the planner's decision as a dict.
#pragma once

#include <torch/extension.h>

namespace lowrank_ops {

void bind_explain(py::module_& m);

}  // namespace lowrank_ops
