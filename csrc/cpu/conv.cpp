#include "cpu/conv.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "cpu/kernels/prefetch.h"

namespace lowrank_ops {
namespace {

// out_factor as a row of accumulators; nothing where the last stage is a product with panels.
std::optional<SumRows> out_row_of(const at::Tensor& out_factor, const Problem& p, Winograd winograd,
                                  const KernelSet& kernel_set) {
  if (!spreads_plane(p, winograd, kernel_set.kernels->group == 2)) return std::nullopt;
  return std::optional<SumRows>(std::in_place, out_factor, p.dtype, kernel_set);
}

}  // namespace

at::Tensor empty_output(const at::Tensor& input, const Problem& p) {
  return at::empty({p.n, p.t, p.oh, p.ow}, input.options().memory_format(input.suggest_memory_format()));
}

ConvBlock::ConvBlock(const OpCall& call, const Problem& p, const CpuTile& tile, const KernelSet& kernel_set,
                     const Prepared& prepared, at::Tensor& output)
    : kernel_set(kernel_set),
      problem(p),
      tile(tile),
      input(call.input),
      output(output),
      in_weight(pack_matrix(call.in_factor, p.dtype, kernel_set, prepared.in_factor)),
      out_weight(pack_matrix(call.out_factor, p.dtype, kernel_set, prepared.out_factor)),
      bias(call.bias, p.dtype, kernel_set),
      channel_sum(channel_sum_of(call.in_factor, call.input, p, tile, kernel_set)),
      out_row(out_row_of(call.out_factor, p, tile.winograd, kernel_set)),
      hidden_type(p.op == Op::kCP || tile.winograd != Winograd::kNone ? kernel_set.kernels->accumulator
                                                                      : kernel_set.kernels->element) {}

TaskColumns::TaskColumns(const Axis& columns, const ConvTask& task) : span(columns.span(task.columns())) {
  const int64_t first = task.first_column * columns.stride;
  inside_begin = std::clamp<int64_t>(columns.first_inside() - first, 0, span);
  inside_end = std::clamp<int64_t>(columns.end_inside() - first, inside_begin, span);
}

ConvTasks::ConvTasks(const ConvBlock& block)
    : problem_(block.problem),
      columns_(block.tile.columns),
      column_tiles_(ceil_div(problem_.ow, columns_)),
      // Strips begin at multiples of Winograd's patches, so that patches do not depend on the number of strips.
      strip_(round_up(ceil_div(problem_.oh, block.tile.strips), patch_of(block.tile.winograd).rows)),
      strips_(ceil_div(problem_.oh, strip_)) {}

ConvTask ConvTasks::operator[](int64_t index) const {
  const int64_t column = index % column_tiles_ * columns_, row = index / column_tiles_ % strips_ * strip_;
  return {index / column_tiles_ / strips_, row, std::min(row + strip_, problem_.oh), column,
          std::min(column + columns_, problem_.ow)};
}

namespace {

int64_t tile_bytes(const ConvBlock& block) {
  return block.tile.rows * block.tile.columns * block.tile_columns() * element_bytes(block.kernel_set.kernels->element);
}

// Bytes of ConvBuffers::copies: input and output use the same memory, one after the other.
int64_t copy_bytes(const ConvBlock& block) {
  return std::max(HiddenRows::input_copy_bytes(block), block.tile.team * output_copy_bytes(block));
}

}  // namespace

ConvBuffers::ConvBuffers(const ConvBlock& block, int64_t extra_bytes)
    : scratch(Scratch::padded(HiddenRows::ring_bytes(block)) + Scratch::padded(tile_bytes(block)) +
              Scratch::padded(copy_bytes(block)) + Scratch::padded(extra_bytes)),
      ring(scratch.take(HiddenRows::ring_bytes(block))),
      tile(scratch.take(tile_bytes(block))),
      copies(scratch.take(copy_bytes(block))),
      extra(scratch.take(extra_bytes)) {
  // An odd rank's last value is read as one of a pair: the other one has to be zero.
  if (block.problem.r2 % block.kernel_set.kernels->group != 0) std::memset(tile, 0, size_t(tile_bytes(block)));
}

int64_t output_copy_bytes(const ConvBlock& block) {
  if (block.out_row || block.output.stride(1) == 1 || block.problem.t == 1) return 0;
  return block.tile.rows * block.tile.columns * block.kernel_set.kernels->panel_width *
         element_bytes(block.kernel_set.kernels->accumulator);
}

namespace {

// One thread's part of the last stage: hidden rows times out_factor into the output.
class OutputWriter {
 public:
  OutputWriter(const ConvBlock& block, Prefetcher& prefetcher, char* copy)
      : block_(block), prefetcher_(prefetcher), copy_(copy) {
    call_.taps = &source_;
    call_.num_taps = 1;
    call_.depth = block.out_weight.padded_depth();
    call_.row_stride = block.tile_columns();
    call_.activation = block.problem.activation;
  }

