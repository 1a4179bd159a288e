// Low-rank linear layers on the CPU: blocks of input rows go through both factors while their hidden rows are in L2.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <cstring>
#include <optional>

#include "cpu/brgemm.h"
#include "cpu/channel_sum.h"
#include "cpu/cpu.h"
#include "cpu/dots.h"
#include "cpu/pages.h"
#include "cpu/weights.h"

namespace lowrank_ops {

namespace {

constexpr int64_t kNearBytes = 16 << 10;  // half of an L1
constexpr int64_t kRowsAtOnce = 12;       // whole register blocks
constexpr int64_t kStagedRows = 112;      // that are staged together at most

// Few rows: both products as dot products with the factors where they lie, in parallel over their columns.
void linear_unpacked(const at::Tensor& rows, const at::Tensor& in_factor, const at::Tensor& out_factor,
                     const SumRows& bias, const Problem& p, at::Tensor& output) {
  const Engine engine = engine_for(p.dtype);
  const ComputeKernels& kernels = *engine.kernels;
  const Dots dots(p.n, p.dtype, engine);
  const int64_t element = element_bytes(kernels.element), sum = element_bytes(kernels.accumulator);
  const int64_t rank_stride = round_up(p.r1, 16), out_stride = round_up(p.t, 16);
  const bool direct = p.n == 1 && p.dtype == kernels.element && (rows.stride(1) == 1 || p.s == 1);
  const int64_t block_bytes = direct ? 0 : dots.block_bytes(p.s);
  const int64_t hidden_block_bytes = dots.needs_blocks(p.r1) ? dots.block_bytes(p.r1) : 0;
  Scratch scratch(Scratch::padded(block_bytes) + Scratch::padded(p.n * rank_stride * sum) +
                  Scratch::padded(p.n * rank_stride * element) + Scratch::padded(hidden_block_bytes) +
                  Scratch::padded(p.n * out_stride * sum));
  void* blocks = scratch.take(block_bytes);
  void* rank_sums = scratch.take(p.n * rank_stride * sum);
  void* hidden = scratch.take(p.n * rank_stride * element);
  void* hidden_blocks = scratch.take(hidden_block_bytes);
  void* out_sums = scratch.take(p.n * out_stride * sum);

  const void* source = rows.const_data_ptr();
  if (!direct) {
    dots.fill_blocks(source, rows.stride(0), rows.stride(1), p.dtype, 0, p.n, p.s, blocks);
    source = blocks;
  }
  dots.multiply(source, dots.block_stride(), in_factor, rank_sums, rank_stride);
  dots.finish(rank_sums, rank_stride, p.r1, hidden, rank_stride, kernels.element);
  if (hidden_block_bytes > 0) {
    dots.fill_blocks(hidden, rank_stride, 1, kernels.element, 0, p.n, p.r1, hidden_blocks);
    dots.multiply(hidden_blocks, dots.block_stride(), out_factor, out_sums, out_stride);
  } else {
    dots.multiply(hidden, rank_stride, out_factor, out_sums, out_stride);
  }
  dots.finish(out_sums, out_stride, p.t, output.data_ptr(), p.t, p.dtype, bias.data(), p.activation);
}

// Some columns of a panel, whole vectors.
struct Slice {
  int64_t panel, first, padded_width, width;
};

// The panels of a factor [columns, depth], some of the depth at a time: packed here into `buffer`, or before. Where
// there are fewer than threads, each is cut into slices; not where they are packed and rows are many, to be shared out.
class StreamedWeight {
 public:
  StreamedWeight(const at::Tensor& factor, int64_t rows, DType dtype, const Engine& engine, const char* prepared)
      : kernels_(*engine.kernels),
        dtype_(dtype),
        factor_(prepared ? factor : factor.contiguous()),
        depth_(factor.size(1)),
        panels_(factor.size(0), kernels_),
        prepared_(prepared) {
    const int64_t threads = at::get_num_threads();
    if (!prepared || rows < kManyRows * threads) cuts_ = std::min(ceil_div(threads, panels_.count), panels_.base);
  }

