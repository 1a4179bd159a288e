// CP on the CPU: both depthwise stages in one pass over the ring buffer of hidden rows (conv.h).
#include <c10/util/SmallVector.h>

#include "cpu/conv.h"
#include "cpu/cpu.h"
#include "cpu/few_pixels.h"

namespace lowrank_ops {
namespace {

class DepthwiseStages {
 public:
  DepthwiseStages(const ConvBlock& block, const at::Tensor& height_factor, const at::Tensor& width_factor)
      : block_(block),
        height_taps_(height_factor, block.problem.dtype, block.kernel_set),
        width_taps_(width_factor, block.problem.dtype, block.kernel_set),
        vectors_(ceil_div(block.hidden_columns(), kernels_.lanes)),
        column_bytes_(Scratch::padded((block.columns.span(block.tile.columns) + 1) * kernels_.lanes *
                                      element_bytes(kernels_.accumulator))) {}

  int64_t scratch_bytes(int64_t threads) const { return threads * column_bytes_; }

  // The middle stage of run_conv.
  void run(Team& team, const HiddenRows& hidden, int64_t row, int64_t rows, int64_t columns, void* tile,
           void* column) const {
    team.run([&](const Share& share) {
      // Divided by channels where those divide evenly: they are what this thread has left in its cache.
      const bool by_channels = vectors_ % share.count == 0;
      // Output rows whose windows are one row apart go through the kernel together.
      const bool neighbours = block_.rows.stride == 1 && block_.rows.dilation == 1;
      DepthwiseCall call = call_for(hidden, columns);
      call.out_rows = by_channels && neighbours ? rows : 1;
      call.column = static_cast<char*>(column) + share.index * column_bytes_;
      share.pieces(1, by_channels ? 1 : rows, vectors_, 1, [&](int64_t, int64_t line, int64_t first, int64_t count) {
        convolve(call, hidden, row, line, by_channels ? rows : line + 1, first, count, static_cast<char*>(tile));
      });
    });
  }

 private:
  DepthwiseCall call_for(const HiddenRows& hidden, int64_t columns) const {
    DepthwiseCall call;
    call.out_row_stride = columns * block_.tile_columns();
    call.kh = block_.problem.kh;
    call.kw = block_.problem.kw;
    call.in_pixels = hidden.columns().span;
    call.out_pixels = columns;
    call.stride = block_.columns.stride;
    call.dilation = block_.columns.dilation;
    call.channel_stride = block_.hidden_columns();
    return call;
  }

  // `count` vectors of channels from `first`, for the rows [begin, end) of a step that begins at output row `row`.
  void convolve(DepthwiseCall& call, const HiddenRows& hidden, int64_t row, int64_t begin, int64_t end, int64_t first,
                int64_t count, char* tile) const {
    const int64_t channel = first * kernels_.lanes, channel_bytes = channel * element_bytes(kernels_.accumulator);
    c10::SmallVector<const void*, 32> in(size_t(call.kh + call.out_rows - 1));
    call.rows = in.data();
    call.channels = count * kernels_.lanes;
    call.height_factor = height_taps_.data(channel);
    call.width_factor = width_taps_.data(channel);
    for (int64_t i = begin; i < end; i += call.out_rows) {
      for (size_t kh = 0; kh < in.size(); ++kh)
        in[kh] = hidden.row((row + i) * block_.rows.stride + int64_t(kh) * block_.rows.dilation) + channel_bytes;
      call.out = tile + (i * call.out_row_stride + channel) * element_bytes(kernels_.element);
      kernels_.depthwise(call);
    }
  }

  const ConvBlock& block_;
  const ComputeKernels& kernels_ = *block_.kernel_set.kernels;
  const SumRows height_taps_, width_taps_;
  const int64_t vectors_;       // of a pixel's channels
  const int64_t column_bytes_;  // scratch memory per thread: the sums along the height of one row of pixels
};

}  // namespace

at::Tensor cp_cpu(const OpCall& call, const Problem& p, const CpuTile& tile, const Prepared& prepared) {
  at::Tensor output = empty_output(call.input, p);
  if (output.numel() == 0) return output;
  if (tile.unpacked) {
    cp_few_pixels(call, p, output);
    return output;
  }
  const KernelSet kernel_set = kernel_set_for(p.dtype);
  ConvBlock block(call, p, tile, kernel_set, prepared, output);
  const DepthwiseStages depthwise(block, call.height_factor, call.width_factor);
  run_conv(
      block, [&](int64_t threads) { return depthwise.scratch_bytes(threads); },
      [&](auto&&... arguments) { depthwise.run(arguments...); });
  return output;
}

}  // namespace lowrank_ops
