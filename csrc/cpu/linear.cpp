// Low-rank linear layers on the CPU: blocks of input rows go through both factors while their hidden rows are in L2.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>

#include <cstring>

#include "cpu/brgemm.h"
#include "cpu/cpu.h"
#include "cpu/weights.h"

namespace lowrank_ops {

namespace {

// How many columns of a weight a task takes at least: enough bytes to be worth a thread.
int64_t column_grain(int64_t depth, int64_t bytes) {
  return std::max<int64_t>(16, (64 << 10) / (depth * bytes));
}

// Few rows: both products as dot products with the factors where they lie, in parallel over their columns.
void linear_unpacked(const at::Tensor& rows, const at::Tensor& in_factor, const at::Tensor& out_factor,
                     const SumRows& bias, const Problem& p, at::Tensor& output) {
  const ComputeKernels& kernels = *engine_for(p.dtype).kernels;
  const int64_t element = element_bytes(kernels.element), sum = element_bytes(kernels.accumulator);
  const int64_t staged_stride = round_up(p.s, 16), rank_stride = round_up(p.r1, 16), out_stride = round_up(p.t, 16);
  const bool direct = p.dtype == kernels.element && (rows.stride(1) == 1 || p.s == 1);
  const int64_t staging_bytes = direct ? 0 : p.n * staged_stride * element;
  Scratch scratch(Scratch::padded(staging_bytes) + Scratch::padded(p.n * rank_stride * sum) +
                  Scratch::padded(p.n * rank_stride * element) + Scratch::padded(p.n * out_stride * sum));
  void* staging = scratch.take(staging_bytes);
  char* rank_sums = static_cast<char*>(scratch.take(p.n * rank_stride * sum));
  char* hidden = static_cast<char*>(scratch.take(p.n * rank_stride * element));
  char* out_sums = static_cast<char*>(scratch.take(p.n * out_stride * sum));
  const void* source = rows.const_data_ptr();
  if (!direct) {
    const LoadCall load{source, rows.stride(0), rows.stride(1), p.n, p.s, staging, staged_stride};
    kernels.load[int(p.dtype)](load);
    source = staging;
  }
  const auto multiply = [&](const void* input, int64_t input_stride, const at::Tensor& weight, char* sums,
                            int64_t sums_stride, char* out, int64_t out_row, DType out_type, bool last) {
    const int64_t depth = weight.size(1), weight_bytes = element_bytes(p.dtype), lanes = kernels.lanes;
    const int64_t blocks = (weight.size(0) + lanes - 1) / lanes;  // whole vectors, so that tasks share none
    at::parallel_for(0, blocks, column_grain(depth, weight_bytes) / lanes + 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * lanes, columns = std::min(end * lanes, weight.size(0)) - first;
      const char* part = static_cast<const char*>(weight.const_data_ptr()) + first * depth * weight_bytes;
      kernels.dot[int(p.dtype)]({input, input_stride, p.n, part, columns, depth, sums + first * sum, sums_stride});
      GemmCall call{};
      call.rows = p.n;
      call.width = columns;
      call.out = out + first * element_bytes(out_type);
      call.out_stride = out_row;
      call.out_type = out_type;
      call.bias = last ? bias.data(first) : nullptr;
      call.activation = last ? p.activation : Activation::kNone;
      kernels.finish(sums + first * sum, sums_stride, call);
    });
  };
  multiply(source, direct ? rows.stride(0) : staged_stride, in_factor, rank_sums, rank_stride, hidden, rank_stride,
           kernels.element, false);
  multiply(hidden, rank_stride, out_factor, out_sums, out_stride, static_cast<char*>(output.data_ptr()), p.t, p.dtype,
           true);
}

}  // namespace

at::Tensor linear_cpu(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                      const OptionalTensor& bias, const Problem& p, const CpuTile& tile) {
  c10::SmallVector<int64_t, 8> sizes(input.sizes());
  sizes.back() = p.t;
  at::Tensor output = at::empty(sizes, input.options());
  if (output.numel() == 0) return output;
  const Engine engine = engine_for(p.dtype);
  const ComputeKernels& kernels = *engine.kernels;
  const at::Tensor rows = input.reshape({p.n, p.s});  // a view unless the leading axes do not collapse
  const SumRows bias_sums(bias, p.dtype, engine);
  if (tile.unpacked) {
    linear_unpacked(rows, in_factor.contiguous(), out_factor.contiguous(), bias_sums, p, output);
    return output;
  }
  const PackedWeight in_weight(in_factor.contiguous(), p.r1, 1, p.s, p.dtype, engine);
  const PackedWeight out_weight(out_factor.contiguous(), p.t, 1, p.r1, p.dtype, engine);
  const bool direct = p.dtype == kernels.element && (rows.stride(1) == 1 || p.s == 1) && p.s % kernels.group == 0;
  const int64_t element = element_bytes(kernels.element);
  const int64_t hidden_columns = in_weight.panels().padded_columns();
  const int64_t hidden_bytes = tile.rows * hidden_columns * element;
  const int64_t staged_stride = round_up(p.s, 16);
  const int64_t staging_bytes = direct ? 0 : tile.rows * staged_stride * element;
  const int64_t blocks = (p.n + tile.rows - 1) / tile.rows;

  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::padded(hidden_bytes) + Scratch::padded(staging_bytes));
    char* hidden = static_cast<char*>(scratch.take(hidden_bytes));
    void* staging = scratch.take(staging_bytes);
    if (p.r1 != hidden_columns) std::memset(hidden, 0, size_t(hidden_bytes));
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * tile.rows, count = std::min(tile.rows, p.n - first);
      const void* source =
          static_cast<const char*>(rows.const_data_ptr()) + first * rows.stride(0) * element_bytes(p.dtype);
      GemmCall call;
      call.taps = &source;
      call.num_taps = 1;
      call.rows = count;
      call.row_stride = rows.stride(0);
      if (!direct) {
        LoadCall load;
        load.in = source;
        load.pixel_stride = rows.stride(0);
        load.channel_stride = rows.stride(1);
        load.pixels = count;
        load.channels = p.s;
        load.tile = staging;
        load.tile_stride = staged_stride;
        kernels.load[int(p.dtype)](load);
        source = staging;
        call.row_stride = staged_stride;
      }
      call.depth = in_weight.padded_depth();
      call.out_stride = hidden_columns;
      call.out_type = kernels.element;
      call.bias = nullptr;
      call.activation = Activation::kNone;
      const Panels& in_panels = in_weight.panels();
      for (int64_t panel = 0; panel < in_panels.count; ++panel) {
        call.weight = in_weight.panel(panel);
        call.width = in_panels.width(panel);
        call.out = hidden + in_panels.first(panel) * element;
        engine.gemm(call);
      }
      source = hidden;
      call.depth = out_weight.padded_depth();
      call.row_stride = hidden_columns;
      call.out_stride = p.t;
      call.out_type = p.dtype;
      call.activation = p.activation;
      const Panels& out_panels = out_weight.panels();
      for (int64_t panel = 0; panel < out_panels.count; ++panel) {
        const int64_t column = out_panels.first(panel);
        call.weight = out_weight.panel(panel);
        call.width = out_panels.width(panel);
        call.bias = bias_sums.data(column);
        call.out = static_cast<char*>(output.data_ptr()) + (first * p.t + column) * element_bytes(p.dtype);
        engine.gemm(call);
      }
    }
    brgemm_release();
  });
  return output;
}

}  // namespace lowrank_ops
