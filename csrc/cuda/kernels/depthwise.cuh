// CP's depthwise stages, in place in the hidden tile [positions, R].
//
// A thread owns two neighbouring channels of one line (a column of the tile for the height factor, a row for the width
// factor) and walks along it. Output i needs the inputs from i * stride on, and i * stride >= i. The thread writes
// output i to position i after reading its inputs, so it overwrites nothing that is still needed. Neighbouring lanes
// hold neighbouring channels, without bank conflicts.
//
//             x →  one thread of the height stage: channels c, c + 1 of column x, rows from top to bottom
//        y ┌────────────┐
//        ↓ │  │ hidden  │  positions [image, y, x], each with R channels
//          │  ▼ tile    │
//          └────────────┘  the width stage: one thread per two channels and row, from left to right
#pragma once

#include "cuda/kernels/epilogue.cuh"

namespace lowrank_ops {

// The work item of a thread: two channels of a line. The thread's next item is as many items away as the CTA has
// threads; that step is an addition, so nothing is divided in the loop.
struct DepthwiseWork {
  int pair, line, image;  // pair of channels; line within its image

  // Moves on by `steps`. An image has `pairs` x `lines` items.
  LOWRANK_OPS_DEVICE void advance(const DepthwiseWork& steps, int pairs, int lines) {
    pair += steps.pair;
    line += steps.line;
    image += steps.image;
    if (pair >= pairs) {
      pair -= pairs;
      ++line;
    }
    if (line >= lines) {
      line -= lines;
      ++image;
    }
  }
  static LOWRANK_OPS_DEVICE DepthwiseWork of(int index, int pairs, int lines) {
    const int line = index / pairs, image = line / lines;
    return {index - line * pairs, line - image * lines, image};
  }
};

// One stage for two channels of a line: the factor, with taps tap_stride elements apart, and the axis. `last`: a
// product reads the results.
template <typename Kernel, bool last>
class DepthwiseLine {
  using Element = typename Kernel::Element;
  using Sum = typename Kernel::Sum;

 public:
  LOWRANK_OPS_DEVICE DepthwiseLine(const Factor& factor, int64_t tap_stride, const TileAxis& axis, int step)
      : factor(factor), tap_stride(tap_stride), axis(axis), step(step) {}

  // Selects the weights of this channel and, where there is a `second` one, of the next.
  LOWRANK_OPS_DEVICE void set_channel(int channel, bool second) {
    weights = static_cast<const Element*>(factor.data) + channel * factor.row_stride;
    has_second = second;
    if (is_common())
#pragma unroll
      for (int tap = 0; tap < 3; ++tap)
#pragma unroll
        for (int i = 0; i < 2; ++i) common[tap][i] = weight(tap, i);
  }

  // `line`: address of the line's first position.
  LOWRANK_OPS_DEVICE void run(unsigned char* line) const {
    if (is_common())
      three_taps(line);
    else
      any_taps(line);
  }

 private:
  const Factor& factor;
  const int64_t tap_stride;
  const TileAxis& axis;
  const int step;  // bytes between positions
  const Element* weights = nullptr;
  bool has_second = false;
  Sum common[3][2] = {};

  LOWRANK_OPS_DEVICE bool is_common() const { return axis.kernel == 3 && axis.stride == 1; }
  LOWRANK_OPS_DEVICE Sum weight(int tap, int i) const {
    return i == 1 && !has_second ? Sum(0)
                                 : Sum(widen(load_global<Element>(weights + i * factor.row_stride + tap * tap_stride)));
  }

  static LOWRANK_OPS_DEVICE void load(const unsigned char* from, Sum (&wide)[2]) {
    widen_pair(Element{}, load_shared<Packed<Element>>(from), wide);
  }
  static LOWRANK_OPS_DEVICE void store(unsigned char* to, const Sum (&sum)[2]) {
    if constexpr (last)
      store_shared(to, Kernel::Engine::hidden_pair(sum[0], sum[1]));
    else
      store_shared(to, Kernel::Engine::narrow_both(sum[0], sum[1]));
  }

