// Products of few rows with an unpacked factor: packing would touch every weight twice (kernels/dot.h).
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/isa.h"

namespace lowrank_ops {

class Dots {
 public:
  // For `rows` rows (at most kMostDotRows) and factors of this dtype.
  Dots(int64_t rows, DType dtype, const KernelSet& kernel_set)
      : kernels_(*kernel_set.kernels), dtype_(dtype), rows_(rows) {}

  // Whether the rows have to lie block after block: several rows that are deeper than a block.
  bool needs_blocks(int64_t depth) const { return rows_ > 1 && depth > kernels_.dot_depth; }
  int64_t block_bytes(int64_t depth) const;
  int64_t block_stride() const { return kernels_.dot_depth; }
  // Copies rows [first, first + count) from elements of `type` into blocks.
  void fill_blocks(const void* source, int64_t row_stride, int64_t stride, DType type, int64_t first, int64_t count,
                   int64_t depth, void* blocks) const;
  // sums [rows, sums_stride] = rows of elements times weight [columns, depth], contiguous; parallel over its columns.
  void multiply(const void* input, int64_t input_stride, const at::Tensor& weight, void* sums,
                int64_t sums_stride) const;
  // out [rows, out_stride] = activation(sums + bias); `bias` may be nullptr.
  void finish(const void* sums, int64_t sums_stride, int64_t columns, void* out, int64_t out_stride, DType out_type,
              const void* bias = nullptr, Activation activation = Activation::kNone) const;

 private:
  const ComputeKernels& kernels_;
  DType dtype_;
  int64_t rows_;
};

}  // namespace lowrank_ops
