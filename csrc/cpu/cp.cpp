// CP on the CPU: both depthwise stages in one pass over the ring buffer of hidden rows (conv.h).
#include <c10/util/SmallVector.h>

#include "cpu/conv.h"
#include "cpu/cpu.h"
#include "cpu/few_pixels.h"

namespace lowrank_ops {

at::Tensor cp_cpu(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                  const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                  const Problem& p, const CpuTile& tile, const Prepared& prepared) {
  at::Tensor output = empty_output(input, p);
  if (output.numel() == 0) return output;
  if (tile.unpacked) {
    cp_few_pixels(input, in_factor, height_factor, width_factor, out_factor, bias, p, output);
    return output;
  }
  const Engine engine = engine_for(p.dtype);
  const ComputeKernels& kernels = *engine.kernels;
  PackedWeight in_weight = pack_matrix(in_factor, p.dtype, engine, prepared.in_factor);
  PackedWeight out_weight = pack_matrix(out_factor, p.dtype, engine, prepared.out_factor);
  const SumRows bias_sums(bias, p.dtype, engine);
  const std::optional<ChannelSum> channel_sum = channel_sum_of(in_factor, input, p, tile, engine);
  const std::optional<SumRows> out_row = out_row_of(out_factor, p, Winograd::kNone, engine);
  const ConvBlock block{engine,  p,          tile,      input,       output,  in_weight,          nullptr,
                        nullptr, out_weight, bias_sums, channel_sum, out_row, kernels.accumulator};
  const SumRows height_taps(height_factor, p.dtype, engine), width_taps(width_factor, p.dtype, engine);
  const int64_t vectors = ceil_div(block.hidden_columns(), kernels.lanes), sum = element_bytes(kernels.accumulator);
  const int64_t column_bytes =
      Scratch::padded((block.columns.span(tile.columns) + 1) * kernels.lanes * sum);  // a thread's

  const auto convolve = [&](Team& team, const HiddenRows& hidden, int64_t row, int64_t rows, int64_t columns,
                            void* tile_memory, void* column) {
    team.run([&](const Share& share) {
      // By channels where those divide evenly: they are what this thread has left in its cache.
      const bool by_channels = vectors % share.count == 0;
      // Rows whose windows move on by one each go together.
      const int64_t together = by_channels && block.rows.stride == 1 && block.rows.dilation == 1 ? rows : 1;
      c10::SmallVector<const void*, 32> seen(p.kh + together - 1);
      DepthwiseCall call;
      call.rows = seen.data();
      call.out_row_stride = columns * block.tile_columns();
      call.kh = p.kh;
      call.kw = p.kw;
      call.in_pixels = hidden.columns().span;
      call.out_pixels = columns;
      call.stride = block.columns.stride;
      call.dilation = block.columns.dilation;
      call.channel_stride = block.hidden_columns();
      call.column = static_cast<char*>(column) + share.index * column_bytes;
      call.out_rows = together;
      share.pieces(1, by_channels ? 1 : rows, vectors, 1, [&](int64_t, int64_t line, int64_t first, int64_t count) {
        const int64_t channel = first * kernels.lanes;
        call.channels = count * kernels.lanes;
        call.height_factor = height_taps.data(channel);
        call.width_factor = width_taps.data(channel);
        for (int64_t i = line; i < (by_channels ? rows : line + 1); i += together) {
          for (int64_t kh = 0; kh < p.kh + together - 1; ++kh)
            seen[size_t(kh)] = hidden.row((row + i) * block.rows.stride + kh * block.rows.dilation) + channel * sum;
          call.out =
              static_cast<char*>(tile_memory) + (i * call.out_row_stride + channel) * element_bytes(kernels.element);
          kernels.depthwise(call);
        }
      });
    });
  };
  run_conv(block, [&](int64_t threads) { return threads * column_bytes; }, convolve);
  return output;
}

}  // namespace lowrank_ops
