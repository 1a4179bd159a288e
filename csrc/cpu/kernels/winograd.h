// Winograd's F(m x m, 3x3): a 3x3 convolution of stride 1 in (m + 2)^2 products for every m^2 outputs instead of 9 m^2:
// 16 instead of 36 for m = 2, 36 instead of 144 for m = 4.
//
//   out [m x m] = A^T ((G g G^T) * (B^T d B)) A        g: 3x3 taps, d: inputs [m + 2, m + 2], *: element by element
//
//                | 1  0 -1  0 |        | 1    0    0  |
//   m = 2: B^T = | 0  1  1  0 |    G = | 1/2  1/2  1/2|    A^T = | 1  1  1  0 |
//                | 0 -1  1  0 |        | 1/2 -1/2  1/2|          | 0  1 -1 -1 |
//                | 0  1  0 -1 |        | 0    0    1  |
//
//   m = 4: from the points 0, +-a, +-b and infinity, a = 3/4 and b = 3/2 (struct Patch<4>). Errors grow with m and
//   depend on the points: with these, whose constants in A and B are exact in fp32, they are 2 to 3 times those of the
//   direct sum, with the usual 1 and 2 about 6 times.
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4. Summed over the input
// channels, each of the (m + 2)^2 places is a matrix product [patches, R1] x [R1, R2]; `place` numbers them row by row.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"

namespace lowrank_ops {
namespace LOWRANK_ISA {

constexpr int kLanesFloat = Vector<float>::kLanes;

// The one-dimensional transforms, all of `kOutputs` = m.
template <int kOutputs>
struct Patch;

template <>
struct Patch<2> {
  static inline void input(const Float (&d)[4], Float (&out)[4]) {
    out[0] = d[0] - d[2];
    out[1] = d[1] + d[2];
    out[2] = d[2] - d[1];
    out[3] = d[1] - d[3];
  }
  static inline void filter(const Float (&g)[3], Float (&out)[4]) {
    const Float half = broadcast<Float>(0.5f), outer = (g[0] + g[2]) * half, inner = g[1] * half;
    out[0] = g[0];
    out[1] = outer + inner;
    out[2] = outer - inner;
    out[3] = g[2];
  }
  static inline void output(const Float (&sum)[4], Float (&out)[2]) {
    out[0] = sum[0] + sum[1] + sum[2];
    out[1] = sum[1] - sum[2] - sum[3];
  }
};

template <>
struct Patch<4> {
  static constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;

