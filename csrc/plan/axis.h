// The axes of a convolution, as tiles of rows and columns walk along them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "plan/integers.h"
#include "plan/problem.h"

namespace lowrank_ops {

// One axis of a convolution on its lattice: the rows (columns) that some tap reads. Position z stands for the input
// coordinate z * step - padding; output o reads the positions o * stride + tap * dilation. `stride` and `dilation` are
// in units of `step`.
struct Axis {
  int64_t in, out, kernel, step, stride, dilation, padding;

  Axis(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation)
      : in(in),
        out(output_size(in, kernel, stride, padding, dilation)),
        kernel(kernel),
        step(kernel == 1 ? stride : std::gcd(stride, dilation)),
        stride(stride / step),
        dilation(kernel == 1 ? 1 : dilation / step),
        padding(padding) {}
  int64_t span(int64_t outputs) const { return (outputs - 1) * stride + (kernel - 1) * dilation + 1; }
  int64_t coordinate(int64_t z) const { return z * step - padding; }
  int64_t first_inside() const { return (padding + step - 1) / step; }
  int64_t end_inside() const { return (in - 1 + padding) / step + 1; }

  // Those taps [begin, end) that lie in [inside_begin, inside_end), of an output whose first tap is at position z.
  struct Taps {
    int64_t begin, end;
    bool operator==(const Taps& other) const { return begin == other.begin && end == other.end; }
  };
  Taps taps_inside(int64_t z, int64_t inside_begin, int64_t inside_end) const {
    const int64_t before = std::max<int64_t>(inside_begin - z, 0), after = std::max<int64_t>(inside_end - z, 0);
    const int64_t end = std::min(ceil_div(after, dilation), kernel);
    return {std::min(ceil_div(before, dilation), end), end};
  }
};

// The two axes of a convolution.
inline Axis row_axis(const Problem& p) {
  return Axis(p.h, p.kh, p.stride[0], p.padding[0], p.dilation[0]);
}
inline Axis column_axis(const Problem& p) {
  return Axis(p.w, p.kw, p.stride[1], p.padding[1], p.dilation[1]);
}

}  // namespace lowrank_ops
