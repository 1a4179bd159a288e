// Winograd's transforms. F(m x m, 3x3): a 3x3 convolution of stride 1 in (m + 2)^2 products for every m^2 outputs
// instead of 9 m^2: 16 instead of 36 for m = 2, 36 instead of 144 for m = 4.
//
//   out [m x m] = A^T ((G g G^T) * (B^T d B)) A        g: 3x3 taps, d: inputs [m + 2, m + 2], *: element by element
//
//                | 1  0 -1  0 |        | 1    0    0  |
//   m = 2: B^T = | 0  1  1  0 |    G = | 1/2  1/2  1/2|    A^T = | 1  1  1  0 |
//                | 0 -1  1  0 |        | 1/2 -1/2  1/2|          | 0  1 -1 -1 |
//                | 0  1  0 -1 |        | 0    0    1  |
//
// F(3, 3) along a line, A^T ((G g) * (B^T d)): 5 products for 3 outputs and 3 taps instead of 9. Longer kernels are
// sums over groups of three taps.
//
// The matrices come from the points at which polynomials are evaluated: m = 2 from 0, +-1, infinity; m = 3 from +-3/8,
// +-5/4, infinity; m = 4 from 0, +-3/4, +-3/2, infinity. Errors grow with m and depend on the points. The constants
// that these points give in A and B are exact in fp32. With them the errors of 4x4 outputs are 2 to 3 times the direct
// sum's (6 times with 0, +-1, +-2); those of lines equal the direct sum's in fp32 and are 1.5 times as large in bf16
// (2.0 times with 0, +-1, 2).
//
// Summed over the input channels, each *place* (an element of the product *) is a matrix product [patches, R1] x [R1,
// R2]. Places are numbered row by row. Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016,
// section 4.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"

namespace lowrank_ops {
namespace LOWRANK_ISA {

constexpr int kLanesFloat = Vector<float>::kLanes;

// The one-dimensional transforms for `kOutputs` = m. Row i of B^T holds the coefficients of the product of (x - point)
// over all points but point i, the last row that over all of them; row i of G the powers of point i, divided by the
// product of its distances from the others; row k of A^T the k-th powers of the points.
template <int kOutputs>
struct Transform;

template <>
struct Transform<2> {
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
struct Transform<3> {
  static constexpr float kA = 0.375f, kB = 1.25f, kA2 = kA * kA, kB2 = kB * kB;

