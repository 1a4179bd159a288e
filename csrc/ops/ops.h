// The three ops as C++ functions, and what the files of csrc/ share about them. Symbols as everywhere in this project:
// input [N, S, H, W], output [N, T, OH, OW], kernel KH x KW, Tucker ranks R1 (input side) and R2, CP or matrix rank R.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "plan/problem.h"

namespace lowrank_ops {

using OptionalTensor = std::optional<at::Tensor>;

// Stride, padding and dilation of a block, each (height, width).
struct Window {
  at::IntArrayRef stride, padding, dilation;
};

Activation parse_activation(const char* op, std::string_view name);
at::Tensor apply_activation(at::Tensor output, Activation activation);

// The dtype in which the library's convolutions can be trusted with a block of this input.
// fp16 on a CPU: the library has no fast kernels for it. bf16 on a CPU: library_bfloat16_fails.
inline at::ScalarType library_dtype(const at::Tensor& input, const Window& window, int64_t kernel_width) {
  const at::ScalarType dtype = input.scalar_type();
  if (!input.is_cpu()) return dtype;
  const bool fails =
      dtype == at::kBFloat16 && library_bfloat16_fails(kernel_width, window.stride[1], window.padding[1]);
  return dtype == at::kHalf || fails ? at::kFloat : dtype;
}

// Of a core [R2, R1, KH, KW] or a factor [R, KW].
inline int64_t kernel_width(const at::Tensor& weight) {
  return weight.sym_size(-1).guard_int(__FILE__, __LINE__);
}

// The dtype of matrix products, which are sound in bf16.
inline at::ScalarType library_dtype(const at::Tensor& input) {
  return input.is_cpu() && input.scalar_type() == at::kHalf ? at::kFloat : input.scalar_type();
}

// An image as the library's convolutions can be trusted with: for a window with a stride along W one channel as NCHW,
// which is the same memory. With channels_last strides torch 2.13's gives garbage there, or reads beyond the image,
// where one column of output is left (float32 and bf16, Zen 5: 300 of 300 random problems). Without a stride all of
// 4,800 were right, and the output keeps the image's format.
inline at::Tensor library_image(const at::Tensor& image, int64_t stride_width) {
  return stride_width > 1 && image.sym_size(1).maybe_as_int() == 1 ? image.squeeze(1).unsqueeze(1) : image;
}

// Whether a transform of torch.func (grad, vmap and what is made of them) handles the current call. torch refuses C++
// autograd functions there and images made contiguous in channels_last; the chain's ops have rules for all transforms.
bool under_transform();

// The chain of library convolutions (in `library_dtype`): any device, differentiable, the output in the memory format
// that input suggests. What runs where no kernel of ours does.
at::Tensor tucker_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                        const at::Tensor& out_factor, const OptionalTensor& bias, const Window& window,
                        Activation activation);
at::Tensor cp_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                    const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                    const Window& window, Activation activation);
// The same with the two depthwise stages multiplied out into one KHxKW convolution: what a GPU's library runs faster
// (merges_depthwise of plan/gpu/planner.h).
at::Tensor merged_cp_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                           const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                           const Window& window, Activation activation);
at::Tensor linear_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                        const OptionalTensor& bias, Activation activation);

// The same from the arguments of the ops, which are checked.
at::Tensor tucker_by_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                           const at::Tensor& out_factor, const OptionalTensor& bias, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, std::string_view activation);
at::Tensor cp_by_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                       const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                       std::string_view activation);
at::Tensor linear_by_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                           const OptionalTensor& bias, std::string_view activation);

}  // namespace lowrank_ops