  // `pixels` pixels from `source` (of the tile) times a panel of out_factor -> `pixel` (of the output) and those after
  // it. They are part `part` of the `parts` that use the panel.
  void write(int64_t panel, const void* source, int64_t pixels, char* pixel, int64_t part, int64_t parts) {
    source_ = source;
    if (block_.out_row) return spread(pixels, pixel);
    const at::Tensor& output = block_.output;
    const Panels& panels = block_.out_weight.panels();
    const int64_t channel = panels.first(panel);
    call_.weight = block_.out_weight.panel(panel);
    call_.width = panels.width(panel);
    call_.rows = pixels;
    call_.bias = block_.bias.data(channel);
    char* target = pixel + channel * output.stride(1) * element_bytes(block_.problem.dtype);
    if (output.stride(1) != 1 && block_.problem.t != 1) return write_transposed(target);
    call_.far_output = block_.tile.far && !block_.tile.spreads_prefetches;
    prefetcher_.attach(call_);
    prefetcher_.attach_next_panel(call_, block_.out_weight, nullptr, panel, part, parts);
    call_.out = target;
    call_.out_stride = output.stride(3);
    call_.out_type = block_.problem.dtype;
    block_.kernel_set.gemm(call_);
  }

 private:
  // The product goes to `copy_`, and from there channel by channel to the output.
  void write_transposed(char* target) {
    const ComputeKernels& kernels = *block_.kernel_set.kernels;
    const DType dtype = block_.problem.dtype;
    const int64_t channel_stride = block_.output.stride(1), element = element_bytes(dtype);
    if (block_.tile.far)  // the prefetches run while the product is computed
      prefetch_rows</*kWrite=*/true>(target, call_.width, channel_stride * element, call_.rows * element);
    call_.out = copy_;
    call_.out_stride = kernels.panel_width;
    call_.out_type = kernels.accumulator;
    block_.kernel_set.gemm(call_);
    StoreCall store;
    store.tile = call_.out;
    store.tile_stride = kernels.panel_width;
    store.pixels = call_.rows;
    store.channels = call_.width;
    store.out = target;
    store.channel_stride = channel_stride;
    kernels.store[int(dtype)](store);
  }

  // A plane of `pixels` accumulators, scaled per channel -> the planes of the output, from `out` on.
  void spread(int64_t pixels, char* out) const {
    SpreadCall call;
    call.plane = source_;
    call.factor = block_.out_row->data();
    call.bias = block_.bias.data();
    call.pixels = pixels;
    call.channels = block_.problem.t;
    call.channel_stride = block_.output.stride(1);
    call.out = out;
    call.activation = block_.problem.activation;
    block_.kernel_set.kernels->spread[int(block_.problem.dtype)](call);
  }

  const ConvBlock& block_;
  Prefetcher& prefetcher_;
  char* copy_;
  const void* source_ = nullptr;
  GemmCall call_;
};

}  // namespace

void write_output(const ConvBlock& block, Team& team, Prefetcher& prefetcher, const ConvTask& task, int64_t row,
                  int64_t rows, const void* tile, void* copies) {
  const at::Tensor& output = block.output;
  const int64_t columns = task.columns(), pixel_stride = output.stride(3), row_stride = output.stride(2);
  const int64_t element = element_bytes(block.problem.dtype);
  const int64_t tile_pixel_bytes = block.tile_columns() * element_bytes(block.kernel_set.kernels->element);
  // Rows that lie one behind the other in the output are one long row of pixels.
  const bool joined = columns == block.problem.ow && row_stride == block.problem.ow * pixel_stride;
  char* out = static_cast<char*>(output.data_ptr()) +
              (task.image * output.stride(0) + row * row_stride + task.first_column * pixel_stride) * element;
  team.run([&](const Share& share) {
    OutputWriter writer(block, prefetcher, static_cast<char*>(copies) + share.index * output_copy_bytes(block));
    share.pieces(block.out_row ? 1 : block.out_weight.panels().count, joined ? 1 : rows,
                 joined ? rows * columns : columns, kFewestPixels,
                 [&](int64_t panel, int64_t i, int64_t first, int64_t pixels) {
                   const char* source = static_cast<const char*>(tile) + (i * columns + first) * tile_pixel_bytes;
                   char* pixel = out + (i * row_stride + first * pixel_stride) * element;
                   writer.write(panel, source, pixels, pixel, i, joined ? 1 : rows);
                 });
  });
}

}  // namespace lowrank_ops
