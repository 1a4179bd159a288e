// Gradients and autocast of the ops: the kernels of the Autograd, AutocastCPU and AutocastCUDA dispatch keys.
//
// Forward saves the input and the factors, never an intermediate; backward calls the `*_backward` op, which
// recomputes them. Nothing here reads sizes: under torch.compile(dynamic=True) these functions are traced
// with symbolic shapes.
//
// Where gradients are to be differentiated again (create_graph=True, or a `*_backward` op called on tensors
// that require grad), they are computed for the whole batch at once by differentiable library calls.
// Forward-mode derivatives and all derivatives and vmaps of torch.func run the chain of library convolutions.
//
// The kernels are templates over the ops (dispatch.h), whose parameter packs are the arguments of the ops' schemas.
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

#include "ops/backward.h"
#include "ops/chain.h"
#include "ops/checks.h"
#include "ops/dispatch.h"
#include "plan/cpu/planner.h"

namespace lowrank_ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename T>
bool requires_grad(const T&) {  // no tensor
  return false;
}
bool requires_grad(const Tensor& tensor) {
  return tensor.requires_grad();
}
bool requires_grad(const OptionalTensor& tensor) {
  return tensor && tensor->requires_grad();
}

template <typename... Tensors>
bool needs_graph(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

template <typename T>
bool has_tangent(const T&) {
  return false;
}
bool has_tangent(const Tensor& tensor) {
  return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
}
bool has_tangent(const OptionalTensor& tensor) {
  return tensor && has_tangent(*tensor);
}

// Whether the derivatives have to be those of the chain: forward-mode ones, and any that torch.func takes.
template <typename... Tensors>
bool needs_chain(const Tensors&... tensors) {
  return (has_tangent(tensors) || ...) || (needs_graph(tensors...) && under_transform());
}

// ---- Forward, with a graph

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// The bias is needed only to recompute what the activation was applied to.
void save(AutogradContext* ctx, const OpCall& call, std::string_view activation) {
  variable_list tensors{call.input};
  for (Tensor& factor : call.factors()) tensors.push_back(std::move(factor));
  tensors.push_back(call.bias && call.activation != Activation::kNone ? *call.bias : Tensor());
  ctx->save_for_backward(std::move(tensors));
  ctx->saved_data["has_bias"] = call.bias.has_value();
  ctx->saved_data["activation"] = std::string(activation);
  if (call.op == Op::kLinear) return;
  ctx->saved_data["stride"] = call.window.stride;
  ctx->saved_data["padding"] = call.window.padding;
  ctx->saved_data["dilation"] = call.window.dilation;
}

// Which gradients autograd asks for: of `count - 1` tensors and the bias.
template <size_t count>
std::array<bool, count> wanted_gradients(AutogradContext* ctx) {
  std::array<bool, count> mask;
  for (size_t i = 0; i + 1 < count; ++i) mask[i] = ctx->needs_input_grad(i);
  mask[count - 1] = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(count - 1);
  return mask;
}

// The backward op with what save() has saved: the tensors at `index` before the bias.
template <typename O, size_t... index>
Gradients<O::gradients> call_backward(AutogradContext* ctx, const Tensor& grad_output, std::index_sequence<index...>) {
  const variable_list saved = ctx->get_saved_variables();
  auto& data = ctx->saved_data;
  const OptionalTensor bias = optional(saved.back());
  const std::string& activation = data["activation"].toStringRef();
  const auto mask = wanted_gradients<O::gradients>(ctx);
  if constexpr (O::op == Op::kLinear)
    return backward_op<O>().call(grad_output, saved[index]..., bias, activation, mask);
  else
    return backward_op<O>().call(grad_output, saved[index]..., bias, data["stride"].toIntVector(),
                                 data["padding"].toIntVector(), data["dilation"].toIntVector(), activation, mask);
}

template <typename Self, typename O, typename Forward = typename O::Forward>
struct OpFunction;
template <typename Self, typename O, typename... Arguments>
struct OpFunction<Self, O, Tensor(Arguments...)> : torch::autograd::Function<Self> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, Arguments... arguments) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor output = forward_op<O>().call(arguments...);
    save(ctx, call_of(arguments...), std::get<sizeof...(Arguments) - 1>(std::tie(arguments...)));
    return output;
  }

  // The gradients, then an undefined one for each argument that is no tensor.
  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    auto gradients = call_backward<O>(ctx, grad_outputs[0], std::make_index_sequence<O::gradients - 1>());
    variable_list list = std::apply([](auto&... gradient) { return variable_list{gradient...}; }, gradients);
    list.resize(sizeof...(Arguments));
    return list;
  }
};

// Named after the ops: users see these names in graphs.
struct TuckerFunction : OpFunction<TuckerFunction, TuckerOp> {};
struct CPFunction : OpFunction<CPFunction, CPOp> {};
struct LinearFunction : OpFunction<LinearFunction, LinearOp> {};

template <typename O>
using FunctionOf = std::conditional_t<O::op == Op::kTucker, TuckerFunction,
                                      std::conditional_t<O::op == Op::kCP, CPFunction, LinearFunction>>;

// ---- Autograd kernels of the ops, and of those with packed weights: where these cannot be used, the ordinary op runs

template <typename O, typename Forward = typename O::Forward>
struct AutogradKernel;
template <typename O, typename... Arguments>
struct AutogradKernel<O, Tensor(Arguments...)> {
  static Tensor call(c10::DispatchKeySet keys, Arguments... arguments) {
    if (needs_chain(arguments...)) return checked_chain(call_of(arguments...));
    if (needs_graph(arguments...)) return FunctionOf<O>::apply(arguments...);
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_op<O>().redispatch(keys & c10::after_ADInplaceOrView_keyset, arguments...);
  }

