// Tucker-2 on the CPU: its core stage runs directly (direct_core.h) or by Winograd's transforms (winograd.h).
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "cpu/conv.h"
#include "cpu/cpu.h"
#include "cpu/direct_core.h"
#include "cpu/winograd.h"

namespace lowrank_ops {
namespace {

constexpr int64_t kCopiedBytes = 64 << 10;  // at least so much of a core per thread that copies it

// The core as [R2, KH, KW, R1] in memory: itself in channels_last, otherwise a copy. torch would copy a contiguous core
// element by element, so it is transposed in registers like an NCHW image: the taps are its KH * KW pixels.
at::Tensor rows_of_core(const at::Tensor& core, const Problem& p, const KernelSet& kernel_set) {
  const ComputeKernels& kernels = *kernel_set.kernels;
  const bool whole = p.dtype == kernels.element && p.r1 % kernels.group == 0;
  if (!whole || !core.is_contiguous() || core.is_contiguous(at::MemoryFormat::ChannelsLast))
    return core.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor rows = at::empty(core.sizes(), core.options().memory_format(at::MemoryFormat::ChannelsLast));
  const int64_t row_bytes = p.r1 * p.kh * p.kw * element_bytes(p.dtype);
  const char* from = static_cast<const char*>(core.const_data_ptr());
  char* to = static_cast<char*>(rows.data_ptr());
  at::parallel_for(0, p.r2, std::max<int64_t>(1, kCopiedBytes / row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      LoadCall load;
      load.in = from + row * row_bytes;
      load.pixel_stride = 1;
      load.channel_stride = load.pixels = p.kh * p.kw;
      load.channels = load.tile_stride = p.r1;
      load.tile = to + row * row_bytes;
      kernels.load[int(p.dtype)](load);
    }
  });
  return rows;
}

// A core of one row as elements [taps, padded depth].
AlignedMemory elements_of_core(const at::Tensor& rows, const Problem& p, const KernelSet& kernel_set,
                               int64_t padded_depth) {
  LoadCall load;
  load.in = rows.const_data_ptr();
  load.pixel_stride = load.channels = p.r1;
  load.channel_stride = 1;
  load.pixels = p.kh * p.kw;
  load.tile_stride = padded_depth;
  AlignedMemory elements = allocate(load.pixels * padded_depth * element_bytes(kernel_set.kernels->element));
  load.tile = elements.get();
  kernel_set.kernels->load[int(p.dtype)](load);
  return elements;
}

}  // namespace

at::Tensor tucker_cpu(const OpCall& call, const Problem& p, const CpuTile& tile, const Prepared& prepared) {
  at::Tensor output = empty_output(call.input, p);
  if (output.numel() == 0) return output;
  const KernelSet kernel_set = kernel_set_for(p.dtype);
  ConvBlock block(call, p, tile, kernel_set, prepared, output);
  const auto core_rows = [&] { return rows_of_core(call.core, p, kernel_set); };
  const bool transforms = tile.winograd != Winograd::kNone;
  PackedWeight core_weight =
      transforms ? pack_winograd(tile.winograd, core_rows, p, kernel_set, prepared.winograd[int(tile.winograd)])
                 : pack_core(core_rows, p.r2, p.kh * p.kw, p.r1, p.dtype, kernel_set, prepared.core);
  block.core_weight = &core_weight;
  if (transforms) {
    const WinogradCore winograd(block);
    run_conv(
        block, [&](int64_t threads) { return winograd.scratch_bytes(threads); },
        [&](auto&&... arguments) { winograd.run(arguments...); });
    return output;
  }
  const CoreStage way = core_stage(p, tile.winograd, kernel_set.kernels->group == 2);
  AlignedMemory core_row;
  if (way != CoreStage::kPanels) core_row = elements_of_core(core_rows(), p, kernel_set, core_weight.padded_depth());
  block.core_row = core_row.get();
  const DirectCore direct(block, way);
  run_conv(block, [](int64_t) { return 0; }, [&](auto&&... arguments) { direct.run(arguments...); });
  return output;
}

}  // namespace lowrank_ops
