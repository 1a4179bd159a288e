// Low-rank linear layers on the CPU: blocks of input rows go through both factors while their hidden rows are in L2.
// Few rows take dot products instead, and some hundred rows stream through the weights (linear_streamed.h).
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
#include "cpu/linear_streamed.h"
#include "cpu/pages.h"
#include "cpu/weights.h"

namespace lowrank_ops {

namespace {

constexpr int64_t kNearBytes = 16 << 10;  // of a weight that stays in L1: half of it
constexpr int64_t kRowsAtOnce = 12;       // whole register blocks
constexpr int64_t kCopiedRows = 112;      // that are copied together at most

// Few rows: both products are dot products with the unpacked factors, in parallel over their columns.
void linear_unpacked(const at::Tensor& rows, const at::Tensor& in_factor, const at::Tensor& out_factor,
                     const SumRows& bias, const Problem& p, at::Tensor& output) {
  const KernelSet kernel_set = kernel_set_for(p.dtype);
  const ComputeKernels& kernels = *kernel_set.kernels;
  const Dots dots(p.n, p.dtype, kernel_set);
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

// Any number of rows, in parallel blocks: a block's hidden rows stay in cache between the two products.
class PackedLinear {
 public:
  PackedLinear(const at::Tensor& rows, const at::Tensor& in_factor, const at::Tensor& out_factor, const SumRows& bias,
               const Problem& p, const CpuTile& tile, const KernelSet& kernel_set, const Prepared& prepared,
               at::Tensor& output)
      : rows_(rows),
        bias_(bias),
        p_(p),
        tile_(tile),
        kernel_set_(kernel_set),
        output_(output),
        in_weight_(pack_matrix(in_factor, p.dtype, kernel_set, prepared.in_factor)),
        out_weight_(pack_matrix(out_factor, p.dtype, kernel_set, prepared.out_factor)) {
    const bool contiguous = rows.stride(1) == 1 || p.s == 1;
    if (first_stage(p) == FirstStage::kDots)
      sum_.emplace(in_factor, rows.stride(1), /*planes=*/false, tile.far, p, kernel_set);
    direct_ = sum_ ? sum_->reads_directly() : p.dtype == kernels_.element && contiguous && p.s % kernels_.group == 0;
    hidden_columns_ = sum_ ? kernels_.group : in_weight_.panels().padded_columns();
    copy_stride_ = round_up(p.s, 16);
    step_ = direct_ ? tile.rows : std::min(tile.rows, kCopiedRows);
    // Rows of the output whole pages apart meet in the same few lines of L1. Where the second weight stays in L1, so
    // few rows are computed together that each is written from end to end before its lines are evicted.
    const int64_t out_bytes = out_weight_.padded_depth() * out_weight_.panels().padded_columns() * element_;
    const bool rows_meet = p.t * element_bytes(p.dtype) % kPageBytes == 0;
    together_ = rows_meet && out_bytes <= kNearBytes ? kRowsAtOnce : step_;
  }

  void run() {
    const int64_t blocks = ceil_div(p_.n, tile_.rows);
    const int64_t hidden_bytes = step_ * hidden_columns_ * element_;
    const int64_t copy_bytes = direct_ ? 0 : step_ * copy_stride_ * element_;
    const std::array<PackedWeight*, 2> weights{sum_ ? nullptr : &in_weight_, &out_weight_};
    const bool each_packs = pack_for_tasks(weights, blocks);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      if (each_packs) pack_own(weights);
      Scratch scratch(Scratch::padded(hidden_bytes) + Scratch::padded(copy_bytes));
      const BrgemmScope products;
      char* hidden = static_cast<char*>(scratch.take(hidden_bytes));
      void* copy = scratch.take(copy_bytes);
      if (p_.r1 != hidden_columns_) std::memset(hidden, 0, size_t(hidden_bytes));
      const int64_t last = std::min(end * tile_.rows, p_.n);
      for (int64_t first = begin * tile_.rows; first < last; first += step_) {
        const int64_t count = std::min(step_, last - first);
        run_first_stage(first, count, copy, hidden);
        for (int64_t row = 0; row < count; row += together_)
          run_second_stage(first + row, std::min(together_, count - row), hidden + row * hidden_columns_ * element_);
      }
    });
  }

 private:
  // `count` rows of the input from `first` times in_factor -> hidden.
  void run_first_stage(int64_t first, int64_t count, void* copy, char* hidden) const {
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
      load.tile = copy;
      load.tile_stride = row_stride = copy_stride_;
      kernels_.load[int(p_.dtype)](load);
      source = copy;
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
  void run_second_stage(int64_t first, int64_t count, const void* hidden) const {
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
      kernel_set_.gemm(call);
    }
  }

  const at::Tensor& rows_;
  const SumRows& bias_;
  const Problem& p_;
  const CpuTile& tile_;
  const KernelSet& kernel_set_;
  at::Tensor& output_;
  const ComputeKernels& kernels_ = *kernel_set_.kernels;
  const int64_t element_ = element_bytes(kernels_.element);
  PackedWeight in_weight_, out_weight_;
  std::optional<ChannelSum> sum_;  // the first stage for a rank of one; otherwise a product with in_weight_
  bool direct_;                    // the kernel reads the rows where they lie; otherwise they are copied
  int64_t hidden_columns_, copy_stride_;
  int64_t step_, together_;  // rows that go through the first stage together, and through the second
};

}  // namespace

at::Tensor linear_cpu(const OpCall& call, const Problem& p, const CpuTile& tile, const Prepared& prepared) {
  const at::Tensor &input = call.input, &in_factor = call.in_factor, &out_factor = call.out_factor;
  c10::SmallVector<int64_t, 8> sizes(input.sizes());
  sizes.back() = p.t;
  at::Tensor output = at::empty(sizes, input.options());
  if (output.numel() == 0) return output;
  const KernelSet kernel_set = kernel_set_for(p.dtype);
  const at::Tensor rows = input.reshape({p.n, p.s});  // a view unless the leading axes do not collapse
  const SumRows bias_sums(call.bias, p.dtype, kernel_set);
  if (tile.unpacked) {
    linear_unpacked(rows, in_factor.contiguous(), out_factor.contiguous(), bias_sums, p, output);
  } else if (tile.depth > 0) {
    linear_streamed(rows, in_factor, out_factor, bias_sums, p, tile, kernel_set, prepared, output);
  } else {
    PackedLinear(rows, in_factor, out_factor, bias_sums, p, tile, kernel_set, prepared, output).run();
  }
  return output;
}

}  // namespace lowrank_ops
