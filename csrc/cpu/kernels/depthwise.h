// CP's depthwise stages: vertical taps into a column of sums in L1, horizontal taps out of it.
//
//   rows kh    c c c c c c c c ...   * height_factor[kh], added  -> column [in_pixels]   vectors along the channels of
//   column     c c c c c c c c ...   * width_factor[kw], added   -> out [out_pixels]     a pixel, one vector at a time
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/plane.h"
#include "cpu/kernels/vector.h"

namespace lowrank_ops {
namespace LOWRANK_ISA {

// How many sums run side by side where taps are many. A single sum would wait for its own last addition, and each
// product would read its weight from memory.
constexpr int kSumsTogether = 8;

// One vector of channels of a depthwise call, for one output row.
template <typename T, typename Out>
struct DepthwiseVector {
  using V = typename Vector<T>::Type;
  static constexpr int kLanes = Vector<T>::kLanes;
  const DepthwiseCall& call;
  int64_t row, channel;

  __attribute__((always_inline)) inline const T* height() const {
    return static_cast<const T*>(call.height_factor) + channel;
  }
  __attribute__((always_inline)) inline const T* width() const {
    return static_cast<const T*>(call.width_factor) + channel;
  }
  __attribute__((always_inline)) inline const T* pixel(int64_t tap, int64_t p) const {
    return static_cast<const T*>(call.rows[row + tap]) + p * call.channel_stride + channel;
  }
  __attribute__((always_inline)) inline Out* out() const {
    return static_cast<Out*>(call.out) + row * call.out_row_stride + channel;
  }
  __attribute__((always_inline)) inline T* column() const { return static_cast<T*>(call.column); }
};

// Vertical taps, kSumsTogether pixels at a time; returns the first pixel that is left.
template <typename T, typename Out>
__attribute__((always_inline)) static inline int64_t add_height_together(const DepthwiseVector<T, Out>& v) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  const DepthwiseCall& call = v.call;
  int64_t p = 0;
  for (; p + kSumsTogether <= call.in_pixels; p += kSumsTogether) {
    V sums[kSumsTogether];
#pragma GCC unroll 8
    for (int j = 0; j < kSumsTogether; ++j) sums[j] = V{};
    for (int64_t i = 0; i < call.kh; ++i) {
      const V w = load(v.height() + i * call.channel_stride);
      const T* first = v.pixel(i, p);
#pragma GCC unroll 8
      for (int j = 0; j < kSumsTogether; ++j) sums[j] += load(first + j * call.channel_stride) * w;
    }
#pragma GCC unroll 8
    for (int j = 0; j < kSumsTogether; ++j) store(v.column() + (p + j) * kLanes, sums[j]);
  }
  return p;
}

// Horizontal taps, kSumsTogether outputs at a time, the last of which may overlap; returns the first output that is
// left.
template <typename T, typename Out>
__attribute__((always_inline)) static inline int64_t add_width_together(const DepthwiseVector<T, Out>& v) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  const DepthwiseCall& call = v.call;
  int64_t o = 0;
  while (o < call.out_pixels && call.out_pixels >= kSumsTogether) {
    o = o + kSumsTogether <= call.out_pixels ? o : call.out_pixels - kSumsTogether;
    V sums[kSumsTogether];
#pragma GCC unroll 8
    for (int j = 0; j < kSumsTogether; ++j) sums[j] = V{};
    const T* first = v.column() + o * call.stride * kLanes;
    for (int64_t i = 0; i < call.kw; ++i, first += call.dilation * kLanes) {
      const V w = load(v.width() + i * call.channel_stride);
#pragma GCC unroll 8
      for (int j = 0; j < kSumsTogether; ++j) sums[j] += load(first + j * call.stride * kLanes) * w;
    }
#pragma GCC unroll 8
    for (int j = 0; j < kSumsTogether; ++j) store(v.out() + (o + j) * call.channel_stride, sums[j]);
    o += kSumsTogether;
  }
  return o;
}

