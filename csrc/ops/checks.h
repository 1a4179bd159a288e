// Argument checks of the ops. Every message names the op, the argument, what is required, what came. The fake kernels
// (lowrank_ops/ops/fakes.py) check the same in the same words, with symbolic shapes (tests/ops/test_errors.py).
#pragma once

#include <cstdint>

#include "ops/call.h"

namespace lowrank_ops {

// Raises unless these are the arguments of a valid call.
void check(const OpCall& call);
// The window alone: pairs, and of numbers whose products do not overflow.
void check_pairs(const char* op, const Window& window);
// `op`: the backward op, for the message. `call` is checked.
void check_grad_output(const char* op, const at::Tensor& grad_output, const OpCall& call);

// ---- The parts, for functions with other arguments

struct Argument {
  const char* name;
  const at::Tensor& tensor;
};

bool is_supported(at::ScalarType type);
void check_dim(const char* op, const Argument& argument, int64_t dim, const char* shape);
void check_size(const char* op, const Argument& argument, int64_t axis, int64_t required, const char* why);
void check_nonempty(const char* op, const Argument& argument);

}  // namespace lowrank_ops