  const Panels& panels() const { return panels_; }
  int64_t slices() const { return panels_.count * cuts_; }
  Slice slice(int64_t index) const {
    const int64_t panel = index / cuts_, cut = index % cuts_, vectors = panels_.padded_width(panel) / panels_.lanes;
    const int64_t begin = vectors * cut / cuts_ * panels_.lanes, end = vectors * (cut + 1) / cuts_ * panels_.lanes;
    const int64_t first = panels_.first(panel) + begin;
    return {panel, first, end - begin, std::min(end - begin, panels_.columns - first)};
  }
  // Lets the call multiply by `count` of the slice's depth from `k`, which is a multiple of 16.
  void multiply_by(GemmCall& gemm, const Slice& slice, int64_t k, int64_t count, void* buffer) const {
    if (prepared_) {
      const int64_t columns = panels_.padded_width(slice.panel), first = panels_.first(slice.panel);
      const int64_t element = element_bytes(kernels_.element);
      gemm.weight_columns = columns;
      gemm.weight =
          prepared_ +
          (first * round_up(depth_, kernels_.group) + k * columns + (slice.first - first) * kernels_.group) * element;
      return;
    }
    PackCall call;
    call.weight =
        static_cast<const char*>(factor_.const_data_ptr()) + (slice.first * depth_ + k) * element_bytes(dtype_);
    call.row_stride = depth_;
    call.num_taps = 1;
    call.depth = count;
    call.padded_depth = round_up(count, kernels_.group);
    call.width = slice.width;
    call.padded_width = call.panel_stride = slice.padded_width;
    call.panel = buffer;
    kernels_.pack[int(dtype_)](call);
    gemm.weight = buffer;
  }

