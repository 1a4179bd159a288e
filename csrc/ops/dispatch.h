// The registered ops as typed functions of C++ (calls go through torch's dispatcher: gradients, autocast, fake tensors,
// the kernels of the input's device), and the way from a schema's arguments to an OpCall and back.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/call.h"

namespace lowrank_ops {

// A tuple of `count` tensors.
template <size_t count>
using Gradients = decltype(std::tuple_cat(std::declval<std::array<at::Tensor, count>>()));

template <typename Forward, size_t count>
struct Signatures;
template <typename... Arguments, size_t count>
struct Signatures<at::Tensor(Arguments...), count> {
  using Prepared = at::Tensor(Arguments..., const at::Tensor& packed);
  using Backward = Gradients<count>(const at::Tensor& grad_output, Arguments..., std::array<bool, count> output_mask);
};

// One struct per op: its names, its C++ signature, and how many of its arguments have gradients.
struct TuckerOp {
  static constexpr Op op = Op::kTucker;
  static constexpr const char* name = "tucker_conv2d";
  static constexpr const char* prepared_name = "tucker_conv2d_prepared";
  static constexpr const char* backward_name = "tucker_conv2d_backward";
  static constexpr size_t gradients = 5;
  using Forward = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                             const OptionalTensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef,
                             std::string_view);
};
struct CPOp {
  static constexpr Op op = Op::kCP;
  static constexpr const char* name = "cp_conv2d";
  static constexpr const char* prepared_name = "cp_conv2d_prepared";
  static constexpr const char* backward_name = "cp_conv2d_backward";
  static constexpr size_t gradients = 6;
  using Forward = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                             const at::Tensor&, const OptionalTensor&, at::IntArrayRef, at::IntArrayRef,
                             at::IntArrayRef, std::string_view);
};
struct LinearOp {
  static constexpr Op op = Op::kLinear;
  static constexpr const char* name = "lowrank_linear";
  static constexpr const char* prepared_name = "lowrank_linear_prepared";
  static constexpr const char* backward_name = "lowrank_linear_backward";
  static constexpr size_t gradients = 4;
  using Forward = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                             std::string_view);
};

template <typename Function>
void for_each_op(const Function& function) {
  function(TuckerOp{});
  function(CPOp{});
  function(LinearOp{});
}

template <typename Signature>
auto registered_op(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(("lowrank_ops::" + std::string(name)).c_str(), "")
      .typed<Signature>();
}

// The registered ops, each looked up once.
template <typename O>
const auto& forward_op() {
  static const auto op = registered_op<typename O::Forward>(O::name);
  return op;
}
template <typename O>
const auto& prepared_op() {
  static const auto op =
      registered_op<typename Signatures<typename O::Forward, O::gradients>::Prepared>(O::prepared_name);
  return op;
}
template <typename O>
const auto& backward_op() {
  static const auto op =
      registered_op<typename Signatures<typename O::Forward, O::gradients>::Backward>(O::backward_name);
  return op;
}

// ---- From the arguments of a schema to an OpCall

inline OpCall call_of(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                      const at::Tensor& out_factor, const OptionalTensor& bias, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, std::string_view activation) {
  return tucker_call(input, in_factor, core, out_factor, bias, {stride, padding, dilation},
                     parse_activation(TuckerOp::name, activation));
}

inline OpCall call_of(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                      const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                      std::string_view activation) {
  return cp_call(input, in_factor, height_factor, width_factor, out_factor, bias, {stride, padding, dilation},
                 parse_activation(CPOp::name, activation));
}

inline OpCall call_of(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                      const OptionalTensor& bias, std::string_view activation) {
  return linear_call(input, in_factor, out_factor, bias, parse_activation(LinearOp::name, activation));
}

// `run`, a function of an OpCall, with the arguments of the op's schema.
template <auto run, typename O, typename Forward = typename O::Forward>
struct ForwardKernel;
template <auto run, typename O, typename... Arguments>
struct ForwardKernel<run, O, at::Tensor(Arguments...)> {
  static at::Tensor call(Arguments... arguments) { return run(call_of(arguments...)); }
};

// `run`, a function of an OpCall and a pointer to the packed weights, with the arguments of the prepared op's schema.
template <auto run, typename O, typename Forward = typename O::Forward>
struct PreparedKernel;
template <auto run, typename O, typename... Arguments>
struct PreparedKernel<run, O, at::Tensor(Arguments...)> {
  static at::Tensor call(Arguments... arguments, const at::Tensor& packed) {
    return run(call_of(arguments...), &packed);
  }
};

// `run`, a function of grad_output, an OpCall and a mask that returns as many gradients, with the arguments of the
// backward op's schema.
template <auto run, typename O, typename Forward = typename O::Forward>
struct BackwardKernel;
template <auto run, typename O, typename... Arguments>
struct BackwardKernel<run, O, at::Tensor(Arguments...)> {
  static Gradients<O::gradients> call(const at::Tensor& grad_output, Arguments... arguments,
                                      std::array<bool, O::gradients> output_mask) {
    const std::vector<at::Tensor> found = run(grad_output, call_of(arguments...), output_mask);
    Gradients<O::gradients> gradients;
    size_t index = 0;
    std::apply([&](auto&... gradient) { ((gradient = found[index++]), ...); }, gradients);
    return gradients;
  }
};

}  // namespace lowrank_ops
