#include "ops/block.h"

#include <ATen/ops/conv2d.h>
#include <ATen/ops/linear.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace lowrank_ops {
namespace {

using at::Tensor;

OptionalTensor to(const OptionalTensor& tensor, at::ScalarType dtype) {
  return tensor ? OptionalTensor(tensor->to(dtype)) : std::nullopt;
}

Stage pointwise(const Tensor& factor, at::ScalarType dtype) {
  return {.weight = factor.to(dtype).unsqueeze(-1).unsqueeze(-1)};
}

Stage window_stage(const Tensor& weight, const Window& window, int64_t groups) {
  const auto& [stride, padding, dilation] = window;
  return {.weight = weight,
          .stride = {stride[0], stride[1]},
          .padding = {padding[0], padding[1]},
          .dilation = {dilation[0], dilation[1]},
          .groups = groups};
}

int64_t rank_of(const OpCall& call) {
  return size_of(call.in_factor, 0);
}

// Both depthwise stages of CP, each along one axis.
Stage height_stage(const OpCall& call, at::ScalarType dtype) {
  const auto& [stride, padding, dilation] = call.window;
  return {.weight = call.height_factor.to(dtype).unsqueeze(1).unsqueeze(-1),  // [R, 1, KH, 1]
          .stride = {stride[0], 1},
          .padding = {padding[0], 0},
          .dilation = {dilation[0], 1},
          .groups = rank_of(call)};
}
Stage width_stage(const OpCall& call, at::ScalarType dtype) {
  const auto& [stride, padding, dilation] = call.window;
  return {.weight = call.width_factor.to(dtype).unsqueeze(1).unsqueeze(1),  // [R, 1, 1, KW]
          .stride = {1, stride[1]},
          .padding = {0, padding[1]},
          .dilation = {1, dilation[1]},
          .groups = rank_of(call)};
}

}  // namespace

at::ScalarType library_dtype(const OpCall& call) {
  const at::ScalarType dtype = call.input.scalar_type();
  if (!call.input.is_cpu()) return dtype;
  if (dtype == at::kHalf) return at::kFloat;  // the library has no fast kernels for it
  if (dtype != at::kBFloat16 || call.op == Op::kLinear) return dtype;
  const Tensor& weight = call.op == Op::kTucker ? call.core : call.width_factor;
  const int64_t kernel_width = size_of(weight, -1);
  const bool fails = library_bfloat16_fails(kernel_width, call.window.stride[1], call.window.padding[1]);
  return fails ? at::kFloat : dtype;
}

Block block_of(const OpCall& call) {
  const at::ScalarType dtype = library_dtype(call);
  Block block{.stages = {}, .bias = to(call.bias, dtype), .activation = call.activation};
  auto& stages = block.stages;
  switch (call.op) {
    case Op::kTucker:
      stages = {pointwise(call.in_factor, dtype), window_stage(call.core.to(dtype), call.window, /*groups=*/1),
                pointwise(call.out_factor, dtype)};
      break;
    case Op::kCP:
      stages = {pointwise(call.in_factor, dtype), height_stage(call, dtype), width_stage(call, dtype),
                pointwise(call.out_factor, dtype)};
      break;
    case Op::kLinear:
      stages = {Stage{.weight = call.in_factor.to(dtype)}, Stage{.weight = call.out_factor.to(dtype)}};
      break;
  }
  return block;
}

Block merged_cp_block(const OpCall& call, const Tensor& taps) {
  const at::ScalarType dtype = library_dtype(call);
  return {.stages = {pointwise(call.in_factor, dtype), window_stage(taps.to(dtype), call.window, rank_of(call)),
                     pointwise(call.out_factor, dtype)},
          .bias = to(call.bias, dtype),
          .activation = call.activation};
}

// For a window with a stride along W an image of one channel is passed as NCHW, which is the same memory. With
// channels_last strides torch 2.13's convolution gives garbage there, or reads beyond the image, where one column of
// output is left (float32 and bf16, Zen 5: 300 of 300 random problems). Without a stride all of 4,800 were right, and
// the output keeps the image's format.
Tensor library_image(const Tensor& image, int64_t stride_width) {
  return stride_width > 1 && image.sym_size(1).maybe_as_int() == 1 ? image.squeeze(1).unsqueeze(1) : image;
}

// The window is given as pairs: torch.vmap's rule counts the image's axes by their length (a batched bias is added
// along the wrong axis with at::conv2d's defaults, of length 1; torch 2.13).
Tensor convolve(const Stage& stage, const Tensor& image, const OptionalTensor& bias) {
  return at::conv2d(image, stage.weight, bias, at::IntArrayRef(stage.stride), at::IntArrayRef(stage.padding),
                    at::IntArrayRef(stage.dilation), stage.groups);
}

Tensor forward(const Stage& stage, const Tensor& x, const OptionalTensor& bias) {
  return is_linear(stage) ? at::linear(x, stage.weight, bias)
                          : convolve(stage, library_image(x, stage.stride[1]), bias);
}

bool under_transform() {
  // torch includes this key as long as a transform is on its stack.
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

}  // namespace lowrank_ops