 private:
  static constexpr int64_t kManyRows = 16;  // of a thread
  const ComputeKernels& kernels_;
  DType dtype_;
  at::Tensor factor_;
  int64_t depth_;
  Panels panels_;
  int64_t cuts_ = 1;
  const char* prepared_;
};

// Some hundred rows: all of them meet a block of packed weights while it is in L2, so that the packed weight is never
// written to memory. In parallel over slices of panels, and over rows where there are fewer of them than threads.
void linear_streamed(const at::Tensor& rows, const StreamedWeight& in_weight, const StreamedWeight& out_weight,
                     const SumRows& bias, const Problem& p, const CpuTile& tile, const Engine& engine,
                     at::Tensor& output) {
  const ComputeKernels& kernels = *engine.kernels;
  const int64_t element = element_bytes(kernels.element), sum = element_bytes(kernels.accumulator);
  const Panels& in_panels = in_weight.panels();
  const int64_t hidden_stride = streamed_stride(in_panels.padded_columns());
  const int64_t staged_stride = streamed_stride(tile.depth);
  const int64_t in_width = in_panels.padded_columns(), out_width = kernels.panel_width;
  const int64_t staged_bytes = Scratch::padded(p.n * staged_stride * element);
  const int64_t buffer_bytes = Scratch::padded(tile.depth * kernels.panel_width * element);
  const int64_t sums_bytes =
      Scratch::padded(p.n * std::max(p.s > tile.depth ? in_width : 0, p.r1 > tile.depth ? out_width : 0) * sum);
  const int64_t thread_bytes = staged_bytes + buffer_bytes + sums_bytes;
  const int64_t hidden_bytes = Scratch::padded(p.n * hidden_stride * element);
  const int64_t threads = at::get_num_threads();
  Scratch scratch(hidden_bytes + threads * thread_bytes);
  char* hidden = static_cast<char*>(scratch.take(hidden_bytes));
  char* own = static_cast<char*>(scratch.take(threads * thread_bytes));
  if (p.r1 % kernels.group != 0) std::memset(hidden, 0, size_t(hidden_bytes));  // the odd rank's partner
  // Rows whole pages apart would meet in the same few lines of L1: they are copied, as are those of other types.
  const bool direct = p.dtype == kernels.element && (rows.stride(1) == 1 || p.s == 1) && p.s % kernels.group == 0 &&
                      rows.stride(0) * element % kPageBytes != 0;

  // Runs `stage(first row, end row, first slice, end slice, memory)` for all of them.
  const auto for_all = [&](const StreamedWeight& weight, const auto& stage) {
    const int64_t slices = weight.slices();
    const int64_t parts = std::min(ceil_div(threads, slices), p.n), part_rows = ceil_div(p.n, parts);
    at::parallel_for(0, parts * slices, 1, [&](int64_t begin, int64_t end) {
      const BrgemmScope products;
      char* memory = own + at::get_thread_num() * thread_bytes;
      while (begin < end) {
        const int64_t part = begin / slices, slice = begin % slices;
        const int64_t last_slice = std::min(slices, slice + end - begin);
        const int64_t row = std::min(part * part_rows, p.n), last_row = std::min(row + part_rows, p.n);
        if (row < last_row) stage(row, last_row, slice, last_slice, memory);
        begin += last_slice - slice;
      }
    });
  };

  for_all(in_weight, [&](int64_t row, int64_t last_row, int64_t first_slice, int64_t last_slice, char* memory) {
    char* staged = memory;
    char* buffer = staged + staged_bytes;
    char* sums = buffer + buffer_bytes;
    const void* source;
    GemmCall call;
    call.taps = &source;
    call.num_taps = 1;
    call.rows = last_row - row;
    call.row_stride = direct ? rows.stride(0) : staged_stride;
    call.bias = nullptr;
    call.activation = Activation::kNone;
    call.initial_stride = in_width;
    for (int64_t k = 0; k < p.s; k += tile.depth) {
      const int64_t count = std::min(tile.depth, p.s - k);
      source = static_cast<const char*>(rows.const_data_ptr()) +
               (row * rows.stride(0) + k * rows.stride(1)) * element_bytes(p.dtype);
      if (!direct) {
        LoadCall load;
        load.in = source;
        load.pixel_stride = rows.stride(0);
        load.channel_stride = p.s == 1 ? 1 : rows.stride(1);
        load.pixels = call.rows;
        load.channels = count;
        load.tile = staged;
        load.tile_stride = staged_stride;
        kernels.load[int(p.dtype)](load);
        source = staged;
      }
      const bool last = k + count == p.s;
      call.depth = round_up(count, kernels.group);
      for (int64_t i = first_slice; i < last_slice; ++i) {
        const Slice slice = in_weight.slice(i);
        char* own_sums = sums + slice.first * sum;
        in_weight.multiply_by(call, slice, k, count, buffer);
        call.initial = k > 0 ? own_sums : nullptr;
        call.width = last ? slice.width : slice.padded_width;
        call.out = last ? hidden + (row * hidden_stride + slice.first) * element : own_sums;
        call.out_stride = last ? hidden_stride : in_width;
        call.out_type = last ? kernels.element : kernels.accumulator;
        engine.gemm(call);
      }
    }
  });
  for_all(out_weight, [&](int64_t row, int64_t last_row, int64_t first_slice, int64_t last_slice, char* memory) {
    char* buffer = memory + staged_bytes;
    char* sums = buffer + buffer_bytes;
    const void* source;
    GemmCall call;
    call.taps = &source;
    call.num_taps = 1;
    call.rows = last_row - row;
    call.row_stride = hidden_stride;
    call.initial_stride = out_width;
    for (int64_t i = first_slice; i < last_slice; ++i) {
      const Slice slice = out_weight.slice(i);
      const int64_t column = slice.first;
      for (int64_t k = 0; k < p.r1; k += tile.depth) {
        const int64_t count = std::min(tile.depth, p.r1 - k);
        const bool last = k + count == p.r1;
        source = hidden + (row * hidden_stride + k) * element;
        call.depth = round_up(count, kernels.group);
        out_weight.multiply_by(call, slice, k, count, buffer);
        call.initial = k > 0 ? sums : nullptr;
        call.width = last ? slice.width : slice.padded_width;
        call.out = last ? static_cast<char*>(output.data_ptr()) + (row * p.t + column) * element_bytes(p.dtype) : sums;
        call.out_stride = last ? p.t : out_width;
        call.out_type = last ? p.dtype : kernels.accumulator;
        call.bias = last ? bias.data(column) : nullptr;
        call.activation = last ? p.activation : Activation::kNone;
        call.far_output = last;  // the first slice of a page maps it: few prefetches are in vain (pages.h)
        engine.gemm(call);
      }
    }
  });
}

// Rows of any number, blocks of them in parallel: a block's hidden rows stay in cache between the two products.
class PackedLinear {
 public:
  PackedLinear(const at::Tensor& rows, const at::Tensor& in_factor, const at::Tensor& out_factor, const SumRows& bias,
               const Problem& p, const CpuTile& tile, const Engine& engine, const Prepared& prepared,
               at::Tensor& output)
      : rows_(rows),
        bias_(bias),
        p_(p),
        tile_(tile),
        engine_(engine),
        output_(output),
        in_weight_(pack_matrix(in_factor, p.dtype, engine, prepared.in_factor)),
        out_weight_(pack_matrix(out_factor, p.dtype, engine, prepared.out_factor)) {
    const bool contiguous = rows.stride(1) == 1 || p.s == 1;
    if (first_stage(p) == FirstStage::kDots)
      sum_.emplace(in_factor, rows.stride(1), /*planes=*/false, tile.far, p, engine);
    direct_ = sum_ ? sum_->reads_directly() : p.dtype == kernels_.element && contiguous && p.s % kernels_.group == 0;
    hidden_columns_ = sum_ ? kernels_.group : in_weight_.panels().padded_columns();
    staged_stride_ = round_up(p.s, 16);
    step_ = direct_ ? tile.rows : std::min(tile.rows, kStagedRows);
    // Rows of the output that are written at once. Where they lie whole pages apart, their parts meet in the same few
    // lines of L1: so few of them, while the second weight stays in L1, that they are written from end to end.
    const int64_t out_bytes = out_weight_.padded_depth() * out_weight_.panels().padded_columns() * element_;
    const bool rows_meet = p.t * element_bytes(p.dtype) % kPageBytes == 0;
    together_ = rows_meet && out_bytes <= kNearBytes ? kRowsAtOnce : step_;
  }

