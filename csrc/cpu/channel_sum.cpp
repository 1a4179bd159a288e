#include "cpu/channel_sum.h"

#include <algorithm>
#include <cstring>

namespace lowrank_ops {

ChannelSum::ChannelSum(const at::Tensor& in_factor, int64_t channel_stride, bool planes, bool far, const Problem& p,
                       const KernelSet& kernel_set)
    : kernels_(*kernel_set.kernels),
      dtype_(p.dtype),
      channels_(p.s),
      channel_stride_(channel_stride),
      planes_(planes),
      far_(far),
      direct_(channel_stride == 1 || p.s == 1) {
  const ComputeKernels& kernels = planes_ ? *kernel_set.sums : kernels_;
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
  call.far_weight = direct_ && far_;
  kernels_.dot[int(direct_ ? dtype_ : kernels_.element)](call);
}

void ChannelSum::write(const char* source, int64_t pixel_stride, int64_t pixels, char* out, int64_t out_stride,
                       DType out_type) const {
  ChannelSums sums;
  const int64_t pixel_bytes = pixel_stride * element_bytes(direct_ ? dtype_ : kernels_.element);
  for (int64_t first = 0, count; first < pixels; first += count) {
    count = std::min(ChannelSums::kMostPixels, pixels - first);
    (*this)(source + first * pixel_bytes, pixel_stride, count, sums.memory);
    write_channel(kernels_, sums.memory, count, out + first * out_stride * element_bytes(out_type), out_stride,
                  out_type);
  }
}

std::optional<ChannelSum> channel_sum_of(const at::Tensor& in_factor, const at::Tensor& input, const Problem& p,
                                         const CpuTile& tile, const KernelSet& kernel_set) {
  const FirstStage way = first_stage(p);
  if (way == FirstStage::kPanels) return std::nullopt;
  const bool planes = way == FirstStage::kPlanes && (input.stride(3) == 1 || p.w == 1);
  return std::optional<ChannelSum>(std::in_place, in_factor, input.stride(1), planes, tile.far, p, kernel_set);
}

void write_channel(const ComputeKernels& kernels, const void* sums, int64_t pixels, void* out, int64_t out_stride,
                   DType out_type) {
  if (out_stride == 1 && out_type == kernels.accumulator) {
    std::memcpy(out, sums, size_t(pixels * element_bytes(out_type)));
    return;
  }
  GemmCall call{};
  call.rows = pixels;
  call.width = 1;
  call.out = out;
  call.out_stride = out_stride;
  call.out_type = out_type;
  call.activation = Activation::kNone;
  kernels.finish(sums, 1, call);
}

}  // namespace lowrank_ops
