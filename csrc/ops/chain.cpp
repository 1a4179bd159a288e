#include "ops/chain.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>

#include "ops/block.h"
#include "ops/checks.h"

namespace lowrank_ops {
namespace {

using at::Tensor;

Tensor apply_activation(Tensor output, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return output;
    case Activation::kRelu:
      return at::relu(output);
    case Activation::kRelu6:
      return at::hardtanh(output, 0, 6);
    case Activation::kHardswish:
      // The library's CUDA kernel multiplies by 1 / 6 as a float, in fp64 too: an error of 3e-8. Its backward divides.
      if (output.is_cuda() && output.scalar_type() == at::kDouble) return output * at::hardtanh(output + 3, 0, 6) / 6;
      return at::hardswish(output);
    case Activation::kSilu:
      return at::silu(output);
    case Activation::kGelu:
      return at::gelu(output);
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

// Converts the hidden image to channels_last where the block's input has that format. An image of rank one fits both
// formats, and the stages before leave it in NCHW: the output, which is larger, would have to be converted.
Tensor in_format_of(const Tensor& input, const Tensor& hidden) {
  if (under_transform() || input.suggest_memory_format() != at::MemoryFormat::ChannelsLast ||
      hidden.suggest_memory_format() == at::MemoryFormat::ChannelsLast)
    return hidden;
  if (hidden.sym_size(1) != 1) return hidden.contiguous(at::MemoryFormat::ChannelsLast);
  return hidden.squeeze(1).contiguous().unsqueeze(-1).permute({0, 3, 1, 2});  // the same values, strides that say so
}

// Tucker's core in the memory format that its convolution is to run in, for a block with `channels` output channels.
// torch convolves in channels_last where the image or the core has it: with an NCHW image on a GPU torch copies the
// hidden image into channels_last and the output back, at a fraction of the memory's rate. With a core of the image's
// format cuDNN does that itself. On an H200 in bfloat16 (h200.csv, set lean_nchw, chains without the core's copy) this
// was 1.10 to 1.85 times as fast with at least kLeastValues in the output, 0.80 to 1.12 times below. On a CPU torch
// converts both images as well: with a core of the image's format chains of small ranks took 0.24 to 0.6 of the time
// (AVX2).
Tensor library_core(const Stage& stage, const Tensor& image, int64_t channels) {
  constexpr int64_t kLeastValues = 1500000;
  const Tensor& core = stage.weight;
  const auto is_nchw = [](const Tensor& tensor) {
    return tensor.suggest_memory_format() == at::MemoryFormat::Contiguous;
  };
  if (under_transform() || !is_nchw(image) || is_nchw(core)) return core;
  if (image.is_cpu()) return core.clone(at::MemoryFormat::Contiguous);
  if (!image.is_cuda()) return core;
  int64_t values = size_of(image, 0) * channels;
  for (int axis = 0; axis < 2; ++axis)
    values *= output_size(size_of(image, 2 + axis), size_of(core, 2 + axis), stage.stride[axis], stage.padding[axis],
                          stage.dilation[axis]);
  return values < kLeastValues ? core : core.clone(at::MemoryFormat::Contiguous);
}

Tensor run_block(const OpCall& call, Block block) {
  const bool linear = call.op == Op::kLinear;
  Stage& last = block.stages.back();
  Tensor hidden = call.input.to(block.dtype());
  for (size_t i = 0; i + 1 < block.stages.size(); ++i) {
    Stage& stage = block.stages[i];
    if (call.op == Op::kTucker && i == 1) {  // the core
      hidden = library_image(hidden, stage.stride[1]);
      stage.weight = library_core(stage, hidden, size_of(last.weight, 0));
      hidden = convolve(stage, hidden, {});
    } else {
      hidden = forward(stage, hidden, {});
    }
  }
  if (!linear) hidden = in_format_of(call.input, hidden);
  const Tensor output =
      apply_activation(forward(last, hidden, block.bias), block.activation).to(call.input.scalar_type());
  return linear || under_transform() ? output : output.contiguous(call.input.suggest_memory_format());
}

}  // namespace

Tensor chain(const OpCall& call) {
  return run_block(call, block_of(call));
}

Tensor depthwise_taps(const Tensor& height_factor, const Tensor& width_factor) {
  return height_factor.unsqueeze(1).unsqueeze(-1).mul(width_factor.unsqueeze(1).unsqueeze(1));
}

Tensor merged_cp_chain(const OpCall& call, const Tensor& taps) {
  return run_block(call, merged_cp_block(call, taps));
}

Tensor merged_cp_chain(const OpCall& call) {
  const at::ScalarType dtype = library_dtype(call);
  return merged_cp_chain(call, depthwise_taps(call.height_factor.to(dtype), call.width_factor.to(dtype)));
}

Tensor checked_chain(const OpCall& call) {
  check(call);
  return chain(call);
}

}  // namespace lowrank_ops