// One output row of a kernel of kTaps x kTaps, whose weights stay in registers; kTaps = 0: of any size.
template <typename T, typename Out, int kTaps>
static void depthwise_taps(const DepthwiseCall& call, int64_t row) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  T* column = static_cast<T*>(call.column);
  const int64_t kh = kTaps ? kTaps : call.kh, kw = kTaps ? kTaps : call.kw;
  V weight[kTaps ? kTaps : 1];
  for (int64_t channel = 0; channel < call.channels; channel += kLanes) {
    const DepthwiseVector<T, Out> vector{call, row, channel};
    const T* height = vector.height();
    const T* width = vector.width();
    if constexpr (kTaps > 0)
      for (int i = 0; i < kTaps; ++i) weight[i] = load(height + i * call.channel_stride);
    int64_t p = 0;
    if constexpr (kTaps == 0) p = add_height_together(vector);
    for (; p < call.in_pixels; ++p) {
      V sum = V{};
#pragma GCC unroll 8
      for (int64_t i = 0; i < kh; ++i) {
        const V w = kTaps ? weight[kTaps ? i : 0] : load(height + i * call.channel_stride);
        sum += load(vector.pixel(i, p)) * w;
      }
      store(column + p * kLanes, sum);
    }
    if constexpr (kTaps > 0)
      for (int i = 0; i < kTaps; ++i) weight[i] = load(width + i * call.channel_stride);
    Out* out = vector.out();
    int64_t o = 0;
    if constexpr (kTaps == 0) o = add_width_together(vector);
    for (; o < call.out_pixels; ++o) {
      V sum = V{};
#pragma GCC unroll 8
      for (int64_t i = 0; i < kw; ++i) {
        const V w = kTaps ? weight[kTaps ? i : 0] : load(width + i * call.channel_stride);
        sum += load(column + (o * call.stride + i * call.dilation) * kLanes) * w;
      }
      store(out + o * call.channel_stride, sum);
    }
  }
}

// 3x3 taps of stride and dilation 1, for kRows output rows and kVectors vectors of channels. The vertical sums of the
// last three pixels stay in registers while the window slides along the row; a value that two output rows both need is
// loaded once.
//
//   pixel - 1    pixel     pixel + 1
//     left       middle      right      vertical sums, kRows x kVectors each; * width_factor[0..2], added -> out[pixel]
//
// kVectors is more than one, although not all of their sums fit the registers: pixels lie channel_stride apart, and
// rows in L2 are read at half the speed if only one line per pixel is read (256 channels, 56 pixels, Zen 5: 29 cycles
// with one vector, 12 with several).
template <typename T, typename Out, int kRows, int kVectors>
struct DepthwiseWindow {
  using V = typename Vector<T>::Type;
  static constexpr int kLanes = Vector<T>::kLanes;
  typedef V Column[kRows][kVectors];
  V height[3][kVectors], width[3][kVectors];
  const T* in[kRows + 2];
  Out* out[kRows];
  int64_t stride;

  __attribute__((always_inline)) inline DepthwiseWindow(const DepthwiseCall& call, int64_t row, int64_t channel)
      : stride(call.channel_stride) {
    const T* height_factor = static_cast<const T*>(call.height_factor) + channel;
    const T* width_factor = static_cast<const T*>(call.width_factor) + channel;
#pragma GCC unroll 3
    for (int tap = 0; tap < 3; ++tap)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        height[tap][v] = load(height_factor + tap * stride + v * kLanes);
        width[tap][v] = load(width_factor + tap * stride + v * kLanes);
      }
    for (int i = 0; i < kRows + 2; ++i) in[i] = static_cast<const T*>(call.rows[row + i]) + channel;
    for (int i = 0; i < kRows; ++i) out[i] = static_cast<Out*>(call.out) + (row + i) * call.out_row_stride + channel;
  }
  // The vertical sums of an input pixel.
  __attribute__((always_inline)) inline void load_column(Column& column, int64_t pixel) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      V value[kRows + 2];
