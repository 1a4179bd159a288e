#include "cpu/conv.h"

#include <ATen/ops/empty.h>

#include "plan/cpu/cost.h"

namespace lowrank_ops {

namespace {

constexpr int64_t kMostAskedBytes = 128 << 10;  // of a weight ahead of its use
constexpr int64_t kBytesAtOnce = 2048;          // prefetched before a call rather than evenly while it computes
constexpr int64_t kStagedPixels = 64;
constexpr int64_t kStagedChannels = 16;  // staged by one thread at least

// Elements from one staged input pixel to the next: channels rounded up so that pairs can be read, and not half a page
// or a multiple of it, at which distance lines share few places in a cache.
int64_t staged_stride(const ConvBlock& block) {
  const int64_t stride = round_up(block.problem.s, kStagedChannels);
  return stride * element_bytes(block.engine.kernels->element) % 2048 == 0 ? stride + kStagedChannels : stride;
}

bool reads_directly(const ConvBlock& block) {
  if (block.channel_sum) return block.channel_sum->reads_directly();
  return block.problem.dtype == block.engine.kernels->element && (block.input.stride(1) == 1 || block.problem.s == 1) &&
         block.problem.s % block.engine.kernels->group == 0;
}

// Whether rows lie one behind the other in the image, and all of their pixels are used.
bool rows_touch(const ConvBlock& block) {
  const Problem& p = block.problem;
  return p.w > 0 && block.rows.step == 1 && block.columns.step == 1 && block.tile.columns == p.ow &&
         block.input.stride(2) == p.w * block.input.stride(3) && block.columns.span(p.ow) >= p.w + p.padding[1];
}

// How many rows are staged together: enough to fill whole vectors, and for a team all that a step needs.
int64_t staged_rows(const ConvBlock& block) {
  if (block.tile.team > 1) return block.rows.span(block.tile.rows);
  return rows_touch(block) ? std::max<int64_t>(1, kStagedPixels / block.problem.w) : 1;
}

}  // namespace

at::Tensor empty_output(const at::Tensor& input, const Problem& p) {
  return at::empty({p.n, p.t, p.oh, p.ow}, input.options().memory_format(input.suggest_memory_format()));
}

std::optional<SumRows> out_row_of(const at::Tensor& out_factor, const Problem& p, Winograd winograd,
                                  const Engine& engine) {
  if (!spreads_plane(p, winograd, engine.kernels->group == 2)) return std::nullopt;
  return std::optional<SumRows>(std::in_place, out_factor, p.dtype, engine);
}

int64_t HiddenRows::ring_bytes(const ConvBlock& block) {
  return block.rows.span(block.tile.rows) * block.columns.span(block.tile.columns) * block.hidden_columns() *
         element_bytes(block.hidden_type);
}

int64_t HiddenRows::staging_bytes(const ConvBlock& block) {
  if (reads_directly(block)) return 0;
  return staged_rows(block) * block.columns.span(block.tile.columns) * staged_stride(block) *
         element_bytes(block.engine.kernels->element);
}

TaskColumns::TaskColumns(const Axis& columns, const ConvTask& task) : span(columns.span(task.columns())) {
  const int64_t first = task.first_column * columns.stride;
  inside_begin = std::clamp<int64_t>(columns.first_inside() - first, 0, span);
  inside_end = std::clamp<int64_t>(columns.end_inside() - first, inside_begin, span);
}

namespace {

// Where the columns that a task reads inside the image begin in the image's first row.
const char* task_input(const ConvBlock& block, const ConvTask& task, const TaskColumns& columns) {
  const at::Tensor& input = block.input;
  const int64_t column = block.columns.coordinate(task.first_column * block.columns.stride + columns.inside_begin);
  return static_cast<const char*>(input.const_data_ptr()) +
         (task.image * input.stride(0) + column * input.stride(3)) * element_bytes(block.problem.dtype);
}

}  // namespace

HiddenRows::HiddenRows(const ConvBlock& block, Team& team, const ConvTask& task, void* ring, void* staging,
                       int64_t asked)
    : block_(block),
      team_(team),
      task_(task),
      columns_(block.columns, task),
      image_(task_input(block, task, columns_)),
      ring_(static_cast<char*>(ring)),
      staging_(static_cast<char*>(staging)),
      asked_(asked),
      asking_(asked) {
  ring_rows_ = block.rows.span(block.tile.rows);
  pixel_bytes_ = block.hidden_columns() * element_bytes(block.hidden_type);
  row_bytes_ = columns_.span * pixel_bytes_;
  input_row_bytes_ = block.input.stride(2) * element_bytes(block.problem.dtype);
  input_pixel_stride_ = block.input.stride(3) * block.columns.step;
  input_channel_stride_ = block.problem.s == 1 ? 1 : block.input.stride(1);
  direct_ = reads_directly(block);
  joined_ = rows_touch(block);
  group_ = direct_ ? ring_rows_ : staged_rows(block);
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
    int64_t rows = std::min({group_, end - z, block_.rows.end_inside() - z});
    if (ring_rows_touch()) rows = std::min(rows, ring_rows_ - z % ring_rows_);  // one run of pixels
    if (direct_) {
      compute(z, rows, image_ + row * input_row_bytes_, block_.rows.step * input_row_bytes_);
    } else {
      stage(z, rows);
      compute(z, rows, staging_, pixels * staged_stride(block_) * element_bytes(block_.engine.kernels->element));
    }
    z += rows;
  }
}