  static inline void input(const Float (&d)[5], Float (&out)[5]) {
    const Float a = broadcast<Float>(kA), b = broadcast<Float>(kB), a2 = broadcast<Float>(kA2),
                b2 = broadcast<Float>(kB2), sum = broadcast<Float>(kA2 + kB2), product = broadcast<Float>(kA2 * kB2);
    const Float odd_a = d[3] - b2 * d[1], even_a = a * (d[2] - b2 * d[0]);
    const Float odd_b = d[3] - a2 * d[1], even_b = b * (d[2] - a2 * d[0]);
    out[0] = odd_a + even_a;
    out[1] = odd_a - even_a;
    out[2] = odd_b + even_b;
    out[3] = odd_b - even_b;
    out[4] = d[4] - sum * d[2] + product * d[0];
  }
  static inline void filter(const Float (&g)[3], Float (&out)[5]) {
    const auto at = [&](float point, float other, Float& plus, Float& minus) {
      const float distance = 2 * (point * point - other * other);  // over point, and of the other sign for -point
      const Float even = g[0] * broadcast<Float>(1 / (point * distance)) + g[2] * broadcast<Float>(point / distance);
      const Float odd = g[1] * broadcast<Float>(1 / distance);
      plus = odd + even;
      minus = odd - even;
    };
    at(kA, kB, out[0], out[1]);
    at(kB, kA, out[2], out[3]);
    out[4] = g[2];
  }
  static inline void output(const Float (&sum)[5], Float (&out)[3]) {
    const Float even_a = sum[0] + sum[1], odd_a = sum[0] - sum[1], even_b = sum[2] + sum[3], odd_b = sum[2] - sum[3];
    out[0] = even_a + even_b;
    out[1] = broadcast<Float>(kA) * odd_a + broadcast<Float>(kB) * odd_b;
    out[2] = broadcast<Float>(kA2) * even_a + broadcast<Float>(kB2) * even_b + sum[4];
  }
};

template <>
struct Transform<4> {
  static constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;

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

// Transforms the columns of a patch along the height, then its rows. Neighbouring patches share two columns, which are
// transformed along the height once.
template <int kOutputs, typename Hidden, typename Out>
static void winograd_input(const WinogradInputCall& call) {
  constexpr int kSide = kOutputs + 2;
  Out* out = static_cast<Out*>(call.out);
  const int64_t place_stride = call.out_patches * call.channels;
  for (int64_t channel = 0; channel < call.channels; channel += kLanesFloat) {
    Float columns[kSide][kSide];  // of the patch, each along the height
    // No output reads columns beyond the last one (at the image's edge): any finite values may stand for them.
    const auto load_column = [&](int64_t column, Float(&transformed)[kSide]) {
      const int64_t at = (column < call.columns ? column : call.columns - 1) * call.channels + channel;
      Float values[kSide];
#pragma GCC unroll 6
      for (int i = 0; i < kSide; ++i) values[i] = load(static_cast<const Hidden*>(call.rows[i]) + at);
      Transform<kOutputs>::input(values, transformed);
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
        Transform<kOutputs>::input(values, row);
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
        Transform<kOutputs>::output(values, column);
#pragma GCC unroll 4
        for (int i = 0; i < kOutputs; ++i) rows[i][j] = column[i];
      }
#pragma GCC unroll 4
      for (int i = 0; i < kOutputs; ++i) {
        if (!call.out[i]) break;
        Float values[kOutputs];
        Transform<kOutputs>::output(rows[i], values);
        Out* target = static_cast<Out*>(call.out[i]) + kOutputs * patch * call.out_stride + channel;
#pragma GCC unroll 4
        for (int j = 0; j < kOutputs; ++j)
          if (j < columns) store(target + j * call.out_stride, values[j]);
      }
    }
  }
}

// A line's patches are three columns apart, and share two.
template <typename Hidden, typename Out>
static void winograd_line_input(const WinogradInputCall& call) {
  Out* out = static_cast<Out*>(call.out);
  const Hidden* row = static_cast<const Hidden*>(call.rows[0]);
  const int64_t place_stride = call.out_patches * call.channels;
  for (int64_t patch = 0; patch < call.patches; ++patch, row += 3 * call.channels) {
    const int64_t columns = call.columns - 3 * patch;  // beyond are zeros
    for (int64_t channel = 0; channel < call.channels; channel += kLanesFloat) {
      Float values[5], transformed[5];
#pragma GCC unroll 5
      for (int j = 0; j < 5; ++j) values[j] = j < columns ? load(row + j * call.channels + channel) : Float{};
      Transform<3>::input(values, transformed);
      Out* target = out + patch * call.channels + channel;
#pragma GCC unroll 5
      for (int place = 0; place < 5; ++place) store(target + place * place_stride, transformed[place]);
    }
  }
}

template <typename Out>
static void winograd_line_output(const WinogradOutputCall& call) {
  const float* sums = static_cast<const float*>(call.sums);
  const int64_t place_stride = call.sums_patches * call.sums_stride;
  for (int64_t patch = 0; patch < call.patches; ++patch) {
    const int64_t columns = call.columns - 3 * patch;
    for (int64_t channel = 0; channel < call.width; channel += kLanesFloat) {
      const float* source = sums + patch * call.sums_stride + channel;
      Float values[5], outputs[3];
#pragma GCC unroll 5
      for (int place = 0; place < 5; ++place) values[place] = load(source + place * place_stride);
      Transform<3>::output(values, outputs);
      Out* target = static_cast<Out*>(call.out[0]) + 3 * patch * call.out_stride + channel;
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j)
        if (j < columns) store(target + j * call.out_stride, outputs[j]);
    }
  }
}

// Packing: kLanes filters by kLanes units at a time, a unit being a channel or a pair of bf16 channels. The taps are
// transposed to vectors of filters in L1, then transformed.
template <typename T>
struct FilterBlock {
  static constexpr int kUnit = sizeof(float) / sizeof(T);
  const PackCall& call;
  int64_t column, unit;

