// The backward ops, on every device: a chain of library convolutions (or matrix products), run over a few
// images (or rows) at a time, so that no intermediate of a whole batch ever exists. All three ops are one
// algorithm: a list of linear stages, walked forward to recompute the stage inputs and then backward.
#include "ops/backward.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "ops/checks.h"
#include "ops/problem_of.h"
#include "plan/gpu/planner.h"

namespace lowrank_ops {
namespace {

using at::IntArrayRef;
using at::Tensor;

// What the recomputed intermediates of one chunk may take. On a CPU near the size of a last-level cache;
// elsewhere large enough that launches do not dominate.
constexpr int64_t kCpuChunkBytes = int64_t{32} << 20;
constexpr int64_t kDeviceChunkBytes = int64_t{256} << 20;

bool is_linear(const Stage& stage) {
  return stage.weight.dim() == 2;
}

Tensor forward(const Stage& stage, const Tensor& x, const OptionalTensor& bias) {
  if (is_linear(stage)) return at::linear(x, stage.weight, bias);
  return at::conv2d(library_image(x, stage.stride[1]), stage.weight, bias, stage.stride, stage.padding, stage.dilation,
                    stage.groups);
}

// A tensor of the shape of forward(stage, x), its values never to be read.
Tensor unset_output(const Stage& stage, const Tensor& x) {
  std::vector<int64_t> sizes{x.size(0), stage.weight.size(0)};
  for (int axis = 0; axis < x.dim() - 2; ++axis)
    sizes.push_back(output_size(x.size(2 + axis), stage.weight.size(2 + axis), stage.stride[axis], stage.padding[axis],
                                stage.dilation[axis]));
  return at::empty(sizes, x.options().memory_format(x.suggest_memory_format()));
}

// The gradients of x and of the stage's weight. For the gradient of x alone only the shape of x is read.
std::tuple<Tensor, Tensor> backward(const Stage& stage, const Tensor& grad, const Tensor& x, std::array<bool, 2> mask) {
  if (is_linear(stage))
    return {mask[0] ? at::mm(grad, stage.weight) : Tensor(), mask[1] ? at::mm(grad.t(), x) : Tensor()};
  auto [grad_x, grad_weight, unused] = at::convolution_backward(
      grad, x, stage.weight, /*bias_sizes=*/at::OptionalIntArrayRef(), stage.stride, stage.padding, stage.dilation,
      /*transposed=*/false, /*output_padding=*/{0, 0}, stage.groups, {mask[0], mask[1], false});
  return {grad_x, grad_weight};
}

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
    case Activation::kSilu: {
      if (!at::GradMode::is_enabled()) return at::silu_backward(grad, before);
      const Tensor gate = at::sigmoid(before);  // silu_backward has no derivative
      return grad * gate * (1 + before * (1 - gate));
    }
    case Activation::kGelu:
      return at::gelu_backward(grad, before);
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

Tensor sum_for_bias(const Tensor& grad) {
  const auto dtype = at::toOpMathType(grad.scalar_type());
  return grad.dim() == 4 ? grad.sum({0, 2, 3}, /*keepdim=*/false, dtype) : grad.sum(0, /*keepdim=*/false, dtype);
}

Stage pointwise(const Tensor& factor) {
  return {factor.unsqueeze(-1).unsqueeze(-1)};
}

OptionalTensor to(const OptionalTensor& tensor, at::ScalarType dtype) {
  return tensor ? OptionalTensor(tensor->to(dtype)) : std::nullopt;
}

// How many images (rows) a chunk holds: the stage inputs and their gradients within the budget.
int64_t chunk_size(const std::vector<Stage>& stages, const Tensor& input, const Tensor& grad_output) {
  const auto pixels = [](const Tensor& tensor) { return tensor.dim() == 4 ? tensor.size(2) * tensor.size(3) : 1; };
  const int64_t most_pixels = std::max(pixels(input), pixels(grad_output));
  int64_t channels = input.size(1);
  for (const Stage& stage : stages) channels += stage.weight.size(0);
  const int64_t bytes = 2 * channels * most_pixels * stages[0].weight.element_size();
  return std::max<int64_t>(1, (input.is_cpu() ? kCpuChunkBytes : kDeviceChunkBytes) / bytes);
}

// `block_gradients` chunk by chunk along axis 0: the weights' gradients added up in fp32 at least, then in
// the dtype, shape and memory format of `factors`, so that an optimizer meets the strides it expects.
template <size_t count>
std::array<Tensor, count> chunked_gradients(const Tensor& grad_output, const Tensor& input, const Block& block,
                                            const std::array<Tensor, count - 2>& factors,
                                            const std::array<bool, count>& mask) {
  const at::ScalarType dtype = block.stages[0].weight.scalar_type();
  const auto format = input.suggest_memory_format();
  // On GPUs the library's convolutions are fastest in channels_last, whatever the caller's format is.
  const auto computed = input.is_cuda() && input.dim() == 4 ? at::MemoryFormat::ChannelsLast : format;
  const auto any = std::find(mask.begin(), mask.end(), true) != mask.end();
  std::array<Tensor, count> total;
  if (mask[0]) total[0] = at::empty(input.sizes(), input.options().memory_format(format));

  const int64_t end = any ? input.size(0) : 0, step = chunk_size(block.stages, input, grad_output);
  for (int64_t first = 0; first < end; first += step) {
    const int64_t size = std::min(step, end - first);
    const auto chunk = [&](const Tensor& tensor) {
      return tensor.narrow(0, first, size).to(dtype).contiguous(computed);
    };
    const std::vector<Tensor> parts = block_gradients(chunk(grad_output), chunk(input), block, mask);
    if (mask[0]) total[0].narrow(0, first, size).copy_(parts[0]);
    for (size_t i = 1; i < count; ++i) {
      if (!mask[i]) continue;
      if (total[i].defined()) {
        total[i].add_(parts[i]);
      } else {
        total[i] = parts[i].to(at::toOpMathType(dtype));
      }
    }
  }

  for (size_t i = 1; i < count; ++i) {
    if (!mask[i]) continue;
    // A column of the last factor has the shape of a bias.
    const Tensor argument = i + 1 < count ? factors[i - 1] : factors.back().select(1, 0);
    total[i] =
        total[i].defined() ? total[i].to(argument.scalar_type()).reshape(argument.sizes()) : at::zeros_like(argument);
    total[i] = total[i].contiguous(argument.suggest_memory_format());
  }
  return total;
}

template <typename Array>
auto as_tuple(const Array& gradients) {
  return std::apply([](const auto&... gradient) { return std::make_tuple(gradient...); }, gradients);
}

// Backward may be called inside an autocast region; the dtypes are the forward pass's, not the region's.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

}  // namespace

Block tucker_block(const Tensor& input, const Tensor& in_factor, const Tensor& core, const Tensor& out_factor,
                   const OptionalTensor& bias, const Window& window, Activation activation) {
  const auto& [stride, padding, dilation] = window;
  const auto dtype = library_dtype(input, window, kernel_width(core));
  return {{pointwise(in_factor.to(dtype)),
           {core.to(dtype), {stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}},
           pointwise(out_factor.to(dtype))},
          to(bias, dtype),
          activation};
}

Block cp_block(const Tensor& input, const Tensor& in_factor, const Tensor& height_factor, const Tensor& width_factor,
               const Tensor& out_factor, const OptionalTensor& bias, const Window& window, Activation activation) {
  const auto& [stride, padding, dilation] = window;
  const auto dtype = library_dtype(input, window, kernel_width(width_factor));
  const int64_t rank = in_factor.sym_size(0).guard_int(__FILE__, __LINE__);
  const Tensor height = height_factor.to(dtype).unsqueeze(1).unsqueeze(-1);  // [R, 1, KH, 1]
  const Tensor width = width_factor.to(dtype).unsqueeze(1).unsqueeze(1);     // [R, 1, 1, KW]
  return {{pointwise(in_factor.to(dtype)),
           {height, {stride[0], 1}, {padding[0], 0}, {dilation[0], 1}, rank},
           {width, {1, stride[1]}, {0, padding[1]}, {1, dilation[1]}, rank},
           pointwise(out_factor.to(dtype))},
          to(bias, dtype),
          activation};
}

Block linear_block(const Tensor& input, const Tensor& in_factor, const Tensor& out_factor, const OptionalTensor& bias,
                   Activation activation) {
  const auto dtype = library_dtype(input);
  return {{{in_factor.to(dtype)}, {out_factor.to(dtype)}}, to(bias, dtype), activation};
}

std::vector<Tensor> block_gradients(const Tensor& grad_output, const Tensor& input, const Block& block,
                                    c10::ArrayRef<bool> mask) {
  const auto& stages = block.stages;
  const int count = static_cast<int>(stages.size());
  const auto wants_weight = [&](int stage) { return mask[1 + stage]; };
  const bool has_activation = block.activation != Activation::kNone;

  // The lowest stage that the gradient has to reach, and how many stages have to be recomputed.
  int lowest = count, recomputed = at::GradMode::is_enabled() ? count - 1 : 0;
  for (int i = count - 1; i >= 0; --i) {
    if (mask[0] || wants_weight(i)) lowest = i;
    if (wants_weight(i)) recomputed = std::max(recomputed, i);
  }
  if (has_activation) recomputed = count;

  std::vector<Tensor> stage_inputs{input};
  for (int i = 0; i < std::max(recomputed, count - 1); ++i) {
    const Tensor& x = stage_inputs.back();
    stage_inputs.push_back(i < recomputed ? forward(stages[i], x, i == count - 1 ? block.bias : std::nullopt)
                                          : unset_output(stages[i], x));
  }

  Tensor grad = grad_output;
  if (has_activation) {
    grad = activation_backward(grad, stage_inputs.back(), block.activation);
    stage_inputs.pop_back();
  }
  std::vector<Tensor> gradients(count + 2);
  if (mask[count + 1]) gradients[count + 1] = sum_for_bias(grad);
  for (int i = count - 1; i >= lowest; --i) {
    std::tie(grad, gradients[1 + i]) =
        backward(stages[i], grad, stage_inputs.back(), {mask[0] || i > lowest, wants_weight(i)});
    stage_inputs.pop_back();
  }
  if (mask[0]) gradients[0] = grad;
  return gradients;
}

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
  const Block block = tucker_block(input, in_factor, core, out_factor, bias, window, function);
  return as_tuple(chunked_gradients<5>(grad_output, input, block, {in_factor, core, out_factor}, output_mask));
}

