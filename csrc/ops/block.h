// A factorized layer as a list of linear stages: what the chain runs forward, and the gradients forward and backward.
#pragma once

#include <array>

#include "ops/call.h"

namespace lowrank_ops {

// A bias-free convolution of a block, or, where `weight` is a matrix, a linear map over the last axis of its input.
struct Stage {
  at::Tensor weight;
  std::array<int64_t, 2> stride{1, 1}, padding{0, 0}, dilation{1, 1};
  int64_t groups = 1;
};

// `bias` follows the last stage. Tensors have the dtype to compute in (library_dtype).
struct Block {
  c10::SmallVector<Stage, 4> stages;
  OptionalTensor bias;
  Activation activation;

  at::ScalarType dtype() const { return stages[0].weight.scalar_type(); }
};

Block block_of(const OpCall& call);
// A CP block with both depthwise stages as one convolution: `taps` is the product of their factors, [R, 1, KH, KW].
Block merged_cp_block(const OpCall& call, const at::Tensor& taps);

// The dtype in which the library can be trusted with a block of this call, or has fast kernels for it.
at::ScalarType library_dtype(const OpCall& call);

inline bool is_linear(const Stage& stage) {
  return stage.weight.dim() == 2;
}

// The image as the library's convolutions can be trusted with it: see block.cpp.
at::Tensor library_image(const at::Tensor& image, int64_t stride_width);
// `image` is library_image()'s.
at::Tensor convolve(const Stage& stage, const at::Tensor& image, const OptionalTensor& bias);
at::Tensor forward(const Stage& stage, const at::Tensor& x, const OptionalTensor& bias);

// Whether a transform of torch.func (grad, vmap and what is made of them) handles the current call. torch refuses C++
// autograd functions there and images made contiguous in channels_last; the chain's ops have rules for all transforms.
bool under_transform();

}  // namespace lowrank_ops