MemoryRows HiddenRows::output_rows(int64_t row, int64_t rows) const {
  const at::Tensor& o = block_.output;
  // Several channels that are not next to each other are stored from a staging buffer: nothing is asked for.
  if (o.stride(1) != 1 && block_.problem.t != 1) return {};
  const int64_t element = element_bytes(block_.problem.dtype);
  const int64_t first = task_.image * o.stride(0) + row * o.stride(2) + task_.first_column * o.stride(3);
  return {static_cast<const char*>(o.const_data_ptr()) + first * element, rows,
          task_.columns() * block_.problem.t * element, o.stride(2) * element};
}

void HiddenRows::map_output(int64_t row, int64_t rows) const {
  map_for_writing(output_rows(row, std::min(rows + 1, task_.last_row - row)));
}

int64_t HiddenRows::look_ahead(int64_t row, int64_t rows, const ConvTask* next) {
  const Problem& p = block_.problem;
  const Axis& axis = block_.rows;
  const int64_t element = element_bytes(p.dtype);
  const MemoryRows output = output_rows(row, rows);
  MemoryRows input;
  const auto ask = [&](const ConvTask& task, int64_t begin, int64_t end) {
    begin = std::max(begin, axis.first_inside());
    end = std::min(end, axis.end_inside());
    if (!direct_ || block_.columns.step != 1 || begin >= end) return begin;
    const TaskColumns columns(block_.columns, task);
    input.first = task_input(block_, task, columns) + axis.coordinate(begin) * input_row_bytes_;
    input.count = end - begin;
    input.bytes = (columns.inside_end - columns.inside_begin) * p.s * element;
    input.stride = axis.step * input_row_bytes_;
    return end;
  };
  asked_ = asking_;
  int64_t asked_of_next = 0;
  if (const int64_t more = task_.last_row - row - rows; more > 0) {
    const int64_t begin = row * axis.stride + axis.span(rows);
    asking_ = ask(task_, begin, begin + std::min(more, rows) * axis.stride);
  } else if (next) {
    const int64_t begin = next->first_row * axis.stride;
    asked_of_next = ask(*next, begin, begin + axis.span(std::min(block_.tile.rows, next->last_row - next->first_row)));
  }
  // Of the products only, and a little less: what is asked for late is waited for.
  double products = fused_products(p, block_.tile) / double(p.n * p.oh * p.ow);
  if (block_.channel_sum) products -= double(p.h * p.w * p.s) / double(p.oh * p.ow);  // not by calls that ask
  if (block_.core_row) products -= double(p.kh * p.kw * p.r1);
  if (block_.out_row) products -= double(p.t);
  ahead_.begin(output, input, 0.97 * products * double(rows * task_.columns()));
  return asked_of_next;
}

void Ahead::begin(const MemoryRows& output, const MemoryRows& input, double multiply_adds) {
  regions_ = {output, input};
  for (MemoryRows& region : regions_)
    if (region.count > 1 && region.stride == region.bytes) region = {region.first, 1, region.count * region.bytes, 0};
  region_ = row_ = byte_ = 0;
  due_ = 0;
  rate_ = double(output.count * output.bytes + input.count * input.bytes) / multiply_adds;
}

void Ahead::attach(GemmCall& call) {
  call.ahead_lines = 0;
  if (region_ == 2) return;
  due_ += rate_ * double(call.num_taps * call.depth) * double(call.rows * call.width);
  // A call takes one run of lines. Short rows before it are prefetched at once: a step of few calls, as of CP or of
  // narrow images, has more rows than calls.
  const char* next;
  int64_t left;
  while (true) {
    while (region_ < 2 && row_ >= regions_[size_t(region_)].count) {
      ++region_;
      row_ = byte_ = 0;
    }
    if (region_ == 2) return;
    const MemoryRows& rows = regions_[size_t(region_)];
    next = rows.first + row_ * rows.stride + byte_;
    left = rows.bytes - byte_;
    if (left > kBytesAtOnce || double(left) > due_) break;
    for (int64_t byte = 0; byte < left; byte += 64) __builtin_prefetch(next + byte, 0, 2);
    due_ -= double(left);
    ++row_;
    byte_ = 0;
  }
  call.ahead = next;
  call.ahead_lines = std::min(int64_t(due_), left) / 64;
  due_ -= double(call.ahead_lines * 64);
  byte_ += call.ahead_lines * 64;
  if (left < 64 * (call.ahead_lines + 1)) {
    ++row_;
    byte_ = 0;
  }
}

