// Winograd's F(2x2, 3x3): a 3x3 convolution of stride 1 in 16 products for every 4 outputs instead of 36.
//
//   out [2 x 2] = A^T ((G g G^T) * (B^T d B)) A        g: 3x3 taps, d: 4x4 inputs, *: element by element
//
//         | 1  0 -1  0 |        | 1    0    0  |
//   B^T = | 0  1  1  0 |    G = | 1/2  1/2  1/2|    A^T = | 1  1  1  0 |
//         | 0 -1  1  0 |        | 1/2 -1/2  1/2|          | 0  1 -1 -1 |
//         | 0  1  0 -1 |        | 0    0    1  |
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1. Summed over the input
// channels, each of the 16 places is a matrix product [patches, R1] x [R1, R2]; `place` numbers them row by row.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"

namespace lowrank_ops {
namespace LOWRANK_ISA {

constexpr int kLanesFloat = Vector<float>::kLanes;

struct Four {
  Float value[4];
};

// B^T applied to four values.
static inline Four transform_input(Float a, Float b, Float c, Float d) {
  return {{a - c, b + c, c - b, b - d}};
}

// One column of a patch after the transform along the height.
template <typename Element>
static inline Four load_column(const WinogradInputCall& call, int64_t column, int64_t channel) {
  const int64_t at = column * call.channels + channel;
  const auto row = [&](int i) { return load(static_cast<const Element*>(call.rows[i]) + at); };
  return transform_input(row(0), row(1), row(2), row(3));
}

// Neighbouring patches share two columns: each is transformed along the height once.
template <typename Hidden, typename Out>
static void winograd_input(const WinogradInputCall& call) {
  Out* out = static_cast<Out*>(call.out);
  const int64_t place_stride = call.out_patches * call.channels;
  for (int64_t channel = 0; channel < call.channels; channel += kLanesFloat) {
    Four first = load_column<Hidden>(call, 0, channel), second = load_column<Hidden>(call, 1, channel);
    for (int64_t patch = 0; patch < call.patches; ++patch) {
      const Four third = load_column<Hidden>(call, 2 * patch + 2, channel);
      // The last column of an odd number of outputs: nothing reads what it would give.
      const Four fourth = 2 * patch + 3 < call.columns ? load_column<Hidden>(call, 2 * patch + 3, channel) : third;
      Out* target = out + patch * call.channels + channel;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Four row = transform_input(first.value[i], second.value[i], third.value[i], fourth.value[i]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store(target + (4 * i + j) * place_stride, row.value[j]);
      }
      first = third;
      second = fourth;
    }
  }
}

template <typename Out>
static void winograd_output(const WinogradOutputCall& call) {
  const float* sums = static_cast<const float*>(call.sums);
  const int64_t place_stride = call.sums_patches * call.sums_stride;
  for (int64_t patch = 0; patch < call.patches; ++patch) {
    const bool both = 2 * patch + 1 < call.columns;
    for (int64_t channel = 0; channel < call.width; channel += kLanesFloat) {
      const float* source = sums + patch * call.sums_stride + channel;
      Float top[4], bottom[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const auto place = [&](int i) { return load(source + (4 * i + j) * place_stride); };
        const Float middle = place(1), lower = place(2);
        top[j] = place(0) + middle + lower;
        bottom[j] = middle - lower - place(3);
      }
      const auto write = [&](void* row, const Float* values) {
        Out* target = static_cast<Out*>(row) + 2 * patch * call.out_stride + channel;
        store(target, values[0] + values[1] + values[2]);
        if (both) store(target + call.out_stride, values[1] - values[2] - values[3]);
      };
      write(call.out[0], top);
      if (call.out[1]) write(call.out[1], bottom);
    }
  }
}

// G g G^T of one filter for a vector of channels.
static inline void transform_filter(const Float (&tap)[9], Float (&place)[16]) {
  const auto transform = [](Float a, Float b, Float c) -> Four {
    const Float half = broadcast<Float>(0.5f), outer = (a + c) * half, inner = b * half;
    return {{a, outer + inner, outer - inner, c}};
  };
  Four columns[3];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) columns[j] = transform(tap[j], tap[3 + j], tap[6 + j]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Four row = transform(columns[0].value[i], columns[1].value[i], columns[2].value[i]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) place[4 * i + j] = row.value[j];
  }
}

// Rows [9][depth] of a weight -> a panel [16][padded_depth / group][panel_stride][group], rounded to the weight's own
// type. kLanes filters by kLanes units at a time, a unit being a channel or a pair of bf16 channels: the 16 places of
// such a block fit L1, where they are transposed.
template <typename T>
static void pack_winograd(const PackCall& call) {
  constexpr int kUnit = sizeof(float) / sizeof(T);
  const int64_t units = call.padded_depth / kUnit, stride = call.panel_stride;
  const T* weight = static_cast<const T*>(call.weight);
  float* panel = static_cast<float*>(call.panel);
  Float places[16][kLanesFloat];
  for (int64_t column = 0; column < call.padded_width; column += kLanesFloat)
    for (int64_t unit = 0; unit < units; unit += kLanesFloat) {
      const int64_t left = call.depth - unit * kUnit;
      const int64_t bytes = (left < kLanesFloat * kUnit ? left : kLanesFloat * kUnit) * int64_t(sizeof(T));
      for (int filter = 0; filter < kLanesFloat; ++filter) {
        Float taps[9], place[16];
        const T* source = weight + (column + filter) * call.row_stride + unit * kUnit;
        for (int i = 0; i < 9; ++i, source += call.depth) {
          if (column + filter >= call.width)
            taps[i] = Float{};
          else if (bytes == kVectorBytes)
            taps[i] = load(reinterpret_cast<const float*>(source));
          else
            memcpy(&(taps[i] = Float{}), source, size_t(bytes));
        }
        if constexpr (kUnit == 1) {
          transform_filter(taps, place);
          for (int i = 0; i < 16; ++i) places[i][filter] = place[i];
        } else {  // the second of a pair lies in the upper half
          Float first[9], second[9], second_place[16];
          for (int i = 0; i < 9; ++i) {
            first[i] = (Float)((FloatBits)taps[i] << 16);
            second[i] = (Float)((FloatBits)taps[i] & 0xffff0000u);
          }
          transform_filter(first, place);
          transform_filter(second, second_place);
          const auto bits = [](Float v) { return __builtin_convertvector(to_bfloat16(v), FloatBits); };
          for (int i = 0; i < 16; ++i) places[i][filter] = (Float)(bits(place[i]) | bits(second_place[i]) << 16);
        }
      }
      const int64_t rows = units - unit < kLanesFloat ? units - unit : kLanesFloat;
      for (int i = 0; i < 16; ++i) {
        transpose(places[i]);
        float* out = panel + (i * units + unit) * stride + column;
        for (int row = 0; row < rows; ++row) store(out + row * stride, places[i][row]);
      }
    }
}

}  // namespace LOWRANK_ISA
}  // namespace lowrank_ops
