// Tucker-2 on the CPU: the core convolution as a GEMM that slides over the ring buffer of hidden rows (conv.h).
#include <c10/util/SmallVector.h>

#include "cpu/conv.h"
#include "cpu/cpu.h"
#include "cpu/winograd.h"

namespace lowrank_ops {

at::Tensor tucker_cpu(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                      const at::Tensor& out_factor, const OptionalTensor& bias, const Problem& p, const CpuTile& tile,
                      const Prepared& prepared) {
  at::Tensor output = empty_output(input, p);
  if (output.numel() == 0) return output;
  const Engine engine = engine_for(p.dtype);
  // [R2, KH, KW, R1] in memory: the order that the modules store; anything else is copied here.
  const auto core_rows = [&] { return core.contiguous(at::MemoryFormat::ChannelsLast); };
  PackedWeight in_weight = pack_matrix(in_factor, p.dtype, engine, prepared.in_factor);
  PackedWeight out_weight = pack_matrix(out_factor, p.dtype, engine, prepared.out_factor);
  const SumRows bias_sums(bias, p.dtype, engine);
  const bool transforms = tile.winograd != Winograd::kNone;
  PackedWeight core_weight =
      transforms ? pack_winograd(tile.winograd, core_rows, p, engine, prepared.winograd[int(tile.winograd)])
                 : pack_core(core_rows, p.r2, p.kh * p.kw, p.r1, p.dtype, engine, prepared.core);
  const DType hidden_type = transforms ? engine.kernels->accumulator : engine.kernels->element;
  const ConvBlock block{engine, p, tile, input, output, in_weight, &core_weight, out_weight, bias_sums, hidden_type};
  if (transforms) {
    const WinogradCore winograd(core_weight, p, tile, engine);
    run_conv(
        block, [&](int64_t threads) { return winograd.scratch_bytes(threads); },
        [&](auto&&... arguments) { winograd.run(block, arguments...); });
    return output;
  }
  const int64_t hidden_columns = block.hidden_columns();
  // The KW taps of a row are one run of KW * R1 elements when pixels touch and no rank is padded.
  const bool joined = block.columns.dilation == 1 && p.r1 == hidden_columns;
  const int64_t row_taps = joined ? 1 : p.kw;
  const Panels& panels = core_weight.panels();

  const auto convolve = [&](Team& team, const HiddenRows& hidden, int64_t row, int64_t rows, int64_t columns,
                            void* tile_memory, void*) {
    const int64_t element = element_bytes(engine.kernels->element);
    team.run([&](const Share& share) {
      c10::SmallVector<const void*, 32> taps(p.kh * row_taps);
      GemmCall call;
      call.taps = taps.data();
      call.num_taps = p.kh * row_taps;
      call.depth = core_weight.padded_depth() * (joined ? p.kw : 1);
      call.row_stride = block.columns.stride * hidden_columns;
      call.out_stride = block.tile_columns();
      call.out_type = engine.kernels->element;
      call.bias = nullptr;
      call.activation = Activation::kNone;
      share.pieces(
          panels.count, rows, columns, kFewestPixels, [&](int64_t panel, int64_t i, int64_t first, int64_t pixels) {
            const int64_t column = first * block.columns.stride;
            for (int64_t kh = 0; kh < p.kh; ++kh) {
              const char* start = hidden.row((row + i) * block.rows.stride + kh * block.rows.dilation);
              for (int64_t kw = 0; kw < row_taps; ++kw)
                taps[kh * row_taps + kw] = start + (column + kw * block.columns.dilation) * hidden.pixel_bytes();
            }
            call.weight = core_weight.panel(panel);
            call.width = panels.width(panel);
            call.rows = pixels;
            call.out = static_cast<char*>(tile_memory) +
                       ((i * columns + first) * call.out_stride + panels.first(panel)) * element;
            hidden.ahead().attach(call);
            engine.gemm(call);
          });
    });
  };
  run_conv(block, [](int64_t) { return 0; }, convolve);
  return output;
}

}  // namespace lowrank_ops