  void run() {
    const int64_t blocks = ceil_div(p_.n, tile_.rows);
    const int64_t hidden_bytes = step_ * hidden_columns_ * element_;
    const int64_t staging_bytes = direct_ ? 0 : step_ * staged_stride_ * element_;
    const std::array<PackedWeight*, 2> weights{sum_ ? nullptr : &in_weight_, &out_weight_};
    const bool each_packs = pack_for_tasks(weights, blocks);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      if (each_packs) pack_own(weights);
      Scratch scratch(Scratch::padded(hidden_bytes) + Scratch::padded(staging_bytes));
      const BrgemmScope products;
      char* hidden = static_cast<char*>(scratch.take(hidden_bytes));
      void* staging = scratch.take(staging_bytes);
      if (p_.r1 != hidden_columns_) std::memset(hidden, 0, size_t(hidden_bytes));
      const int64_t last = std::min(end * tile_.rows, p_.n);
      for (int64_t first = begin * tile_.rows; first < last; first += step_) {
        const int64_t count = std::min(step_, last - first);
        first_stage_of(first, count, staging, hidden);
        for (int64_t row = 0; row < count; row += together_)
          second_stage_of(first + row, std::min(together_, count - row), hidden + row * hidden_columns_ * element_);
      }
    });
  }

