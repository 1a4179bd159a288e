// Kernels for images in planes, with vectors along the pixels.
//
// Sums over the channels are the first stage of a block with a rank of one, in NCHW (cpu/channel_sum.h). kPlanes
// channels are added at a time: the hardware can prefetch that many streams, but not one for each of all channels.
//
//                     pixels
//   channel k         v0  v1  v2  ...   * factor[k]
//    ...                                             added to sums v0 v1 v2 ..., which wait in L1 for the next channels
//   k + kPlanes - 1   v0  v1  v2  ...
//
// Each sum runs over the channels in their order, whichever pixel it belongs to.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"

namespace lowrank_ops {
namespace LOWRANK_ISA {

constexpr int kPlanes = 8;
constexpr int kBlock = 4;  // vectors of a plane that go through a loop together

// Adds channels [channel, channel + kCount) for all pixels; channel 0 begins the sums.
template <typename T, typename In, int kCount>
static inline void add_channels(const PlaneCall& call, int64_t channel) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  const In* in[kCount];
  V w[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    in[i] = static_cast<const In*>(call.in) + (channel + i) * call.channel_stride;
    w[i] = broadcast<V>(static_cast<const T*>(call.factor)[channel + i]);
  }
  T* sums = static_cast<T*>(call.sums);
  int64_t pixel = 0;
  for (; pixel + kLanes <= call.pixels; pixel += kLanes) {
    V sum = channel > 0 ? load(sums + pixel) : V{};
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) sum += load(in[i] + pixel) * w[i];
    store(sums + pixel, sum);
  }
  if (const int64_t left = call.pixels - pixel; left > 0) {
    V sum = channel > 0 ? load_part(sums + pixel, left) : V{};
    for (int i = 0; i < kCount; ++i) sum += load_part(in[i] + pixel, left) * w[i];
    store_part(sums + pixel, sum, left);
  }
}

template <typename T, typename In>
static void add_planes(const PlaneCall& call) {
  int64_t channel = 0;
  for (; channel + kPlanes <= call.channels; channel += kPlanes) add_channels<T, In, kPlanes>(call, channel);
  for (; channel < call.channels; ++channel) add_channels<T, In, 1>(call, channel);
}

// CP's depthwise stages for a plane: vectors along the pixels, each tap reads them at its own offset.
//
//   rows kh    p p p p p p p p ...   * height_factor[kh], added  -> column  p p p p p p p p ...
//   column     p p p p p p p p ...   * width_factor[kw], each kw from kw * dilation on, added -> out
//
// With a stride, the outputs of a vector would read pixels that are not neighbours: one output at a time.
template <typename T>
static void depthwise_plane(const DepthwiseCall& call) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  const T* height = static_cast<const T*>(call.height_factor);
  const T* width = static_cast<const T*>(call.width_factor);
  T* column = static_cast<T*>(call.column);
  for (int64_t row = 0; row < call.out_rows; ++row) {
    for (int64_t p = 0; p < call.in_pixels; p += kLanes) {
      const int64_t left = call.in_pixels - p;
      V sum = V{};
      for (int64_t i = 0; i < call.kh; ++i) {
        const T* in = static_cast<const T*>(call.rows[row + i]) + p;
        sum += (left < kLanes ? load_part(in, left) : load(in)) * height[i * kLanes];
      }
      store(column + p, sum);
    }
    T* out = static_cast<T*>(call.out) + row * call.out_row_stride;
    if (call.stride > 1) {
      for (int64_t o = 0; o < call.out_pixels; ++o) {
        T sum = 0;
        for (int64_t i = 0; i < call.kw; ++i) sum += column[o * call.stride + i * call.dilation] * width[i * kLanes];
        out[o] = sum;
      }
      continue;
    }
    for (int64_t o = 0; o < call.out_pixels; o += kLanes) {
      const int64_t left = call.out_pixels - o;
      V sum = V{};
      for (int64_t i = 0; i < call.kw; ++i) sum += load(column + o + i * call.dilation) * width[i * kLanes];
      if (left < kLanes)
        store_part(out + o, sum, left);
      else
        store(out + o, sum);
    }
  }
}

