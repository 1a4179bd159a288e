// Gradients and autocast of the ops: the kernels of the Autograd, AutocastCPU and AutocastCUDA dispatch keys.
//
// Forward saves the input and the factors, never an intermediate; backward calls the `*_backward` op, which
// recomputes them. Nothing here reads sizes: under torch.compile(dynamic=True) these functions are traced
// with symbolic shapes.
//
// Where gradients are to be differentiated again (create_graph=True, or a `*_backward` op called on tensors
// that require grad), they are computed for the whole batch at once by differentiable library calls.
// Forward-mode derivatives and all derivatives and vmaps of torch.func run the chain of library convolutions.
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

#include "ops/backward.h"
#include "ops/checks.h"
#include "ops/dispatch.h"

namespace lowrank_ops {
namespace {

using at::IntArrayRef;
using at::Tensor;
using std::string_view;
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

// ---- Saving for backward
// -------------------------------------------------------------------------------------------

void save_window(AutogradContext* ctx, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation) {
  ctx->saved_data["stride"] = stride;
  ctx->saved_data["padding"] = padding;
  ctx->saved_data["dilation"] = dilation;
}

// The bias is needed only to recompute what the activation was applied to.
void save(AutogradContext* ctx, variable_list tensors, const OptionalTensor& bias, string_view activation) {
  ctx->saved_data["activation"] = std::string(activation);
  ctx->saved_data["has_bias"] = bias.has_value();
  tensors.push_back(bias && activation != "none" ? *bias : Tensor());
  ctx->save_for_backward(std::move(tensors));
}

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// Which gradients the engine asks for: of `count - 1` tensors and the bias.
template <size_t count>
std::array<bool, count> wanted_gradients(AutogradContext* ctx) {
  std::array<bool, count> mask;
  for (size_t i = 0; i + 1 < count; ++i) mask[i] = ctx->needs_input_grad(i);
  mask[count - 1] = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(count - 1);
  return mask;
}

// The gradients, then an undefined one for each argument that is no tensor.
template <typename Gradients>
variable_list for_engine(Gradients gradients, size_t arguments) {
  variable_list list = std::apply([](auto&... gradient) { return variable_list{gradient...}; }, gradients);
  list.resize(arguments);
  return list;
}

struct TuckerFunction : torch::autograd::Function<TuckerFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& in_factor, const Tensor& core,
                        const Tensor& out_factor, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
                        IntArrayRef dilation, string_view activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor output =
        tucker_conv2d_op().call(input, in_factor, core, out_factor, bias, stride, padding, dilation, activation);
    save_window(ctx, stride, padding, dilation);
    save(ctx, {input, in_factor, core, out_factor}, bias, activation);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    return for_engine(tucker_conv2d_backward_op().call(grad_outputs[0], saved[0], saved[1], saved[2], saved[3],
                                                       optional(saved[4]), data["stride"].toIntVector(),
                                                       data["padding"].toIntVector(), data["dilation"].toIntVector(),
                                                       data["activation"].toStringRef(), wanted_gradients<5>(ctx)),
                      9);
  }
};

struct CPFunction : torch::autograd::Function<CPFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& in_factor, const Tensor& height_factor,
                        const Tensor& width_factor, const Tensor& out_factor, const OptionalTensor& bias,
                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, string_view activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor output = cp_conv2d_op().call(input, in_factor, height_factor, width_factor, out_factor, bias, stride,
                                        padding, dilation, activation);
    save_window(ctx, stride, padding, dilation);
    save(ctx, {input, in_factor, height_factor, width_factor, out_factor}, bias, activation);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    return for_engine(cp_conv2d_backward_op().call(grad_outputs[0], saved[0], saved[1], saved[2], saved[3], saved[4],
                                                   optional(saved[5]), data["stride"].toIntVector(),
                                                   data["padding"].toIntVector(), data["dilation"].toIntVector(),
                                                   data["activation"].toStringRef(), wanted_gradients<6>(ctx)),
                      10);
  }
};

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& in_factor, const Tensor& out_factor,
                        const OptionalTensor& bias, string_view activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor output = lowrank_linear_op().call(input, in_factor, out_factor, bias, activation);
    save(ctx, {input, in_factor, out_factor}, bias, activation);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    return for_engine(
        lowrank_linear_backward_op().call(grad_outputs[0], saved[0], saved[1], saved[2], optional(saved[3]),
                                          ctx->saved_data["activation"].toStringRef(), wanted_gradients<4>(ctx)),
        5);
  }
};

// ---- Autograd kernels of the ops

