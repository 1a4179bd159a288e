// For tests on a GPU: kernels launched one by one, and their check before first use.
#pragma once

#include <torch/extension.h>

namespace lowrank_ops {

void bind_cuda(py::module_& m);

}  // namespace lowrank_ops
