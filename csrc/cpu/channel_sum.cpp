#include "cpu/channel_sum.h"

namespace lowrank_ops {

ChannelSum::ChannelSum(const at::Tensor& in_factor, const at::Tensor& input, const Problem& p, const Engine& engine)
    : kernels_(*engine.kernels),
      dtype_(p.dtype),
      channels_(p.s),
      channel_stride_(input.stride(1)),
      planes_(first_stage(p) == FirstStage::kPlanes && (input.stride(3) == 1 || p.w == 1)),
      direct_(input.stride(1) == 1 || p.s == 1) {
  const ComputeKernels& kernels = planes_ ? *engine.sums : kernels_;
  factor_ = allocate(round_up(p.s, kernels.group) * element_bytes(kernels.element));
  LoadCall load;
  load.in = in_factor.const_data_ptr();
  load.pixel_stride = in_factor.stride(0);
  load.channel_stride = p.s == 1 ? 1 : in_factor.stride(1);
  load.pixels = 1;
  load.channels = load.tile_stride = p.s;
  load.tile = factor_.get();
  kernels.load[int(p.dtype)](load);
}

void ChannelSum::operator()(const char* source, int64_t pixel_stride, int64_t pixels, void* sums) const {
  if (planes_) return kernels_.planes[int(dtype_)]({source, channel_stride_, channels_, pixels, factor_.get(), sums});
  DotCall call;
  call.input = factor_.get();
  call.input_stride = channels_;
  call.rows = 1;
  call.weight = source;
  call.weight_stride = pixel_stride;
  call.columns = pixels;
  call.depth = channels_;
  call.sums = sums;
  call.sums_stride = pixels;
  kernels_.dot[int(direct_ ? dtype_ : kernels_.element)](call);
}

std::optional<ChannelSum> channel_sum_of(const at::Tensor& in_factor, const at::Tensor& input, const Problem& p,
                                         const Engine& engine) {
  if (first_stage(p) == FirstStage::kPanels) return std::nullopt;
  return std::optional<ChannelSum>(std::in_place, in_factor, input, p, engine);
}

}  // namespace lowrank_ops
