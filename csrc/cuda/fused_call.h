// One call of an op on CUDA tensors, in the terms of the planner and of the kernels.
#pragma once

#include "cuda/device.h"
#include "cuda/kernels/launch.h"
#include "ops/call.h"
#include "ops/padded_factors.h"

namespace lowrank_ops {

// The parameters of a kernel, and the tensors that they point into besides the call's own.
struct Launch {
  BlockParams params;
  at::Tensor output, core;
  OptionalTensor bias;
};

class FusedCall {
 public:
  // A checked call whose tensors are on one GPU; a linear layer's input is its rows [N, S]. `caller`: for messages.
  // `padded`: what padded_factors_for has found for this call; it outlives it.
  FusedCall(const char* caller, const OpCall& call, const PaddedFactors* padded = nullptr);

  const char* caller() const { return caller_; }
  // With the copy widths of the tensors, and whether fp32 may be rounded to tf32.
  const Problem& problem() const { return problem_; }
  c10::Device device() const { return given_.input.device(); }

  // The output of the chain of library ops, which reads the given factors.
  at::Tensor run_chain() const;

  at::Tensor empty_output() const;
  // `output` is one of empty_output()'s.
  Launch prepare(const Geometry& geometry, const at::Tensor& output) const;
  // Puts the planned kernel onto the stream of the current device.
  cudaError_t launch(const Plan& plan, const at::Tensor& output, cudaStream_t stream) const;
  // What to say of a launch that failed: the call, the plan and the GPU.
  std::string failure(const Plan& plan, cudaError_t error) const;
  // launch() on the current stream; when it fails, an exception with failure().
  void run(const Plan& plan, const at::Tensor& output) const;
  at::Tensor run(const Plan& plan) const;

 private:
  const char* caller_;
  OpCall given_;
  const PaddedFactors* padded_;
  OpCall call_;  // what the kernels read: the given call, or the same with padded factors
  Problem problem_;
};

// Whether the driver refused a launch: nothing ran, and the GPU goes on working. Any other error may be one of earlier
// work, after which nothing runs on this GPU any more.
bool is_refusal(cudaError_t error);
// For tests: every launch of a fused kernel fails with this error; cudaSuccess: no longer.
void fail_launches(cudaError_t error);
// For tests: persistent kernels have at most so many CTAs, and so several tiles each; 0: no limit.
void limit_ctas(int ctas);

}  // namespace lowrank_ops