 private:
  // `count` rows of the input from `first` times in_factor -> hidden.
  void first_stage_of(int64_t first, int64_t count, void* staging, char* hidden) const {
    const void* source =
        static_cast<const char*>(rows_.const_data_ptr()) + first * rows_.stride(0) * element_bytes(p_.dtype);
    int64_t row_stride = rows_.stride(0);
    if (!direct_) {
      LoadCall load;
      load.in = source;
      load.pixel_stride = rows_.stride(0);
      load.channel_stride = rows_.stride(1);
      load.pixels = count;
      load.channels = p_.s;
      load.tile = staging;
      load.tile_stride = row_stride = staged_stride_;
      kernels_.load[int(p_.dtype)](load);
      source = staging;
    }
    if (sum_)
      return sum_->write(static_cast<const char*>(source), row_stride, count, hidden, hidden_columns_,
                         kernels_.element);
    GemmCall call;
    call.rows = count;
    call.row_stride = row_stride;
    call.out_stride = hidden_columns_;
    call.out_type = kernels_.element;
    call.activation = Activation::kNone;
    multiply(call, source, in_weight_, nullptr, hidden);
  }

  // `count` hidden rows times out_factor, bias and activation -> rows of the output from `first`.
  void second_stage_of(int64_t first, int64_t count, const void* hidden) const {
    GemmCall call;
    call.rows = count;
    call.row_stride = hidden_columns_;
    call.out_stride = p_.t;
    call.out_type = p_.dtype;
    call.activation = p_.activation;
    multiply(call, hidden, out_weight_, &bias_,
             static_cast<char*>(output_.data_ptr()) + first * p_.t * element_bytes(p_.dtype));
  }

  // Rows from `source` times all panels of a weight, `bias` (nullptr: none) added -> `out`, as `call` says.
  void multiply(GemmCall& call, const void* source, const PackedWeight& weight, const SumRows* bias, char* out) const {
    call.taps = &source;
    call.num_taps = 1;
    call.depth = weight.padded_depth();
    const Panels& panels = weight.panels();
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t column = panels.first(panel);
      call.weight = weight.panel(panel);
      call.width = panels.width(panel);
      call.bias = bias ? bias->data(column) : nullptr;
      call.out = out + column * element_bytes(call.out_type);
      engine_.gemm(call);
    }
  }

  const at::Tensor& rows_;
  const SumRows& bias_;
  const Problem& p_;
  const CpuTile& tile_;
  const Engine& engine_;
  at::Tensor& output_;
  const ComputeKernels& kernels_ = *engine_.kernels;
  const int64_t element_ = element_bytes(kernels_.element);
  PackedWeight in_weight_, out_weight_;
  std::optional<ChannelSum> sum_;  // the first stage for a rank of one; otherwise a product with in_weight_
  bool direct_;                    // the kernel reads the rows where they lie; otherwise they are staged
  int64_t hidden_columns_, staged_stride_;
  int64_t step_, together_;  // rows of the first stage, of the second
};

}  // namespace

at::Tensor linear_cpu(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                      const OptionalTensor& bias, const Problem& p, const CpuTile& tile, const Prepared& prepared) {
  c10::SmallVector<int64_t, 8> sizes(input.sizes());
  sizes.back() = p.t;
  at::Tensor output = at::empty(sizes, input.options());
  if (output.numel() == 0) return output;
  const Engine engine = engine_for(p.dtype);
  const at::Tensor rows = input.reshape({p.n, p.s});  // a view unless the leading axes do not collapse
  const SumRows bias_sums(bias, p.dtype, engine);
  if (tile.unpacked) {
    linear_unpacked(rows, in_factor.contiguous(), out_factor.contiguous(), bias_sums, p, output);
  } else if (tile.depth > 0) {
    const StreamedWeight in_weight(in_factor, p.n, p.dtype, engine, prepared.in_factor);
    const StreamedWeight out_weight(out_factor, p.n, p.dtype, engine, prepared.out_factor);
    linear_streamed(rows, in_weight, out_weight, bias_sums, p, tile, engine, output);
  } else {
    PackedLinear(rows, in_factor, out_factor, bias_sums, p, tile, engine, prepared, output).run();
  }
  return output;
}

}  // namespace lowrank_ops
