// Tucker-2 on the CPU: the core convolution as a GEMM that slides over the ring buffer of hidden rows (conv.h).
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>

#include "cpu/conv.h"
#include "cpu/cpu.h"
#include "cpu/winograd.h"

namespace lowrank_ops {
namespace {

constexpr int64_t kCopiedBytes = 64 << 10;  // of a core by a thread at least

// Neighbouring output columns with the same taps inside the image.
struct ColumnRun {
  int64_t first, end;
  Axis::Taps taps;
};
using ColumnRuns = c10::SmallVector<ColumnRun, 8>;

// Zeros around the image need no products: with dilation 6 a fifth of those of a 30x40 image. Runs shorter than a
// register block, as with dilation 1, would cost more than they save.
ColumnRuns column_runs(const Axis& axis, const TaskColumns& columns, int64_t count) {
  const auto taps_of = [&](int64_t column) {
    return axis.taps_inside(column * axis.stride, columns.inside_begin, columns.inside_end);
  };
  const Axis::Taps every_tap{0, axis.kernel};
  const int64_t after = std::max<int64_t>(columns.inside_end - (axis.kernel - 1) * axis.dilation, 0);
  const int64_t end_of_every_tap = std::min(ceil_div(after, axis.stride), count);
  const ColumnRuns all = {{0, count, every_tap}};
  ColumnRuns runs;
  for (int64_t column = 0; column < count; column = runs.back().end) {
    ColumnRun run{column, column + 1, taps_of(column)};
    if (run.taps == every_tap) run.end = std::max(run.end, end_of_every_tap);
    while (run.end < count && taps_of(run.end) == run.taps) ++run.end;
    if (run.end - run.first < std::min(kFewestPixels, count)) return all;
    runs.push_back(run);
  }
  return runs;
}

// The core as [R2, KH, KW, R1] in memory: itself in channels_last, otherwise a copy. Contiguous cores, which torch
// would copy element by element, are transposed in registers as images are: a row of taps is an image of KH * KW
// pixels.
at::Tensor rows_of_core(const at::Tensor& core, const Problem& p, const Engine& engine) {
  const ComputeKernels& kernels = *engine.kernels;
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
AlignedMemory elements_of_core(const at::Tensor& rows, const Problem& p, const Engine& engine, int64_t padded_depth) {
  LoadCall load;
  load.in = rows.const_data_ptr();
  load.pixel_stride = load.channels = p.r1;
  load.channel_stride = 1;
  load.pixels = p.kh * p.kw;
  load.tile_stride = padded_depth;
  AlignedMemory elements = allocate(load.pixels * padded_depth * element_bytes(engine.kernels->element));
  load.tile = elements.get();
  engine.kernels->load[int(p.dtype)](load);
  return elements;
}

// The core's product with one output channel: what `call` says, by dot products along the windows.
//
//   pixel m   window of tap 0     window of tap 1   ...    each R1 or, where pixels touch, KW * R1 elements
//             * core_row, tap 0   * core_row, tap 1 ...    lanes added up at the end -> tile m
void sum_taps(const ConvBlock& block, const GemmCall& call) {
  const ComputeKernels& kernels = *block.engine.kernels;
  c10::SmallVector<const void*, 32> windows(call.taps, call.taps + call.num_taps);
  ChannelSums sums;
  DotCall dot{};
  dot.rows = 1;
  dot.weight_stride = call.row_stride;
  dot.depth = call.depth;
  dot.sums = sums.memory;
  dot.num_taps = call.num_taps;
  dot.tap_weights = windows.data();
  dot.tap_inputs = call.tap_weights;
  for (int64_t pixel = 0; pixel < call.rows; pixel += dot.columns) {
    dot.columns = dot.sums_stride = std::min(ChannelSums::kMostPixels, call.rows - pixel);
    for (int64_t tap = 0; tap < call.num_taps; ++tap)
      windows[size_t(tap)] =
          static_cast<const char*>(call.taps[tap]) + pixel * call.row_stride * element_bytes(kernels.element);
    kernels.dot[int(kernels.element)](dot);
    char* out = static_cast<char*>(call.out) + pixel * call.out_stride * element_bytes(call.out_type);
    write_channel(kernels, sums.memory, dot.columns, out, call.out_stride, call.out_type);
  }
}

// The core between planes of one hidden channel: `pixels` outputs of a row from column `first` -> out, elements.
void slide_window(const ConvBlock& block, const HiddenRows& hidden, int64_t row, int64_t first, int64_t pixels,
                  void* out) {
  const Problem& p = block.problem;
  const int64_t top = row * block.rows.stride;
  const Axis::Taps inside = block.rows.taps_inside(top, block.rows.first_inside(), block.rows.end_inside());
  c10::SmallVector<const void*, 32> seen;
  for (int64_t kh = inside.begin; kh < inside.end; ++kh)
    seen.push_back(hidden.row(top + kh * block.rows.dilation) + first * block.columns.stride * hidden.pixel_bytes());
  WindowCall call;
  call.rows = seen.data();
  call.kh_count = inside.end - inside.begin;
  call.kw_count = p.kw;
  call.weight = block.core_row + inside.begin * p.kw * element_bytes(block.engine.kernels->element);
  call.stride = block.columns.stride;
  call.dilation = block.columns.dilation;
  call.out_pixels = pixels;
  call.out = out;
  block.engine.kernels->window(call);
}

// Whether the window is one tap that sees each pixel of the image once.
bool scales_pixels(const Problem& p) {
  const auto is = [](const auto& pair, int64_t value) { return pair[0] == value && pair[1] == value; };
  return p.kh * p.kw == 1 && is(p.stride, 1) && is(p.padding, 0);
}

}  // namespace

at::Tensor tucker_cpu(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                      const at::Tensor& out_factor, const OptionalTensor& bias, const Problem& p, const CpuTile& tile,
                      const Prepared& prepared) {
  at::Tensor output = empty_output(input, p);
  if (output.numel() == 0) return output;
  const Engine engine = engine_for(p.dtype);
  const auto core_rows = [&] { return rows_of_core(core, p, engine); };
  PackedWeight in_weight = pack_matrix(in_factor, p.dtype, engine, prepared.in_factor);
  PackedWeight out_weight = pack_matrix(out_factor, p.dtype, engine, prepared.out_factor);
  const SumRows bias_sums(bias, p.dtype, engine);
  const bool transforms = tile.winograd != Winograd::kNone;
  PackedWeight core_weight =
      transforms ? pack_winograd(tile.winograd, core_rows, p, engine, prepared.winograd[int(tile.winograd)])
                 : pack_core(core_rows, p.r2, p.kh * p.kw, p.r1, p.dtype, engine, prepared.core);
  const DType hidden_type = transforms ? engine.kernels->accumulator : engine.kernels->element;
  const std::optional<ChannelSum> channel_sum = channel_sum_of(in_factor, input, p, tile, engine);
  const std::optional<SumRows> out_row = out_row_of(out_factor, p, tile.winograd, engine);
  AlignedMemory core_row;
  const CoreStage core_way = core_stage(p, tile.winograd, engine.kernels->group == 2);
  if (core_way != CoreStage::kPanels) core_row = elements_of_core(core_rows(), p, engine, core_weight.padded_depth());
  const ConvBlock block{engine,         p,          tile,      input,       output,  in_weight,  &core_weight,
                        core_row.get(), out_weight, bias_sums, channel_sum, out_row, hidden_type};
  if (transforms) {
    const WinogradCore winograd(core_weight, p, tile, engine);
    run_conv(
        block, [&](int64_t threads) { return winograd.scratch_bytes(threads); },
        [&](auto&&... arguments) { winograd.run(block, arguments...); });
    return output;
  }
  const int64_t hidden_columns = block.hidden_columns();
  // The taps of a row are one run of elements where the pixels that they see touch.
  const bool joined = block.columns.dilation == 1;
  const Panels& panels = core_weight.panels();

  const auto convolve = [&](Team& team, const HiddenRows& hidden, int64_t row, int64_t rows, int64_t columns,
                            void* tile_memory, void*) {
    const int64_t element = element_bytes(engine.kernels->element);
    if (core_way == CoreStage::kPlanes) {
      const bool one_run = scales_pixels(p) && hidden.is_one_run(row, rows);
      return team.run([&](const Share& share) {
        share.pieces(1, one_run ? 1 : rows, one_run ? rows * columns : columns, kFewestPixels,
                     [&](int64_t, int64_t i, int64_t first, int64_t pixels) {
                       char* out = static_cast<char*>(tile_memory) + (i * columns + first) * element;
                       slide_window(block, hidden, row + i, first, pixels, out);
                     });
      });
    }
    const ColumnRuns runs = column_runs(block.columns, hidden.columns(), columns);
    team.run([&](const Share& share) {
      c10::SmallVector<const void*, 32> taps(p.kh * p.kw), tap_weights(p.kh * p.kw);
      GemmCall call;
      call.taps = taps.data();
      call.tap_weights = tap_weights.data();
      call.row_stride = block.columns.stride * hidden_columns;
      call.out_stride = block.tile_columns();
      call.out_type = engine.kernels->element;
      call.bias = nullptr;
      call.activation = Activation::kNone;
      const auto multiply = [&](int64_t panel, int64_t i, int64_t first, int64_t pixels, const Axis::Taps& line) {
        const int64_t top = (row + i) * block.rows.stride, column = first * block.columns.stride;
        const Axis::Taps inside = block.rows.taps_inside(top, block.rows.first_inside(), block.rows.end_inside());
        const char* weight = block.core_row ? block.core_row : static_cast<const char*>(core_weight.panel(panel));
        const int64_t tap_bytes =
            core_weight.padded_depth() * (block.core_row ? 1 : panels.padded_width(panel)) * element;
        const int64_t together = joined ? std::max<int64_t>(line.end - line.begin, 1) : 1;
        call.depth = core_weight.padded_depth() * together;
        call.weight = weight;
        call.num_taps = 0;
        const auto add = [&](int64_t kh, int64_t kw) {
          taps[call.num_taps] = hidden.row(top + kh * block.rows.dilation) +
                                (column + kw * block.columns.dilation) * hidden.pixel_bytes();
          tap_weights[call.num_taps++] = weight + (kh * p.kw + kw) * tap_bytes;
        };
        for (int64_t kh = inside.begin; kh < inside.end; ++kh)
          for (int64_t kw = line.begin; kw < line.end; kw += together) add(kh, kw);
        if (call.num_taps == 0) add(0, 0);  // of zeros
        call.width = panels.width(panel);
        call.rows = pixels;
        call.out =
            static_cast<char*>(tile_memory) + ((i * columns + first) * call.out_stride + panels.first(panel)) * element;
        if (block.core_row) return sum_taps(block, call);
        hidden.ahead().attach(call);
        hidden.ahead().attach_next_panel(call, core_weight, &out_weight, panel, i, rows);
        engine.gemm(call);
      };
      share.pieces(panels.count, rows, columns, kFewestPixels,
                   [&](int64_t panel, int64_t i, int64_t first, int64_t pixels) {
                     for (const ColumnRun& run : runs) {
                       const int64_t begin = std::max(first, run.first), end = std::min(first + pixels, run.end);
                       if (begin < end) multiply(panel, i, begin, end - begin, run.taps);
                     }
                   });
    });
  };
  run_conv(block, [](int64_t) { return 0; }, convolve);
  return output;
}

}  // namespace lowrank_ops
