// One call of an op on CUDA tensors: what the planner and the kernels are told of it.
#pragma once

#include "cuda/device.h"
#include "cuda/kernels/launch.h"
#include "ops/ops.h"

namespace lowrank_ops {

// The tensors of a call; those that an op does not have stay undefined.
struct BlockTensors {
  at::Tensor input;  // [N, S, H, W]; of a linear layer its rows [N, S]
  at::Tensor in_factor, core, height_factor, width_factor, out_factor;
  OptionalTensor bias;
};

// What a kernel is told, and the tensors that it points into besides the call's own.
struct Launch {
  BlockParams params;
  at::Tensor output, core;
  OptionalTensor bias;
};

class FusedCall {
 public:
  // `problem` gets its copy widths and whether fp32 may be rounded to tf32. The tensors are on one GPU, and checked.
  FusedCall(const char* op, BlockTensors tensors, Problem problem);

  const char* op() const { return op_; }
  const Problem& problem() const { return problem_; }
  const at::Tensor& input() const { return tensors_.input; }
  c10::Device device() const { return tensors_.input.device(); }

  at::Tensor empty_output() const;
  // `output` is one of empty_output()'s.
  Launch prepare(const Geometry& geometry, const at::Tensor& output) const;
  // Puts the planned kernel onto the stream of the current device.
  cudaError_t launch(const Plan& plan, const at::Tensor& output, cudaStream_t stream) const;
  // The same on the current stream, with an exception that says everything when the launch fails.
  void run(const Plan& plan, const at::Tensor& output) const;
  at::Tensor run(const Plan& plan) const;

 private:
  const char* op_;
  BlockTensors tensors_;
  Problem problem_;
};

}  // namespace lowrank_ops
