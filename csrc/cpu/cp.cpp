// CP on the CPU: both depthwise stages in one pass over the ring buffer of hidden rows (conv.h).
#include <c10/util/SmallVector.h>

#include "cpu/conv.h"
#include "cpu/cpu.h"

namespace lowrank_ops {

at::Tensor cp_cpu(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                  const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                  const Problem& p, const CpuTile& tile, const Prepared& prepared) {
  at::Tensor output = empty_output(input, p);
  if (output.numel() == 0) return output;
  const Engine engine = engine_for(p.dtype);
  const ComputeKernels& kernels = *engine.kernels;
  const PackedWeight in_weight = pack_matrix(in_factor, p.dtype, engine, prepared.in_factor);
  const PackedWeight out_weight = pack_matrix(out_factor, p.dtype, engine, prepared.out_factor);
  const SumRows bias_sums(bias, p.dtype, engine);
  const ConvBlock block{engine, p, tile, input, output, in_weight, out_weight, bias_sums, kernels.accumulator};
  const SumRows height_taps(height_factor, p.dtype, engine), width_taps(width_factor, p.dtype, engine);
  const int64_t column_bytes = block.columns.span(tile.columns) * kernels.lanes * element_bytes(kernels.accumulator);

  run_conv(block, column_bytes,
           [&](const HiddenRows& hidden, int64_t row, int64_t rows, int64_t columns, void* tile_memory, void* column) {
             c10::SmallVector<const void*, 32> taps(p.kh);
             DepthwiseCall call;
             call.rows = taps.data();
             call.kh = p.kh;
             call.kw = p.kw;
             call.in_pixels = hidden.span();
             call.out_pixels = columns;
             call.stride = block.columns.stride;
             call.dilation = block.columns.dilation;
             call.channels = block.hidden_columns();
             call.height_factor = height_taps.data();
             call.width_factor = width_taps.data();
             call.column = column;
             for (int64_t i = 0; i < rows; ++i) {
               for (int64_t kh = 0; kh < p.kh; ++kh)
                 taps[kh] = hidden.row((row + i) * block.rows.stride + kh * block.rows.dilation);
               call.out = static_cast<char*>(tile_memory) +
                          i * columns * block.tile_columns() * element_bytes(kernels.element);
               kernels.depthwise(call);
             }
           });
  return output;
}

}  // namespace lowrank_ops
