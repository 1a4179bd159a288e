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

// The chain of library convolutions: any device, differentiable. What runs where no kernel of ours does.
at::Tensor tucker_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                        const at::Tensor& out_factor, const OptionalTensor& bias, const Window& window,
                        Activation activation);
at::Tensor cp_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                    const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                    const Window& window, Activation activation);
at::Tensor linear_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                        const OptionalTensor& bias, Activation activation);

}  // namespace lowrank_ops
