// A problem for the planner: one call of one op. Plain C++17: no torch, no CUDA headers.
#pragma once

#include <cstdint>
#include <utility>

namespace lowrank_ops {

enum class Op { kTucker, kCP, kLinear };
enum class DType { kFloat, kDouble, kBFloat16, kHalf };
enum class Layout { kContiguous, kChannelsLast };
enum class Activation { kNone, kRelu, kRelu6, kHardswish, kSilu, kGelu };

struct Problem {
  Op op = Op::kTucker;
  DType dtype = DType::kFloat;
  Layout layout = Layout::kContiguous;
  // input [n, s, h, w] -> output [n, t, oh, ow]; a linear layer has n rows and h = w = 1.
  int64_t n = 0, s = 0, h = 1, w = 1, t = 0, oh = 1, ow = 1;
  int64_t r1 = 0, r2 = 0;  // Tucker's ranks; CP and linear have one rank, which both hold
  int64_t kh = 1, kw = 1;
  int64_t stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  Activation activation = Activation::kNone;
  // GPUs: whether fp32 may be rounded to tf32 (torch's settings), and the widest copies in bytes that the pointers and
  // strides of input, factors and output allow (0: as the sizes allow, dense tensors).
  bool tf32 = false;
  int64_t input_vector = 0, factor_vector = 0, output_vector = 0;
  bool repeats = false;   // GPUs: rows of the input or of a factor overlap, or an axis has a stride of 0
  bool prepared = false;  // GPUs: the factors were copied before the call, with padded ranks (ops/padded_factors.h)
  bool column = false;    // CPUs: a call with images of one column, turned for the fused kernel (column_as_row)
};

inline int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t span = size + 2 * padding - dilation * (kernel - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

// Whether input and output have one column, as in one-dimensional networks that use conv2d. The other taps of a wider
// window see padding.
inline bool is_one_column(const Problem& p) {
  return p.op != Op::kLinear && p.w == 1 && p.ow == 1 && p.h > 1;
}
// The same problem with rows and columns exchanged. An image of one column and one of one row lie in memory alike, in
// both layouts; but kernels multiply the pixels of a row together, and find one pixel per row in the first, all in the
// second.
inline Problem column_as_row(Problem p) {
  std::swap(p.h, p.w);
  std::swap(p.oh, p.ow);
  std::swap(p.kh, p.kw);
  std::swap(p.stride[0], p.stride[1]);
  std::swap(p.padding[0], p.padding[1]);
  std::swap(p.dilation[0], p.dilation[1]);
  p.column = true;
  return p;
}
// A call's problem as the CPU's fused kernels see it.
inline Problem as_fused(const Problem& given) {
  return is_one_column(given) ? column_as_row(given) : given;
}

// A rank of factors that were copied for GPUs: whole vectors of 16 bytes, for elements of `element` bytes.
constexpr int64_t padded_rank(int64_t rank, int64_t element) {
  const int64_t elements = 16 / element;
  return (rank + elements - 1) / elements * elements;
}

// Whether weights that were packed before the call hold all that it may read. When a core is packed, the size of images
// is not known, so that it is packed for images that are not turned (column_as_row). If its window has one column, its
// panels serve turned images too; but Winograd's transform along a line is packed for windows of one row only.
inline bool packed_covers(const Problem& p) {
  return p.op != Op::kTucker || !p.column;
}

// Whether torch's bf16 convolutions (oneDNN's, as of torch 2.13) cannot be trusted with a window on a CPU. Some with a
// stride along W fail. On Zen 4 (AVX512_BF16), random problems with a padding too: a dense forward crashed the process
// within the first few hundred, 9 of 4,000 dense and 1 of 4,000 depthwise weight gradients were wrong (garbage, NaN).
// On Zen 5 189 of 1,530 without padding, all with one column of output, had wrong outputs and weight gradients (one
// hidden channel; kernels 4 wide). Kernels 1 wide never failed without padding.
constexpr bool library_bfloat16_fails(int64_t kernel_width, int64_t stride_width, int64_t padding_width) {
  return stride_width > 1 && (kernel_width > 1 || padding_width > 0);
}
// Whether a CPU's chain runs a bf16 problem in fp32 for that reason (library_dtype of ops/block.h): it is no candidate
// then. In a problem that column_as_row() has turned the call's width is the height.
constexpr bool chain_needs_float32(const Problem& p) {
  const int width = p.column ? 0 : 1;
  return p.op != Op::kLinear && p.dtype == DType::kBFloat16 &&
         library_bfloat16_fails(p.column ? p.kh : p.kw, p.stride[width], p.padding[width]);
}

}  // namespace lowrank_ops
