// Each product takes the depth in blocks of CpuTile::depth. Threads divide the slices of the weight's panels, and the
// rows where there are fewer slices than threads.
//
//   for each block of the depth:
//     rows [N, depth] (copied, unless the kernel can read them where they lie)
//     for each slice of the factor's panels:
//       slice [depth, columns] --packed into a buffer--> sums [N, columns] += rows * slice
#include "cpu/linear_streamed.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "cpu/brgemm.h"
#include "cpu/pages.h"

namespace lowrank_ops {
namespace {

// Some columns of a panel, whole vectors.
struct Slice {
  int64_t panel, first, padded_width, width;
};

// The panels of a factor [columns, depth], packed into a buffer block by block of the depth, or before the call. Where
// there are fewer panels than threads, each is divided into slices; but not where they were packed before and rows are
// many: threads divide the rows then.
class StreamedWeight {
 public:
  StreamedWeight(const at::Tensor& factor, int64_t rows, DType dtype, const KernelSet& kernel_set, const char* prepared)
      : kernels_(*kernel_set.kernels),
        dtype_(dtype),
        factor_(prepared ? factor : factor.contiguous()),
        depth_(factor.size(1)),
        panels_(factor.size(0), kernels_),
        prepared_(prepared) {
    const int64_t threads = at::get_num_threads();
    if (!prepared || rows < kManyRows * threads)
      panel_slices_ = std::min(ceil_div(threads, panels_.count), panels_.base);
  }

  const Panels& panels() const { return panels_; }
  int64_t slices() const { return panels_.count * panel_slices_; }
  Slice slice(int64_t index) const {
    const int64_t panel = index / panel_slices_, part = index % panel_slices_;
    const int64_t vectors = panels_.padded_width(panel) / panels_.lanes;
    const int64_t begin = vectors * part / panel_slices_ * panels_.lanes;
    const int64_t end = vectors * (part + 1) / panel_slices_ * panels_.lanes;
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
  static constexpr int64_t kManyRows = 16;  // per thread
  const ComputeKernels& kernels_;
  DType dtype_;
  at::Tensor factor_;
  int64_t depth_;
  Panels panels_;
  int64_t panel_slices_ = 1;  // of a panel
  const char* prepared_;
};

class StreamedLinear {
 public:
  StreamedLinear(const at::Tensor& rows, const at::Tensor& in_factor, const at::Tensor& out_factor, const SumRows& bias,
                 const Problem& p, const CpuTile& tile, const KernelSet& kernel_set, const Prepared& prepared,
                 at::Tensor& output)
      : rows_(rows),
        bias_(bias),
        p_(p),
        tile_(tile),
        kernel_set_(kernel_set),
        output_(output),
        in_weight_(in_factor, p.n, p.dtype, kernel_set, prepared.in_factor),
        out_weight_(out_factor, p.n, p.dtype, kernel_set, prepared.out_factor),
        // Rows whole pages apart would meet in the same few lines of L1: they are copied, as are those of other types.
        direct_(p.dtype == kernels_.element && (rows.stride(1) == 1 || p.s == 1) && p.s % kernels_.group == 0 &&
                rows.stride(0) * element_ % kPageBytes != 0) {
    if (p.s > tile.depth) sum_columns_ = in_width_;
    if (p.r1 > tile.depth) sum_columns_ = std::max(sum_columns_, out_width_);
    rows_bytes_ = Scratch::padded(p.n * copy_stride_ * element_);
    buffer_bytes_ = Scratch::padded(tile.depth * kernels_.panel_width * element_);
  }

  void run() {
    const int64_t thread_bytes = rows_bytes_ + buffer_bytes_ + Scratch::padded(p_.n * sum_columns_ * sum_);
    const int64_t hidden_bytes = Scratch::padded(p_.n * hidden_stride_ * element_);
    const int64_t threads = at::get_num_threads();
    Scratch scratch(hidden_bytes + threads * thread_bytes);
    hidden_ = static_cast<char*>(scratch.take(hidden_bytes));
    char* memory = static_cast<char*>(scratch.take(threads * thread_bytes));
    // An odd rank's last value is read as one of a pair: the other one has to be zero.
    if (p_.r1 % kernels_.group != 0) std::memset(hidden_, 0, size_t(hidden_bytes));
    const auto memory_of = [&] { return Memory(memory + at::get_thread_num() * thread_bytes, *this); };
    for_all(in_weight_, [&](const Range& rows, const Range& slices) { first_stage(rows, slices, memory_of()); });
    for_all(out_weight_, [&](const Range& rows, const Range& slices) { second_stage(rows, slices, memory_of()); });
  }

 private:
  struct Range {
    int64_t begin, end;
  };
  // A thread's scratch memory: copied rows, a packed block of a weight, and sums that wait for the next block.
  struct Memory {
    char *rows, *buffer, *sums;
    Memory(char* begin, const StreamedLinear& linear)
        : rows(begin), buffer(rows + linear.rows_bytes_), sums(buffer + linear.buffer_bytes_) {}
  };

  // Runs stage(rows, slices) for all of both, in parallel.
  template <typename Stage>
  void for_all(const StreamedWeight& weight, const Stage& stage) const {
    const int64_t slices = weight.slices();
    const int64_t parts = std::min(ceil_div(at::get_num_threads(), slices), p_.n), part_rows = ceil_div(p_.n, parts);
    at::parallel_for(0, parts * slices, 1, [&](int64_t begin, int64_t end) {
      const BrgemmScope products;
      while (begin < end) {
        const int64_t part = begin / slices, slice = begin % slices;
        const int64_t last_slice = std::min(slices, slice + end - begin);
        const int64_t row = std::min(part * part_rows, p_.n), last_row = std::min(row + part_rows, p_.n);
        if (row < last_row) stage(Range{row, last_row}, Range{slice, last_slice});
        begin += last_slice - slice;
      }
    });
  }

