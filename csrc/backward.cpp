// The backward ops, on every device: a chain of library convolutions (or matrix products), run over a few images (or
// rows) at a time, so that no intermediate of a whole batch ever exists. All three ops are one algorithm: a list of
// linear stages, walked forward to recompute the stage inputs and then backward.
#include "backward.h"

#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "checks.h"

namespace lowrank_ops {
namespace {

using at::IntArrayRef;
using at::Tensor;

// What the recomputed intermediates of one chunk may take. On a CPU near the size of a last-level cache; elsewhere
// large enough that launches do not dominate.
constexpr int64_t kCpuChunkBytes = int64_t{32} << 20;
constexpr int64_t kDeviceChunkBytes = int64_t{256} << 20;

// A convolution of the block, or, where `weight` is a matrix, a linear map over the rows of its input.
struct Stage {
  Tensor weight;
  std::array<int64_t, 2> stride{1, 1}, padding{0, 0}, dilation{1, 1};
  int64_t groups = 1;

  bool is_linear() const { return weight.dim() == 2; }

  Tensor forward(const Tensor& x, const OptionalTensor& bias) const {
    if (is_linear()) return at::linear(x, weight, bias);
    return at::conv2d(x, weight, bias, stride, padding, dilation, groups);
  }

  // A tensor of the shape of forward(x), its values never to be read.
  Tensor unset_output(const Tensor& x) const {
    std::vector<int64_t> sizes{x.size(0), weight.size(0)};
    for (int axis = 0; axis < x.dim() - 2; ++axis)
      sizes.push_back(
          output_size(x.size(2 + axis), weight.size(2 + axis), stride[axis], padding[axis], dilation[axis]));
    return at::empty(sizes, x.options().memory_format(x.suggest_memory_format()));
  }