// With both depthwise stages as one convolution with their product, in fp32: what merges_depthwise says of the forward
// pass holds all the more of the backward one. On an H200 (bfloat16, channels_last, 3x3) a step of 32x256-256 56x56 R64
// took 1482 us with two stages, the chain with one 380 (benchmarks/results/h200_training.jsonl).
Gradients6 merged_cp_backward(const Tensor& grad_output, const Tensor& input, const Tensor& in_factor,
                              const Tensor& height_factor, const Tensor& width_factor, const Tensor& out_factor,
                              const OptionalTensor& bias, const Window& window, Activation activation,
                              const std::array<bool, 6>& mask) {
  const auto wide = at::toOpMathType(height_factor.scalar_type());
  const Tensor height = height_factor.to(wide).unsqueeze(2), width = width_factor.to(wide).unsqueeze(1);
  const Tensor product = (height * width).unsqueeze(1);  // [R, 1, KH, KW]
  Block block = tucker_block(input, in_factor, product, out_factor, bias, window, activation);
  block.stages[1].groups = in_factor.size(0);
  const auto found = chunked_gradients<5>(grad_output, input, block, {in_factor, product, out_factor},
                                          {mask[0], mask[1], mask[2] || mask[3], mask[4], mask[5]});
  Tensor grad_height, grad_width;
  if (mask[2]) grad_height = (found[2].squeeze(1) * width).sum(2).to(height_factor.scalar_type());
  if (mask[3]) grad_width = (found[2].squeeze(1) * height).sum(1).to(width_factor.scalar_type());
  return {found[0], found[1], grad_height, grad_width, found[3], found[4]};
}