void Ahead::attach_weight(GemmCall& call, const void* next, int64_t bytes, int64_t part, int64_t parts) const {
  if (!weights_are_far || call.ahead_lines > 0) return;
  const int64_t lines = std::min(bytes, kMostAskedBytes) / 64, first = lines * part / parts;
  call.ahead = static_cast<const char*>(next) + 64 * first;
  call.ahead_lines = lines * (part + 1) / parts - first;
}

void Ahead::attach_next_panel(GemmCall& call, const PackedWeight& weight, const PackedWeight* then, int64_t panel,
                              int64_t part, int64_t parts) const {
  if (!weights_are_far) return;
  const bool last = panel + 1 == weight.panels().count;
  if (last && then == nullptr) return;
  const PackedWeight& next = last ? *then : weight;
  const int64_t index = last ? 0 : panel + 1;
  attach_weight(call, next.panel(index), next.panel_bytes(index), part, parts);
}

void HiddenRows::stage(int64_t z, int64_t rows) {
  const ComputeKernels& kernels = *block_.engine.kernels;
  const int64_t element = element_bytes(kernels.element), pixels = columns_.inside_end - columns_.inside_begin;
  const int64_t channels = block_.problem.s, blocks = ceil_div(channels, kStagedChannels);
  team_.run([&](const Share& share) {
    LoadCall load;
    load.pixel_stride = input_pixel_stride_;
    load.channel_stride = input_channel_stride_;
    load.pixels = joined_ ? rows * pixels : pixels;
    load.tile_stride = staged_stride(block_);
    share.pieces(1, joined_ ? 1 : rows, blocks, 1, [&](int64_t, int64_t i, int64_t first, int64_t count) {
      const int64_t channel = first * kStagedChannels;
      load.in = image_ + block_.rows.coordinate(z + i) * input_row_bytes_ +
                channel * input_channel_stride_ * element_bytes(block_.problem.dtype);
      load.channels = std::min(count * kStagedChannels, channels - channel);
      load.tile = staging_ + (i * pixels * load.tile_stride + channel) * element;
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
    call.row_stride = direct_ ? input_pixel_stride_ : staged_stride(block_);
    call.out_stride = block_.hidden_columns();
    call.out_type = block_.hidden_type;
    call.bias = nullptr;
    call.activation = Activation::kNone;
    const int64_t pixel_bytes = call.row_stride * element_bytes(block_.engine.kernels->element);
    // Rows that are one run of pixels, here and in the ring, fill register blocks better than one by one.
    const int64_t columns = columns_.inside_end - columns_.inside_begin;
    const bool one_run = ring_rows_touch() && source_bytes == columns * pixel_bytes;
    share.pieces(panels.count, one_run ? 1 : rows, one_run ? rows * columns : columns, kFewestPixels,
                 [&](int64_t panel, int64_t i, int64_t first, int64_t pixels) {
                   pixel = source + i * source_bytes + first * pixel_bytes;
                   const int64_t last = one_run ? z + rows - 1 : z + i;
                   call.far_input = block_.tile.far && direct_ && last >= asked_ && (panel == 0 || share.count > 1);
                   call.weight = block_.in_weight.panel(panel);
                   call.width = panels.width(panel);
                   call.rows = pixels;
                   call.out = ring_ + ((z + i) % ring_rows_) * row_bytes_ +
                              (columns_.inside_begin + first) * pixel_bytes_ + panels.first(panel) * hidden_element;
                   ahead_.attach(call);
                   ahead_.attach_next_panel(call, block_.in_weight, next_weight, panel, i, one_run ? 1 : rows);
                   block_.engine.gemm(call);
                 });
  });
}

void HiddenRows::add_channels(int64_t z, int64_t rows, const char* source, int64_t source_bytes) {
  const int64_t pixel_stride = direct_ ? input_pixel_stride_ : staged_stride(block_);
  const int64_t pixel_bytes =
      pixel_stride * element_bytes(direct_ ? block_.problem.dtype : block_.engine.kernels->element);
  const int64_t sum_bytes = element_bytes(block_.engine.kernels->accumulator);
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
                     for (int64_t i = 0, here; i < count; i += here) {
                       const int64_t column = (begin + i) % columns;
                       here = std::min(count - i, columns - column);
                       char* out = ring_ + ((z + line + (begin + i) / columns) % ring_rows_) * row_bytes_ +
                                   (columns_.inside_begin + column) * pixel_bytes_;
                       write_channel(*block_.engine.kernels, sums.memory + i * sum_bytes, here, out,
                                     block_.hidden_columns(), block_.hidden_type);
                     }
                   }
                 });
  });
}

