// The chain of library convolutions: the plain way to run a factorized block, on any device, with gradients.
#include <ATen/TensorOperators.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <array>

#include "ops/ops.h"

namespace lowrank_ops {

Activation parse_activation(const char* op, std::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu6") return Activation::kRelu6;
  if (name == "hardswish") return Activation::kHardswish;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  TORCH_CHECK_VALUE(false, op, ": activation must be one of none, relu, relu6, hardswish, silu, gelu, got '", name,
                    "'");
}

at::Tensor apply_activation(at::Tensor output, Activation activation) {
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

bool under_transform() {
  // torch includes this key as long as a transform is on its stack.
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

namespace {

OptionalTensor to(const OptionalTensor& tensor, at::ScalarType dtype) {
  return tensor ? OptionalTensor(tensor->to(dtype)) : std::nullopt;
}

// The window is given as pairs: torch.vmap's rule counts the image's axes by their length (a batched bias is added
// along the wrong axis with at::conv2d's defaults, of length 1; torch 2.13).
at::Tensor pointwise(const at::Tensor& input, const at::Tensor& factor, const OptionalTensor& bias = {}) {
  constexpr std::array<int64_t, 2> one{1, 1}, zero{0, 0};
  return at::conv2d(input, factor.to(input.scalar_type()).unsqueeze(-1).unsqueeze(-1), to(bias, input.scalar_type()),
                    at::IntArrayRef(one), at::IntArrayRef(zero), at::IntArrayRef(one));
}

// A hidden image in channels_last where the block's input is: ranks of one, which are neither format's, leave the
// stages before in NCHW, and the output, which is larger, would be converted.
at::Tensor in_format_of(const at::Tensor& input, const at::Tensor& hidden) {
  if (under_transform() || input.suggest_memory_format() != at::MemoryFormat::ChannelsLast ||
      hidden.suggest_memory_format() == at::MemoryFormat::ChannelsLast)
    return hidden;
  if (hidden.sym_size(1) != 1) return hidden.contiguous(at::MemoryFormat::ChannelsLast);
  return hidden.squeeze(1).contiguous().unsqueeze(-1).permute({0, 3, 1, 2});  // the same values, strides that say so
}

// The last 1x1 convolution with its activation, in the dtype and (but under a transform) memory format of the block's
// input.
at::Tensor last_stage(const at::Tensor& input, const at::Tensor& hidden, const at::Tensor& out_factor,
                      const OptionalTensor& bias, Activation activation) {
  const at::Tensor output =
      apply_activation(pointwise(in_format_of(input, hidden), out_factor, bias), activation).to(input.scalar_type());
  return under_transform() ? output : output.contiguous(input.suggest_memory_format());
}

// The core in the memory format that its convolution is to run in. torch takes channels_last where the image or the
// core has it: with an NCHW image on a GPU torch copies the hidden image into
// channels_last and the output back, at a fraction of the memory's rate. With a core of the image's format cuDNN does
// that itself. On an H200 in bfloat16 (h200_lean_nchw.json, chains without the core's copy) this was 1.10 to 1.85 times
// as fast with at least kLeastValues in the output, 0.80 to 1.12 times below. On a CPU torch converts both images as
// well: with a core of the image's format chains of small ranks took 0.24 to 0.6 of the time (AVX2).
at::Tensor library_core(const at::Tensor& image, const at::Tensor& core, const at::Tensor& out_factor,
                        const Window& window) {
  constexpr int64_t kLeastValues = 1500000;
  const auto is_nchw = [](const at::Tensor& tensor) {
    return tensor.suggest_memory_format() == at::MemoryFormat::Contiguous;
  };
  if (under_transform() || !is_nchw(image) || is_nchw(core)) return core;
  if (image.is_cpu()) return core.clone(at::MemoryFormat::Contiguous);
  if (!image.is_cuda()) return core;
  const auto size = [](const at::Tensor& tensor, int64_t axis) {
    return tensor.sym_size(axis).guard_int(__FILE__, __LINE__);
  };
  int64_t values = size(image, 0) * size(out_factor, 0);
  for (int axis = 0; axis < 2; ++axis)
    values *= output_size(size(image, 2 + axis), size(core, 2 + axis), window.stride[axis], window.padding[axis],
                          window.dilation[axis]);
  return values < kLeastValues ? core : core.clone(at::MemoryFormat::Contiguous);
}

}  // namespace

at::Tensor tucker_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                        const at::Tensor& out_factor, const OptionalTensor& bias, const Window& window,
                        Activation activation) {
  const at::ScalarType dtype = library_dtype(input, window, kernel_width(core));
  at::Tensor hidden = pointwise(input.to(dtype), in_factor);
  hidden = library_image(hidden, window.stride[1]);
  hidden = at::conv2d(hidden, library_core(hidden, core.to(dtype), out_factor, window), {}, window.stride,
                      window.padding, window.dilation);
  return last_stage(input, hidden, out_factor, bias, activation);
}

at::Tensor cp_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                    const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                    const Window& window, Activation activation) {
  const at::ScalarType dtype = library_dtype(input, window, kernel_width(width_factor));
  const int64_t rank = in_factor.size(0);
  at::Tensor hidden = pointwise(input.to(dtype), in_factor);
  const auto depthwise = [&](const at::Tensor& weight, std::array<int64_t, 2> stride, std::array<int64_t, 2> padding,
                             std::array<int64_t, 2> dilation) {
    hidden = at::conv2d(library_image(hidden, stride[1]), weight.to(dtype), {}, at::IntArrayRef(stride),
                        at::IntArrayRef(padding), at::IntArrayRef(dilation), rank);
  };
  depthwise(height_factor.unsqueeze(1).unsqueeze(-1), {window.stride[0], 1}, {window.padding[0], 0},
            {window.dilation[0], 1});
  depthwise(width_factor.unsqueeze(1).unsqueeze(1), {1, window.stride[1]}, {0, window.padding[1]},
            {1, window.dilation[1]});
  return last_stage(input, hidden, out_factor, bias, activation);
}

at::Tensor merged_cp_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                           const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                           const Window& window, Activation activation) {
  const at::ScalarType dtype = library_dtype(input, window, kernel_width(width_factor));
  const at::Tensor weight = height_factor.to(dtype).unsqueeze(1).unsqueeze(-1).mul(
      width_factor.to(dtype).unsqueeze(1).unsqueeze(1));  // [R, 1, KH, KW], rounded once
  const at::Tensor hidden = at::conv2d(library_image(pointwise(input.to(dtype), in_factor), window.stride[1]), weight,
                                       {}, window.stride, window.padding, window.dilation, in_factor.size(0));
  return last_stage(input, hidden, out_factor, bias, activation);
}

at::Tensor linear_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                        const OptionalTensor& bias, Activation activation) {
  const at::ScalarType dtype = library_dtype(input);
  const at::Tensor hidden = at::linear(input.to(dtype), in_factor.to(dtype));
  return apply_activation(at::linear(hidden, out_factor.to(dtype), to(bias, dtype)), activation)
      .to(input.scalar_type());
}

}  // namespace lowrank_ops
