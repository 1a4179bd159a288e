// CP on the CPU for few pixels in all images together: packing the factors would take as long as reading them. The
// pixels are rows, and both products are dot products with the unpacked factors.
//
//   pixels [P, S] --in_factor--> hidden [P, R] --depthwise--> filtered [Q, R] --out_factor--> output [Q, T]
//
// The depthwise stages run one output at a time, over the taps of its window that lie inside the image.
#include "cpu/few_pixels.h"

#include <c10/util/SmallVector.h>

#include <cstring>

#include "cpu/dots.h"
#include "cpu/memory.h"
#include "cpu/weights.h"

namespace lowrank_ops {
namespace {

// Both depthwise stages: hidden [P, channels], accumulators -> filtered [Q, channels], elements. Channels fill whole
// vectors.
void convolve(const Problem& p, const ComputeKernels& kernels, const SumRows& height_taps, const SumRows& width_taps,
              int64_t channels, const char* hidden, char* filtered, void* column) {
  const int64_t sum = element_bytes(kernels.accumulator), element = element_bytes(kernels.element);
  const Axis rows = row_axis(p), columns = column_axis(p);
  c10::SmallVector<const void*, 16> in(size_t(p.kh), nullptr);
  DepthwiseCall call;
  call.rows = in.data();
  call.out_rows = call.out_pixels = call.stride = 1;
  call.out_row_stride = call.channels = call.channel_stride = channels;
  call.dilation = columns.dilation * columns.step;  // in pixels of the image, not of the lattice
  call.column = column;
  for (int64_t q = 0; q < p.n * p.oh * p.ow; ++q) {
    const int64_t image = q / (p.oh * p.ow), top = q / p.ow % p.oh * rows.stride, left = q % p.ow * columns.stride;
    const Axis::Taps down = rows.taps_inside(top, rows.first_inside(), rows.end_inside());
    const Axis::Taps across = columns.taps_inside(left, columns.first_inside(), columns.end_inside());
    call.out = filtered + q * channels * element;
    if (down.begin == down.end || across.begin == across.end) {
      std::memset(call.out, 0, size_t(channels * element));
      continue;
    }
    const int64_t x = columns.coordinate(left + across.begin * columns.dilation);
    for (int64_t tap = down.begin; tap < down.end; ++tap) {
      const int64_t y = rows.coordinate(top + tap * rows.dilation);
      in[size_t(tap - down.begin)] = hidden + ((image * p.h + y) * p.w + x) * channels * sum;
    }
    call.kh = down.end - down.begin;
    call.kw = across.end - across.begin;
    call.in_pixels = (call.kw - 1) * call.dilation + 1;
    call.height_factor = height_taps.data(down.begin * channels);
    call.width_factor = width_taps.data(across.begin * channels);
    kernels.depthwise(call);
  }
}

// The pixels of all images as rows of elements, in blocks.
void read_pixels(const at::Tensor& input, const Problem& p, const Dots& dots, void* blocks) {
  const int64_t channel_stride = p.s == 1 ? 1 : input.stride(1);
  for (int64_t row = 0; row < p.n * p.h; ++row) {
    const char* source = static_cast<const char*>(input.const_data_ptr()) +
                         (row / p.h * input.stride(0) + row % p.h * input.stride(2)) * element_bytes(p.dtype);
    dots.fill_blocks(source, input.stride(3), channel_stride, p.dtype, row * p.w, p.w, p.s, blocks);
  }
}

// sums [Q, sums_stride] with bias and activation -> output. Sums of outputs whose channels are not next to each other
// are overwritten.
void write_outputs(char* sums, int64_t sums_stride, const Problem& p, const SumRows& bias, const Dots& dots,
                   const ComputeKernels& kernels, at::Tensor& output) {
  const auto finish = [&](void* out, int64_t stride, DType type) {
    dots.finish(sums, sums_stride, p.t, out, stride, type, bias.data(), p.activation);
  };
  if (output.stride(1) == 1 || p.oh * p.ow == 1 || p.t == 1) return finish(output.data_ptr(), p.t, p.dtype);
  finish(sums, sums_stride, kernels.accumulator);
  for (int64_t image = 0; image < p.n; ++image) {
    StoreCall store;
    store.pixels = store.channel_stride = p.oh * p.ow;
    store.channels = p.t;
    store.tile = sums + image * store.pixels * sums_stride * element_bytes(kernels.accumulator);
    store.tile_stride = sums_stride;
    store.out = static_cast<char*>(output.data_ptr()) + image * output.stride(0) * element_bytes(p.dtype);
    kernels.store[int(p.dtype)](store);
  }
}

}  // namespace

void cp_few_pixels(const OpCall& call, const Problem& p, at::Tensor& output) {
  const KernelSet kernel_set = kernel_set_for(p.dtype);
  const ComputeKernels& kernels = *kernel_set.kernels;
  const int64_t pixels = p.n * p.h * p.w, outputs = p.n * p.oh * p.ow;
  const Dots first(pixels, p.dtype, kernel_set), last(outputs, p.dtype, kernel_set);
  const int64_t element = element_bytes(kernels.element), sum = element_bytes(kernels.accumulator);
  const int64_t channels = round_up(p.r1, kernels.lanes), out_stride = round_up(p.t, kernels.lanes);
  const int64_t hidden_bytes = pixels * channels * sum, filtered_bytes = outputs * channels * element;
  const int64_t filtered_block_bytes = last.needs_blocks(p.r1) ? last.block_bytes(p.r1) : 0;
  const int64_t column_bytes = (p.w + 1) * kernels.lanes * sum, out_bytes = outputs * out_stride * sum;
  Scratch scratch(Scratch::padded(first.block_bytes(p.s)) + Scratch::padded(hidden_bytes) +
                  Scratch::padded(column_bytes) + Scratch::padded(filtered_bytes) +
                  Scratch::padded(filtered_block_bytes) + Scratch::padded(out_bytes));
  void* blocks = scratch.take(first.block_bytes(p.s));
  char* hidden = static_cast<char*>(scratch.take(hidden_bytes));
  void* column = scratch.take(column_bytes);
  char* filtered = static_cast<char*>(scratch.take(filtered_bytes));
  void* filtered_blocks = scratch.take(filtered_block_bytes);
  char* out_sums = static_cast<char*>(scratch.take(out_bytes));

  read_pixels(call.input, p, first, blocks);
  if (channels != p.r1) std::memset(hidden, 0, size_t(hidden_bytes));
  first.multiply(blocks, first.block_stride(), call.in_factor.contiguous(), hidden, channels);
  const SumRows height_taps(call.height_factor, p.dtype, kernel_set),
      width_taps(call.width_factor, p.dtype, kernel_set);
  convolve(p, kernels, height_taps, width_taps, channels, hidden, filtered, column);
  if (filtered_block_bytes > 0) {
    last.fill_blocks(filtered, channels, 1, kernels.element, 0, outputs, p.r1, filtered_blocks);
    last.multiply(filtered_blocks, last.block_stride(), call.out_factor.contiguous(), out_sums, out_stride);
  } else {
    last.multiply(filtered, channels, call.out_factor.contiguous(), out_sums, out_stride);
  }
  write_outputs(out_sums, out_stride, p, SumRows(call.bias, p.dtype, kernel_set), last, kernels, output);
}

}  // namespace lowrank_ops