Tensor tucker_autograd(c10::DispatchKeySet keys, const Tensor& input, const Tensor& in_factor, const Tensor& core,
                       const Tensor& out_factor, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
                       IntArrayRef dilation, string_view activation) {
  if (needs_chain(input, in_factor, core, out_factor, bias))
    return tucker_by_chain(input, in_factor, core, out_factor, bias, stride, padding, dilation, activation);
  if (needs_graph(input, in_factor, core, out_factor, bias))
    return TuckerFunction::apply(input, in_factor, core, out_factor, bias, stride, padding, dilation, activation);
  at::AutoDispatchBelowADInplaceOrView guard;
  return tucker_conv2d_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, input, in_factor, core, out_factor,
                                       bias, stride, padding, dilation, activation);
}

Tensor cp_autograd(c10::DispatchKeySet keys, const Tensor& input, const Tensor& in_factor, const Tensor& height_factor,
                   const Tensor& width_factor, const Tensor& out_factor, const OptionalTensor& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, string_view activation) {
  if (needs_chain(input, in_factor, height_factor, width_factor, out_factor, bias))
    return cp_by_chain(input, in_factor, height_factor, width_factor, out_factor, bias, stride, padding, dilation,
                       activation);
  if (needs_graph(input, in_factor, height_factor, width_factor, out_factor, bias))
    return CPFunction::apply(input, in_factor, height_factor, width_factor, out_factor, bias, stride, padding, dilation,
                             activation);
  at::AutoDispatchBelowADInplaceOrView guard;
  return cp_conv2d_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, input, in_factor, height_factor,
                                   width_factor, out_factor, bias, stride, padding, dilation, activation);
}

Tensor linear_autograd(c10::DispatchKeySet keys, const Tensor& input, const Tensor& in_factor, const Tensor& out_factor,
                       const OptionalTensor& bias, string_view activation) {
  if (needs_chain(input, in_factor, out_factor, bias))
    return linear_by_chain(input, in_factor, out_factor, bias, activation);
  if (needs_graph(input, in_factor, out_factor, bias))
    return LinearFunction::apply(input, in_factor, out_factor, bias, activation);
  at::AutoDispatchBelowADInplaceOrView guard;
  return lowrank_linear_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, input, in_factor, out_factor, bias,
                                        activation);
}

// ---- Ops with packed weights: where these cannot be used, the ordinary op runs

template <auto plain, auto prepared, typename Signature>
struct PreparedOp;
template <auto plain, auto prepared, typename... Arguments>
struct PreparedOp<plain, prepared, Tensor(Arguments...)> {
  // Under autocast the factors are cast to other ones; devices other than the CPU have no packed weights.
  static Tensor ordinary(Arguments... arguments, const Tensor&) { return plain().call(arguments...); }

  static Tensor autograd(c10::DispatchKeySet keys, Arguments... arguments, const Tensor& packed) {
    if (needs_chain(arguments...) || needs_graph(arguments...)) return plain().call(arguments...);
    at::AutoDispatchBelowADInplaceOrView guard;
    return prepared().redispatch(keys & c10::after_ADInplaceOrView_keyset, arguments..., packed);
  }
};
using PreparedTucker = PreparedOp<&tucker_conv2d_op, &tucker_conv2d_prepared_op, TuckerForward>;
using PreparedCP = PreparedOp<&cp_conv2d_op, &cp_conv2d_prepared_op, CPForward>;
using PreparedLinear = PreparedOp<&lowrank_linear_op, &lowrank_linear_prepared_op, LinearForward>;

void register_ordinary(torch::Library& m) {
  m.impl("tucker_conv2d_prepared", &PreparedTucker::ordinary);
  m.impl("cp_conv2d_prepared", &PreparedCP::ordinary);
  m.impl("lowrank_linear_prepared", &PreparedLinear::ordinary);
}

// ---- Autograd kernels of the backward ops: the gradients themselves, differentiable
// --------------------------------

// The gradients of the whole batch at once, in the dtype and shape of the arguments.
template <size_t count>
auto differentiable_gradients(const Tensor& grad_output, const Tensor& input, const Block& block,
                              const std::array<Tensor, count - 2>& factors, const std::array<bool, count>& mask) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::ScalarType dtype = block.stages[0].weight.scalar_type();
  const std::vector<Tensor> found = block_gradients(grad_output.to(dtype), input.to(dtype), block, mask);
  std::array<Tensor, count> gradients;
  for (size_t i = 0; i < count; ++i) {
    if (!mask[i]) continue;
    gradients[i] = found[i].to(input.scalar_type());
    if (i > 0 && i + 1 < count) gradients[i] = gradients[i].reshape_symint(factors[i - 1].sym_sizes());
  }
  return gradients;
}

template <size_t count>
auto as_tuple(const std::array<Tensor, count>& gradients) {
  return std::apply([](const auto&... gradient) { return std::make_tuple(gradient...); }, gradients);
}

