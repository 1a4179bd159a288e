// A call of one of the three ops, as csrc/ hands it from function to function. Symbols as everywhere in this project:
// input [N, S, H, W], output [N, T, OH, OW], kernel KH x KW, Tucker ranks R1 (input side) and R2, CP or matrix rank R.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <optional>
#include <string_view>

#include "plan/problem.h"

namespace lowrank_ops {

using OptionalTensor = std::optional<at::Tensor>;

// Stride, padding and dilation of a block, each (height, width).
struct Window {
  at::IntArrayRef stride, padding, dilation;
};

struct NamedActivation {
  const char* name;
  Activation activation;
};
constexpr std::array<NamedActivation, 6> kActivations{{{"none", Activation::kNone},
                                                       {"relu", Activation::kRelu},
                                                       {"relu6", Activation::kRelu6},
                                                       {"hardswish", Activation::kHardswish},
                                                       {"silu", Activation::kSilu},
                                                       {"gelu", Activation::kGelu}}};
const char* name_of(Activation activation);
Activation parse_activation(const char* op, std::string_view name);

// A tensor's size along an axis, as a number even where torch.compile traces with symbolic sizes (compiled code is then
// valid for that size only). Tensor::size(), which does the same, ends in an internal error of torch 2.11 where
// torch.compile traces through torch.func.
inline int64_t size_of(const at::Tensor& tensor, int64_t axis) {
  return tensor.sym_size(axis).guard_int(__FILE__, __LINE__);
}

// The factors of a block. Those that its op does not have are undefined.
struct Factors {
  at::Tensor in_factor, core, height_factor, width_factor, out_factor;
};

// A view of an op's arguments, which outlive it. A factor that the op does not have is an undefined tensor.
struct OpCall {
  Op op;
  const at::Tensor& input;          // [N, S, H, W]; of lowrank_linear [..., S]
  const at::Tensor& in_factor;      // [R1, S], or [R, S]
  const at::Tensor& core;           // Tucker: [R2, R1, KH, KW]
  const at::Tensor& height_factor;  // CP: [R, KH]
  const at::Tensor& width_factor;   // CP: [R, KW]
  const at::Tensor& out_factor;     // [T, R2], or [T, R]
  const OptionalTensor& bias;       // [T]
  Window window;                    // of the two convolutions
  Activation activation;

  // The factors that the op has, in the order of its arguments.
  c10::SmallVector<at::Tensor, 4> factors() const;
};

const at::Tensor& no_tensor();

// The call of an op on these factors, which outlive it, as everything else does.
inline OpCall call_on(Op op, const at::Tensor& input, const Factors& factors, const OptionalTensor& bias,
                      const Window& window, Activation activation) {
  return {.op = op,
          .input = input,
          .in_factor = factors.in_factor,
          .core = factors.core,
          .height_factor = factors.height_factor,
          .width_factor = factors.width_factor,
          .out_factor = factors.out_factor,
          .bias = bias,
          .window = window,
          .activation = activation};
}

inline OpCall tucker_call(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                          const at::Tensor& out_factor, const OptionalTensor& bias, const Window& window,
                          Activation activation) {
  return {.op = Op::kTucker,
          .input = input,
          .in_factor = in_factor,
          .core = core,
          .height_factor = no_tensor(),
          .width_factor = no_tensor(),
          .out_factor = out_factor,
          .bias = bias,
          .window = window,
          .activation = activation};
}

inline OpCall cp_call(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                      const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                      const Window& window, Activation activation) {
  return {.op = Op::kCP,
          .input = input,
          .in_factor = in_factor,
          .core = no_tensor(),
          .height_factor = height_factor,
          .width_factor = width_factor,
          .out_factor = out_factor,
          .bias = bias,
          .window = window,
          .activation = activation};
}

inline OpCall linear_call(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                          const OptionalTensor& bias, Activation activation) {
  return {.op = Op::kLinear,
          .input = input,
          .in_factor = in_factor,
          .core = no_tensor(),
          .height_factor = no_tensor(),
          .width_factor = no_tensor(),
          .out_factor = out_factor,
          .bias = bias,
          .window = {},
          .activation = activation};
}

// The same call of another input, which outlives it.
inline OpCall with_input(const OpCall& call, const at::Tensor& input) {
  return {.op = call.op,
          .input = input,
          .in_factor = call.in_factor,
          .core = call.core,
          .height_factor = call.height_factor,
          .width_factor = call.width_factor,
          .out_factor = call.out_factor,
          .bias = call.bias,
          .window = call.window,
          .activation = call.activation};
}

}  // namespace lowrank_ops