#pragma GCC unroll 4
      for (int i = 0; i < kRows + 2; ++i) value[i] = load(in[i] + pixel * stride + v * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        column[i][v] = V{};
#pragma GCC unroll 3
        for (int tap = 0; tap < 3; ++tap) column[i][v] += value[i + tap] * height[tap][v];
      }
    }
  }
  __attribute__((always_inline)) inline void write(int64_t pixel, const Column& left, const Column& middle,
                                                   const Column& right) const {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        V sum = V{};
        sum += left[i][v] * width[0][v];
        sum += middle[i][v] * width[1][v];
        sum += right[i][v] * width[2][v];
        store(out[i] + pixel * stride + v * kLanes, sum);
      }
  }
};

template <typename T, typename Out, int kRows, int kVectors>
static inline void depthwise_window(const DepthwiseCall& call, int64_t row, int64_t channel) {
  using Window = DepthwiseWindow<T, Out, kRows, kVectors>;
  const Window window(call, row, channel);
  typename Window::Column first, second, third;
  window.load_column(first, 0);
  window.load_column(second, 1);
  int64_t pixel = 0;
  for (; pixel + 3 <= call.out_pixels; pixel += 3) {
    window.load_column(third, pixel + 2);
    window.write(pixel, first, second, third);
    window.load_column(first, pixel + 3);
    window.write(pixel + 1, second, third, first);
    window.load_column(second, pixel + 4);
    window.write(pixel + 2, third, first, second);
  }
  for (; pixel < call.out_pixels; ++pixel) {
    window.load_column(third, pixel + 2);
    window.write(pixel, first, second, third);
    memcpy(&first, &second, sizeof(first));
    memcpy(&second, &third, sizeof(second));
  }
}

template <typename T, typename Out, int kRows>
static inline void depthwise_windows(const DepthwiseCall& call, int64_t row) {
  constexpr int kLanes = Vector<T>::kLanes, kVectors = kVectorBytes == 64 ? 4 : 2;
  int64_t channel = 0;
  for (; channel + kVectors * kLanes <= call.channels; channel += kVectors * kLanes)
    depthwise_window<T, Out, kRows, kVectors>(call, row, channel);
  for (; channel < call.channels; channel += kLanes) depthwise_window<T, Out, kRows, 1>(call, row, channel);
}

// A kernel of 1x1, as in the CP block of a pointwise convolution: it scales each channel and needs no column.
template <typename T, typename Out>
static void depthwise_point(const DepthwiseCall& call) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  const T* height = static_cast<const T*>(call.height_factor);
  const T* width = static_cast<const T*>(call.width_factor);
  for (int64_t row = 0; row < call.out_rows; ++row) {
    const T* in = static_cast<const T*>(call.rows[row]);
    Out* out = static_cast<Out*>(call.out) + row * call.out_row_stride;
    for (int64_t p = 0; p < call.out_pixels; ++p) {
      for (int64_t channel = 0; channel < call.channels; channel += kLanes) {
        V column = V{}, sum = V{};
        column += load(in + channel) * load(height + channel);
        sum += column * load(width + channel);
        store(out + channel, sum);
      }
      in += call.stride * call.channel_stride;
      out += call.channel_stride;
    }
  }
}

template <typename T, typename Out>
static void depthwise(const DepthwiseCall& call) {
  if constexpr (sizeof(Out) == sizeof(T))
    if (call.channel_stride == 1) return depthwise_plane<T>(call);
  if (call.kh == 1 && call.kw == 1) return depthwise_point<T, Out>(call);
  int64_t row = 0;
  if (call.kh == 3 && call.kw == 3 && call.stride == 1 && call.dilation == 1) {
    constexpr int kRows = kVectorBytes == 64 ? 2 : 1;  // as many as fit the registers
    for (; row + kRows <= call.out_rows; row += kRows) depthwise_windows<T, Out, kRows>(call, row);
    for (; row < call.out_rows; ++row) depthwise_windows<T, Out, 1>(call, row);
    return;
  }
  for (; row < call.out_rows; ++row) {
    if (call.kh == 3 && call.kw == 3)
      depthwise_taps<T, Out, 3>(call, row);
    else if (call.kh == 5 && call.kw == 5)
      depthwise_taps<T, Out, 5>(call, row);
    else
      depthwise_taps<T, Out, 0>(call, row);
  }
}

}  // namespace LOWRANK_ISA
}  // namespace lowrank_ops
