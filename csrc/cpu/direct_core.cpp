#include "cpu/direct_core.h"

#include <c10/util/SmallVector.h>

#include <algorithm>

namespace lowrank_ops {
namespace {

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

// Runs `call`, a product with one output channel, by dot products along the windows (CoreStage::kDots).
//
//   pixel m   window of tap 0     window of tap 1   ...    each R1 or, where pixels touch, KW * R1 elements
//             * core_row, tap 0   * core_row, tap 1 ...    lanes added up at the end -> tile m
void sum_taps(const ConvBlock& block, const GemmCall& call) {
  const ComputeKernels& kernels = *block.kernel_set.kernels;
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
  c10::SmallVector<const void*, 32> rows;
  for (int64_t kh = inside.begin; kh < inside.end; ++kh)
    rows.push_back(hidden.row(top + kh * block.rows.dilation) + first * block.columns.stride * hidden.pixel_bytes());
  WindowCall call;
  call.rows = rows.data();
  call.kh_count = inside.end - inside.begin;
  call.kw_count = p.kw;
  call.weight = block.core_row + inside.begin * p.kw * element_bytes(block.kernel_set.kernels->element);
  call.stride = block.columns.stride;
  call.dilation = block.columns.dilation;
  call.out_pixels = pixels;
  call.out = out;
  block.kernel_set.kernels->window(call);
}

// Whether the window is one tap that sees each pixel of the image once.
bool scales_pixels(const Problem& p) {
  const auto is = [](const auto& pair, int64_t value) { return pair[0] == value && pair[1] == value; };
  return p.kh * p.kw == 1 && is(p.stride, 1) && is(p.padding, 0);
}

// One thread's products of the core with the windows of a step of `rows` output rows from `row`.
class WindowProducts {
 public:
  WindowProducts(const ConvBlock& block, const HiddenRows& hidden, int64_t row, int64_t rows, int64_t columns,
                 char* tile)
      : block_(block),
        weight_(*block.core_weight),
        hidden_(hidden),
        row_(row),
        rows_(rows),
        columns_(columns),
        tile_(tile),
        element_(element_bytes(block.kernel_set.kernels->element)),
        taps_(block.problem.kh * block.problem.kw),
        tap_weights_(block.problem.kh * block.problem.kw) {
    call_.taps = taps_.data();
    call_.tap_weights = tap_weights_.data();
    call_.row_stride = block.columns.stride * block.hidden_columns();
    call_.out_stride = block.tile_columns();
    call_.out_type = block.kernel_set.kernels->element;
    call_.bias = nullptr;
    call_.activation = Activation::kNone;
  }

  // `pixels` output pixels from `first` of row `i` of the step; `across` are those columns of the window that see the
  // image.
  void multiply(int64_t panel, int64_t i, int64_t first, int64_t pixels, const Axis::Taps& across) {
    const Panels& panels = weight_.panels();
    collect_taps(panel, i, first, across);
    call_.width = panels.width(panel);
    call_.rows = pixels;
    call_.out = tile_ + ((i * columns_ + first) * call_.out_stride + panels.first(panel)) * element_;
    if (block_.core_row) return sum_taps(block_, call_);
    hidden_.prefetcher().attach(call_);
    hidden_.prefetcher().attach_next_panel(call_, weight_, &block_.out_weight, panel, i, rows_);
    block_.kernel_set.gemm(call_);
  }

 private:
  // Where the taps that see the image lie, and their parts of the panel. The taps of a row are one run of elements
  // where the pixels that they see touch.
  void collect_taps(int64_t panel, int64_t i, int64_t first, const Axis::Taps& across) {
    const Axis& rows = block_.rows;
    const int64_t top = (row_ + i) * rows.stride, column = first * block_.columns.stride;
    const Axis::Taps down = rows.taps_inside(top, rows.first_inside(), rows.end_inside());
    const char* weight = block_.core_row ? block_.core_row : static_cast<const char*>(weight_.panel(panel));
    const int64_t tap_bytes =
        weight_.padded_depth() * (block_.core_row ? 1 : weight_.panels().padded_width(panel)) * element_;
    const int64_t together = block_.columns.dilation == 1 ? std::max<int64_t>(across.end - across.begin, 1) : 1;
    call_.depth = weight_.padded_depth() * together;
    call_.weight = weight;
    call_.num_taps = 0;
    const auto add = [&](int64_t kh, int64_t kw) {
      taps_[call_.num_taps] =
          hidden_.row(top + kh * rows.dilation) + (column + kw * block_.columns.dilation) * hidden_.pixel_bytes();
      tap_weights_[call_.num_taps++] = weight + (kh * block_.problem.kw + kw) * tap_bytes;
    };
    for (int64_t kh = down.begin; kh < down.end; ++kh)
      for (int64_t kw = across.begin; kw < across.end; kw += together) add(kh, kw);
    if (call_.num_taps == 0) add(0, 0);  // outside the image: a product with zeros
  }

  const ConvBlock& block_;
  const PackedWeight& weight_;
  const HiddenRows& hidden_;
  const int64_t row_, rows_, columns_;
  char* const tile_;
  const int64_t element_;
  c10::SmallVector<const void*, 32> taps_, tap_weights_;
  GemmCall call_;
};

}  // namespace

void DirectCore::slide_windows(Team& team, const HiddenRows& hidden, int64_t row, int64_t rows, int64_t columns,
                               char* tile) const {
  const int64_t element = element_bytes(block_.kernel_set.kernels->element);
  const bool one_run = scales_pixels(block_.problem) && hidden.is_one_run(row, rows);
  team.run([&](const Share& share) {
    share.pieces(1, one_run ? 1 : rows, one_run ? rows * columns : columns, kFewestPixels,
                 [&](int64_t, int64_t i, int64_t first, int64_t pixels) {
                   slide_window(block_, hidden, row + i, first, pixels, tile + (i * columns + first) * element);
                 });
  });
}

void DirectCore::run(Team& team, const HiddenRows& hidden, int64_t row, int64_t rows, int64_t columns, void* tile,
                     void*) const {
  if (way_ == CoreStage::kPlanes) return slide_windows(team, hidden, row, rows, columns, static_cast<char*>(tile));
  const ColumnRuns runs = column_runs(block_.columns, hidden.columns(), columns);
  team.run([&](const Share& share) {
    WindowProducts products(block_, hidden, row, rows, columns, static_cast<char*>(tile));
    share.pieces(block_.core_weight->panels().count, rows, columns, kFewestPixels,
                 [&](int64_t panel, int64_t i, int64_t first, int64_t pixels) {
                   for (const ColumnRun& run : runs) {
                     const int64_t begin = std::max(first, run.first), end = std::min(first + pixels, run.end);
                     if (begin < end) products.multiply(panel, i, begin, end - begin, run.taps);
                   }
                 });
  });
}

}  // namespace lowrank_ops