// Tucker's core for ranks of one: vectors along the pixels, each tap reads them at its own offset.
//
//   rows kh    p p p p p p p p ...   * weight[kh, kw], from kw * dilation on, added in the order of the taps -> out
//
// With a stride, sums are computed at every pixel, and those that are outputs are written.
template <typename T>
static void plane_window(const WindowCall& call) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  T* out = static_cast<T*>(call.out);
  const int64_t positions = (call.out_pixels - 1) * call.stride + 1;
  const auto add_taps = [&](int64_t p, V* sums, int count, const auto& read) {
    for (int v = 0; v < count; ++v) sums[v] = V{};
    const T* weight = static_cast<const T*>(call.weight);
    for (int64_t kh = 0; kh < call.kh_count; ++kh) {
      const T* in = static_cast<const T*>(call.rows[kh]) + p;
      for (int64_t kw = 0; kw < call.kw_count; ++kw, in += call.dilation) {
        const V w = broadcast<V>(*weight++);
        for (int v = 0; v < count; ++v) sums[v] += read(in + v * kLanes) * w;
      }
    }
  };
  int64_t next = 0;  // output
  const auto write = [&](int64_t p, const V& sum) {
    const int64_t left = positions - p;
    if (call.stride > 1) {
      T sums[kLanes];
      store(sums, sum);
      for (; next < call.out_pixels && next * call.stride < p + kLanes; ++next)
        out[next] = sums[next * call.stride - p];
    } else if (left < kLanes) {
      store_part(out + p, sum, left);
    } else {
      store(out + p, sum);
    }
  };
  int64_t p = 0;
  for (V sums[kBlock]; p + kBlock * kLanes <= positions; p += kBlock * kLanes) {
    add_taps(p, sums, kBlock, [](const T* in) { return load(in); });
    for (int v = 0; v < kBlock; ++v) write(p + v * kLanes, sums[v]);
  }
  for (V sum; p < positions; p += kLanes) {
    const int64_t left = positions - p;
    add_taps(p, &sum, 1, [left](const T* in) { return left < kLanes ? load_part(in, left) : load(in); });
    write(p, sum);
  }
}

// The last stage of a block with a rank of one: each output channel is the plane, scaled.
//
//   plane      p p p p p p p p ...   * factor[channel] + bias[channel], activation -> channel's plane p p p p p p p p
template <typename Out, typename T>
static void spread_plane(const SpreadCall& call) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  const T* plane = static_cast<const T*>(call.plane);
  for (int64_t channel = 0; channel < call.channels; ++channel) {
    Out* out = static_cast<Out*>(call.out) + channel * call.channel_stride;
    const V factor = broadcast<V>(static_cast<const T*>(call.factor)[channel]);
    const V bias = call.bias ? broadcast<V>(static_cast<const T*>(call.bias)[channel]) : V{};
    int64_t p = 0;
    for (V scaled[kBlock]; p + kBlock * kLanes <= call.pixels; p += kBlock * kLanes) {
      for (int v = 0; v < kBlock; ++v) scaled[v] = load(plane + p + v * kLanes) * factor + bias;
      if (call.activation != Activation::kNone)
        for (V& v : scaled) v = activate(v, call.activation);
      for (int v = 0; v < kBlock; ++v) store(out + p + v * kLanes, scaled[v]);
    }
    for (; p + kLanes <= call.pixels; p += kLanes)
      store(out + p, activate(load(plane + p) * factor + bias, call.activation));
    if (const int64_t left = call.pixels - p; left > 0)
      store_part(out + p, activate(load_part(plane + p, left) * factor + bias, call.activation), left);
  }
}

}  // namespace LOWRANK_ISA
}  // namespace lowrank_ops