  // The gradients of x and weight. For the gradient of x alone only the shape of x is read.
  std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, std::array<bool, 2> mask) const {
    if (is_linear()) return {mask[0] ? at::mm(grad, weight) : Tensor(), mask[1] ? at::mm(grad.t(), x) : Tensor()};
    auto [grad_x, grad_weight, unused] =
        at::convolution_backward(grad, x, weight, /*bias_sizes=*/at::OptionalIntArrayRef(), stride, padding, dilation,
                                 /*transposed=*/false, /*output_padding=*/{0, 0}, groups, {mask[0], mask[1], false});
    return {grad_x, grad_weight};
  }
};

Stage pointwise(const Tensor& factor) { return {factor.unsqueeze(-1).unsqueeze(-1)}; }

Tensor activation_backward(const Tensor& grad, const Tensor& before, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return grad;
    case Activation::kRelu:
      return at::threshold_backward(grad, before, 0);
    case Activation::kRelu6:
      return at::hardtanh_backward(grad, before, 0, 6);
    case Activation::kHardswish:
      return at::hardswish_backward(grad, before);
    case Activation::kSilu:
      return at::silu_backward(grad, before);
    case Activation::kGelu:
      return at::gelu_backward(grad, before);
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

// Adds up the chunks' share of a weight gradient, in fp32 where the dtype is narrower.
class Sum {
 public:
  void add(const Tensor& part) {
    if (total_.defined()) {
      total_.add_(part);
    } else {
      total_ = part.to(at::toOpMathType(part.scalar_type()));
    }
  }

  // In the dtype and shape of `factor`, and in its memory format, so that an optimizer meets the strides it expects.
  Tensor result(const Tensor& factor) const {
    if (!total_.defined()) return at::zeros_like(factor, at::MemoryFormat::Contiguous);
    return total_.to(factor.scalar_type()).view(factor.sizes()).contiguous(factor.suggest_memory_format());
  }

 private:
  Tensor total_;
};

// How many images (rows) a chunk holds: the stage inputs and their gradients within the budget.
int64_t chunk_size(const std::vector<Stage>& stages, const Tensor& input, const Tensor& grad_output) {
  const auto pixels = [](const Tensor& tensor) { return tensor.dim() == 4 ? tensor.size(2) * tensor.size(3) : 1; };
  const int64_t most_pixels = std::max(pixels(input), pixels(grad_output));
  int64_t channels = input.size(1);
  for (const Stage& stage : stages) channels += stage.weight.size(0);
  const int64_t bytes = 2 * channels * most_pixels * stages[0].weight.element_size();
  return std::max<int64_t>(1, (input.is_cpu() ? kCpuChunkBytes : kDeviceChunkBytes) / bytes);
}

// The gradients of input, the stages' factors and bias, in this order: those that `mask` asks for. Chunks are cut
// along axis 0. The stages' weights and `stage_bias` have the dtype to compute in.
std::vector<Tensor> block_backward(const Tensor& grad_output, const Tensor& input, const std::vector<Stage>& stages,
                                   const std::vector<Tensor>& factors, const OptionalTensor& bias,
                                   Activation activation, c10::ArrayRef<bool> mask) {
  const int count = static_cast<int>(stages.size());
  const at::ScalarType dtype = stages[0].weight.scalar_type();
  const OptionalTensor stage_bias = bias ? OptionalTensor(bias->to(dtype)) : std::nullopt;
  const auto format = input.suggest_memory_format();
  const bool wants_input = mask[0], wants_bias = mask[1 + count];
  const auto wants_factor = [&](int stage) { return mask[1 + stage]; };

  // The lowest stage that the gradient has to reach, and how many stages have to be recomputed.
  int lowest = count, recomputed = 0;
  for (int i = count - 1; i >= 0; --i) {
    if (wants_input || wants_factor(i)) lowest = i;
    if (wants_factor(i)) recomputed = std::max(recomputed, i);
  }
  if (activation != Activation::kNone) recomputed = count;

  Tensor grad_input = wants_input ? at::empty(input.sizes(), input.options().memory_format(format)) : Tensor();
  std::vector<Sum> grad_factors(count);
  Sum grad_bias;
  const int64_t total = input.size(0), step = chunk_size(stages, input, grad_output);
  for (int64_t first = 0; first < total && (lowest < count || wants_bias); first += step) {
    const int64_t size = std::min(step, total - first);
    const auto load = [&](const Tensor& tensor) {
      return tensor.narrow(0, first, size).to(dtype).contiguous(format);
    };
    std::vector<Tensor> stage_inputs{load(input)};
    for (int i = 0; i < count; ++i) {
      const Tensor& x = stage_inputs.back();
      const bool is_last = i == count - 1;
      if (i < recomputed) {
        stage_inputs.push_back(stages[i].forward(x, is_last ? stage_bias : std::nullopt));
      } else if (!is_last) {
        stage_inputs.push_back(stages[i].unset_output(x));
      }
    }

    Tensor grad = load(grad_output);
    if (activation != Activation::kNone) {
      grad = activation_backward(grad, stage_inputs.back(), activation);
      stage_inputs.pop_back();
    }
    if (wants_bias) {
      const auto sum_dtype = at::toOpMathType(dtype);
      grad_bias.add(grad.dim() == 4 ? grad.sum({0, 2, 3}, false, sum_dtype) : grad.sum(0, false, sum_dtype));
    }
    for (int i = count - 1; i >= lowest; --i) {
      auto [grad_below, grad_weight] =
          stages[i].backward(grad, stage_inputs.back(), {wants_input || i > lowest, wants_factor(i)});
      if (wants_factor(i)) grad_factors[i].add(grad_weight);
      grad = std::move(grad_below);
      stage_inputs.pop_back();
    }
    if (wants_input) grad_input.narrow(0, first, size).copy_(grad);
  }

  std::vector<Tensor> gradients{grad_input};
  for (int i = 0; i < count; ++i)
    gradients.push_back(wants_factor(i) ? grad_factors[i].result(factors[i]) : Tensor());
  // A column of the last factor, [T, ...], has the shape of a bias.
  gradients.push_back(wants_bias ? grad_bias.result(factors.back().select(1, 0)) : Tensor());
  return gradients;
}

template <size_t... I>
auto as_tuple(const std::vector<Tensor>& tensors, std::index_sequence<I...>) {
  return std::make_tuple(tensors[I]...);
}

void check_grad_output(const char* op, const Tensor& grad_output, const Tensor& input, IntArrayRef required) {
  TORCH_CHECK_VALUE(grad_output.sizes() == required, op, ": grad_output must have the output's shape ", required,
                    ", got ", grad_output.sizes());
  TORCH_CHECK_TYPE(grad_output.scalar_type() == input.scalar_type(), op, ": grad_output must have the input's dtype ",
                   input.scalar_type(), ", got ", grad_output.scalar_type());
  TORCH_CHECK_VALUE(grad_output.device() == input.device(), op, ": grad_output must be on the input's device ",
                    input.device(), ", got ", grad_output.device());
}

void check_grad_output(const char* op, const Tensor& grad_output, const Tensor& input, int64_t t, int64_t kh,
                       int64_t kw, const Window& window) {
  const auto size = [&](int axis, int64_t kernel) {
    return output_size(input.size(2 + axis), kernel, window.stride[axis], window.padding[axis],
                       window.dilation[axis]);
  };
  check_grad_output(op, grad_output, input, {input.size(0), t, size(0, kh), size(1, kw)});
}

// Backward may be called inside an autocast region; the dtypes are the forward pass's, not the region's.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

}  // namespace

Gradients5 tucker_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& in_factor,
                                  const Tensor& core, const Tensor& out_factor, const OptionalTensor& bias,
                                  IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                  std::string_view activation, std::array<bool, 5> output_mask) {
  constexpr const char* op = "tucker_conv2d_backward";
  const Window window{stride, padding, dilation};
  const Activation function = parse_activation(op, activation);
  check_tucker(input, in_factor, core, out_factor, bias, window);
  check_grad_output(op, grad_output, input, out_factor.size(0), core.size(2), core.size(3), window);
  const NoAutocast no_autocast;
  const auto dtype = library_dtype(input, core.size(3) > 1 && stride[1] > 1 && dilation[1] > 1);
  const std::vector<Stage> stages{
      pointwise(in_factor.to(dtype)),
      {core.to(dtype), {stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}},
      pointwise(out_factor.to(dtype)),
  };
  return as_tuple(
      block_backward(grad_output, input, stages, {in_factor, core, out_factor}, bias, function, output_mask),
      std::make_index_sequence<5>());
}