  int64_t rows() const {
    const int64_t left = call.padded_depth / kUnit - unit;
    return left < kLanesFloat ? left : kLanesFloat;
  }
  // One tap of the block, [unit][filter]; zeros beyond the weight.
  void load_tap(int64_t tap, Float (&values)[kLanesFloat]) const {
    const T* source = static_cast<const T*>(call.weight) + column * call.row_stride + tap * call.depth + unit * kUnit;
    const int64_t left = call.depth - unit * kUnit;
    const int64_t bytes = (left < kLanesFloat * kUnit ? left : kLanesFloat * kUnit) * int64_t(sizeof(T));
    for (int filter = 0; filter < kLanesFloat; ++filter, source += call.row_stride) {
      __builtin_prefetch(source + kLanesFloat * kUnit);  // the next units
      if (column + filter >= call.width || tap >= call.num_taps)
        values[filter] = Float{};
      else if (bytes == kVectorBytes)
        values[filter] = load(reinterpret_cast<const float*>(source));
      else
        memcpy(&(values[filter] = Float{}), source, size_t(bytes));
    }
    transpose(values);
  }
  // Channel `half` of a unit.
  static Float channel(Float unit, int half) {
    if constexpr (kUnit == 1) return unit;
    return half == 0 ? (Float)((FloatBits)unit << 16) : (Float)((FloatBits)unit & 0xffff0000u);
  }
  // A unit of the panel from its channels.
  static Float joined(const Float (&channels)[kUnit]) {
    if constexpr (kUnit == 1) {
      return channels[0];
    } else {
      const auto bits = [](Float v) { return __builtin_convertvector(to_bfloat16(v), FloatBits); };
      return (Float)(bits(channels[0]) | bits(channels[1]) << 16);
    }
  }
};

template <typename T, typename PackBlock>
static inline void pack_filters(const PackCall& call, const PackBlock& pack_block) {
  for (int64_t column = 0; column < call.padded_width; column += kLanesFloat)
    for (int64_t unit = 0; unit < call.padded_depth / FilterBlock<T>::kUnit; unit += kLanesFloat)
      pack_block(FilterBlock<T>{call, column, unit});
}

// Rows [9][depth] of a weight -> a panel [places][padded_depth / group][panel_stride][group], rounded to the weight's
// own type. The transform along the width writes one row of places after the other: all places at once would be too
// many streams, which lie powers of two apart.
template <int kOutputs, typename T>
static void pack_winograd(const PackCall& call) {
  constexpr int kSide = kOutputs + 2, kUnit = FilterBlock<T>::kUnit;
  const int64_t units = call.padded_depth / kUnit, stride = call.panel_stride;
  Float columns[kSide][kLanesFloat][3][kUnit];
  pack_filters<T>(call, [&](const FilterBlock<T>& block) {
    const int64_t rows = block.rows();
    for (int j = 0; j < 3; ++j) {
      Float taps[3][kLanesFloat];
      for (int i = 0; i < 3; ++i) block.load_tap(3 * i + j, taps[i]);
      for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 2
        for (int half = 0; half < kUnit; ++half) {
          Float transformed[kSide];
          Transform<kOutputs>::filter(
              {block.channel(taps[0][row], half), block.channel(taps[1][row], half), block.channel(taps[2][row], half)},
              transformed);
#pragma GCC unroll 6
          for (int i = 0; i < kSide; ++i) columns[i][row][j][half] = transformed[i];
        }
    }
    for (int i = 0; i < kSide; ++i)
      for (int64_t row = 0; row < rows; ++row) {
        Float places[kUnit][kSide];
#pragma GCC unroll 2
        for (int half = 0; half < kUnit; ++half) {
          const auto& taps = columns[i][row];
          Transform<kOutputs>::filter({taps[0][half], taps[1][half], taps[2][half]}, places[half]);
        }
        float* out = static_cast<float*>(call.panel) + (kSide * i * units + block.unit + row) * stride + block.column;
#pragma GCC unroll 6
        for (int j = 0; j < kSide; ++j) {
          Float channels[kUnit];
          for (int half = 0; half < kUnit; ++half) channels[half] = places[half][j];
          store(out + j * units * stride, block.joined(channels));
        }
      }
  });
}

// Rows [KW][depth] -> a panel [5 places][groups of taps][padded_depth / group][panel_stride][group].
template <typename T>
static void pack_winograd_line(const PackCall& call) {
  constexpr int kUnit = FilterBlock<T>::kUnit;
  const int64_t units = call.padded_depth / kUnit, stride = call.panel_stride, groups = (call.num_taps + 2) / 3;
  pack_filters<T>(call, [&](const FilterBlock<T>& block) {
    for (int64_t group = 0; group < groups; ++group) {
      Float taps[3][kLanesFloat];
      for (int i = 0; i < 3; ++i) block.load_tap(3 * group + i, taps[i]);
      for (int64_t row = 0; row < block.rows(); ++row) {
        Float places[kUnit][5];
#pragma GCC unroll 2
        for (int half = 0; half < kUnit; ++half)
          Transform<3>::filter(
              {block.channel(taps[0][row], half), block.channel(taps[1][row], half), block.channel(taps[2][row], half)},
              places[half]);
        float* out = static_cast<float*>(call.panel) + (group * units + block.unit + row) * stride + block.column;
#pragma GCC unroll 5
        for (int place = 0; place < 5; ++place) {
          Float channels[kUnit];
          for (int half = 0; half < kUnit; ++half) channels[half] = places[half][place];
          store(out + place * groups * units * stride, block.joined(channels));
        }
      }
    }
  });
}

// Patches of kOutputs x kOutputs outputs.
template <int kOutputs, typename Element>
constexpr WinogradKernels square_kernels() {
  return {kOutputs + 2, &winograd_input<kOutputs, float, Element>, &winograd_output<kOutputs, Element>,
          &pack_winograd<kOutputs, Element>};
}

template <typename Element>
constexpr WinogradKernels line_kernels() {
  return {1, &winograd_line_input<float, Element>, &winograd_line_output<Element>, &pack_winograd_line<Element>};
}

}  // namespace LOWRANK_ISA
}  // namespace lowrank_ops
