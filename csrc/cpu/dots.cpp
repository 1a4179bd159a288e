#include "cpu/dots.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace lowrank_ops {
namespace {

// The least columns of a weight per task: enough bytes to be worth a thread.
int64_t column_grain(int64_t depth, int64_t bytes) {
  return std::max<int64_t>(1, (64 << 10) / (depth * bytes));
}

}  // namespace

int64_t Dots::block_bytes(int64_t depth) const {
  return rows_ * round_up(depth, kernels_.dot_depth) * element_bytes(kernels_.element);
}

void Dots::fill_blocks(const void* source, int64_t row_stride, int64_t stride, DType type, int64_t first, int64_t count,
                       int64_t depth, void* blocks) const {
  for (int64_t k = 0; k < depth; k += kernels_.dot_depth) {
    LoadCall load;
    load.in = static_cast<const char*>(source) + k * stride * element_bytes(type);
    load.pixel_stride = row_stride;
    load.channel_stride = stride;
    load.pixels = count;
    load.channels = std::min(kernels_.dot_depth, depth - k);
    load.tile = static_cast<char*>(blocks) + (k * rows_ + first * kernels_.dot_depth) * element_bytes(kernels_.element);
    load.tile_stride = kernels_.dot_depth;
    kernels_.load[int(type)](load);
  }
}

void Dots::multiply(const void* input, int64_t input_stride, const at::Tensor& weight, void* sums,
                    int64_t sums_stride) const {
  const int64_t columns = weight.size(0), depth = weight.size(1), bytes = element_bytes(dtype_);
  const int64_t sum = element_bytes(kernels_.accumulator);
  // Tasks are multiples of four columns. No sum depends on the task that computes it.
  const int64_t grain = ceil_div(column_grain(depth, bytes), int64_t(4));
  at::parallel_for(0, ceil_div(columns, int64_t(4)), grain, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * 4, count = std::min(end * 4, columns) - first;
    const char* part = static_cast<const char*>(weight.const_data_ptr()) + first * depth * bytes;
    kernels_.dot[int(dtype_)](
        {input, input_stride, rows_, part, depth, count, depth, static_cast<char*>(sums) + first * sum, sums_stride});
  });
}

void Dots::finish(const void* sums, int64_t sums_stride, int64_t columns, void* out, int64_t out_stride, DType out_type,
                  const void* bias, Activation activation) const {
  GemmCall call{};
  call.rows = rows_;
  call.width = columns;
  call.out = out;
  call.out_stride = out_stride;
  call.out_type = out_type;
  call.bias = bias;
  call.activation = activation;
  kernels_.finish(sums, sums_stride, call);
}

}  // namespace lowrank_ops
