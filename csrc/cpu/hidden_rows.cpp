#include "cpu/hidden_rows.h"

#include <algorithm>
#include <cstring>

#include "plan/cpu/cost.h"

namespace lowrank_ops {
namespace {

constexpr int64_t kCopiedPixels = 64;    // in one call, where rows are short
constexpr int64_t kCopiedChannels = 16;  // that one thread copies at least

// Elements from one copied input pixel to the next: channels rounded up so that pairs can be read, but no multiple of
// half a page: lines at that distance share few places in a cache.
int64_t copy_stride(const ConvBlock& block) {
  const int64_t stride = round_up(block.problem.s, kCopiedChannels);
  return stride * element_bytes(block.kernel_set.kernels->element) % (kPageBytes / 2) == 0 ? stride + kCopiedChannels
                                                                                           : stride;
}

bool reads_directly(const ConvBlock& block) {
  if (block.channel_sum) return block.channel_sum->reads_directly();
  return block.problem.dtype == block.kernel_set.kernels->element &&
         (block.input.stride(1) == 1 || block.problem.s == 1) && block.problem.s % block.kernel_set.kernels->group == 0;
}

// Whether rows lie one behind the other in the image, and all of their pixels are used.
bool rows_touch(const ConvBlock& block) {
  const Problem& p = block.problem;
  return p.w > 0 && block.rows.step == 1 && block.columns.step == 1 && block.tile.columns == p.ow &&
         block.input.stride(2) == p.w * block.input.stride(3) && block.columns.span(p.ow) >= p.w + p.padding[1];
}

// How many rows are copied together: enough to fill whole vectors, and for a team all that a step needs.
int64_t copied_rows(const ConvBlock& block) {
  if (block.tile.team > 1) return block.rows.span(block.tile.rows);
  return rows_touch(block) ? std::max<int64_t>(1, kCopiedPixels / block.problem.w) : 1;
}

// The first pixel that a task reads inside the image, in the image's first row.
const char* task_input(const ConvBlock& block, const ConvTask& task, const TaskColumns& columns) {
  const at::Tensor& input = block.input;
  const int64_t column = block.columns.coordinate(task.first_column * block.columns.stride + columns.inside_begin);
  return static_cast<const char*>(input.const_data_ptr()) +
         (task.image * input.stride(0) + column * input.stride(3)) * element_bytes(block.problem.dtype);
}

}  // namespace

int64_t HiddenRows::ring_bytes(const ConvBlock& block) {
  return block.rows.span(block.tile.rows) * block.columns.span(block.tile.columns) * block.hidden_columns() *
         element_bytes(block.hidden_type);
}

int64_t HiddenRows::input_copy_bytes(const ConvBlock& block) {
  if (reads_directly(block)) return 0;
  return copied_rows(block) * block.columns.span(block.tile.columns) * copy_stride(block) *
         element_bytes(block.kernel_set.kernels->element);
}

HiddenRows::HiddenRows(const ConvBlock& block, Team& team, const ConvTask& task, void* ring, void* input_copy,
                       int64_t prefetched_until)
    : block_(block),
      team_(team),
      task_(task),
      columns_(block.columns, task),
      image_(task_input(block, task, columns_)),
      ring_(static_cast<char*>(ring)),
      input_copy_(static_cast<char*>(input_copy)),
      prefetched_until_(prefetched_until),
      prefetching_until_(prefetched_until) {
  ring_rows_ = block.rows.span(block.tile.rows);
  pixel_bytes_ = block.hidden_columns() * element_bytes(block.hidden_type);
  row_bytes_ = columns_.span * pixel_bytes_;
  input_row_bytes_ = block.input.stride(2) * element_bytes(block.problem.dtype);
  input_pixel_stride_ = block.input.stride(3) * block.columns.step;
  input_channel_stride_ = block.problem.s == 1 ? 1 : block.input.stride(1);
  direct_ = reads_directly(block);
  joined_ = rows_touch(block);
  rows_together_ = direct_ ? ring_rows_ : copied_rows(block);
  // The zeros around the image, and those that pad a rank to whole vectors, are the same for every row: written once.
  const bool padded_rank = block.problem.r1 != block.hidden_columns();
  for (int64_t row = 0; row < ring_rows_; ++row) {
    char* begin = ring_ + row * row_bytes_;
    if (padded_rank) {
      std::memset(begin, 0, size_t(row_bytes_));
    } else {
      std::memset(begin, 0, size_t(columns_.inside_begin * pixel_bytes_));
      std::memset(begin + columns_.inside_end * pixel_bytes_, 0,
                  size_t((columns_.span - columns_.inside_end) * pixel_bytes_));
    }
  }
}

void HiddenRows::produce(int64_t begin, int64_t end) {
  int64_t z = std::max(begin, next_);
  next_ = end;
  const int64_t pixels = columns_.inside_end - columns_.inside_begin;
  if (pixels == 0) return;  // padding only: the ring is all zeros
  while (z < end) {
    const int64_t row = block_.rows.coordinate(z);
    if (row < 0 || row >= block_.problem.h) {
      std::memset(ring_ + (z % ring_rows_) * row_bytes_ + columns_.inside_begin * pixel_bytes_, 0,
                  size_t(pixels * pixel_bytes_));
      ++z;
      continue;
    }
    int64_t rows = std::min({rows_together_, end - z, block_.rows.end_inside() - z});
    if (ring_rows_touch()) rows = std::min(rows, ring_rows_ - z % ring_rows_);  // one run of pixels
    if (direct_) {
      compute(z, rows, image_ + row * input_row_bytes_, block_.rows.step * input_row_bytes_);
    } else {
      copy_input(z, rows);
      compute(z, rows, input_copy_, pixels * copy_stride(block_) * element_bytes(block_.kernel_set.kernels->element));
    }
    z += rows;
  }
}

MemoryRows HiddenRows::output_rows(int64_t row, int64_t rows) const {
  const at::Tensor& o = block_.output;
  // Several channels that are not next to each other are stored from a buffer, without prefetches.
  if (o.stride(1) != 1 && block_.problem.t != 1) return {};
  const int64_t element = element_bytes(block_.problem.dtype);
  const int64_t first = task_.image * o.stride(0) + row * o.stride(2) + task_.first_column * o.stride(3);
  return {static_cast<const char*>(o.const_data_ptr()) + first * element, rows,
          task_.columns() * block_.problem.t * element, o.stride(2) * element};
}

void HiddenRows::map_output(int64_t row, int64_t rows) const {
  map_for_writing(output_rows(row, std::min(rows + 1, task_.last_row - row)));
}

MemoryRows HiddenRows::input_rows(const ConvTask& task, int64_t& begin, int64_t end) const {
  const Axis& axis = block_.rows;
  begin = std::max(begin, axis.first_inside());
  end = std::min(end, axis.end_inside());
  if (!direct_ || block_.columns.step != 1 || begin >= end) return {};
  const TaskColumns columns(block_.columns, task);
  const int64_t pixels = columns.inside_end - columns.inside_begin;
  const MemoryRows rows = {task_input(block_, task, columns) + axis.coordinate(begin) * input_row_bytes_, end - begin,
                           pixels * block_.problem.s * element_bytes(block_.problem.dtype),
                           axis.step * input_row_bytes_};
  begin = end;
  return rows;
}

// The products, without the stages that other kernels than the GEMM run for a rank of one. Prefetches are spread over
// 97 % of them: the next step waits for a prefetch that comes late.
double HiddenRows::prefetching_multiply_adds(int64_t pixels) const {
  const Problem& p = block_.problem;
  double products = fused_products(p, block_.tile) / double(p.n * p.oh * p.ow);
  if (block_.channel_sum) products -= double(p.h * p.w * p.s) / double(p.oh * p.ow);
  if (block_.core_row) products -= double(p.kh * p.kw * p.r1);
  if (block_.out_row) products -= double(p.t);
  return 0.97 * products * double(pixels);
}

int64_t HiddenRows::begin_prefetches(int64_t row, int64_t rows, const ConvTask* next) {
  const Axis& axis = block_.rows;
  MemoryRows input;
  prefetched_until_ = prefetching_until_;
  int64_t next_prefetched_until = 0;
  if (const int64_t more = task_.last_row - row - rows; more > 0) {
    int64_t z = row * axis.stride + axis.span(rows);
    input = input_rows(task_, z, z + std::min(more, rows) * axis.stride);
    prefetching_until_ = z;
  } else if (next) {
    int64_t z = next->first_row * axis.stride;
    input = input_rows(*next, z, z + axis.span(std::min(block_.tile.rows, next->last_row - next->first_row)));
    next_prefetched_until = z;
  }
  prefetcher_.begin(output_rows(row, rows), input, prefetching_multiply_adds(rows * task_.columns()));
  return next_prefetched_until;
}

void HiddenRows::copy_input(int64_t z, int64_t rows) {
  const ComputeKernels& kernels = *block_.kernel_set.kernels;
  const int64_t element = element_bytes(kernels.element), pixels = columns_.inside_end - columns_.inside_begin;
  const int64_t channels = block_.problem.s, blocks = ceil_div(channels, kCopiedChannels);
  team_.run([&](const Share& share) {
    LoadCall load;
    load.pixel_stride = input_pixel_stride_;
    load.channel_stride = input_channel_stride_;
    load.pixels = joined_ ? rows * pixels : pixels;
    load.tile_stride = copy_stride(block_);
    share.pieces(1, joined_ ? 1 : rows, blocks, 1, [&](int64_t, int64_t i, int64_t first, int64_t count) {
      const int64_t channel = first * kCopiedChannels;
      load.in = image_ + block_.rows.coordinate(z + i) * input_row_bytes_ +
                channel * input_channel_stride_ * element_bytes(block_.problem.dtype);
      load.channels = std::min(count * kCopiedChannels, channels - channel);
      load.tile = input_copy_ + (i * pixels * load.tile_stride + channel) * element;
      kernels.load[int(block_.problem.dtype)](load);
    });
  });
}

void HiddenRows::compute(int64_t z, int64_t rows, const char* source, int64_t source_bytes) {
  if (block_.channel_sum) return add_channels(z, rows, source, source_bytes);
  const Panels& panels = block_.in_weight.panels();
  const PackedWeight* next_weight = block_.core_weight ? block_.core_weight : &block_.out_weight;
  const int64_t hidden_element = element_bytes(block_.hidden_type);
  team_.run([&](const Share& share) {
    const void* pixel;
    GemmCall call;
    call.taps = &pixel;
    call.num_taps = 1;
    call.depth = block_.in_weight.padded_depth();
    call.row_stride = direct_ ? input_pixel_stride_ : copy_stride(block_);
    call.out_stride = block_.hidden_columns();
    call.out_type = block_.hidden_type;
    call.bias = nullptr;
    call.activation = Activation::kNone;
    const int64_t pixel_bytes = call.row_stride * element_bytes(block_.kernel_set.kernels->element);
    // Rows that are one run of pixels, here and in the ring, fill register blocks better than one by one.
    const int64_t columns = columns_.inside_end - columns_.inside_begin;
    const bool one_run = ring_rows_touch() && source_bytes == columns * pixel_bytes;
    share.pieces(panels.count, one_run ? 1 : rows, one_run ? rows * columns : columns, kFewestPixels,
                 [&](int64_t panel, int64_t i, int64_t first, int64_t pixels) {
                   pixel = source + i * source_bytes + first * pixel_bytes;
                   const int64_t last = one_run ? z + rows - 1 : z + i;
                   call.far_input =
                       block_.tile.far && direct_ && last >= prefetched_until_ && (panel == 0 || share.count > 1);
                   call.weight = block_.in_weight.panel(panel);
                   call.width = panels.width(panel);
                   call.rows = pixels;
                   call.out = ring_ + ((z + i) % ring_rows_) * row_bytes_ +
                              (columns_.inside_begin + first) * pixel_bytes_ + panels.first(panel) * hidden_element;
                   prefetcher_.attach(call);
                   prefetcher_.attach_next_panel(call, block_.in_weight, next_weight, panel, i, one_run ? 1 : rows);
                   block_.kernel_set.gemm(call);
                 });
  });
}

void HiddenRows::add_channels(int64_t z, int64_t rows, const char* source, int64_t source_bytes) {
  const int64_t pixel_stride = direct_ ? input_pixel_stride_ : copy_stride(block_);
  const int64_t pixel_bytes =
      pixel_stride * element_bytes(direct_ ? block_.problem.dtype : block_.kernel_set.kernels->element);
  int64_t columns = columns_.inside_end - columns_.inside_begin;
  if (source_bytes == columns * pixel_bytes && is_one_run(z, rows)) {  // one long row
    columns *= rows;
    rows = 1;
  }
  const bool touch = source_bytes == columns * pixel_bytes;  // rows that are one run of pixels
  team_.run([&](const Share& share) {
    ChannelSums sums;
    share.pieces(1, touch ? 1 : rows, touch ? rows * columns : columns, kFewestPixels,
                 [&](int64_t, int64_t line, int64_t first, int64_t pixels) {
                   for (int64_t begin = first, count; begin < first + pixels; begin += count) {
                     count = std::min(ChannelSums::kMostPixels, first + pixels - begin);
                     (*block_.channel_sum)(source + line * source_bytes + begin * pixel_bytes, pixel_stride, count,
                                           sums.memory);
                     write_sums(z + line, begin, count, columns, sums.memory);
                   }
                 });
  });
}

void HiddenRows::write_sums(int64_t z, int64_t first, int64_t count, int64_t columns, const char* sums) {
  const int64_t sum_bytes = element_bytes(block_.kernel_set.kernels->accumulator);
  for (int64_t i = 0, here; i < count; i += here) {
    const int64_t column = (first + i) % columns;
    here = std::min(count - i, columns - column);
    char* out = ring_ + ((z + (first + i) / columns) % ring_rows_) * row_bytes_ +
                (columns_.inside_begin + column) * pixel_bytes_;
    write_channel(*block_.kernel_set.kernels, sums + i * sum_bytes, here, out, block_.hidden_columns(),
                  block_.hidden_type);
  }
}

}  // namespace lowrank_ops
