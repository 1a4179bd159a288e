// The first stage of a block with a hidden rank of one (in a linear layer, rows take the place of pixels). One output
// channel fills no vector, so that it runs in one of two other ways (plan/cpu/planner.h, FirstStage):
//
//   kDots    a hidden value is a dot product, vectors along the channels of its pixel (kernels/dot.h)
//
//              pixel p       c c c c c c c c ...      * in_factor [S], lanes added up at the end -> hidden p
//
//   kPlanes  vectors along the pixels (kernels/plane.h)
//
//              channel 0     p p p p p p p p ...      * in_factor[0]
//              channel 1     p p p p p p p p ...      * in_factor[1], added -> hidden p p p p p p p p
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cpu/isa.h"
#include "cpu/memory.h"

namespace lowrank_ops {

class ChannelSum {
 public:
  // `planes`: pixels lie next to each other, and the stage runs as kPlanes. `far`: the image comes from memory.
  ChannelSum(const at::Tensor& in_factor, int64_t channel_stride, bool planes, bool far, const Problem& problem,
             const KernelSet& kernel_set);
  // Whether it reads the image where it lies; otherwise a copy of it as elements, channels next to each other.
  bool reads_directly() const { return planes_ || direct_; }
  // sums[p] = sum over channels of pixel p, accumulators. Pixels lie `pixel_stride` elements apart.
  void operator()(const char* source, int64_t pixel_stride, int64_t pixels, void* sums) const;
  // The same for any number of pixels -> out[p * out_stride], elements or accumulators.
  void write(const char* source, int64_t pixel_stride, int64_t pixels, char* out, int64_t out_stride,
             DType out_type) const;

 private:
  const ComputeKernels& kernels_;
  DType dtype_;
  int64_t channels_, channel_stride_;
  bool planes_, far_, direct_;
  AlignedMemory factor_;  // [S]: accumulators for planes, elements for dot products
};

// Nothing where the first stage is a product with panels.
std::optional<ChannelSum> channel_sum_of(const at::Tensor& in_factor, const at::Tensor& input, const Problem& problem,
                                         const CpuTile& tile, const KernelSet& kernel_set);

// Accumulators of one channel -> out[pixel * out_stride]. Sums are readable up to a vector's bytes beyond the last.
void write_channel(const ComputeKernels& kernels, const void* sums, int64_t pixels, void* out, int64_t out_stride,
                   DType out_type);
// Memory for such sums of at most kMostPixels pixels.
struct ChannelSums {
  static constexpr int64_t kMostPixels = 512;
  alignas(64) char memory[kMostPixels * sizeof(double) + 64];
};

}  // namespace lowrank_ops
