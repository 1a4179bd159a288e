// The kernels that each CPU instruction set has, and the arguments of their calls. Plain C++: no torch headers. Each
// `kernels_<isa>.cpp` compiles the same templates with its own flags and fills one `KernelTable`; csrc/cpu/isa.cpp
// picks a table at run time.
//
// Words used here. A *tile* is a scratch matrix [pixels, channels] in L2. A *panel* is a block of at most `panel_width`
// output channels of a weight, packed [taps][depth / group][width][group]: vectors run along the output channels,
// `group` is 2 for the bf16 dot product (pairs along the depth) and 1 otherwise. An *element* is a value of a tile or a
// packed weight, an *accumulator* one of a sum.
#pragma once

#include <cstdint>

#include "plan/problem.h"

namespace lowrank_ops {

// out[m, 0:width] = activation(bias + sum over taps and k of taps[tap][m * row_stride + k] * weight[tap][k][0:width])
// for `rows` rows and one panel. Each output is one sum in a fixed order (taps, then k), whatever `rows` is. With
// `initial` the sum continues from there, so that a depth divided into blocks gives the same bits.
struct GemmCall {
  const void* const* taps;  // num_taps pointers to the first row of A
  int64_t num_taps;
  int64_t depth;  // k per tap, a multiple of `group`
  int64_t rows;
  int64_t row_stride;                        // elements between rows of A
  const void* weight;                        // the packed panel
  const void* const* tap_weights = nullptr;  // where the part of each tap begins; nullptr: one behind the other
  int64_t width;                             // columns to write, at most panel_width
  int64_t weight_columns = 0;  // of the whole panel, where `width` is a part of it (one tap only); 0: it is all of it
  void* out;
  int64_t out_stride;  // elements between rows of out
  DType out_type;
  const void* bias;  // accumulator type, readable up to the padded width; nullptr: none
  Activation activation;
  const void* initial = nullptr;  // accumulators [rows, initial_stride] to begin with, readable as bias is
  int64_t initial_stride = 0;
  bool far_input = false;   // A comes from memory, not from a tile: prefetch the rows of the next blocks
  bool far_output = false;  // the same for out
  // Cache lines that later calls will touch: their prefetches are spread over this call.
  const char* prefetch = nullptr;
  int64_t prefetch_lines = 0;
};
using GemmFunction = void (*)(const GemmCall&);

// Copies pixels x channels from a strided image into a tile [pixels, tile_stride] and converts the type. Channels from
// `channels` up to the next even number are zeroed, so that pairs can be read.
struct LoadCall {
  const void* in;
  int64_t pixel_stride, channel_stride;  // elements
  int64_t pixels, channels;
  void* tile;
  int64_t tile_stride;
};
using LoadFunction = void (*)(const LoadCall&);

// Writes a tile [pixels, tile_stride] of accumulator type transposed to out[channel * channel_stride + pixel].
struct StoreCall {
  const void* tile;
  int64_t tile_stride;
  int64_t pixels, channels;
  void* out;
  int64_t channel_stride;
};
using StoreFunction = void (*)(const StoreCall&);

// Packs `width` output channels of a weight, each a row of num_taps * depth contiguous elements, `row_stride` apart,
// into `padded_width` columns (zeros beyond `width`) of a panel that is `panel_stride` columns wide. Depth is padded
// with zeros to `padded_depth`.
struct PackCall {
  const void* weight;
  int64_t row_stride;
  int64_t num_taps, depth, padded_depth;
  int64_t width, padded_width, panel_stride;
  void* panel;  // the first of the columns
};
using PackFunction = void (*)(const PackCall&);

// out[r, o, c] = sum over kw of width_factor[kw, c] * V[r, o * stride + kw * dilation, c], V[r, p, c] = sum over kh of
// height_factor[kh, c] * rows[r + kh][p, c]: CP's two depthwise stages, for output rows whose windows are one row
// apart. All values are accumulators, except those of `out`, which are elements. `channels` is a multiple of the lanes.
// Pixels of all matrices and taps of the factors are `channel_stride` apart; 1 stands for a plane of one channel, whose
// factors lie in the first of the lanes.
struct DepthwiseCall {
  const void* const* rows;  // kh + out_rows - 1 pointers to [in_pixels, channels]
  int64_t out_rows, out_row_stride;
  int64_t kh, kw;
  int64_t in_pixels, out_pixels;
  int64_t stride, dilation;
  int64_t channels, channel_stride;
  const void* height_factor;
  const void* width_factor;
  void* column;  // scratch of (in_pixels + 1) * lanes accumulators
  void* out;
};
using DepthwiseFunction = void (*)(const DepthwiseCall&);

// sums[m, n] = sum over k of input[m, k] * weight[n, k], for a weight of the tensor's own type as it lies in memory and
// at most kMostDotRows rows. Several rows that are deeper than `dot_depth` lie block by block, so that a block of all
// rows stays in L1: [depth / dot_depth][rows][input_stride = dot_depth].
constexpr int64_t kMostDotRows = 8;
struct DotCall {
  const void* input;  // elements
  int64_t input_stride;
  int64_t rows;
  const void* weight;     // [columns, depth], each contiguous
  int64_t weight_stride;  // elements between columns
  int64_t columns, depth;
  void* sums;  // accumulators
  int64_t sums_stride;
  bool far_weight = false;  // one row, short columns: they come from memory, prefetch the next ones
  // One row only: the products of `num_taps` such weights with inputs of their own, added up.
  int64_t num_taps = 1;
  const void* const* tap_weights = nullptr;  // instead of `weight`
  const void* const* tap_inputs = nullptr;   // instead of `input`
};
using DotFunction = void (*)(const DotCall&);

// sums[p] = sum over channels of in[channel * channel_stride + p] * factor[channel]. The image has the tensor's own
// type; factor and sums are accumulators.
struct PlaneCall {
  const void* in;
  int64_t channel_stride, channels, pixels;
  const void* factor;
  void* sums;
};
using PlaneFunction = void (*)(const PlaneCall&);

// out[o] = sum over kh and kw of rows[kh][o * stride + kw * dilation] * weight[kh * kw_count + kw]: a window over a
// plane of one channel. All values are elements, which have the accumulators' type here.
struct WindowCall {
  const void* const* rows;
  int64_t kh_count, kw_count;
  const void* weight;
  int64_t stride, dilation, out_pixels;
  void* out;
};
using WindowFunction = void (*)(const WindowCall&);

// out[channel * channel_stride + p] = activation(plane[p] * factor[channel] + bias[channel]): a block's last stage with
// a rank of one, for an output whose pixels lie next to each other. Plane, factor and bias (nullptr: none):
// accumulators.
struct SpreadCall {
  const void* plane;
  const void* factor;
  const void* bias;
  int64_t pixels, channels, channel_stride;
  void* out;
  Activation activation;
};
using SpreadFunction = void (*)(const SpreadCall&);

// out[m, :] = activation(sums[m, :] + bias), for sums that another kernel left in memory. Only `rows`, `width`, `out`,
// `out_stride`, `out_type`, `bias` and `activation` of the call are read. Sums and bias are readable up to whole
// vectors.
using FinishFunction = void (*)(const void* sums, int64_t sums_stride, const GemmCall& call);

// Winograd's input transform (cpu/kernels/winograd.h, plan/patches.h): rows [columns, channels] of hidden
// accumulators -> the first `patches` of out [places, out_patches, channels], elements. Channels fill whole vectors.
constexpr int kMostPatchRows = 4;
struct WinogradInputCall {
  const void* rows[kMostPatchRows + 2];
  int64_t columns;  // that can be read
  int64_t channels;
  int64_t patches, out_patches;
  void* out;
};
using WinogradInputFunction = void (*)(const WinogradInputCall&);

// Winograd's output transform: sums [places, sums_patches, sums_stride], accumulators -> the rows of a row of patches.
// Each is `columns` output pixels of elements, `out_stride` apart, with `width` channels (whole vectors). Rows beyond
// the image are nullptr.
struct WinogradOutputCall {
  const void* sums;
  int64_t sums_patches, sums_stride;
  int64_t patches, columns;
  int64_t width;
  void* out[kMostPatchRows];
  int64_t out_stride;
};
using WinogradOutputFunction = void (*)(const WinogradOutputCall&);

struct WinogradKernels {
  int64_t input_rows = 0;  // that the input transform reads; 0: these kernels do not exist
  WinogradInputFunction input = nullptr;
  WinogradOutputFunction output = nullptr;
  PackFunction pack = nullptr;  // rows of taps into a panel of all places
};

// Kernels for one way to compute. `Element` is the type of tiles and packed weights, `Accumulator` that of sums.
struct ComputeKernels {
  DType element;
  DType accumulator;
  int64_t lanes;        // accumulators in a vector: panel widths and tile columns are multiples of it
  int64_t panel_width;  // columns of a full panel
  int64_t group;        // 2: weights in pairs along the depth
  int64_t dot_depth;    // elements
  GemmFunction gemm;
  DepthwiseFunction depthwise;
  // Indexed by the tensor's DType (order of the enum); nullptr for types that these kernels do not compute with.
  LoadFunction load[4];
  StoreFunction store[4];
  PackFunction pack[4];
  DotFunction dot[4];
  PlaneFunction planes[4];
  WindowFunction window;     // nullptr where elements and accumulators are of two types
  SpreadFunction spread[4];  // the same
  FinishFunction finish;
  // Indexed by Winograd. For fp32 sums and for weights of the elements' own type; 4x4 outputs in fp32 only: in bf16
  // their errors would be four times those of the direct core.
  WinogradKernels winograd[4] = {};
};

struct KernelTable {
  const char* isa;
  const ComputeKernels* compute_float;  // fp32 sums of fp32 products: fp32, and bf16 and fp16 converted
  const ComputeKernels* compute_double;
  const ComputeKernels* compute_bfloat16;  // fp32 sums of bf16 products; its gemm is nullptr without the instruction
};

const KernelTable& kernels_generic();
#if defined(__x86_64__)
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();
const KernelTable& kernels_avx512bf16();
#endif

}  // namespace lowrank_ops