// The same for a whole op: also what torch.vmap runs, over grad_output or over anything else.
Gradients5 tucker_gradients(const Tensor& grad_output, const Tensor& input, const Tensor& in_factor, const Tensor& core,
                            const Tensor& out_factor, const OptionalTensor& bias, IntArrayRef stride,
                            IntArrayRef padding, IntArrayRef dilation, string_view activation,
                            std::array<bool, 5> output_mask) {
  constexpr const char* op = "tucker_conv2d_backward";
  const Window window{stride, padding, dilation};
  check_pairs(op, window);  // torch's own ops check the shapes
  const Block block = tucker_block(input, in_factor, core, out_factor, bias, window, parse_activation(op, activation));
  return as_tuple(differentiable_gradients<5>(grad_output, input, block, {in_factor, core, out_factor}, output_mask));
}

Gradients6 cp_gradients(const Tensor& grad_output, const Tensor& input, const Tensor& in_factor,
                        const Tensor& height_factor, const Tensor& width_factor, const Tensor& out_factor,
                        const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                        string_view activation, std::array<bool, 6> output_mask) {
  constexpr const char* op = "cp_conv2d_backward";
  const Window window{stride, padding, dilation};
  check_pairs(op, window);  // torch's own ops check the shapes
  const Block block = cp_block(input, in_factor, height_factor, width_factor, out_factor, bias, window,
                               parse_activation(op, activation));
  return as_tuple(differentiable_gradients<6>(grad_output, input, block,
                                              {in_factor, height_factor, width_factor, out_factor}, output_mask));
}

Gradients4 linear_gradients(const Tensor& grad_output, const Tensor& input, const Tensor& in_factor,
                            const Tensor& out_factor, const OptionalTensor& bias, string_view activation,
                            std::array<bool, 4> output_mask) {
  const Block block =
      linear_block(input, in_factor, out_factor, bias, parse_activation("lowrank_linear_backward", activation));
  auto gradients = differentiable_gradients<4>(grad_output.reshape_symint({-1, out_factor.sym_size(0)}),
                                               input.reshape_symint({-1, in_factor.sym_size(1)}), block,
                                               {in_factor, out_factor}, output_mask);
  if (output_mask[0]) gradients[0] = gradients[0].view_symint(input.sym_sizes());
  return as_tuple(gradients);
}

Gradients5 tucker_backward_autograd(c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& input,
                                    const Tensor& in_factor, const Tensor& core, const Tensor& out_factor,
                                    const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
                                    IntArrayRef dilation, string_view activation, std::array<bool, 5> output_mask) {
  if (needs_graph(grad_output, input, in_factor, core, out_factor, bias))
    return tucker_gradients(grad_output, input, in_factor, core, out_factor, bias, stride, padding, dilation,
                            activation, output_mask);
  at::AutoDispatchBelowADInplaceOrView guard;
  return tucker_conv2d_backward_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, grad_output, input, in_factor,
                                                core, out_factor, bias, stride, padding, dilation, activation,
                                                output_mask);
}

Gradients6 cp_backward_autograd(c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& input,
                                const Tensor& in_factor, const Tensor& height_factor, const Tensor& width_factor,
                                const Tensor& out_factor, const OptionalTensor& bias, IntArrayRef stride,
                                IntArrayRef padding, IntArrayRef dilation, string_view activation,
                                std::array<bool, 6> output_mask) {
  if (needs_graph(grad_output, input, in_factor, height_factor, width_factor, out_factor, bias))
    return cp_gradients(grad_output, input, in_factor, height_factor, width_factor, out_factor, bias, stride, padding,
                        dilation, activation, output_mask);
  at::AutoDispatchBelowADInplaceOrView guard;
  return cp_conv2d_backward_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, grad_output, input, in_factor,
                                            height_factor, width_factor, out_factor, bias, stride, padding, dilation,
                                            activation, output_mask);
}

Gradients4 linear_backward_autograd(c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& input,
                                    const Tensor& in_factor, const Tensor& out_factor, const OptionalTensor& bias,
                                    string_view activation, std::array<bool, 4> output_mask) {
  if (needs_graph(grad_output, input, in_factor, out_factor, bias))
    return linear_gradients(grad_output, input, in_factor, out_factor, bias, activation, output_mask);
  at::AutoDispatchBelowADInplaceOrView guard;
  return lowrank_linear_backward_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, grad_output, input,
                                                 in_factor, out_factor, bias, activation, output_mask);
}

// ---- Autocast: every tensor to the region's dtype, as for torch's own convolutions
// ---------------------------------

// Casts the tensors of a call; everything else passes as it is.
template <at::DeviceType device>
struct Autocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
  at::ScalarType dtype = at::autocast::get_autocast_dtype(device);

  template <typename T>
  auto operator()(const T& tensor) const {
    return at::autocast::cached_cast(dtype, tensor, device);
  }
};