  // Loads every input once. Outputs come in blocks of four, so that the loads of a block precede its stores.
  LOWRANK_OPS_DEVICE void three_taps(unsigned char* line) const {
    Sum before[2][2];
    load(line, before[0]);
    load(line + step, before[1]);
    int left = axis.tile;
    for (; left >= 4; left -= 4) line = three_taps_of<4>(line, before);
#pragma unroll 1
    for (; left > 0; --left) line = three_taps_of<1>(line, before);
  }
  // Computes `outputs` outputs from `line` on; `before` holds their first two inputs. On return `before` holds those of
  // the next outputs; returns the next outputs' position.
  template <int outputs>
  LOWRANK_OPS_DEVICE unsigned char* three_taps_of(unsigned char* line, Sum (&before)[2][2]) const {
    Sum input[outputs + 2][2];
    unsigned char* place[outputs + 3] = {line};
#pragma unroll
    for (int i = 1; i < outputs + 3; ++i) place[i] = place[i - 1] + step;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int channel = 0; channel < 2; ++channel) input[i][channel] = before[i][channel];
#pragma unroll
    for (int i = 2; i < outputs + 2; ++i) load(place[i], input[i]);
#pragma unroll
    for (int i = 0; i < outputs; ++i) {
      Sum sum[2];
#pragma unroll
      for (int channel = 0; channel < 2; ++channel)
        sum[channel] = input[i][channel] * common[0][channel] + input[i + 1][channel] * common[1][channel] +
                       input[i + 2][channel] * common[2][channel];
      store(place[i], sum);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int channel = 0; channel < 2; ++channel) before[i][channel] = input[outputs + i][channel];
    return place[outputs];
  }

  // Blocks of 8 outputs share the load of a tap's weights.
  LOWRANK_OPS_DEVICE void any_taps(unsigned char* line) const {
    constexpr int block = 8;
    for (int first = 0; first < axis.tile; first += block) {
      Sum sum[block][2] = {};
      for (int tap = 0; tap < axis.kernel; ++tap) {
        const Sum factors[2] = {weight(tap, 0), weight(tap, 1)};
#pragma unroll
        for (int i = 0; i < block; ++i) {
          if (first + i < axis.tile) {
            Sum input[2];
            load(line + ((first + i) * axis.stride + tap) * step, input);
            sum[i][0] += input[0] * factors[0];
            sum[i][1] += input[1] * factors[1];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < block; ++i)
        if (first + i < axis.tile) store(line + (first + i) * step, sum[i]);
    }
  }
};

// One stage on the whole tile. An image has `of_image` positions and `lines` lines; lines begin `line_step` positions
// apart, and the positions of a line are `step` apart.
template <typename Kernel, bool last>
LOWRANK_OPS_DEVICE void depthwise_stage(unsigned char* hidden, int row_bytes, const Geometry& g, const Factor& factor,
                                        int64_t tap_stride, const TileAxis& axis, int lines, int line_step, int step,
                                        int of_image, int thread) {
  const int pairs = int(ceil_div(g.r1, 2));
  DepthwiseLine<Kernel, last> stage(factor, tap_stride, axis, step * row_bytes);
  DepthwiseWork work = DepthwiseWork::of(thread, pairs, lines);
  const DepthwiseWork steps = DepthwiseWork::of(Kernel::threads, pairs, lines);
  for (int previous = -1; work.image < g.tile_n; work.advance(steps, pairs, lines)) {
    const int channel = 2 * work.pair;
    if (channel != previous) stage.set_channel(channel, channel + 1 < g.r1);
    previous = channel;
    const int position = work.image * of_image + work.line * line_step;
    stage.run(hidden + position * row_bytes + channel * Kernel::element);
  }
}

// Both stages. The result of output pixel (image, y, x) then lies at position (image * HH + y) * HW + x of the hidden
// tile, where HH and HW are the halo's height and width.
template <typename Kernel>
LOWRANK_OPS_DEVICE void depthwise(unsigned char* hidden, int row_bytes, const BlockParams& p, int thread) {
  const Geometry& g = p.geometry;
  const int halo_h = g.rows.halo(), halo_w = g.columns.halo();
  depthwise_stage<Kernel, false>(hidden, row_bytes, g, p.height_factor, p.height_factor.tap_stride[0], g.rows, halo_w,
                                 1, halo_w, halo_h * halo_w, thread);
  barrier<Barrier::kDepthwise>();
  depthwise_stage<Kernel, true>(hidden, row_bytes, g, p.width_factor, p.width_factor.tap_stride[1], g.columns,
                                g.rows.tile, halo_w, 1, halo_h * halo_w, thread);
}

}  // namespace lowrank_ops
