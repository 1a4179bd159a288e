// The backward ops, on every device, run over a few images (or rows) at a time, so that no intermediate of a whole
// batch ever exists. All three ops are one algorithm: a list of linear stages, each a library convolution (or a matrix
// product), walked forward to recompute the stage inputs and then backward. Where no factor's gradient is wanted, the
// forward op computes the input's (input_gradient.h).
#include "ops/backward.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "ops/checks.h"
#include "ops/dispatch.h"
#include "ops/input_gradient.h"
#include "ops/policy.h"
#include "ops/problem_of.h"
#include "plan/gpu/planner.h"

namespace lowrank_ops {
namespace {

using at::Tensor;

// Bytes that the recomputed intermediates of one chunk may take: on a CPU near the size of a last-level cache,
// elsewhere large enough that launches do not dominate.
constexpr int64_t kCpuChunkBytes = int64_t{32} << 20;
constexpr int64_t kDeviceChunkBytes = int64_t{256} << 20;

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

// How many images (rows) a chunk holds: the stage inputs and their gradients within the budget.
int64_t chunk_size(const Block& block, const Tensor& input, const Tensor& grad_output) {
  const auto pixels = [](const Tensor& tensor) { return tensor.dim() == 4 ? tensor.size(2) * tensor.size(3) : 1; };
  const int64_t most_pixels = std::max(pixels(input), pixels(grad_output));
  int64_t channels = input.size(1);
  for (const Stage& stage : block.stages) channels += stage.weight.size(0);
  const int64_t bytes = 2 * channels * most_pixels * block.stages[0].weight.element_size();
  return std::max<int64_t>(1, (input.is_cpu() ? kCpuChunkBytes : kDeviceChunkBytes) / bytes);
}

// The format in which gradients are computed. On GPUs the library's convolutions and the kernels are fastest in
// channels_last, whatever the caller's format is.
at::MemoryFormat computed_format(const Tensor& input) {
  return input.is_cuda() && input.dim() == 4 ? at::MemoryFormat::ChannelsLast : input.suggest_memory_format();
}

// `block_gradients` chunk by chunk along axis 0: the weights' gradients added up in fp32 at least, then in
// the dtype, shape and memory format of `factors`, so that an optimizer meets the strides it expects.
std::vector<Tensor> chunked_gradients(const Tensor& grad_output, const Tensor& input, const Block& block,
                                      const c10::SmallVector<Tensor, 4>& factors, c10::ArrayRef<bool> mask) {
  const at::ScalarType dtype = block.dtype();
  const auto format = input.suggest_memory_format(), computed = computed_format(input);
  const auto any = std::find(mask.begin(), mask.end(), true) != mask.end();
  std::vector<Tensor> total(mask.size());
  if (mask[0]) total[0] = at::empty(input.sizes(), input.options().memory_format(format));

  const int64_t end = any ? input.size(0) : 0, step = chunk_size(block, input, grad_output);
  for (int64_t first = 0; first < end; first += step) {
    const int64_t size = std::min(step, end - first);
    const auto chunk = [&](const Tensor& tensor) {
      return tensor.narrow(0, first, size).to(dtype).contiguous(computed);
    };
    const std::vector<Tensor> parts = block_gradients(chunk(grad_output), chunk(input), block, mask);
    if (mask[0]) total[0].narrow(0, first, size).copy_(parts[0]);
    for (size_t i = 1; i < total.size(); ++i) {
      if (!mask[i]) continue;
      if (total[i].defined()) {
        total[i].add_(parts[i]);
      } else {
        total[i] = parts[i].to(at::toOpMathType(dtype));
      }
    }
  }

  for (size_t i = 1; i < total.size(); ++i) {
    if (!mask[i]) continue;
    // A column of the last factor has the shape of a bias.
    const Tensor argument = i + 1 < total.size() ? factors[i - 1] : factors.back().select(1, 0);
    total[i] =
        total[i].defined() ? total[i].to(argument.scalar_type()).reshape(argument.sizes()) : at::zeros_like(argument);
    total[i] = total[i].contiguous(argument.suggest_memory_format());
  }
  return total;
}

// Backward may be called inside an autocast region; the dtypes are the forward pass's, not the region's.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

}  // namespace

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

namespace {

// CP's gradients with both depthwise stages as one convolution with their product, in fp32: the gain of
// merges_depthwise() in the forward pass is larger in the backward pass. On an H200 (bfloat16,
// channels_last, 3x3) a step of 32x256-256 56x56 R64 took 1482 us with two stages, the chain with one 380
// (benchmarks/results/h200_training.jsonl).
std::vector<Tensor> merged_cp_gradients(const Tensor& grad_output, const OpCall& call, c10::ArrayRef<bool> mask) {
  const auto rank_dtype = call.height_factor.scalar_type(), wide = at::toOpMathType(rank_dtype);
  const Tensor height = call.height_factor.to(wide).unsqueeze(2), width = call.width_factor.to(wide).unsqueeze(1);
  const Tensor taps = (height * width).unsqueeze(1);  // [R, 1, KH, KW]
  const auto found =
      chunked_gradients(grad_output, call.input, merged_cp_block(call, taps), {call.in_factor, taps, call.out_factor},
                        std::array<bool, 5>{mask[0], mask[1], mask[2] || mask[3], mask[4], mask[5]});
  Tensor grad_height, grad_width;
  if (mask[2]) grad_height = (found[2].squeeze(1) * width).sum(2).to(rank_dtype);
  if (mask[3]) grad_width = (found[2].squeeze(1) * height).sum(1).to(rank_dtype);
  return {found[0], found[1], grad_height, grad_width, found[3], found[4]};
}

// Whether both depthwise stages are to be one convolution.
bool merges(const OpCall& call) {
  if (call.op != Op::kCP || !call.input.is_cuda()) return false;
  Problem problem = problem_of(call);
  problem.layout = Layout::kChannelsLast;  // the format that chunks are computed in
  return merges_depthwise(problem);
}

// Whether the forward op is to compute the gradients: none of a factor is wanted, for which the hidden images'
// gradients would have to be computed anyway. Under the policy "chain" the library's own gradients run.
bool takes_forward_op(const OpCall& call, c10::ArrayRef<bool> mask) {
  const auto factors = mask.slice(1, mask.size() - 2);
  return mask[0] && std::none_of(factors.begin(), factors.end(), [](bool wanted) { return wanted; }) &&
         policy() != Policy::kChain && call.input.numel() > 0 && is_block_gradient(call);
}

// The gradients of the input and, where it is wanted, of the bias.
std::vector<Tensor> forward_op_gradients(const Tensor& grad_output, const OpCall& call, c10::ArrayRef<bool> mask) {
  const Tensor& input = call.input;
  const auto format = input.suggest_memory_format(), computed = computed_format(input);
  const bool has_activation = call.activation != Activation::kNone;
  const InputGradient block(call);
  // Only what the activation was applied to is recomputed: without one, there are no intermediates.
  const int64_t end = input.size(0), step = has_activation ? chunk_size(block_of(call), input, grad_output) : end;
  Tensor grad_input, grad_bias;
  if (step < end) grad_input = at::empty(input.sizes(), input.options().memory_format(format));
  for (int64_t first = 0; first < end; first += step) {
    const int64_t size = std::min(step, end - first);
    const auto chunk = [&](const Tensor& tensor) { return tensor.narrow(0, first, size).contiguous(computed); };
    Tensor grad = chunk(grad_output);
    if (has_activation)
      grad = activation_backward(grad, before_activation(with_input(call, chunk(input))), call.activation);
    if (mask.back()) grad_bias = grad_bias.defined() ? grad_bias + sum_for_bias(grad) : sum_for_bias(grad);
    const Tensor part = block.of(grad);
    if (step < end)
      grad_input.narrow(0, first, size).copy_(part);
    else
      grad_input = part.contiguous(format);
  }
  std::vector<Tensor> gradients(mask.size());
  gradients[0] = grad_input;
  if (mask.back()) gradients.back() = grad_bias.to(call.out_factor.scalar_type());
  return gradients;
}

// The gradients of a convolution, or of a linear layer whose input is a matrix of rows.
std::vector<Tensor> gradients_of(const Tensor& grad_output, const OpCall& call, c10::ArrayRef<bool> mask) {
  if (takes_forward_op(call, mask)) return forward_op_gradients(grad_output, call, mask);
  if (merges(call)) return merged_cp_gradients(grad_output, call, mask);
  return chunked_gradients(grad_output, call.input, block_of(call), call.factors(), mask);
}

std::vector<Tensor> op_gradients(const Tensor& grad_output, const OpCall& call, c10::ArrayRef<bool> mask) {
  check(call);
  check_grad_output((std::string(name_of(call.op)) + "_backward").c_str(), grad_output, call);
  const NoAutocast no_autocast;
  if (call.op != Op::kLinear) return gradients_of(grad_output, call, mask);
  const Tensor rows = call.input.reshape({-1, call.in_factor.size(1)});
  auto gradients = gradients_of(grad_output.reshape({-1, call.out_factor.size(0)}), with_input(call, rows), mask);
  if (mask[0]) gradients[0] = gradients[0].view(call.input.sizes());
  return gradients;
}

}  // namespace

std::vector<Tensor> merged_cp_backward(const Tensor& grad_output, const OpCall& call, c10::ArrayRef<bool> mask) {
  check(call);
  check_grad_output("merged_cp_backward", grad_output, call);
  const NoAutocast no_autocast;
  return merged_cp_gradients(grad_output, call, mask);
}

TORCH_LIBRARY_IMPL(lowrank_ops, CompositeExplicitAutograd, m) {
  for_each_op([&m](auto op) { m.impl(op.backward_name, &BackwardKernel<op_gradients, decltype(op)>::call); });
}

}  // namespace lowrank_ops