template <at::DeviceType device>
Tensor tucker_autocast(const Tensor& input, const Tensor& in_factor, const Tensor& core, const Tensor& out_factor,
                       const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                       string_view activation) {
  const Autocast<device> cast;
  return tucker_conv2d_op().call(cast(input), cast(in_factor), cast(core), cast(out_factor), cast(bias), stride,
                                 padding, dilation, activation);
}

template <at::DeviceType device>
Tensor cp_autocast(const Tensor& input, const Tensor& in_factor, const Tensor& height_factor,
                   const Tensor& width_factor, const Tensor& out_factor, const OptionalTensor& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, string_view activation) {
  const Autocast<device> cast;
  return cp_conv2d_op().call(cast(input), cast(in_factor), cast(height_factor), cast(width_factor), cast(out_factor),
                             cast(bias), stride, padding, dilation, activation);
}

template <at::DeviceType device>
Tensor linear_autocast(const Tensor& input, const Tensor& in_factor, const Tensor& out_factor,
                       const OptionalTensor& bias, string_view activation) {
  const Autocast<device> cast;
  return lowrank_linear_op().call(cast(input), cast(in_factor), cast(out_factor), cast(bias), activation);
}

template <at::DeviceType device>
void register_autocast(torch::Library& m) {
  m.impl("tucker_conv2d", &tucker_autocast<device>);
  m.impl("cp_conv2d", &cp_autocast<device>);
  m.impl("lowrank_linear", &linear_autocast<device>);
}

// ---- torch.vmap: the chain's ops know what to do with a batch of images or of factors

// torch asks for the rule of vmap before that of autocast.
template <auto chain, auto on_cpu, auto on_cuda, typename Signature>
struct BatchedOp;
template <auto chain, auto on_cpu, auto on_cuda, typename... Arguments>
struct BatchedOp<chain, on_cpu, on_cuda, Tensor(const Tensor&, Arguments...)> {
  static Tensor call(const Tensor& input, Arguments... arguments) {
    if (input.is_cpu() && at::autocast::is_autocast_enabled(at::kCPU)) return on_cpu(input, arguments...);
    if (input.is_cuda() && at::autocast::is_autocast_enabled(at::kCUDA)) return on_cuda(input, arguments...);
    return chain(input, arguments...);
  }
};
using BatchedTucker =
    BatchedOp<&tucker_by_chain, &tucker_autocast<at::kCPU>, &tucker_autocast<at::kCUDA>, TuckerForward>;
using BatchedCP = BatchedOp<&cp_by_chain, &cp_autocast<at::kCPU>, &cp_autocast<at::kCUDA>, CPForward>;
using BatchedLinear =
    BatchedOp<&linear_by_chain, &linear_autocast<at::kCPU>, &linear_autocast<at::kCUDA>, LinearForward>;

}  // namespace

TORCH_LIBRARY_IMPL(lowrank_ops, Autograd, m) {
  m.impl("tucker_conv2d", &tucker_autograd);
  m.impl("cp_conv2d", &cp_autograd);
  m.impl("lowrank_linear", &linear_autograd);
  m.impl("tucker_conv2d_prepared", &PreparedTucker::autograd);
  m.impl("cp_conv2d_prepared", &PreparedCP::autograd);
  m.impl("lowrank_linear_prepared", &PreparedLinear::autograd);
  m.impl("tucker_conv2d_backward", &tucker_backward_autograd);
  m.impl("cp_conv2d_backward", &cp_backward_autograd);
  m.impl("lowrank_linear_backward", &linear_backward_autograd);
}

TORCH_LIBRARY_IMPL(lowrank_ops, FuncTorchBatched, m) {
  m.impl("tucker_conv2d", &BatchedTucker::call);
  m.impl("cp_conv2d", &BatchedCP::call);
  m.impl("lowrank_linear", &BatchedLinear::call);
  register_ordinary(m);
  m.impl("tucker_conv2d_backward", &tucker_gradients);
  m.impl("cp_conv2d_backward", &cp_gradients);
  m.impl("lowrank_linear_backward", &linear_gradients);
}
TORCH_LIBRARY_IMPL(lowrank_ops, AutocastCPU, m) {
  register_autocast<at::kCPU>(m);
  register_ordinary(m);
}
TORCH_LIBRARY_IMPL(lowrank_ops, AutocastCUDA, m) {
  register_autocast<at::kCUDA>(m);
  register_ordinary(m);
}
TORCH_LIBRARY_IMPL(lowrank_ops, CompositeExplicitAutograd, m) {
  register_ordinary(m);
}

}  // namespace lowrank_ops