Gradients6 cp_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& in_factor,
                              const Tensor& height_factor, const Tensor& width_factor, const Tensor& out_factor,
                              const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
                              IntArrayRef dilation, std::string_view activation, std::array<bool, 6> output_mask) {
  constexpr const char* op = "cp_conv2d_backward";
  const Window window{stride, padding, dilation};
  const Activation function = parse_activation(op, activation);
  check_cp(input, in_factor, height_factor, width_factor, out_factor, bias, window);
  check_grad_output(op, grad_output, input, out_factor.size(0), height_factor.size(1), width_factor.size(1), window);
  const NoAutocast no_autocast;
  const auto dtype = library_dtype(input, width_factor.size(1) > 1 && stride[1] > 1 && dilation[1] > 1);
  const int64_t rank = in_factor.size(0);
  const std::vector<Stage> stages{
      pointwise(in_factor.to(dtype)),
      {height_factor.to(dtype).unsqueeze(1).unsqueeze(-1), {stride[0], 1}, {padding[0], 0}, {dilation[0], 1}, rank},
      {width_factor.to(dtype).unsqueeze(1).unsqueeze(1), {1, stride[1]}, {0, padding[1]}, {1, dilation[1]}, rank},
      pointwise(out_factor.to(dtype)),
  };
  return as_tuple(block_backward(grad_output, input, stages, {in_factor, height_factor, width_factor, out_factor},
                                 bias, function, output_mask),
                  std::make_index_sequence<6>());
}

Gradients4 lowrank_linear_backward(const Tensor& grad_output, const Tensor& input, const Tensor& in_factor,
                                   const Tensor& out_factor, const OptionalTensor& bias, std::string_view activation,
                                   std::array<bool, 4> output_mask) {
  constexpr const char* op = "lowrank_linear_backward";
  const Activation function = parse_activation(op, activation);
  check_linear(input, in_factor, out_factor, bias);
  std::vector<int64_t> output_sizes = input.sizes().vec();
  output_sizes.back() = out_factor.size(0);
  check_grad_output(op, grad_output, input, output_sizes);
  const NoAutocast no_autocast;
  const auto dtype = library_dtype(input, false);
  std::vector<Tensor> gradients =
      block_backward(grad_output.reshape({-1, out_factor.size(0)}), input.reshape({-1, in_factor.size(1)}),
                     {{in_factor.to(dtype)}, {out_factor.to(dtype)}}, {in_factor, out_factor}, bias, function,
                     output_mask);
  if (output_mask[0]) gradients[0] = gradients[0].view(input.sizes());
  return as_tuple(gradients, std::make_index_sequence<4>());
}

TORCH_LIBRARY_IMPL(lowrank_ops, CompositeExplicitAutograd, m) {
  m.impl("tucker_conv2d_backward", &tucker_conv2d_backward);
  m.impl("cp_conv2d_backward", &cp_conv2d_backward);
  m.impl("lowrank_linear_backward", &lowrank_linear_backward);
}

}  // namespace lowrank_ops
