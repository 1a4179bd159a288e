// The output in the common case (common_case.h): from a warp's sums to whole 16-byte vectors of channels.
//
// Bias and activation are applied to the sums in registers. Then the elements, rounded once, take the detour through
// shared memory. The activation is chosen once per pass. Only costly ones (with divisions, exp or erf) go the way of
// the general kernel, which stages sums, so that they are compiled once.
//
//   registers                              staging: 16 rows of elements    output
//   lane: rows lane / 4 and lane / 4 + 8,  padded to an odd multiple of    16 bytes of a pixel per lane; neighbouring
//   columns lane % 4 * 2 and the next      16 bytes                        lanes take neighbouring vectors of a row
#pragma once

#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/stream_lean.cuh"

namespace lowrank_ops {

template <typename Kernel>
class LeanOutput {
  using Element = typename Kernel::Element;
  static constexpr int element = Kernel::element, tiles = Kernel::config.pixel_tiles,
                       rank_tiles = Kernel::config.rank_tiles;
  // 16 pixels x `columns` channels are staged at a time. In rows that are an odd multiple of 16 bytes apart,
  // neighbouring lanes store 4 bytes (2 elements) to different banks. With 4-byte elements rows lie 160 bytes apart.
  static constexpr int columns = element == 2 ? 8 * rank_tiles : kStagedColumns, parts = 8 * rank_tiles / columns;
  static constexpr int row_bytes = element == 2 ? columns * element + kVectorBytes : kStagedStride * element;
  static constexpr int size = kVectorBytes / element, vectors = columns / size, copies = 16 * vectors / 32;
  // For costly activations: columns of staged sums, and the distance of two rows in sums.
  static constexpr int sum_columns = element == 2 ? kLeanStagedColumns : kStagedColumns,
                       sum_stride = element == 2 ? kLeanStagedStride : kStagedStride;
  static_assert(16 * most(row_bytes, sum_stride * 4) <= lean_staging(Kernel::config, element), "it must fit");
  using Sums = const float (&)[tiles][rank_tiles][4];

 public:
  static constexpr int offset_bytes = 4;

  LOWRANK_OPS_DEVICE LeanOutput(const KernelParams& params, unsigned char* staging, const unsigned char* pixel_offset,
                                unsigned char* tile, int lane)
      : p(params.block), staging(staging), pixel_offset(pixel_offset), tile(tile), lane(lane), vector(lane % vectors) {
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int i = 0; i < copies; ++i)
        offset[m][i] = load_shared<uint32_t>(pixel_offset + (m * 16 + row_of(i)) * offset_bytes);
  }

  // The bias of the columns whose sums a lane holds. It is loaded before the products of a pass, which hide the wait.
  struct Bias {
    Packed<Element> pair[rank_tiles];
  };
  LOWRANK_OPS_DEVICE Bias load_bias(int first_channel) const {
    Bias bias{};
    const int channel = first_channel + lane % 4 * 2, left = p.bias == nullptr ? 0 : p.geometry.t - channel;
    const Element* from = static_cast<const Element*>(p.bias) + channel;
#pragma unroll
    for (int n = 0; n < rank_tiles; ++n)
      if (n * 8 < left) bias.pair[n] = load_global<Packed<Element>>(from + n * 8);
    return bias;
  }

  // Writes the channels from `channel` on, which must be less than T.
  LOWRANK_OPS_DEVICE void write(Sums sum, const Bias& bias, int channel) const {
    if (p.activation > Activation::kRelu6) return write_costly(sum, channel);
    float wide[rank_tiles][2];
#pragma unroll
    for (int n = 0; n < rank_tiles; ++n) widen_pair(Element{}, bias.pair[n], wide[n]);
    if (p.activation == Activation::kNone)
      write_as<Activation::kNone>(sum, wide, channel);
    else if (p.activation == Activation::kRelu)
      write_as<Activation::kRelu>(sum, wide, channel);
    else
      write_as<Activation::kRelu6>(sum, wide, channel);
  }

 private:
  const BlockParams& p;
  unsigned char* const staging;
  const unsigned char* const pixel_offset;  // the table's entries of the warp's pixels
  unsigned char* const tile;
  const int lane, vector;          // the 16-byte vector of a row that this lane writes
  uint32_t offset[tiles][copies];  // where its rows lie in the output: from `tile` on, in units of 16 bytes