  // Rows of B^T are the coefficients of the product of (x - point) over all points but one, the last of all of them.
  static inline void input(const Float (&d)[6], Float (&out)[6]) {
    const Float a = broadcast<Float>(kA), b = broadcast<Float>(kB), a2 = broadcast<Float>(kA2),
                b2 = broadcast<Float>(kB2), sum = broadcast<Float>(kA2 + kB2), product = broadcast<Float>(kA2 * kB2);
    const Float even_a = d[4] - b2 * d[2], odd_a = d[3] - b2 * d[1];
    const Float even_b = d[4] - a2 * d[2], odd_b = d[3] - a2 * d[1];
    out[0] = d[4] - sum * d[2] + product * d[0];
    out[1] = even_a + a * odd_a;
    out[2] = even_a - a * odd_a;
    out[3] = even_b + b * odd_b;
    out[4] = even_b - b * odd_b;
    out[5] = d[5] - sum * d[3] + product * d[1];
  }
  // Row i of G: the powers of point i, divided by the product of its distances from the other points.
  static inline void filter(const Float (&g)[3], Float (&out)[6]) {
    constexpr float kDistanceA = 2 * kA2 * (kA2 - kB2), kDistanceB = 2 * kB2 * (kB2 - kA2);
    const auto at = [&](float point, float distance, Float& plus, Float& minus) {
      const Float even = g[0] * broadcast<Float>(1 / distance) + g[2] * broadcast<Float>(point * point / distance);
      const Float odd = g[1] * broadcast<Float>(point / distance);
      plus = even + odd;
      minus = even - odd;
    };
    out[0] = g[0] * broadcast<Float>(1 / (kA2 * kB2));
    at(kA, kDistanceA, out[1], out[2]);
    at(kB, kDistanceB, out[3], out[4]);
    out[5] = g[2];
  }
  // Row k of A^T: the k-th powers of the points.
  static inline void output(const Float (&sum)[6], Float (&out)[4]) {
    const Float even_a = sum[1] + sum[2], odd_a = (sum[1] - sum[2]) * broadcast<Float>(kA);
    const Float even_b = sum[3] + sum[4], odd_b = (sum[3] - sum[4]) * broadcast<Float>(kB);
    const Float a2 = broadcast<Float>(kA2), b2 = broadcast<Float>(kB2);
    out[0] = sum[0] + even_a + even_b;
    out[1] = odd_a + odd_b;
    out[2] = a2 * even_a + b2 * even_b;
    out[3] = sum[5] + a2 * odd_a + b2 * odd_b;
  }
};

// Neighbouring patches share two columns: each is transformed along the height once.
template <int kOutputs, typename Hidden, typename Out>
static void winograd_input(const WinogradInputCall& call) {
  constexpr int kSide = kOutputs + 2;
  Out* out = static_cast<Out*>(call.out);
  const int64_t place_stride = call.out_patches * call.channels;
  for (int64_t channel = 0; channel < call.channels; channel += kLanesFloat) {
    Float columns[kSide][kSide];  // of the patch, each along the height
    // Columns beyond the last of an output that is wanted are zeros: finite, and the same whoever computes them.
    const auto load_column = [&](int64_t column, Float(&transformed)[kSide]) {
      Float values[kSide] = {};
      if (column < call.columns) {
        const int64_t at = column * call.channels + channel;
#pragma GCC unroll 6
        for (int i = 0; i < kSide; ++i) values[i] = load(static_cast<const Hidden*>(call.rows[i]) + at);
      }
      Patch<kOutputs>::input(values, transformed);
    };
    load_column(0, columns[0]);
    load_column(1, columns[1]);
    for (int64_t patch = 0; patch < call.patches; ++patch) {
#pragma GCC unroll 6
      for (int j = 2; j < kSide; ++j) load_column(kOutputs * patch + j, columns[j]);
      Out* target = out + patch * call.channels + channel;
#pragma GCC unroll 6
      for (int i = 0; i < kSide; ++i) {
        Float values[kSide], row[kSide];
#pragma GCC unroll 6
        for (int j = 0; j < kSide; ++j) values[j] = columns[j][i];
        Patch<kOutputs>::input(values, row);
#pragma GCC unroll 6
        for (int j = 0; j < kSide; ++j) store(target + (kSide * i + j) * place_stride, row[j]);
      }
#pragma GCC unroll 6
      for (int i = 0; i < kSide; ++i) {
        columns[0][i] = columns[kOutputs][i];
        columns[1][i] = columns[kOutputs + 1][i];
      }
    }
  }
}

template <int kOutputs, typename Out>
static void winograd_output(const WinogradOutputCall& call) {
  constexpr int kSide = kOutputs + 2;
  const float* sums = static_cast<const float*>(call.sums);
  const int64_t place_stride = call.sums_patches * call.sums_stride;
  for (int64_t patch = 0; patch < call.patches; ++patch) {
    const int64_t columns = call.columns - kOutputs * patch;
    for (int64_t channel = 0; channel < call.width; channel += kLanesFloat) {
      const float* source = sums + patch * call.sums_stride + channel;
      Float rows[kOutputs][kSide];
#pragma GCC unroll 6
      for (int j = 0; j < kSide; ++j) {
        Float values[kSide], column[kOutputs];
#pragma GCC unroll 6
        for (int i = 0; i < kSide; ++i) values[i] = load(source + (kSide * i + j) * place_stride);
        Patch<kOutputs>::output(values, column);
#pragma GCC unroll 4
        for (int i = 0; i < kOutputs; ++i) rows[i][j] = column[i];
      }
#pragma GCC unroll 4
      for (int i = 0; i < kOutputs; ++i) {
        if (!call.out[i]) break;
        Float values[kOutputs];
        Patch<kOutputs>::output(rows[i], values);
        Out* target = static_cast<Out*>(call.out[i]) + kOutputs * patch * call.out_stride + channel;
#pragma GCC unroll 4
        for (int j = 0; j < kOutputs; ++j)
          if (j < columns) store(target + j * call.out_stride, values[j]);
      }
    }
  }
}

// Rows [9][depth] of a weight -> a panel [places][padded_depth / group][panel_stride][group], rounded to the weight's
// own type: G g G^T for kLanes filters by kLanes units at a time, a unit being a channel or a pair of bf16 channels.
// Their taps are transposed and transformed along the height in L1. Along the width it is done row of places by row of
// places: all of them at once would write too many streams, which lie powers of two apart.
template <int kOutputs, typename T>
static void pack_winograd(const PackCall& call) {
  constexpr int kSide = kOutputs + 2;
  constexpr int kUnit = sizeof(float) / sizeof(T);
  const int64_t units = call.padded_depth / kUnit, stride = call.panel_stride;
  const T* weight = static_cast<const T*>(call.weight);
  float* panel = static_cast<float*>(call.panel);
  Float columns[kSide][kLanesFloat][3][kUnit];
  for (int64_t column = 0; column < call.padded_width; column += kLanesFloat)
    for (int64_t unit = 0; unit < units; unit += kLanesFloat) {
      const int64_t left = call.depth - unit * kUnit;
      const int64_t bytes = (left < kLanesFloat * kUnit ? left : kLanesFloat * kUnit) * int64_t(sizeof(T));
      const int64_t rows = units - unit < kLanesFloat ? units - unit : kLanesFloat;
      for (int j = 0; j < 3; ++j) {
        Float taps[3][kLanesFloat];
        for (int i = 0; i < 3; ++i) {
          const T* source = weight + column * call.row_stride + (3 * i + j) * call.depth + unit * kUnit;
          for (int filter = 0; filter < kLanesFloat; ++filter, source += call.row_stride) {
            __builtin_prefetch(source + kLanesFloat * kUnit);  // of the next units
            if (column + filter >= call.width)
              taps[i][filter] = Float{};
            else if (bytes == kVectorBytes)
              taps[i][filter] = load(reinterpret_cast<const float*>(source));
            else
              memcpy(&(taps[i][filter] = Float{}), source, size_t(bytes));
          }
          transpose(taps[i]);
        }
        for (int64_t row = 0; row < rows; ++row) {
          Float transformed[kSide];
          const auto transform = [&](int half, Float a, Float b, Float c) {
            Patch<kOutputs>::filter({a, b, c}, transformed);
#pragma GCC unroll 6
            for (int i = 0; i < kSide; ++i) columns[i][row][j][half] = transformed[i];
          };
          if constexpr (kUnit == 1) {
            transform(0, taps[0][row], taps[1][row], taps[2][row]);
          } else {  // the second of a pair lies in the upper half
            const auto first = [](Float pair) { return (Float)((FloatBits)pair << 16); };
            const auto second = [](Float pair) { return (Float)((FloatBits)pair & 0xffff0000u); };
            transform(0, first(taps[0][row]), first(taps[1][row]), first(taps[2][row]));
            transform(1, second(taps[0][row]), second(taps[1][row]), second(taps[2][row]));
          }
        }
      }
      for (int i = 0; i < kSide; ++i)
        for (int64_t row = 0; row < rows; ++row) {
          Float places[kUnit][kSide];
#pragma GCC unroll 2
          for (int half = 0; half < kUnit; ++half) {
            const auto& taps = columns[i][row];
            Patch<kOutputs>::filter({taps[0][half], taps[1][half], taps[2][half]}, places[half]);
          }
          float* out = panel + (kSide * i * units + unit + row) * stride + column;
#pragma GCC unroll 6
          for (int j = 0; j < kSide; ++j) {
            const auto bits = [](Float v) { return __builtin_convertvector(to_bfloat16(v), FloatBits); };
            if constexpr (kUnit == 1)
              store(out + j * units * stride, places[0][j]);
            else
              store(out + j * units * stride, (Float)(bits(places[0][j]) | bits(places[1][j]) << 16));
          }
        }
    }
}

template <int kOutputs, typename Element>
constexpr WinogradKernels winograd_kernels() {
  return {kOutputs, &winograd_input<kOutputs, float, Element>, &winograd_output<kOutputs, Element>,
          &pack_winograd<kOutputs, Element>};
}

}  // namespace LOWRANK_ISA
}  // namespace lowrank_ops
