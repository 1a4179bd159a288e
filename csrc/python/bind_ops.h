#pragma once

#include <torch/extension.h>

namespace lowrank_ops {

void bind_ops(py::module_& m);

}  // namespace lowrank_ops