  static Tensor prepared(c10::DispatchKeySet keys, Arguments... arguments, const Tensor& packed) {
    if (needs_chain(arguments...) || needs_graph(arguments...)) return forward_op<O>().call(arguments...);
    at::AutoDispatchBelowADInplaceOrView guard;
    return prepared_op<O>().redispatch(keys & c10::after_ADInplaceOrView_keyset, arguments..., packed);
  }

  // Under autocast the factors are cast to other ones; only CPUs and CUDA GPUs have kernels that read packed weights.
  static Tensor without_packed(Arguments... arguments, const Tensor&) { return forward_op<O>().call(arguments...); }
};

void register_without_packed(torch::Library& m) {
  for_each_op([&m](auto op) { m.impl(op.prepared_name, &AutogradKernel<decltype(op)>::without_packed); });
}

// ---- Autograd kernels of the backward ops: the gradients themselves, differentiable

// The gradients of the whole batch at once, in the dtype and shape of the arguments. Also what torch.vmap runs, over
// grad_output or over anything else.
std::vector<Tensor> differentiable_gradients(const Tensor& grad_output, const OpCall& call, c10::ArrayRef<bool> mask) {
  const bool linear = call.op == Op::kLinear;
  if (!linear) check_pairs(name_of(call.op), call.window);  // torch's own ops check the shapes
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Block block = block_of(call);
  const auto rows = [&](const Tensor& tensor, const Tensor& factor, int64_t axis) {
    return (linear ? tensor.reshape_symint({-1, factor.sym_size(axis)}) : tensor).to(block.dtype());
  };
  std::vector<Tensor> gradients =
      block_gradients(rows(grad_output, call.out_factor, 0), rows(call.input, call.in_factor, 1), block, mask);
  const auto factors = call.factors();
  for (size_t i = 0; i < mask.size(); ++i) {
    if (!mask[i]) {
      gradients[i] = Tensor();
      continue;
    }
    gradients[i] = gradients[i].to(call.input.scalar_type());
    if (i > 0 && i <= factors.size()) gradients[i] = gradients[i].reshape_symint(factors[i - 1].sym_sizes());
  }
  if (linear && mask[0]) gradients[0] = gradients[0].view_symint(call.input.sym_sizes());
  return gradients;
}

template <typename O>
using DifferentiableBackward = BackwardKernel<differentiable_gradients, O>;

template <typename O, typename Forward = typename O::Forward>
struct BackwardAutogradKernel;
template <typename O, typename... Arguments>
struct BackwardAutogradKernel<O, Tensor(Arguments...)> {
  static Gradients<O::gradients> call(c10::DispatchKeySet keys, const Tensor& grad_output, Arguments... arguments,
                                      std::array<bool, O::gradients> output_mask) {
    if (needs_graph(grad_output, arguments...))
      return DifferentiableBackward<O>::call(grad_output, arguments..., output_mask);
    at::AutoDispatchBelowADInplaceOrView guard;
    return backward_op<O>().redispatch(keys & c10::after_ADInplaceOrView_keyset, grad_output, arguments...,
                                       output_mask);
  }
};

// ---- Autocast: every tensor to the region's dtype, as for torch's own convolutions

template <at::DeviceType device, typename O, typename Forward = typename O::Forward>
struct AutocastKernel;
template <at::DeviceType device, typename O, typename... Arguments>
struct AutocastKernel<device, O, Tensor(Arguments...)> {
  static Tensor call(Arguments... arguments) {
    const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
    const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
    // An argument that is no tensor passes as it is.
    return forward_op<O>().call(at::autocast::cached_cast(dtype, arguments, device)...);
  }
};

template <at::DeviceType device>
void register_autocast(torch::Library& m) {
  for_each_op([&m](auto op) { m.impl(op.name, &AutocastKernel<device, decltype(op)>::call); });
  register_without_packed(m);
}

// ---- torch.vmap: the chain's ops know what to do with a batch of images or of factors

template <typename O, typename Forward = typename O::Forward>
struct BatchedKernel;
template <typename O, typename... Arguments>
struct BatchedKernel<O, Tensor(const Tensor&, Arguments...)> {
  static Tensor call(const Tensor& input, Arguments... arguments) {
    // torch asks for the rule of vmap before that of autocast.
    if (input.is_cpu() && at::autocast::is_autocast_enabled(at::kCPU))
      return AutocastKernel<at::kCPU, O>::call(input, arguments...);
    if (input.is_cuda() && at::autocast::is_autocast_enabled(at::kCUDA))
      return AutocastKernel<at::kCUDA, O>::call(input, arguments...);
    return checked_chain(call_of(input, arguments...));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(lowrank_ops, Autograd, m) {
  for_each_op([&m](auto op) {
    using O = decltype(op);
    m.impl(O::name, &AutogradKernel<O>::call);
    m.impl(O::prepared_name, &AutogradKernel<O>::prepared);
    m.impl(O::backward_name, &BackwardAutogradKernel<O>::call);
  });
}
TORCH_LIBRARY_IMPL(lowrank_ops, FuncTorchBatched, m) {
  for_each_op([&m](auto op) {
    using O = decltype(op);
    m.impl(O::name, &BatchedKernel<O>::call);
    m.impl(O::backward_name, &DifferentiableBackward<O>::call);
  });
  register_without_packed(m);
}
TORCH_LIBRARY_IMPL(lowrank_ops, AutocastCPU, m) {
  register_autocast<at::kCPU>(m);
}
TORCH_LIBRARY_IMPL(lowrank_ops, AutocastCUDA, m) {
  register_autocast<at::kCUDA>(m);
}
TORCH_LIBRARY_IMPL(lowrank_ops, CompositeExplicitAutograd, m) {
  register_without_packed(m);
}

}  // namespace lowrank_ops