int64_t output_staging_bytes(const ConvBlock& block) {
  if (block.out_row || block.output.stride(1) == 1 || block.problem.t == 1) return 0;
  return block.tile.rows * block.tile.columns * block.engine.kernels->panel_width *
         element_bytes(block.engine.kernels->accumulator);
}

namespace {

// The last stage for `pixels` pixels of a plane (accumulators) -> the planes of the output, from `out` on.
void spread(const ConvBlock& block, const void* plane, int64_t pixels, char* out) {
  SpreadCall call;
  call.plane = plane;
  call.factor = block.out_row->data();
  call.bias = block.bias.data();
  call.pixels = pixels;
  call.channels = block.problem.t;
  call.channel_stride = block.output.stride(1);
  call.out = out;
  call.activation = block.problem.activation;
  block.engine.kernels->spread[int(block.problem.dtype)](call);
}

}  // namespace

void write_output(const ConvBlock& block, Team& team, Ahead& ahead, const ConvTask& task, int64_t row, int64_t rows,
                  const void* tile, void* staging) {
  const int64_t columns = task.columns();
  const Problem& p = block.problem;
  const ComputeKernels& kernels = *block.engine.kernels;
  const Panels& panels = block.out_weight.panels();
  const at::Tensor& output = block.output;
  const int64_t element = element_bytes(p.dtype);
  const int64_t tile_pixel_bytes = block.tile_columns() * element_bytes(kernels.element);
  const bool channels_last = output.stride(1) == 1 || p.t == 1;
  const int64_t out_pixel_stride = output.stride(3);
  // Rows that lie one behind the other in the output are one long row of pixels.
  const bool joined = columns == p.ow && output.stride(2) == p.ow * out_pixel_stride;
  char* out = static_cast<char*>(output.data_ptr()) +
              (task.image * output.stride(0) + row * output.stride(2) + task.first_column * out_pixel_stride) * element;
  team.run([&](const Share& share) {
    const void* source;
    GemmCall call;
    call.taps = &source;
    call.num_taps = 1;
    call.depth = block.out_weight.padded_depth();
    call.row_stride = block.tile_columns();
    call.activation = p.activation;
    const auto write = [&](int64_t panel, int64_t i, int64_t first, int64_t pixels) {
      source = static_cast<const char*>(tile) + (i * columns + first) * tile_pixel_bytes;
      char* pixel = out + (i * output.stride(2) + first * out_pixel_stride) * element;
      if (block.out_row) return spread(block, source, pixels, pixel);
      const int64_t channel = panels.first(panel);
      call.weight = block.out_weight.panel(panel);
      call.width = panels.width(panel);
      call.rows = pixels;
      call.bias = block.bias.data(channel);
      char* target = pixel + channel * output.stride(1) * element;
      if (channels_last) {
        call.far_output = block.tile.far && !block.tile.ahead;
        ahead.attach(call);
        ahead.attach_next_panel(call, block.out_weight, nullptr, panel, i, joined ? 1 : rows);
        call.out = target;
        call.out_stride = out_pixel_stride;
        call.out_type = p.dtype;
        block.engine.gemm(call);
        return;
      }
      if (block.tile.far)  // asked for while the product is computed
        for (int64_t i = 0; i < call.width; ++i)
          for (int64_t byte = 0; byte < pixels * element; byte += 64)
            __builtin_prefetch(target + i * output.stride(1) * element + byte, 1, 2);
      call.out = static_cast<char*>(staging) + share.index * output_staging_bytes(block);
      call.out_stride = kernels.panel_width;
      call.out_type = kernels.accumulator;
      block.engine.gemm(call);
      StoreCall store;
      store.tile = call.out;
      store.tile_stride = kernels.panel_width;
      store.pixels = call.rows;
      store.channels = call.width;
      store.out = target;
      store.channel_stride = output.stride(1);
      kernels.store[int(p.dtype)](store);
    };
    share.pieces(block.out_row ? 1 : panels.count, joined ? 1 : rows, joined ? rows * columns : columns, kFewestPixels,
                 write);
  });
}

}  // namespace lowrank_ops
