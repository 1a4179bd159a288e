// Strides and dilations in the sm90a convolutions: the input is seen as planes of pixels that lie some steps apart.
// Plain C++17.
//
// To Tucker's kernels the window has stride and dilation 1 on a plane, and a plane is a tensor like any other to TMA.
// Along one axis:
//
//   Stride 2, window 3, padding 1: a plane has some taps of the window, and every tap belongs to one plane.
//
//     output o reads           2 o - 1          2 o             2 o + 1
//                              tap 0            tap 1           tap 2
//     plane 0: pixels 1, 3...  number o - 1                     number o      first = 1, shift = -1
//     plane 1: pixels 0, 2...                   number o                      first = 0, shift = 0
//
//   Dilation 2, window 3, padding 2: the outputs fall into residue classes (plan/geometry.h), a tile into one of them;
//   output number i of class c is 2 i + c, and a class has all taps on one plane.
//
//     output i of class 0 reads    2 i - 2       2 i       2 i + 2        pixels 0, 2..., number i - 1, i, i + 1
//     output i of class 1 reads    2 i - 1       2 i + 1   2 i + 3        pixels 1, 3..., number i - 1, i, i + 1
//
// A window of one tap has one plane and one class, whatever its stride and dilation are.
//
// CP's kernel reads its window by ordinary loads, which can step over pixels. So its tiles read all pixels of their
// class as one plane, whatever the stride is.
#pragma once

#include "plan/geometry.h"

namespace lowrank_ops {

constexpr int kMostPlanes = 4;  // of all classes, both axes together: a tensor map each, among a kernel's parameters

struct PlaneAxis {
  int taps = 1;    // taps of the window that read this plane: number `plane`, and every stride-th after it
  int halo = 1;    // pixels that a tile reads
  int first = 0;   // the plane's pixels of the image are `first`, first + step, ...
  int pixels = 1;  // so many; at least one, as TMA takes no tensors of size 0
  int shift = 0;   // output i reads the pixels number i + shift, ..., i + shift + taps - 1: zeros where there are none
};

// Planes that a tile reads.
LOWRANK_OPS_BOTH constexpr int planes_of(const TileAxis& axis) {
  return least(axis.stride, axis.kernel);
}
LOWRANK_OPS_BOTH constexpr int planes_of(const Geometry& g) {
  return planes_of(g.rows) * planes_of(g.columns);
}
// Input pixels from one to the next in a plane. A dilation that divides the stride makes no planes.
LOWRANK_OPS_BOTH constexpr int plane_step(const TileAxis& axis) {
  return axis.stride * axis.unit;
}

constexpr PlaneAxis plane_of(const TileAxis& axis, int residue, int plane) {
  const int step = plane_step(axis), start = axis.input(residue, plane);  // what output 0 of the class reads first
  PlaneAxis p;
  p.taps = int(ceil_div(axis.kernel - plane, axis.stride));
  p.halo = axis.tile - 1 + p.taps;
  p.first = start % step + (start % step < 0 ? step : 0);
  p.pixels = int(ceil_div(axis.in - p.first, step));
  p.shift = (start - p.first) / step;
  if (p.first >= axis.in) p.first = 0, p.pixels = 1, p.shift = 1;  // no pixel of the image: all lie beyond pixel 0
  return p;
}

// All pixels of the input that the outputs of a class read, `axis.unit` apart. Output i reads the pixels number
// i * axis.stride + shift and the next ones.
constexpr PlaneAxis whole_class(const TileAxis& axis, int residue) {
  TileAxis unit_stride = axis;
  unit_stride.stride = 1;
  PlaneAxis p = plane_of(unit_stride, residue, 0);
  p.halo = axis.halo();
  return p;
}

// Pixels that a tile reads of the plane with the most taps.
constexpr int plane_pixels(const Geometry& g) {
  return plane_of(g.rows, 0, 0).halo * plane_of(g.columns, 0, 0).halo;
}

}  // namespace lowrank_ops