  // The row of the lane's copy number `i`. With four vectors per row, eight lanes read from all banks where their two
  // rows lie four apart.
  LOWRANK_OPS_DEVICE int row_of(int i) const {
    return spread_rows(lane / vectors, vectors == 4 ? 2 : 3) + i * (32 / vectors);
  }

  // The clamps of relu and relu6 work on pairs: 0 and 6 are elements, so rounding first changes nothing.
  template <Activation activation>
  static LOWRANK_OPS_DEVICE auto finish_pair(float first, float second) {
    if constexpr (activation == Activation::kNone)
      return narrow_pair<Element>(first, second);
    else if constexpr (activation == Activation::kRelu)
      return narrow_pair_relu<Element>(first, second);
    else
      return at_most_six<Element>(narrow_pair_relu<Element>(first, second));
  }

  template <Activation activation>
  LOWRANK_OPS_DEVICE void write_as(Sums sum, const float (&bias)[rank_tiles][2], int first_channel) const {
    unsigned char* const to = staging + lane / 4 * row_bytes + lane % 4 * 2 * element;
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      const int channel = first_channel + part * columns + vector * size;
      unsigned char* const output = tile + int64_t(channel) * element;
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
#pragma unroll
        for (int n = 0; n < columns / 8; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int from = part * columns / 8 + n;
            store_shared(to + half * 8 * row_bytes + n * 8 * element,
                         finish_pair<activation>(sum[m][from][2 * half] + bias[from][0],
                                                 sum[m][from][2 * half + 1] + bias[from][1]));
          }
        warp_barrier<Barrier::kStagingWritten>();
#pragma unroll
        for (int i = 0; i < copies; ++i)
          if (offset[m][i] != kNowhere && channel < p.geometry.t)
            store_global(vectors_behind(output, offset[m][i]),
                         load_shared<Vector<Element>>(staging + row_of(i) * row_bytes + vector * kVectorBytes));
        warp_barrier<Barrier::kStagingRead>();
      }
    }
  }

  // Stages 16 pixels x `sum_columns` channels at a time, as sums, in one loop.
  LOWRANK_OPS_DEVICE void write_costly(Sums sum, int first_channel) const {
    constexpr int per_tile = 8 * rank_tiles / sum_columns, all = tiles * per_tile;
#pragma unroll 1
    for (int part = 0; part < all; ++part) {
      const int m = part / per_tile, channel = first_channel + part % per_tile * sum_columns;
#pragma unroll
      for (int i = 0; i < all; ++i)  // registers cannot be indexed: one branch per part
        if (i == part) stage_sums(sum[i / per_tile], i % per_tile * (sum_columns / 8));
      warp_barrier<Barrier::kStagingWritten>();
      write_staged(m, channel);
      warp_barrier<Barrier::kStagingRead>();
    }
  }

  LOWRANK_OPS_DEVICE void write_staged(int m, int first_channel) const {
    constexpr int vectors_of_part = sum_columns / size;
#pragma unroll 1
    for (int i = lane; i < 16 * vectors_of_part; i += 32) {
      const int row = i / vectors_of_part, column = i % vectors_of_part * size, channel = first_channel + column;
      const uint32_t to = load_shared<uint32_t>(pixel_offset + (m * 16 + row) * offset_bytes);
      if (to == kNowhere || channel >= p.geometry.t) continue;
      float values[size];
      load_sums(values, reinterpret_cast<const float*>(staging) + row * sum_stride + column, row);
      Vector<Element> result;
      finish(result.value, values, p, channel);
      store_global(vectors_behind(tile + int64_t(channel) * element, to), result);
    }
  }

  LOWRANK_OPS_DEVICE void stage_sums(const float (&sum)[rank_tiles][4], int first) const {
    float* const to = reinterpret_cast<float*>(staging) + lane / 4 * sum_stride + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < sum_columns / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_shared(to + half * 8 * sum_stride + n * 8,
                     Pair<float>{{sum[first + n][2 * half], sum[first + n][2 * half + 1]}});
  }
};

}  // namespace lowrank_ops
