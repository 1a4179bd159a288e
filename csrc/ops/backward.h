// The backward ops as C++ functions: they recompute the intermediates, so that only the input and the factors
// need to be kept from the forward pass. `output_mask` says, in the order of the results, which gradients are
// wanted; the others come back undefined. The bias is read only where there is an activation; its gradient
// can be had without it.
#pragma once

#include <array>
#include <tuple>
#include <vector>

#include "ops/ops.h"

namespace lowrank_ops {

using Gradients4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Gradients5 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Gradients6 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// A bias-free convolution of a block, or, where `weight` is a matrix, a linear map over the rows of its
// input.
struct Stage {
  at::Tensor weight;
  std::array<int64_t, 2> stride{1, 1}, padding{0, 0}, dilation{1, 1};
  int64_t groups = 1;
};

// A factorized layer as a list of linear stages; `bias` follows the last one. Tensors have the dtype to
// compute in.
struct Block {
  std::vector<Stage> stages;
  OptionalTensor bias;
  Activation activation;
};

Block tucker_block(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                   const at::Tensor& out_factor, const OptionalTensor& bias, const Window& window,
                   Activation activation);
Block cp_block(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
               const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
               const Window& window, Activation activation);
Block linear_block(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                   const OptionalTensor& bias, Activation activation);

// The gradients of input, the stages' weights and the bias, in this order and in the block's dtype (the
// bias's in fp32 at least); undefined where `mask` is false. Differentiable under grad mode, and reads no
// sizes then. All intermediates exist at once: for a large batch it is to be called on a part at a time.
std::vector<at::Tensor> block_gradients(const at::Tensor& grad_output, const at::Tensor& input, const Block& block,
                                        c10::ArrayRef<bool> mask);

Gradients5 tucker_conv2d_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& in_factor,
                                  const at::Tensor& core, const at::Tensor& out_factor, const OptionalTensor& bias,
                                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                  std::string_view activation, std::array<bool, 5> output_mask);
// CP's gradients with both depthwise stages as one convolution: what GPUs run where that is faster.
Gradients6 merged_cp_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& in_factor,
                              const at::Tensor& height_factor, const at::Tensor& width_factor,
                              const at::Tensor& out_factor, const OptionalTensor& bias, const Window& window,
                              Activation activation, const std::array<bool, 6>& mask);
Gradients6 cp_conv2d_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& in_factor,
                              const at::Tensor& height_factor, const at::Tensor& width_factor,
                              const at::Tensor& out_factor, const OptionalTensor& bias, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, std::string_view activation,
                              std::array<bool, 6> output_mask);
Gradients4 lowrank_linear_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& in_factor,
                                   const at::Tensor& out_factor, const OptionalTensor& bias,
                                   std::string_view activation, std::array<bool, 4> output_mask);

}  // namespace lowrank_ops