Gradients6 cp_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& in_factor,
                              const Tensor& height_factor, const Tensor& width_factor, const Tensor& out_factor,
                              const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                              std::string_view activation, std::array<bool, 6> output_mask) {
  constexpr const char* op = "cp_conv2d_backward";
  const Window window{stride, padding, dilation};
  const Activation function = parse_activation(op, activation);
  check_cp(input, in_factor, height_factor, width_factor, out_factor, bias, window);
  check_grad_output(op, grad_output, input, out_factor.size(0), height_factor.size(1), width_factor.size(1), window);
  const NoAutocast no_autocast;
  const auto merges = [&] {
    Problem problem = cp_problem(input, height_factor, width_factor, out_factor, window, function);
    problem.layout = Layout::kChannelsLast;  // what chunks are computed in
    return merges_depthwise(problem);
  };
  if (input.is_cuda() && merges())
    return merged_cp_backward(grad_output, input, in_factor, height_factor, width_factor, out_factor, bias, window,
                              function, output_mask);
  const Block block = cp_block(input, in_factor, height_factor, width_factor, out_factor, bias, window, function);
  return as_tuple(chunked_gradients<6>(grad_output, input, block, {in_factor, height_factor, width_factor, out_factor},
                                       output_mask));
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
  const Block block = linear_block(input, in_factor, out_factor, bias, function);
  auto gradients =
      chunked_gradients<4>(grad_output.reshape({-1, out_factor.size(0)}), input.reshape({-1, in_factor.size(1)}), block,
                           {in_factor, out_factor}, output_mask);
  if (output_mask[0]) gradients[0] = gradients[0].view(input.sizes());
  return as_tuple(gradients);
}

TORCH_LIBRARY_IMPL(lowrank_ops, CompositeExplicitAutograd, m) {
  m.impl("tucker_conv2d_backward", &tucker_conv2d_backward);
  m.impl("cp_conv2d_backward", &cp_conv2d_backward);
  m.impl("lowrank_linear_backward", &lowrank_linear_backward);
}

}  // namespace lowrank_ops