  // `count` of the depth of input rows from `k`, where the kernel can read them.
  const void* input_block(const Range& rows, int64_t k, int64_t count, const Memory& memory) const {
    const void* source = static_cast<const char*>(rows_.const_data_ptr()) +
                         (rows.begin * rows_.stride(0) + k * rows_.stride(1)) * element_bytes(p_.dtype);
    if (direct_) return source;
    LoadCall load;
    load.in = source;
    load.pixel_stride = rows_.stride(0);
    load.channel_stride = p_.s == 1 ? 1 : rows_.stride(1);
    load.pixels = rows.end - rows.begin;
    load.channels = count;
    load.tile = memory.rows;
    load.tile_stride = copy_stride_;
    kernels_.load[int(p_.dtype)](load);
    return memory.rows;
  }

  // Input rows times in_factor -> hidden_.
  void first_stage(const Range& rows, const Range& slices, const Memory& memory) const {
    const void* source;
    GemmCall call;
    call.taps = &source;
    call.num_taps = 1;
    call.rows = rows.end - rows.begin;
    call.row_stride = direct_ ? rows_.stride(0) : copy_stride_;
    call.bias = nullptr;
    call.activation = Activation::kNone;
    call.initial_stride = in_width_;
    for (int64_t k = 0; k < p_.s; k += tile_.depth) {
      const int64_t count = std::min(tile_.depth, p_.s - k);
      source = input_block(rows, k, count, memory);
      const bool last = k + count == p_.s;
      call.depth = round_up(count, kernels_.group);
      for (int64_t i = slices.begin; i < slices.end; ++i) {
        const Slice slice = in_weight_.slice(i);
        char* sums = memory.sums + slice.first * sum_;
        in_weight_.multiply_by(call, slice, k, count, memory.buffer);
        call.initial = k > 0 ? sums : nullptr;
        call.width = last ? slice.width : slice.padded_width;
        call.out = last ? hidden_ + (rows.begin * hidden_stride_ + slice.first) * element_ : sums;
        call.out_stride = last ? hidden_stride_ : in_width_;
        call.out_type = last ? kernels_.element : kernels_.accumulator;
        kernel_set_.gemm(call);
      }
    }
  }

  // hidden_ times out_factor, bias and activation -> rows of the output.
  void second_stage(const Range& rows, const Range& slices, const Memory& memory) const {
    const void* source;
    GemmCall call;
    call.taps = &source;
    call.num_taps = 1;
    call.rows = rows.end - rows.begin;
    call.row_stride = hidden_stride_;
    call.initial_stride = out_width_;
    for (int64_t i = slices.begin; i < slices.end; ++i) {
      const Slice slice = out_weight_.slice(i);
      char* out = static_cast<char*>(output_.data_ptr()) + (rows.begin * p_.t + slice.first) * element_bytes(p_.dtype);
      for (int64_t k = 0; k < p_.r1; k += tile_.depth) {
        const int64_t count = std::min(tile_.depth, p_.r1 - k);
        const bool last = k + count == p_.r1;
        source = hidden_ + (rows.begin * hidden_stride_ + k) * element_;
        call.depth = round_up(count, kernels_.group);
        out_weight_.multiply_by(call, slice, k, count, memory.buffer);
        call.initial = k > 0 ? memory.sums : nullptr;
        call.width = last ? slice.width : slice.padded_width;
        call.out = last ? out : memory.sums;
        call.out_stride = last ? p_.t : out_width_;
        call.out_type = last ? p_.dtype : kernels_.accumulator;
        call.bias = last ? bias_.data(slice.first) : nullptr;
        call.activation = last ? p_.activation : Activation::kNone;
        call.far_output = last;  // the first slice of a page gives it memory: few prefetches are in vain (pages.h)
        kernel_set_.gemm(call);
      }
    }
  }

  const at::Tensor& rows_;
  const SumRows& bias_;
  const Problem& p_;
  const CpuTile& tile_;
  const KernelSet& kernel_set_;
  at::Tensor& output_;
  const ComputeKernels& kernels_ = *kernel_set_.kernels;
  const int64_t element_ = element_bytes(kernels_.element), sum_ = element_bytes(kernels_.accumulator);
  const StreamedWeight in_weight_, out_weight_;
  const int64_t in_width_ = in_weight_.panels().padded_columns(), out_width_ = kernels_.panel_width;
  const int64_t hidden_stride_ = streamed_stride(in_width_), copy_stride_ = streamed_stride(tile_.depth);
  const bool direct_;        // the kernel reads the rows where they lie; otherwise they are copied
  int64_t sum_columns_ = 0;  // that wait for the next block of the depth; 0: there is one block
  int64_t rows_bytes_, buffer_bytes_;
  char* hidden_ = nullptr;  // [N, hidden_stride_]
};

}  // namespace

void linear_streamed(const at::Tensor& rows, const at::Tensor& in_factor, const at::Tensor& out_factor,
                     const SumRows& bias, const Problem& p, const CpuTile& tile, const KernelSet& kernel_set,
                     const Prepared& prepared, at::Tensor& output) {
  StreamedLinear(rows, in_factor, out_factor, bias, p, tile, kernel_set, prepared, output).run();
}

}  // namespace lowrank_ops
