// CP's depthwise stages, in place in the hidden tile [positions, R].
//
// A thread owns two neighbouring channels of one line (a column of the tile for the height factor, a row for the width
// factor) and walks along it. Output i needs inputs from i * stride >= i on, and the thread writes it to position i
// after reading them, so nobody reads what was overwritten. Neighbouring lanes hold neighbouring channels: no bank
// conflicts.
#pragma once

#include "kernels/epilogue.cuh"

namespace lowrank_ops {

// One line: `outputs` outputs, positions `step` bytes apart. Blocks of 8 outputs share the loads of a tap's weights.
template <typename Element, typename Sum>
LOWRANK_OPS_DEVICE void depthwise_line(unsigned char* line, int step, int outputs, int stride, int taps,
                                       const Element* weights, int64_t row_stride, int64_t tap_stride, bool second) {
  constexpr int kBlock = 8;
  const auto weight = [&](int tap, int channel) {
    return channel == 1 && !second
               ? Sum(0)
               : Sum(widen(load_global<Element>(weights + channel * row_stride + tap * tap_stride)));
  };
  if (taps == 3 && stride == 1) {  // the common case: every input is loaded once
    Sum factor[3][2], window[3][2];
#pragma unroll
    for (int tap = 0; tap < 3; ++tap)
#pragma unroll
      for (int channel = 0; channel < 2; ++channel) factor[tap][channel] = weight(tap, channel);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Pair<Element> pair = load_shared<Pair<Element>>(line + i * step);
      window[i + 1][0] = widen(pair.value[0]);
      window[i + 1][1] = widen(pair.value[1]);
    }
#pragma unroll 4
    for (int i = 0; i < outputs; ++i) {
      const Pair<Element> pair = load_shared<Pair<Element>>(line + (i + 2) * step);
      Pair<Element> result;
#pragma unroll
      for (int channel = 0; channel < 2; ++channel) {
        window[0][channel] = window[1][channel];
        window[1][channel] = window[2][channel];
        window[2][channel] = widen(pair.value[channel]);
        result.value[channel] =
            narrow<Element, Sum>(window[0][channel] * factor[0][channel] + window[1][channel] * factor[1][channel] +
                                 window[2][channel] * factor[2][channel]);
      }
      store_shared(line + i * step, result);
    }
    return;
  }
  for (int first = 0; first < outputs; first += kBlock) {
    Sum sum[kBlock][2] = {};
    for (int tap = 0; tap < taps; ++tap) {
      const Sum factor[2] = {weight(tap, 0), weight(tap, 1)};
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        if (first + i < outputs) {
          const Pair<Element> pair = load_shared<Pair<Element>>(line + ((first + i) * stride + tap) * step);
          sum[i][0] += widen(pair.value[0]) * factor[0];
          sum[i][1] += widen(pair.value[1]) * factor[1];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kBlock; ++i)
      if (first + i < outputs)
        store_shared(line + (first + i) * step,
                     Pair<Element>{{narrow<Element, Sum>(sum[i][0]), narrow<Element, Sum>(sum[i][1])}});
  }
}

// Both stages on the whole tile. The result of output pixel (image, y, x) lies at position (image * HH + y) * HW + x.
template <typename Element, typename Sum>
LOWRANK_OPS_DEVICE void depthwise(unsigned char* hidden, int row_bytes, const BlockParams& p, int thread, int threads) {
  const Geometry& g = p.geometry;
  const int halo_h = g.rows.halo(), halo_w = g.columns.halo(), pairs = int(ceil_div(g.r1, 2));
  const auto stage = [&](const Factor& factor, int lines_image, int line_step, int step, const TileAxis& axis,
                         int64_t tap_stride) {
    for (int i = thread; i < g.tile_n * lines_image * pairs; i += threads) {
      const int channel = i % pairs * 2, line = i / pairs;
      const int position = line / lines_image * halo_h * halo_w + line % lines_image * line_step;
      depthwise_line<Element, Sum>(hidden + position * row_bytes + channel * int(sizeof(Element)), step * row_bytes,
                                   axis.tile, axis.stride, axis.kernel,
                                   static_cast<const Element*>(factor.data) + channel * factor.row_stride,
                                   factor.row_stride, tap_stride, channel + 1 < g.r1);
    }
  };
  stage(p.height_factor, halo_w, 1, halo_w, g.rows, p.height_factor.tap_stride[0]);
  barrier<Barrier::kDepthwise>();
  stage(p.width_factor, g.rows.tile, halo_w, 1, g.columns, p.width_factor.tap_stride[1]);
}

}  // namespace lowrank_ops
