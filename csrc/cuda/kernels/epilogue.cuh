// From a warp's sums to the output: bias, activation, and a detour through shared memory, so that global memory sees
// whole vectors (channels_last) or neighbouring pixels (NCHW).
//
//   registers                  staging: 16 rows of 32 sums       output
//   16 pixels x 8 N channels   written by (row, two columns)     channels_last: a lane takes 16 bytes of a pixel
//   (engine_*.cuh)             ───────────────────────────►      NCHW: 16 lanes take the 16 pixels of a channel
#pragma once

#include "cuda/kernels/activation.cuh"
#include "cuda/kernels/engine_simt.cuh"
#include "cuda/kernels/kernel_params.cuh"

namespace lowrank_ops {

// Loads `size` neighbouring sums, 16 bytes at a time. Where that takes two loads, odd rows take them in the reverse
// order: then the eight lanes that are served together, four per row, read from different banks.
template <int size, typename Sum>
LOWRANK_OPS_DEVICE void load_sums(Sum (&values)[size], const Sum* sums, int row) {
  constexpr int per_load = Vector<Sum>::size;
  if constexpr (size == 2 * per_load) {
    const bool swap = row % 2 == 1;
    const auto first = load_shared<Vector<Sum>>(sums + (swap ? per_load : 0));
    const auto second = load_shared<Vector<Sum>>(sums + (swap ? 0 : per_load));
#pragma unroll
    for (int i = 0; i < per_load; ++i) {
      values[i] = swap ? second.value[i] : first.value[i];
      values[per_load + i] = swap ? first.value[i] : second.value[i];
    }
  } else if constexpr (size == per_load) {
    const auto loaded = load_shared<Vector<Sum>>(sums);
#pragma unroll
    for (int i = 0; i < size; ++i) values[i] = loaded.value[i];
  } else {
    static_assert(size == 1, "a vector or an element");
    values[0] = load_shared<Sum>(sums);
  }
}

// Adds the bias to the sums of neighbouring channels, applies the activation and rounds.
template <typename Element, int size, typename Sum>
LOWRANK_OPS_DEVICE void finish(Element (&result)[size], Sum (&values)[size], const BlockParams& p, int channel) {
  const Element* bias = static_cast<const Element*>(p.bias);
#pragma unroll
  for (int i = 0; i < size; ++i)
    if (bias && channel + i < p.geometry.t) values[i] += widen(load_global<Element>(bias + channel + i));
  activate(values, p.activation);
#pragma unroll
  for (int i = 0; i < size; ++i) result[i] = narrow<Element, Sum>(values[i]);
}

// Writes the sums of 16 pixels x 8 * N channels of one warp, 32 channels at a time. `staging` is the warp's own part;
// `pixel_offset` holds the table's entries of these 16 pixels: element offsets into the output, negative for none.
//
// The sums themselves are staged, so that bias and activation are compiled once and not for every register. Rows are 40
// sums apart, so that the lanes' stores of two sums fall into different banks.
template <typename Element, int N, typename Sum>
LOWRANK_OPS_DEVICE void write_output(const Sum (&sum)[N][4], unsigned char* staging, const unsigned char* pixel_offset,
                                     const BlockParams& p, int first_channel, int lane) {
  constexpr int columns = kStagedColumns, stride = kStagedStride, tiles = columns / 8;
  static_assert(N % tiles == 0, "whole parts");
  Element* output = static_cast<Element*>(p.output);
  Sum* staged = reinterpret_cast<Sum*>(staging);
#pragma unroll
  for (int part = 0; part < N / tiles; ++part, first_channel += columns) {
    if (first_channel >= p.geometry.t) break;
#pragma unroll
    for (int n = 0; n < tiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_shared(staged + (lane / 4 + 8 * half) * stride + n * 8 + lane % 4 * 2,
                     Pair<Sum>{{sum[part * tiles + n][2 * half], sum[part * tiles + n][2 * half + 1]}});
    warp_barrier<Barrier::kStagingWritten>();
    if (p.output_vector == kVectorBytes) {
      constexpr int size = Vector<Element>::size, vectors = columns / size;
#pragma unroll 1
      for (int i = lane; i < 16 * vectors; i += 32) {
        const int row = i / vectors, channel = i % vectors * size;
        const int64_t offset = load_shared<int64_t>(pixel_offset + row * 8);
        if (offset < 0 || first_channel + channel >= p.geometry.t) continue;
        Sum values[size];
        load_sums(values, staged + row * stride + channel, row);
        Vector<Element> vector;
        finish(vector.value, values, p, first_channel + channel);
        store_global(output + offset + first_channel + channel, vector);
      }
    } else {
      // Neighbouring lanes take neighbours in memory: channels, or pixels where channels lie apart.
      const int64_t channel_stride = p.output_stride[1];
#pragma unroll 1
      for (int i = lane; i < 16 * columns; i += 32) {
        const int row = channel_stride == 1 ? i / columns : i % 16,
                  channel = channel_stride == 1 ? i % columns : i / 16;
        const int64_t offset = load_shared<int64_t>(pixel_offset + row * 8);
        if (offset < 0 || first_channel + channel >= p.geometry.t) continue;
        Sum value[1];
        load_sums(value, staged + row * stride + channel, row);
        Element element[1];
        finish(element, value, p, first_channel + channel);
        store_global(output + offset + (first_channel + channel) * channel_stride, element[0]);
      }
    }
    warp_barrier<Barrier::kStagingRead>();
  }
}

// The output of a warp, for any layout. `pixel_offset`: the table's entries of the warp's pixels.
template <typename Kernel>
class GeneralOutput {
  static constexpr int tiles = Kernel::config.pixel_tiles, rank_tiles = Kernel::config.rank_tiles;
  using Sum = typename Kernel::Sum;

 public:
  static constexpr int offset_bytes = 8;

  LOWRANK_OPS_DEVICE GeneralOutput(const KernelParams& params, unsigned char* staging,
                                   const unsigned char* pixel_offset, unsigned char*, int lane)
      : p(params.block), staging(staging), pixel_offset(pixel_offset), lane(lane) {}

  struct Bias {};  // empty: `finish` loads the bias where it adds it
  LOWRANK_OPS_DEVICE Bias load_bias(int) const { return {}; }

  // Writes the channels from `channel` on, which must be less than T.
  LOWRANK_OPS_DEVICE void write(const Sum (&sum)[tiles][rank_tiles][4], Bias, int channel) const {
#pragma unroll
    for (int m = 0; m < tiles; ++m)
      write_output<typename Kernel::Element>(sum[m], staging, pixel_offset + m * 16 * offset_bytes, p, channel, lane);
  }

 private:
  const BlockParams& p;
  unsigned char* const staging;
  const unsigned char* const pixel_offset;
  const int lane;
};

}  // namespace lowrank_ops
